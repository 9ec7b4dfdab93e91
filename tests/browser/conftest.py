"""What the page's tests get: a server that has room for half of the experts, Chromium, and a new tab for each test."""

import shutil
from collections.abc import Iterator

import pytest
from browsing import Page, Served
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from moedge.api.keys import make_key


@pytest.fixture(scope="session")
def half() -> int:
    """The limit that leaves slots for half of the experts, from the plan of a server that has room for all."""
    served = Served("--memory", "64GiB", "--parallel", 1, "--port", 0)
    served.end()
    plan = served.plan
    fixed = sum(row["nbytes"] for row in plan["rows"] if row["name"] != "expert slots")
    return int(fixed + (sum(plan["num_experts"]) // 2 + plan["spare"]) * plan["slot_bytes"])


@pytest.fixture(scope="session")
def served(half: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with room for half of the experts and one answer; it asks for a key, and nobody may wait."""
    key, line = make_key("test")
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(line + "\n")
    server = Served("--memory", half, "--parallel", 1, "--queue", 0, "--api-keys", keys, "--port", 0, key=key)
    yield server
    server.end()


@pytest.fixture(scope="session")
def chrome() -> Iterator[webdriver.Chrome]:
    """One headless Chromium for all tests."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    assert driver, "there is no chromedriver: apt-get install chromium chromium-driver"
    assert browser, "there is no chromium: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(chrome: webdriver.Chrome) -> Iterator[Page]:
    page = Page(chrome)
    yield page
    chrome.close()
    chrome.switch_to.window(chrome.window_handles[0])
