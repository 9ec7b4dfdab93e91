"""What the page says when something is wrong, and that it goes on by itself or at a click when it is right again."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import LONG, Page, Served

import moedge
from moedge.serve.app import make_app
from moedge.serve.listen import Server, Stages, bind, url_of
from moedge.serve.service import Service

pytestmark = pytest.mark.browser


def test_it_asks_for_the_key_until_it_is_right(served: Served, page: Page) -> None:
    page.open(served.url)
    page.wait(lambda: page["ask"].is_displayed(), "the dialog")
    assert page["state"].text == "waiting for the API key"
    assert page.run("return document.activeElement.id") == "key"
    page.press("wrong\n")
    page.wait(lambda: "does not accept that key" in page["refused"].text, "the refusal")
    page.press(served.key + "\n")
    page.wait_for("state", "ready")
    assert not page["ask"].is_displayed()
    page.chrome.refresh()
    page.wait_for("state", "ready")  # this tab remembers it
    assert page.run("return localStorage.length") == 0
    page["fold"].find_element("tag name", "summary").click()
    page["forget"].click()
    page.wait(lambda: page["ask"].is_displayed(), "the dialog after the key was forgotten")


def test_a_full_queue_is_said_with_the_time_to_wait(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    body = {"model": "mini", "prompt": LONG, "max_tokens": 2000, "temperature": 1, "stream": True}
    with served.request("/v1/completions", body):  # the only place is taken
        page.ask("47 + 28 =")
        page.rest()
        said = page.all(".fault")[-1]
        assert said.get_attribute("role") == "alert"
        assert "The server is busy." in said.text
        assert "Try again in 1 second." in said.text or "seconds." in said.text
        page.wait_for("state", "ready, 1 other request")
    page.wait(lambda: served.get("/cache")["requests_running"] == 0, "the other client's end")
    said.find_element("tag name", "button").click()
    page.wait(lambda: page.answer.strip() == "75", "the answer")
    assert page.all(".fault") == []


def test_a_lost_connection_is_said_and_found_again(half: int, page: Page) -> None:
    first = Served("--memory", half, "--parallel", 1, "--port", 0)
    page.open(first.url)
    page.wait_for("state", "ready")
    page.ask_long()
    first.end(signal.SIGKILL)
    page.rest()
    assert (
        "The connection to the server is lost. Check that moedge serve is still running" in page.all(".fault")[0].text
    )
    page.wait_for("state", "not connected, trying again")
    second = Served("--memory", half, "--parallel", 1, "--port", first.url.rsplit(":")[-1])
    try:
        page.wait_for("state", "ready")
        page.set(max_tokens=5)
        page.all(".fault button")[0].click()
        page.wait(lambda: page.all(".note"), "the whole answer")
        assert page.note.startswith("5 tokens, ")
        assert len(page.all(".answer")) == 1  # in the place of the broken one
    finally:
        second.end()


def test_what_the_server_refuses_is_said_in_its_words(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    page.run("document.getElementById('prompt').value = 'word '.repeat(3000)")
    page.ask("")
    page.rest()
    said = page.all(".fault")[-1].text
    assert said.startswith("The server refused this. ")
    assert "2048" in said
    assert page.all(".fault button") == []  # the same would be refused again


@contextmanager
def in_this_process(load: Callable[[], Any]) -> Iterator[str]:
    """The address of a server whose model comes from `load`."""
    service = Service("plain", load, parallel=1, queue=1, seconds=60)
    with bind("127.0.0.1", 0) as listener:
        begin = lambda: service.start(lambda _: None, lambda: None)  # noqa: E731
        server = Server(make_app(service), Stages(begin, service.engine.drain, service.engine.end, grace=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield url_of(listener)
        server.should_exit = True
        thread.join(30)


def test_it_waits_for_the_model_and_continues_texts_without_a_template(tiny: Callable[..., Path], page: Page) -> None:
    folder = tiny("olmoe", tokenizer=True)
    (folder / "chat_template.jinja").unlink()
    loaded = threading.Event()

    def load() -> Any:
        assert loaded.wait(60)
        return moedge.load(folder)

    with in_this_process(load) as url:
        page.open(url)
        page.wait_for("state", "loading the model")
        page.ask("The sea")
        page.rest()
        assert "The server is not ready yet." in page.all(".fault")[0].text
        loaded.set()
        page.wait_for("state", "ready")
        assert page["model"].text == "plain"
        page["anew"].click()
        assert "no chat template" in page["about"].text
        page.set(max_tokens=8)
        page.requests()
        page.ask("The sea")
        page.rest()
        assert page.note.startswith("8 tokens, ")
        assert [request["url"] for request in page.requests() if request["method"] == "POST"] == [
            url + "/v1/completions"
        ]
        loaded.set()
