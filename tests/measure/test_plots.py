"""Plots are XML that stands alone, show every value where it belongs, and escape what they are given."""

import math
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from moedge.measure.plots import DARK, LIGHT, Axis, _log_ticks, _ticks, bars, heat, lines

SVG = "{http://www.w3.org/2000/svg}"
X, Y = Axis("share"), Axis("KL, nats")


def parsed(svg: str) -> Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "script" not in svg
    assert not re.search(r"(href|src|url\()", svg)
    return root


def texts(root: Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def paths(root: Element, kind: str) -> list[str]:
    return [e.get("d", "") for e in root.iter(f"{SVG}path") if (e.get("class") or "").startswith(kind)]


def test_lines_go_through_their_points() -> None:
    root = parsed(lines({"a": [(0, 0), (1, 10)], "b": [(0, 5), (0.5, 5)]}, "Two", Axis("x", least=0, most=1), Y))
    a, b = paths(root, "line")[:2]
    assert a == "M64.0 328.0L620.0 40.0"  # corner to corner
    assert b == "M64.0 184.0L342.0 184.0"
    assert {"Two", "x", "KL, nats", "a", "b", "0", "10"} <= set(texts(root))


def test_what_is_not_finite_is_left_out() -> None:
    root = parsed(lines({"a": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]}, "Gaps", X, Y))
    assert paths(root, "line")[0].count("L") == 1
    root = parsed(lines({"a": [(1, 0), (2, 1), (3, 10)]}, "Log", X, Axis("y", log=True)))
    assert paths(root, "line")[0].count("L") == 1
    root = parsed(bars(["g", "h"], {"a": [1, math.nan]}, "Gaps", Y))
    assert len([e for e in root.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]) == 1


def test_a_staircase_has_steps() -> None:
    root = parsed(lines({"cdf": [(0, 0), (1, 0.5), (2, 1)]}, "CDF", X, Y, steps=True))
    assert re.fullmatch(r"M\S+ \S+(H\S+?V\S+?){2}", paths(root, "line")[0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 6, [0, 1, 2, 3, 4, 5, 6]), (-3, 47, [-10, 0, 10, 20, 30, 40, 50])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_logarithm_are_powers_of_ten() -> None:
    assert _log_ticks(1e-3, 10) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert _log_ticks(0.1, 1) == pytest.approx([0.1, 0.2, 0.5, 1])
    assert _log_ticks(3, 4) == [3, 4]
    assert len(_log_ticks(1e-30, 1)) <= 10


def test_one_point_and_equal_points_have_an_axis() -> None:
    for y in (Y, Axis("y", log=True)):
        parsed(lines({"a": [(2, 3)]}, "One", X, y))


def test_bars_stand_on_nought_beside_each_other_or_stacked() -> None:
    root = parsed(bars(["one", "two"], {"a": [2, 4], "b": [4, -1]}, "Bars", Y))
    found = [e for e in root.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    height = {(e.find(f"{SVG}title").text or ""): float(e.get("height", "0")) for e in found}  # type: ignore[union-attr]
    assert height["one, b: 4"] == pytest.approx(2 * height["one, a: 2"], abs=0.11)
    assert height["two, b: -1"] > 0
    root = parsed(bars(["one"], {"a": [2], "b": [4]}, "Stack", Y, stacked=True))
    first, second = (e for e in root.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None)
    assert first.get("x") == second.get("x")
    assert float(second.get("y", "0")) + float(second.get("height", "0")) == pytest.approx(float(first.get("y", "0")))


def test_a_heat_map_has_a_cell_for_each_value_and_frames_what_is_marked() -> None:
    root = parsed(heat([[0, 2, 1], [4, math.nan]], "Heat", "expert", "layer", [[1], []]))
    cells = [e for e in root.iter(f"{SVG}rect") if (e.get("class") or "").startswith("cell")]
    assert [e.get("fill-opacity") for e in cells] == ["0.000", "1.000", "0.500", "1.000", "0.000"]
    assert [e.get("class") for e in cells] == ["cell", "cell kept", "cell", "cell", "cell"]
    assert cells[1].find(f"{SVG}title").text == "layer 0, expert 1: 2, kept"  # type: ignore[union-attr]
    parsed(heat([[1.0] * 256] * 61, "Large", "expert", "layer"))
    parsed(heat([[0.0, 0.0]], "Nothing but nought", "expert", "layer"))


def test_text_is_escaped() -> None:
    evil = "<script>alert('1')</script> & \x00\x1b \"q\""
    for svg in (
        lines({evil: [(0, 1)]}, evil, Axis(evil), Axis(evil)),
        bars([evil], {evil: [1]}, evil, Axis(evil)),
        heat([[1]], evil, evil, evil),
    ):
        assert any("<script>" in text for text in texts(ElementTree.fromstring(svg)))
        assert "<script" not in svg


def test_colours_are_readable_on_both_grounds() -> None:
    """WCAG: graphics need a contrast of 3 to their ground."""

    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colours, ground in ((LIGHT, "#ffffff"), (DARK, "#16191d")):
        for colour in colours:
            bright, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (colour, ground)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lines({}, "t", X, Y),
        lambda: lines({"a": []}, "t", X, Y),
        lambda: lines({"a": [(1, -1)]}, "t", X, Axis("y", log=True)),
        lambda: bars([], {}, "t", Y),
        lambda: bars(["g"], {"a": [1, 2]}, "t", Y),
        lambda: bars(["g"], {"a": [1]}, "t", Axis("y", log=True)),
        lambda: heat([], "t", "x", "y"),
        lambda: heat([[]], "t", "x", "y"),
    ],
)
def test_nothing_to_plot_is_an_error(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"nothing to plot|one for each group|logarithmic"):
        call()
