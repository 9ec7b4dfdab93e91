"""The page's chat and picture: what a person sees while the mini model answers."""

import json
import os
from typing import Any

import pytest
from browsing import LONG, Page, Served

pytestmark = pytest.mark.browser

WATCH = """
window.seen = [];
new MutationObserver(() => {
    const text = [...document.querySelectorAll('.answer .text')].at(-1);
    if (text && text.textContent.length !== seen.at(-1)) seen.push(text.textContent.length);
}).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true});
"""
PIXELS = "return document.getElementById('picture').toDataURL()"


def bodies(page: Page) -> list[dict[str, Any]]:
    """What was sent to the API since the last look."""
    return [json.loads(request["postData"]) for request in page.requests() if request["method"] == "POST"]


def test_an_answer_streams_and_the_picture_moves(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    before, pictures = served.get("/cache"), {page.run(PIXELS)}
    page.run(WATCH)
    page.ask_long(max_tokens=160)
    assert page["send"].text == "Stop"
    page.wait(lambda: pictures.add(page.run(PIXELS)) or len(pictures) > 3, "the picture to move")
    page.wait_for("state", "answering")
    page.rest()
    assert len(page.run("return seen")) > 20  # it grew token by token
    assert page.note.startswith("160 tokens, ")
    assert "ended at the longest answer" in page.note
    page.wait_for("state", "ready")
    figures_are_those_of_the_server(page, served, before)
    page["anew"].click()
    page.set(temperature=0)
    page.ask("47 + 28 =")
    page.rest()
    assert page.answer.strip() == "75"
    assert page.complaints() == []
    asked = {request["url"].split("/")[2] for request in page.requests() if not request["url"].startswith("data:")}
    assert asked == {served.url.split("/")[2]}  # nothing leaves the origin


def figures_are_those_of_the_server(page: Page, served: Served, before: dict[str, Any]) -> None:
    now = served.get("/cache")
    assert now["tokens"] >= before["tokens"] + 160
    asked = now["hits"] + now["misses"]
    assert float(page["speed-now"].text) > 0
    assert float(page["hit-now"].text.rstrip("%")) > 0
    assert page["read-now"].text.endswith("iB")
    page.wait_for("hit-all", f"{100 * now['hits'] / asked:.1f}% since start")
    assert page["tokens-all"].text == f"{now['tokens']:,} tokens since start"
    assert page["running"].text == "0"
    held = sum(len(layer["resident"]) for layer in now["layers"])
    used, missed = (sum(len(layer[name]) for layer in now["layers"]) for name in ("used", "missed"))
    assert f"6 layers of 32 experts. {held} of 192 experts are in memory" in page["summary"].text
    assert f"The last step used {used};" in page["summary"].text
    assert page["picture"].get_attribute("aria-label") == f"Expert cache. {page['summary'].text}"
    page["rows"].find_element("tag name", "summary").click()
    cells = page.wait(lambda: [row.text for row in page.all("#layers tr")], "the table")
    assert cells == [
        f"{layer['layer']} {len(layer['resident'])} of 32 {len(layer['used'])} {len(layer['missed'])}"
        for layer in now["layers"]
    ]
    assert sum(int(cell.split()[-1]) for cell in cells) == missed


def test_an_answer_is_stopped_and_the_conversation_goes_on(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    page.ask_long()
    page["send"].click()
    page.rest()
    assert page.note.startswith("stopped · ")
    page.wait(lambda: served.get("/cache")["requests_running"] == 0, "the server to stop")
    stopped = page.run("return turns.at(-1).text")
    assert "".join(stopped.split()) == "".join(page.answer.split())
    page.requests()
    page.set(temperature=0, max_tokens=20)
    page.ask("12 - 40 =")
    page.rest()
    (body,) = bodies(page)
    assert body["messages"] == [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": stopped},
        {"role": "user", "content": "12 - 40 ="},
    ]
    page["anew"].click()
    page.ask("12 - 40 =")
    page.rest()
    assert page.answer.strip() == "-28"
    (body,) = bodies(page)
    assert body["messages"] == [{"role": "user", "content": "12 - 40 ="}]
    assert page.complaints() == []


def test_settings_reach_the_server_and_are_kept(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    chosen = {"temperature": 0.35, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "max_tokens": 12}
    page.set(**chosen, system="Be brief.")
    page.chrome.refresh()
    page.wait_for("state", "ready")
    assert "temperature 0.35, 12 tokens" in page["fold"].text
    page.ask("Hello")
    page.rest()
    (body,) = bodies(page)
    assert {name: body[name] for name in chosen} == chosen
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page["fold"].find_element("tag name", "summary").click()
    page["defaults"].click()
    page.ask("Hello")
    page.rest()
    (body,) = bodies(page)
    assert "seed" not in body
    assert "system" not in {message["role"] for message in body["messages"]}
    assert body["max_tokens"] == 256


def test_a_setting_out_of_range_is_not_sent(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    page.set(top_p=1.5)
    page["fold"].find_element("tag name", "summary").click()
    page["prompt"].send_keys("Hello\n")
    assert page["fold"].get_attribute("open")  # so that the field can be seen
    assert page.run("return document.activeElement.id") == "top_p"
    assert bodies(page) == []
    assert page["prompt"].get_attribute("value") == "Hello"


def test_text_of_the_model_is_never_markup(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    told = "<b>x</b> **bold** *it* `a<i>`\n\nNext\n```html\n<script>alert(1)</script>\n```\nend **"
    html = page.run(
        "const node = document.createElement('div'); render(node, arguments[0]); return node.innerHTML", told
    )
    assert html == (
        "<p>&lt;b&gt;x&lt;/b&gt; <strong>bold</strong> <em>it</em> <code>a&lt;i&gt;</code></p><p>Next</p>"
        '<pre class="" tabindex="0"><code class="">&lt;script&gt;alert(1)&lt;/script&gt;</code></pre><p>end **</p>'
    ).replace("<p>", '<p class="">').replace("<strong>", '<strong class="">').replace("<em>", '<em class="">').replace(
        "<code>", '<code class="">'
    )
    page.ask("<img src=x onerror=alert(1)>")
    page.rest()
    assert page.all(".you .text")[0].text == "<img src=x onerror=alert(1)>"
    assert page.all("#log img") == []


@pytest.mark.parametrize(("layers", "experts"), [(6, 32), (48, 128), (61, 256)])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_picture_is_readable_at_any_size(served: Served, page: Page, width: int, layers: int, experts: int) -> None:
    """Each mark is at least two dots wide and high, all are on the canvas, and the states have the legend's colours."""
    page.look(width=width, height=844)
    page.open(served.url, served.key)
    rows = [
        {"layer": row, "experts": experts, "resident": [1, 2, 3], "used": [2, 3], "missed": [3]}
        for row in range(layers)
    ]
    counted = page.run(
        """
        look({...cache, layers: arguments[0]});
        const canvas = document.getElementById('picture'), pen = canvas.getContext('2d');
        const style = getComputedStyle(document.documentElement), counts = {};
        for (const name of ['absent', 'resident', 'used', 'missed']) {
            pen.fillStyle = style.getPropertyValue('--' + name);
            counts[pen.fillStyle] = [name, 0];
        }
        const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
        const hex = (n) => n.toString(16).padStart(2, '0');
        for (let at = 0; at < data.length; at += 4) {
            const found = data[at + 3] === 255 && counts['#' + hex(data[at]) + hex(data[at + 1]) + hex(data[at + 2])];
            if (found) found[1] += 1;
        }
        return Object.fromEntries(Object.values(counts));
        """,
        rows,
    )
    assert counted["used"] >= layers * 4
    assert counted["missed"] >= layers * 4
    assert counted["resident"] >= layers * 2
    assert counted["absent"] >= layers * (experts - 3)
    box = page.run("return document.getElementById('picture').getBoundingClientRect().toJSON()")
    assert box["right"] <= width
    assert box["height"] <= 420


@pytest.mark.skipif("SCREENSHOT" not in os.environ, reason="make test-browser SCREENSHOT=docs/serve-page.png takes it")
def test_the_screenshot_of_the_documentation(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    page.set(max_tokens=200, temperature=0.6, seed=1)
    page["fold"].find_element("tag name", "summary").click()
    page.ask(LONG)
    page.wait(lambda: len(page.answer) > 330, "a longer answer")
    assert page.chrome.save_screenshot(os.environ["SCREENSHOT"])
