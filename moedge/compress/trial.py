"""`moedge fit --compare`: every method at every budget on the test part, from one profile; no model is written.

The folder holds the profile and a row for each pair that is done, so that a run that was interrupted goes on. Knows the
model, the samples and the folder; what is measured and shown is in compare.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moedge.compress import page
from moedge.compress.compare import Journal, Row, compare, html, markdown_table, parse_shares, settings_of, share_text
from moedge.compress.division import as_read, tests_of, up_to
from moedge.compress.evaluate import Quality, Reference, check_reads
from moedge.compress.fit import Note, Settings, choose, divide, profiled
from moedge.compress.importance import METHODS, Statistics
from moedge.compress.opening import opened
from moedge.compress.plan import Shape, parse_budget
from moedge.compress.samples import Task
from moedge.compress.shape import drawn, shape_of
from moedge.errors import CheckpointError, DataError
from moedge.runtime.lm import LM
from moedge.runtime.pack import source_of

ROWS, PROFILE = "rows.jsonl", "profile.npz"
RESULTS = ("compare.md", "compare.json", "compare.html")


@dataclass(frozen=True)
class Compared:
    """The full model's quality by test, and a row for each method and budget."""

    title: str
    full: Mapping[str, Quality]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def markdown(self) -> str:
        return markdown_table(self.rows, self.full) + "".join(f"\n\nWarning: {text}." for text in self.warnings)

    def as_dict(self) -> dict[str, Any]:
        full = {name: quality.as_dict() for name, quality in self.full.items()}
        return {"full": full, "rows": [row.as_dict() for row in self.rows], "warnings": list(self.warnings)}

    def save(self, folder: Path) -> None:
        """compare.md, compare.json and compare.html, each whole or not there."""
        page.write_text(folder / "compare.md", f"# {self.title}\n\n{self.markdown()}\n")
        page.write_text(folder / "compare.json", json.dumps(self.as_dict(), indent=1) + "\n")
        page.write_text(folder / "compare.html", html(self.title, self.rows, self.full))


def compare_methods(
    model: str,
    specs: Sequence[str],
    methods: Sequence[str],
    budgets: str,
    out: Path,
    settings: Settings,
    note: Note = lambda _: None,
) -> Compared:
    """Compare `methods` at `budgets` (25%,50%) for the task `specs[0]`, tested also on the other `specs`.

    Raises DataError, ModelError, CheckpointError, MemoryLimitError as `fit` does.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise DataError(f"method {unknown[0]!r} does not exist: choose {', '.join(METHODS)}")
    try:
        shares = parse_shares(budgets)
    except ValueError as error:
        raise DataError(str(error)) from error
    task, test = divide(specs[0], settings)
    tests, warnings = tests_of(task, test, specs[1:])
    blueprint = drawn(model)
    blueprint.checkpoint.close()
    shape = shape_of(blueprint)
    for share in shares:
        parse_budget(share_text(share), shape)
    about = {"model": source_of(blueprint), "profiled": task.fingerprint}
    about |= {name: getattr(settings, name) for name in ("tokens", "scope", "protect")}
    with _begun(out), ExitStack() as stack:
        journal = Journal(out / ROWS, settings_of(tests, **about))  # which refuses rows of other settings
        references, seen = _read(stack, model, task, tests, settings, out / PROFILE, note)
        trial = _Trial(model, shape, seen, settings)
        rows = tuple(compare(methods, shares, references, trial.candidate, journal, note))
        full = {name: reference.quality for name, reference in references.items()}
    compared = Compared(f"{Path(model).name} for {task.name}: methods compared", full, rows, tuple(warnings))
    compared.save(out)
    return compared


@contextmanager
def _begun(out: Path) -> Iterator[None]:
    """The folder of a comparison, a new one or one to go on in; gone again where nothing was done in it."""
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {ROWS, PROFILE, *RESULTS}):
        raise CheckpointError(f"{out} exists already, and is no comparison that was begun: choose another name")
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not any(out.iterdir()):
            out.rmdir()


def _read(
    stack: ExitStack, model: str, task: Task, tests: Sequence[Task], settings: Settings, keep: Path, note: Note
) -> tuple[dict[str, Reference], Statistics]:
    """What needs the full model in memory: its logits on the tests, and the profile."""
    references = dict[str, Reference]()
    with opened(model, settings.memory) as lm:
        for test in tests:
            tested = up_to(test, lm.tokenizer, settings.tokens // 2)
            references[test.name] = stack.enter_context(Reference.of(lm, tested, note=note))
        if not settings.force:
            check_reads(references[tests[0].name])
        some = as_read(lm, up_to(task, lm.tokenizer, settings.tokens), settings.scope)
        return references, profiled(lm, some, keep, note)[0]


@dataclass(frozen=True)
class _Trial:
    """Gives the model of a method and a budget."""

    model: str
    shape: Shape
    seen: Statistics
    settings: Settings

    @contextmanager
    def candidate(self, method: str, share: float) -> Iterator[LM]:
        plan = choose(self.seen, self.shape, share_text(share), replace(self.settings, method=method, beta=None))
        with opened(self.model, self.settings.memory, experts=plan.kept) as lm:
            yield lm
