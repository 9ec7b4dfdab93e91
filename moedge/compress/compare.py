"""Methods against budgets: each pair measured on the same tests, kept in a journal, shown as a table and plots.

Knows neither how experts are chosen nor how a model is narrowed: `candidate` gives the model of a method and a budget.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moedge.compress import page
from moedge.compress.evaluate import Note, Quality, Reference, measure
from moedge.compress.page import Block, Heading, Paragraph, Plot, Table
from moedge.compress.samples import Task
from moedge.errors import DataError
from moedge.measure.plots import Axis, lines
from moedge.runtime.session import Model

Candidate = Callable[[str, float], AbstractContextManager[Model]]


@dataclass(frozen=True)
class Row:
    """One method at one budget. share: of the experts; quality: by the name of the test, in the tests' order."""

    method: str
    share: float
    quality: Mapping[str, Quality]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Row":
        quality = {name: Quality(**some) for name, some in found["quality"].items()}
        return cls(str(found["method"]), float(found["share"]), quality, float(found["seconds"]))


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares of `25%,50%,75%`, descending. ValueError for anything that is not above 0 and at most 100%."""
    found = []
    for part in text.split(","):
        try:
            share = float(part.strip().removesuffix("%")) / 100 if part.strip().endswith("%") else float("nan")
        except ValueError:
            share = float("nan")
        if not 0 < share <= 1:
            raise ValueError(f"budget {part.strip()!r} is not a share above 0% and up to 100%: write them like 25%,50%")
        found.append(share)
    return tuple(sorted(set(found), reverse=True))


def share_text(share: float) -> str:
    """`12.5%`"""
    return f"{100 * share:.4g}%"


class Journal:
    """Rows that are done, one JSON object a line, each with the settings that it is of.

    A line that a kill cut short is dropped. Raises DataError, naming what differs, for rows of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))  # as they are read back: tuples are lists
        self.rows: dict[tuple[str, float], Row] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            self._take(line, number)
        if cut:
            page.write_text(path, f"{whole}\n" if whole else "")

    def _take(self, line: str, number: int) -> None:
        try:
            found = json.loads(line)
            settings, row = found["settings"], Row.from_dict(found)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._path}:{number} is no row of a comparison ({type(error).__name__}: {error}): delete it"
            ) from error
        for name in sorted({*settings, *self._settings}):
            if settings.get(name) != self._settings.get(name):
                raise DataError(
                    f"{self._path}:{number} was measured with {name} {settings.get(name)!r}, now it is "
                    f"{self._settings.get(name)!r}: use that again, or delete the file to measure afresh"
                )
        self.rows[row.method, row.share] = row

    def add(self, row: Row) -> None:
        line = json.dumps({"settings": self._settings} | row.as_dict())  # ASCII: a cut line is still readable
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.rows[row.method, row.share] = row


def settings_of(tests: Iterable[Task], **more: Any) -> dict[str, Any]:
    """What rows are valid for: the tests' samples, and what the caller adds, as how many tokens of them are read."""
    return {"tests": {task.name: task.fingerprint for task in tests}} | more


def compare(
    methods: Sequence[str],
    shares: Sequence[float],
    references: Mapping[str, Reference],
    candidate: Candidate,
    journal: Journal | None = None,
    note: Note = lambda _: None,
) -> Iterator[Row]:
    """Measure every method at every share on every test; rows as they come, those of the journal at once.

    Raises what `candidate` and `measure` raise; rows that are done by then are in the journal.
    """
    for share in shares:
        for method in methods:
            done = journal.rows.get((method, share)) if journal is not None else None
            if done is not None:
                yield done
                continue
            title, start = f"{method} at {share_text(share)}", time.perf_counter()
            note(title)
            with candidate(method, share) as lm:
                quality = {
                    name: measure(lm, some.task, some, _titled(note, f"{title}, {name}"))
                    for name, some in references.items()
                }
            row = Row(method, share, quality, time.perf_counter() - start)
            if journal is not None:
                journal.add(row)
            yield row


def _titled(note: Note, title: str) -> Note:
    return lambda text: note(f"{title}: {text}")


def table(rows: Sequence[Row], full: Mapping[str, Quality]) -> Table:
    """A line for each row, the largest budget first, then the least KL on the first test; columns for every test."""
    if not rows:
        raise ValueError("no row was measured: nothing to show")
    first = next(iter(full))
    head, ordered = ["budget", "method"], sorted(rows, key=lambda row: (-row.share, row.quality[first].kl))
    cells = [[share_text(row.share), row.method] for row in ordered]
    full_cells = ["100%", "(full model)"]
    for name, whole in full.items():
        titles, full_some = _columns(whole, whole)
        head += titles if name == first else [f"{name}: {title}" for title in titles]
        full_cells += full_some
        for row, line in zip(ordered, cells, strict=True):
            line += _columns(row.quality[name], whole)[1]
    return Table(
        [*head, "seconds"],
        [[*full_cells, ""], *([*c, f"{r.seconds:.1f}"] for r, c in zip(ordered, cells, strict=True))],
    )


def _columns(quality: Quality, full: Quality) -> tuple[list[str], list[str]]:
    """Titles and cells of one test; which there are depends on the full model's measures alone."""
    found = [("KL", f"{quality.kl:.4g}")]
    if full.kl_answer is not None:
        found.append(("KL of answers", f"{quality.kl_answer:.4g}"))
    found += [("top-1", f"{100 * quality.top1_agreement:.1f}%"), ("perplexity", f"{quality.perplexity:.4g}")]
    if full.bits_per_byte and quality.bits_per_byte:
        rise = f" ({100 * (quality.bits_per_byte / full.bits_per_byte - 1):+.1f}%)" if quality is not full else ""
        found.append(("bits per byte", f"{quality.bits_per_byte:.3f}{rise}"))
    if full.accuracy is not None and quality.accuracy is not None:
        kept = quality.retained(full)
        found.append(("accuracy", f"{100 * quality.accuracy:.1f}%"))
        found.append(("kept above chance", "" if kept is None else f"{kept:.3f}"))
    return [title for title, _ in found], [cell for _, cell in found]


def plots(rows: Sequence[Row], full: Mapping[str, Quality]) -> list[str]:
    """SVG of KL by budget, a line for each method, for every test; of questions also what is kept above chance."""
    methods = list(dict.fromkeys(row.method for row in rows))
    x, found = Axis("experts kept, %"), []
    for name, whole in full.items():
        kl: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        kept: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        for row in sorted(rows, key=lambda row: row.share):
            quality = row.quality[name]
            kl[row.method].append((100 * row.share, quality.kl))
            above = quality.retained(whole)
            if above is not None:
                kept[row.method].append((100 * row.share, above))
        far = any(value > 0 for points in kl.values() for _, value in points)
        title = f"{name}: distance from the full model"
        found.append(
            lines(kl, title, x, Axis("KL, nats a token", log=True) if far else Axis("KL, nats a token", least=0))
        )
        if any(kept.values()):
            found.append(lines(kept, f"{name}: accuracy kept above chance", x, Axis("share of the full model's")))
    return found


def _blocks(rows: Sequence[Row], full: Mapping[str, Quality]) -> Iterator[Block]:
    for name, quality in full.items():
        guess = "" if quality.chance is None else f", guessing gets {100 * quality.chance:.1f}%"
        yield Paragraph(f"{name}: {quality.n} samples, {quality.tokens} tokens{guess}. KL in nats a token.")
    yield table(rows, full)
    yield Heading("Plots")
    yield from map(Plot, plots(rows, full))


def markdown_table(rows: Sequence[Row], full: Mapping[str, Quality]) -> str:
    """The table as Markdown."""
    return page.table_text(table(rows, full))


def html(title: str, rows: Sequence[Row], full: Mapping[str, Quality]) -> str:
    """Table and plots as one file that loads nothing."""
    return page.html(title, _blocks(rows, full))
