"""A real `moedge serve` in a process of its own, and a page of it in Chromium as a person sees and uses it."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "checkpoints" / "mini"
LONG = "It was a dark night, and the captain of the ship looked at the sea. He"  # a text that the mini model continues


class Served:
    """`moedge serve` in a process, ready when this returns."""

    def __init__(self, *options: object, key: str = "") -> None:
        command = [sys.executable, "-m", "moedge", "serve", str(MINI), "--json", *map(str, options)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{command} ended with {self.process.wait()}"
        ready = json.loads(line)
        self.url, self.plan, self.key = ready["url"], ready["plan"], key

    def get(self, path: str) -> Any:
        with self.request(path) as answer:
            return json.load(answer)

    def request(self, path: str, body: object = None) -> Any:
        """An answer to be read, as another client gets it."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Page:
    """What a person does with the page and sees of it. Each is a new tab, so it remembers nothing."""

    def __init__(self, chrome: webdriver.Chrome) -> None:
        self.chrome = chrome
        chrome.switch_to.new_window("tab")
        self.look()
        chrome.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        for kind in ("browser", "performance"):
            chrome.get_log(kind)  # what other tabs left

    def look(self, width: int = 1280, height: int = 800, **media: str) -> None:
        """As on a screen of this size; `colour="dark"`, `motion="reduce"`."""
        features = {"colour": "prefers-color-scheme", "motion": "prefers-reduced-motion"}
        wanted = [{"name": features[name], "value": value} for name, value in media.items()]
        screen = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def open(self, url: str, key: str = "") -> None:
        """Load it, with the key already given, and wait until it is ready."""
        if key:
            given = {"source": f"sessionStorage.setItem('key', {json.dumps(key)})"}
            self.chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", given)
        self.chrome.get(url + "/")
        if key:
            self.wait_for("state", "ready")

    def run(self, script: str, *arguments: object) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def __getitem__(self, name: str) -> WebElement:
        return self.chrome.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def press(self, *keys: str, hold: str = "") -> None:
        """On the keyboard, wherever the focus is; `hold` is held down meanwhile."""
        actions = webdriver.ActionChains(self.chrome)
        if hold:
            actions.key_down(hold)
        actions.send_keys(*keys)
        if hold:
            actions.key_up(hold)
        actions.perform()

    def wait(self, holds: Callable[[], Any], what: str) -> Any:
        until = time.monotonic() + 40
        while not (result := holds()):
            assert time.monotonic() < until, f"waited in vain for {what}; the page says {self['log'].text!r}"
            time.sleep(0.02)
        return result

    def wait_for(self, name: str, text: str) -> None:
        self.wait(lambda: text in self[name].text, f"{text!r} in {name}, which says {self[name].text!r}")

    def ask(self, text: str) -> None:
        """Send a message. Returns when the answer has begun."""
        before = len(self.all(".answer"))
        self["prompt"].send_keys(text + Keys.ENTER)
        self.wait(lambda: len(self.all(".answer")) > before, "an answer")

    def ask_long(self, max_tokens: int = 2000) -> None:
        """Have the model write on. So hot it hardly ever ends by itself. Returns when there is something to read."""
        self.set(max_tokens=max_tokens, temperature=3, seed=1)
        self.ask(LONG)
        self.wait(lambda: len(self.answer) > 20, "some of the answer")

    def rest(self) -> None:
        """Until no answer is in progress."""
        self.wait(lambda: self["send"].text == "Send", "the end of the answer")

    @property
    def answer(self) -> str:
        """The last one, so far."""
        return str(self.run("return [...document.querySelectorAll('.answer .text')].at(-1)?.textContent ?? ''"))

    @property
    def note(self) -> str:
        return self.all(".answer")[-1].find_element(By.CLASS_NAME, "note").text

    def set(self, **settings: object) -> None:
        """Type settings into their fields."""
        if not self["fold"].get_attribute("open"):
            self["fold"].find_element(By.TAG_NAME, "summary").click()
        for name, value in settings.items():
            self[name].clear()
            self[name].send_keys(str(value))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.chrome.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[dict[str, Any]]:
        """What the tab asked of any server since the last call: url, method, postData."""
        logged = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        return [entry["params"]["request"] for entry in logged if entry["method"] == "Network.requestWillBeSent"]
