"""The report: every figure is there, both forms are well made, nothing is loaded from elsewhere, text is escaped."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from moedge.compress import page
from moedge.compress.evaluate import Quality
from moedge.compress.page import Bullets, Code, Heading, Paragraph, Table
from moedge.compress.report import Layer, Report, importance_cdf, model_card, ranges

EVIL = "<script>alert('1')</script> | `x` & \"q\""
FULL = {
    "sst2": Quality(3.0, 1.2, 0.0, 1.0, 900, 40, 1.5, 0.0, 1.0, 0.9, 0.5),
    "novel": Quality(20.0, 1.8, 0.0, 1.0, 5000, 12),
}
FITTED = {
    "sst2": Quality(3.3, 1.26, 0.12, 0.91, 900, 40, 1.6, 0.07, 0.97, 0.8, 0.5),
    "novel": Quality(30.0, 2.1, 0.6, 0.7, 5000, 12),
}
LAYERS = (
    Layer((0, 1, 2, 5), (4.0, 3.0, 2.0, 0.0, 0.0, 1.0), 800, (3, 4), 2, 2, 2),
    Layer((1, 3, 4, 5), (1.0, 2.0, 1.0, 2.0, 2.0, 2.0), 800, (), 0, 2, 4),
)
REPORT = Report(
    model="org/model",
    command="moedge fit org/model --task sst2=dev.jsonl --budget 50% -o out",
    task="sst2",
    method="litemoe",
    budget="50%",
    reasons=("4 of 6 experts a layer: the least that is a multiple of 2",),
    layers=LAYERS,
    bytes_before=23 << 20,
    bytes_after=12 << 20,
    before=FULL,
    after=FITTED,
    seconds={"profile": 3.25, "export": 1.5},
    warnings=("only 40 samples",),
)


class Page(HTMLParser):
    """Tags that are open, and everything that would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "img", "link", "iframe", "object"} or any(
            name in {"src", "href", "srcset"} or name.startswith("on") for name, _ in attrs
        ):
            self.loads.append(tag)
        if tag not in {"meta", "rect", "path", "circle"} or "/" not in (self.get_starttag_text() or ""):
            self.open.append(tag)
        if tag == "meta":
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [REPORT, replace(REPORT, before={}, after={}, layers=(), warnings=())])
def test_both_forms_are_well_made(report: Report) -> None:
    assert Page(report.html()).loads == []
    for plot in re.findall(r"<svg.*?</svg>", report.html(), re.DOTALL):
        ElementTree.fromstring(plot)
    assert "url(" not in report.html()
    for table in re.findall(r"(?:^\|.*\n)+", report.markdown(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_every_figure_is_in_the_report() -> None:
    text, markup = REPORT.markdown(), REPORT.html()
    assert markup.count("<svg") == 4
    for expected in (
        "8 of 12 experts are kept (66.7%); 23 MiB become 12 MiB.",
        "perplexity goes from 3 to 3.3 and accuracy from 90.0% to 80.0%; KL 0.12.",
        "Warning: only 40 samples",
        "4 of 6 experts a layer",
        "| bits per byte | 1.2000 | 1.2600 | +5.0% |",
        "| accuracy | 90.0% | 80.0% | 75.0% of what is above chance |",
        "| KL of the answers | 0 | 0.07 |",
        "| novel (12 passages, 5000 tokens) | full | fitted | change |",
        "| 23 MiB | 12 MiB | 47.8% |",
        "| 0 | 6 | 4 | 2 | 2 | 2 | 2 | 800 | 3-4 |",
        "| 1 | 6 | 4 | 2 | 0 | 2 | 4 | 800 | none |",
        "| 0 | 0-2, 5 | 3-4 |",
        "| together | 4.8 |",
    ):
        assert expected in text, expected
    for expected in (
        "Importance of experts, cumulative",
        "kept experts are framed",
        "moedge fit org/model",
        "75.0% of what is above",
    ):
        assert expected.lower() in markup.lower(), expected


def test_a_report_survives_json(tmp_path: Path) -> None:
    again = Report.from_dict(json.loads(json.dumps(REPORT.as_dict(), allow_nan=False)))
    assert again == REPORT
    REPORT.save(tmp_path)
    assert (tmp_path / "report.md").read_text() == again.markdown()
    assert (tmp_path / "report.html").read_text() == again.html()
    assert len(list(tmp_path.iterdir())) == 2


def test_text_of_users_is_no_markup() -> None:
    names = dict.fromkeys(("model", "command", "task", "method", "budget"), EVIL)
    texts = {"reasons": (EVIL,), "warnings": (EVIL,), "seconds": {EVIL: 1.0}}
    measured = {"before": {EVIL: FULL["sst2"]}, "after": {EVIL: FITTED["sst2"]}}
    report = replace(REPORT, **names, **texts, **measured)  # type: ignore[arg-type]
    assert Page(report.html()).loads == []
    written = re.sub(r"^    .*$", "", report.markdown(), flags=re.MULTILINE)  # code stands as it is
    assert "<script" not in re.sub(r"\\.", "", written)
    assert "<script" not in re.sub(r"\\.", "", model_card(report, None).split("\n---\n", 1)[1])
    assert yaml.safe_load(model_card(report, None).split("---\n")[1])["license"] == "unknown"


def test_the_cdf_is_of_shares_and_ends_at_all() -> None:
    assert importance_cdf([3.0, 1.0, 0.0, 0.0]) == [(0, 0), (0, 0.25), (0, 0.5), (0.25, 0.75), (0.75, 1)]
    assert importance_cdf([-1.0, 1.0]) == [(-1, 0), (-1, 0.5), (1, 1)]
    assert importance_cdf([0.0, 0.0]) == [(0, 0), (0, 0.5), (0, 1)]


def test_ids_as_ranges() -> None:
    assert [ranges(ids) for ids in ([], [3], [0, 1], [0, 1, 2, 5, 7, 8])] == ["none", "3", "0-1", "0-2, 5, 7-8"]


def front(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_card_carries_what_the_sources_states() -> None:
    source = (
        "---\nlicense: other\nlicense_name: see-data\nlanguage: [en, de]\ntags: [chat]\nmodel-index: 3\n---\n# Card\n"
    )
    card = model_card(REPORT, source)
    assert front(card) == {
        "license": "other",
        "license_name": "see-data",
        "language": ["en", "de"],
        "tags": ["chat", "moe", "pruned", "moedge"],
        "base_model": "org/model",
        "library_name": "transformers",
    }
    for expected in ("litemoe", "50%", "from 90.0% to 80.0%", "other: see-data", "KL 0.12", "only 40 samples"):
        assert expected in card, expected
    assert "dev.jsonl" not in card
    assert front(model_card(replace(REPORT, warnings=()), source)) == front(card)


@pytest.mark.parametrize(
    "source", [None, "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense:\n---\n"]
)
def test_a_licence_that_nobody_states_is_unknown(source: str | None) -> None:
    card = model_card(REPORT, source)
    assert front(card)["license"] == "unknown"
    assert "had no card that states one" in card


def test_the_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    folder.mkdir()
    card = model_card(replace(REPORT, model=str(folder)), None)
    assert front(card)["base_model"] == "mini"
    assert str(tmp_path) not in card
    cached = "cache/models--org--name/snapshots/0123"
    assert front(model_card(replace(REPORT, model=cached), None))["base_model"] == "org/name"


def test_a_page_of_every_block() -> None:
    blocks = [
        Heading("H"),
        Paragraph("a\nb"),
        Code("x = 1\ny"),
        Bullets(["one", "two"]),
        Table(["h", ""], [["a|b", "1.5%"]]),
    ]
    assert page.markdown("T_1", blocks) == (
        "# T\\_1\n\n## H\n\na b\n\n    x = 1\n    y\n\n- one\n- two\n\n| h |  |\n| --- | --- |\n| a\\|b | 1.5% |\n"
    )
    assert '<td>a|b</td><td class="n">1.5%</td>' in page.html("T", blocks)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    page.write_text(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(page.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        page.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize(
    ("loader", "shown", "library"),
    [
        ("AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM.from_pretrained", "transformers"),
        ("moedge", "moedge.load(", "moedge"),
    ],
)
def test_the_card_shows_what_loads_the_model(loader: str, shown: str, library: str) -> None:
    card = model_card(REPORT, None, loader)
    assert shown in card
    assert "AutoModelForCausalLM" not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == library
