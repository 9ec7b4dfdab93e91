"""For whom the page works: phones, keyboards, screen readers, eyes that want contrast, or rest."""

from typing import Any

import axe_core_python
import pytest
from browsing import LONG, Page, Served
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.browser

AXE = next(iter(axe_core_python.__path__)) + "/axe.min.js"


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it stands."""
    with open(AXE, encoding="utf-8") as file:
        page.run(file.read())
    found: dict[str, Any] = page.chrome.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert len(found["passes"]) > 10
    return [f"{rule['id']}: {node['html'][:120]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colour", ["light", "dark"])
def test_axe_finds_nothing(served: Served, page: Page, width: int, colour: str) -> None:
    page.look(width=width, height=844, colour=colour)
    page.open(served.url)
    page.wait(lambda: page["ask"].is_displayed(), "the dialog")
    assert violations(page) == []
    page.open(served.url, served.key)
    assert violations(page) == []
    page.ask_long(max_tokens=30)
    page.rest()
    page.run("fail(document.querySelector('.answer'), LOST(), () => {})")
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.wait(lambda: page.all("#layers tr"), "the table")
    assert violations(page) == []


@pytest.mark.parametrize(("width", "height"), [(320, 256), (390, 844), (844, 390)])
def test_nothing_is_cut_off_on_small_screens(served: Served, page: Page, width: int, height: int) -> None:
    page.look(width=width, height=height)
    page.open(served.url, served.key)
    page.set(max_tokens=20)
    page.ask("A" * 400 + " " + LONG)
    page.rest()
    page.run("render(document.querySelector('.answer .text'), 'B'.repeat(900) + '\\n```\\n' + 'C'.repeat(900))")
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.wait(lambda: page.all("#layers tr"), "the table")
    assert page.run("return document.documentElement.scrollWidth") == width
    for part in ("header", "aside", "main", "#form"):
        wide, room = page.run(
            "const part = document.querySelector(arguments[0]); return [part.scrollWidth, part.clientWidth]", part
        )
        assert wide <= room, part
    for name in ("prompt", "send", "anew", "temperature", "seed"):
        page.run("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", name)
        box = page.run("return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", name)
        assert box["left"] >= 0 and box["right"] <= width, name  # noqa: PT018
        assert box["top"] >= 0 and box["bottom"] <= height, name  # noqa: PT018


def focus(page: Page) -> str:
    """Where it is; and it can be seen there."""
    name, outline = page.run(
        "const at = document.activeElement;"
        "return [at.id || at.className || at.parentElement.id || at.localName, getComputedStyle(at).outlineStyle]"
    )
    assert outline != "none", f"the focus on {name} cannot be seen"
    return str(name)


def test_all_of_it_works_from_the_keyboard(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    assert focus(page) == "prompt"
    order = ["prompt"]
    while len(order) < 12 and order[-1] != "skip":
        page.press(Keys.TAB, hold=Keys.SHIFT)
        order.append(focus(page))
    assert order == ["prompt", "conversation", "fold", "rows", "more", "skip"]
    page["fold"].find_element("tag name", "summary").send_keys(Keys.ENTER)
    page.press(Keys.TAB, Keys.TAB)
    assert focus(page) == "temperature"
    page.press("a", hold=Keys.CONTROL)
    page.press("2.95", Keys.ARROW_UP, Keys.TAB)
    page.press("a", hold=Keys.CONTROL)
    page.press("1500")
    assert page["temperature"].get_attribute("value") == "3"
    assert page["max_tokens"].get_attribute("value") == "1500"
    page.run("document.querySelector('.skip').focus()")
    page.press(Keys.ENTER)
    assert focus(page) == "prompt"
    page.press(LONG)
    page.press(Keys.ENTER, hold=Keys.SHIFT)
    page.press("and", Keys.ENTER)
    page.wait(lambda: len(page.answer) > 20, "some of the answer")
    assert page.all(".you .text")[0].get_attribute("textContent") == f"{LONG}\nand"
    page.press(Keys.ESCAPE)
    page.rest()
    assert page.note.startswith("stopped")
    assert focus(page) == "prompt"
    page.press(Keys.TAB, Keys.TAB, Keys.ENTER)  # send, new conversation
    assert page.all(".turn") == []
    assert focus(page) == "prompt"


def test_a_screen_reader_hears_answers_once(served: Served, page: Page) -> None:
    page.open(served.url, served.key)
    page.run(
        "window.heard = []; new MutationObserver(() => heard.push(said.textContent))"
        ".observe(said, {childList: true, characterData: true, subtree: true})"
    )
    page.ask_long(max_tokens=300)
    assert page.all(".answer")[-1].get_attribute("aria-busy") == "true"
    page.rest()
    assert page.run("return heard") == ["Answering.", f"Answer: {page.run('return turns.at(-1).text')}"]
    live = page.run(
        "return [...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map((n) => n.id)"
    )
    assert live == ["state", "said", "refused"]  # none of them holds the tokens
    assert page.all(".answer")[-1].get_attribute("aria-busy") == "false"


def test_whoever_wants_no_motion_gets_none(served: Served, page: Page) -> None:
    page.look(motion="reduce")
    page.open(served.url, served.key)
    page.ask_long()
    assert page.run("return document.getAnimations().length") == 0
    lit, used = page.run("paint(); return [lit.size, cache.layers.reduce((sum, layer) => sum + layer.used.length, 0)]")
    assert lit == used  # the last step's, and nothing that fades
    page.press(Keys.ESCAPE)
    page.rest()
