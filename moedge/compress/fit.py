"""`moedge fit` from end to end: read the samples, profile, choose, measure what it costs, write the smaller model.

The model stays offloaded all the time: experts stream through the memory that `memory` leaves. Everything is written
under another name until it is whole; a run that was interrupted goes on with the profile that it had. Puts the parts
together; what each of them does is in its own module.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.compress.division import as_read, cut_warning, tests_of, up_to
from moedge.compress.evaluate import Quality, Reference, check_reads, measure
from moedge.compress.export import export
from moedge.compress.importance import METHODS, Statistics, super_experts
from moedge.compress.index import Match, TaskIndex, check_name, spread
from moedge.compress.opening import PASS, opened
from moedge.compress.plan import Budget, FitPlan, Shape, by_thresholds, make_plan, parse_budget, with_room
from moedge.compress.profile import Counted, Question, first_layer, identity_of, nothing_seen, passes, profile
from moedge.compress.refine import check_refinable, refined, weigh
from moedge.compress.report import Layer, Report, model_card
from moedge.compress.samples import Scope, Task, Windows, read_task
from moedge.compress.shape import drawn, format_of, shape_of
from moedge.errors import DataError
from moedge.models.kept import Kept
from moedge.models.load import Blueprint
from moedge.runtime.journal import JOURNAL, Unfinished
from moedge.runtime.lm import LM
from moedge.runtime.pack import pack, source_of
from moedge.units import format_size

PROFILE, REFINED = "profile.npz", "refined.json"
Floats = NDArray[np.float64]
Note = Callable[[str], None]  # what is being done, for people


@dataclass(frozen=True)
class Settings:
    """How a model is fitted. Raises DataError for a value that cannot be."""

    method: str = "default"
    scope: Scope = "text"  # the tokens of a question whose experts count: all, or the answer's
    tokens: int = 8192  # that are profiled, and half as many that are tested on
    test_share: float = 0.2  # of the samples, kept out of the profile
    seed: int = 0  # of that division
    protect: str = "auto"  # super experts: auto, none, or layer:expert,...
    alpha: float | None = None  # of a layer's importance: below it an expert is cold; found unless given
    beta: float | None = None  # above it an expert is kept; given instead of a budget
    refine: int = 0  # rounds of swapping experts, by what the smaller model does on the samples
    memory: int | None = None
    bits: int | None = None  # the result packed so
    index: Path | None = None  # a folder of known tasks
    force: bool = False  # fit also to samples that the full model cannot read

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DataError(f"method {self.method!r} does not exist: choose {', '.join(METHODS)}")
        if self.beta is not None and (self.alpha or 0.0) > self.beta:
            raise DataError(f"alpha {self.alpha:g} is above beta {self.beta:g}: cold experts are those below hot ones")
        if self.tokens < 2 or not 0 < self.test_share < 1:
            raise DataError(f"tokens {self.tokens} and test share {self.test_share}: give at least 2, and 0 to 1")


@dataclass(frozen=True)
class Fitted:
    """What a fit made: the report, which experts of the full model were kept, and the known task that was looked at."""

    report: Report
    kept: Kept
    match: Match | None


def divide(spec: str, settings: Settings) -> tuple[Task, Task]:
    """The task's samples to profile and, disjoint, to test on."""
    return read_task(spec).split(settings.seed, settings.test_share)


def profiled(
    lm: LM, some: Iterable[Counted], keep: Path | None = None, note: Note = lambda _: None
) -> tuple[Statistics, list[Floats]]:
    """The statistics of a task, and of each of its passes the first layer's mass [E].

    `keep`: a file to go on from; what it holds of other samples is replaced.
    """
    groups = passes(list(some), PASS, lm.anatomy.encoder_decoder)
    total, first = nothing_seen(lm), list[Floats]()
    what = identity_of(groups)
    if keep is not None and keep.exists():
        found, more = Statistics.load(keep)
        if str(more.get("what")) == what:
            total, first = found, list(more["first"])
    for count, seen in enumerate(profile(lm, groups, len(first)), start=len(first) + 1):
        total.add(seen)
        first.append(seen.mass[0])
        if keep is not None:
            total.save(keep, first=np.array(first), what=np.array(what))
        note(f"profile: {count} of {len(groups)} passes")
    return total, first


def fit(
    model: str,
    spec: str,
    budget: str,
    out: Path,
    settings: Settings,
    also: Sequence[str] = (),
    command: str = "",
    note: Note = lambda _: None,
) -> Fitted:
    """Write `model`, shrunk to `budget` for the task `spec` ([NAME=]FILE), to the folder `out`; what was found.

    `also`: other tasks to test on. `command`: what the report names as its cause. Raises DataError, ModelError,
    CheckpointError, MemoryLimitError, each before anything long begins where it can be known by then.
    """
    task, test = divide(spec, settings)
    tests, warnings = tests_of(task, test, also)
    blueprint = drawn(model)
    try:
        run = _Run(model, blueprint, settings, note, warnings)
        run.check(task, budget)
        unfinished = Unfinished(out, run.identity([task, *tests], budget))
        try:
            with unfinished.writing():
                choice, fitted = run.make(task, tests, budget, unfinished.folder, command)
            unfinished.finish(PROFILE, REFINED)
            run.remember(choice)
        except BaseException:
            unfinished.forget()
            raise
        finally:
            unfinished.close()
    finally:
        blueprint.checkpoint.close()
    return fitted


_Seen = tuple[Statistics, list[Floats] | None, Match | None]  # as in _Choice


@dataclass(frozen=True)
class _Choice:
    """What is known before anything is written."""

    task: Task  # its samples that were profiled
    plan: FitPlan
    seen: Statistics
    first: list[Floats] | None  # of each pass the first layer's mass [E]; None where a known task lent the statistics
    match: Match | None
    references: dict[str, Reference]  # by the name of the test


class _Run:
    """The steps of one fit, and how long each took."""

    def __init__(
        self, model: str, blueprint: Blueprint, settings: Settings, note: Note, warnings: Sequence[str]
    ) -> None:
        self.model, self.blueprint, self.settings, self.note = model, blueprint, settings, note
        self.warnings = list(warnings)
        self.full_bytes = shape_of(blueprint).nbytes
        self.shape = shape_of(blueprint, settings.bits)
        self.seconds: dict[str, float] = {}

    def check(self, task: Task, budget: str) -> None:
        """Raises DataError for settings that cannot be, before anything is read."""
        settings, shape = self.settings, self.shape
        if settings.scope == "answer" and task.kind == "text":
            raise DataError(f"task {task.name!r} is a text without answers: leave --scope answer out")
        if settings.index is not None:
            check_name(task.name)
        if settings.refine:
            check_refinable(self.blueprint.anatomy, settings.memory)
        whole = Budget("", shape.num_experts, "")
        chosen = parse_budget(budget, shape) if settings.beta is None else whole
        protect = [] if settings.protect == "auto" else parse_protected(settings.protect)
        make_plan(np.zeros((shape.layers, shape.num_experts)), shape, chosen, protect)

    def identity(self, tasks: Sequence[Task], budget: str) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        chosen = {name: str(value) for name, value in asdict(self.settings).items() if name != "memory"}
        samples = [task.fingerprint for task in tasks]
        return {"fit": chosen, "budget": budget, "samples": samples, "source": source_of(self.blueprint)}

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def make(
        self, task: Task, tests: Sequence[Task], budget: str, folder: Path, command: str
    ) -> tuple[_Choice, Fitted]:
        """Profile and choose, write the smaller model into `folder`, measure it on what was kept for the test."""
        with ExitStack() as stack:
            choice = self._with_full_model(stack, task, tests, budget, folder)
            made, after, references = self._export(choice.plan, folder), {}, choice.references
            with self._step("smaller model measured"), opened(made, self.settings.memory) as lm:
                for name, reference in references.items():
                    after[name] = measure(lm, reference.task, reference, self._noting(f"smaller model, {name}"))
        return choice, self._finish(choice, made, after, command)

    def _with_full_model(
        self, stack: ExitStack, task: Task, tests: Sequence[Task], budget: str, folder: Path
    ) -> _Choice:
        """What needs the full model in memory, which it is not afterwards."""
        tokens, references = self.settings.tokens, dict[str, Reference]()
        with opened(self.model, self.settings.memory) as lm:
            with self._step("full model measured"):
                for test in tests:
                    tested = up_to(test, lm.tokenizer, tokens // 2)
                    if lm.anatomy.encoder_decoder:
                        as_read(lm, tested, self.settings.scope)  # raises for samples that are too long
                    reference = Reference.of(lm, tested, note=self._noting(f"full model, {test.name}"))
                    references[test.name] = stack.enter_context(reference)
                    self.warnings += cut_warning(f"test on {test.name}", reference.windows.cut)
                    if test is tests[0] and not self.settings.force:
                        check_reads(reference)
            with self._step("profile"):
                task = up_to(task, lm.tokenizer, tokens)
                some = as_read(lm, task, self.settings.scope)
                seen, first, match = self._statistics(lm, some, folder / PROFILE)
            plan = choose(seen, self.shape, budget, self.settings)
            if self.settings.refine:
                with self._step("refine"):
                    plan = self._refined(lm, task, some, plan, folder / REFINED)
        if isinstance(some, Windows) and first is not None:
            self.warnings += cut_warning("profile", some.cut)
        return _Choice(task, plan, seen, first, match, references)

    def _refined(self, lm: LM, task: Task, some: Windows | list[Question], plan: FitPlan, keep: Path) -> FitPlan:
        answers = as_read(lm, task, "answer") if task.kind == "questions" else None
        return refined(lm, weigh(some, answers), plan, self.shape, self.settings.refine, keep, self.note)

    def _statistics(self, lm: LM, some: Iterable[Counted], keep: Path) -> _Seen:
        """Those of a known task that is near, where there is an index; else of a profile."""
        match = None
        if (index := self._index()) is not None:
            groups = passes(list(some), PASS, lm.anatomy.encoder_decoder)
            mass = np.sum([seen.mass[0] for seen in first_layer(lm, groups)], axis=0)
            match = index.nearest(mass, self.settings.scope)
            if match is not None and match.near:
                return index.read(match.name)[0], None, match
        return *profiled(lm, some, keep, self.note), match

    def _index(self) -> TaskIndex | None:
        folder = self.settings.index
        return None if folder is None else TaskIndex(folder, json.dumps(source_of(self.blueprint)))

    def remember(self, choice: _Choice) -> None:
        """Store a task that was profiled in the index: last of all, so that a run that goes on does not find itself."""
        index, first = self._index(), choice.first
        if index is None or first is None or len(first) < 2:
            return
        about = {"samples": choice.task.fingerprint, "scope": self.settings.scope}
        index.add(choice.task.name, choice.seen, spread(first), about)

    def _export(self, plan: FitPlan, folder: Path) -> Path:
        """Where in `folder` the smaller model is, packed where that is asked for."""
        for left in folder.iterdir():  # by a run that was killed
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name not in (JOURNAL, PROFILE, REFINED):
                left.unlink()
        made = folder / "model"
        made.mkdir()
        with self._step("export"):
            export(self.blueprint, plan.kept, made, self._counting("export"))
        if self.settings.bits:
            with self._step("pack"):
                packed, format = folder / "packed", format_of(made, self.settings.bits)
                pack(made, packed, format, self.settings.memory, self._counting("pack"))
                shutil.rmtree(made)
            return packed
        return made

    def _finish(self, choice: _Choice, made: Path, after: dict[str, Quality], command: str) -> Fitted:
        """The model in `made` with fit.json, the reports and a model card into the folder that `made` is in."""
        folder, nbytes = made.parent, sum(file.stat().st_size for file in made.iterdir())
        report = self._report(choice, after, nbytes, command)
        for file in sorted(made.iterdir()):
            os.replace(file, folder / file.name)
        made.rmdir()
        card = self.blueprint.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
        (folder / "README.md").write_text(model_card(report, text, self._loader), encoding="utf-8")
        report.save(folder)
        scores = tuple(tuple(row) for row in choice.plan.scores.tolist())
        counts = (self.shape.num_experts,) * self.shape.layers
        kept = Kept(self.blueprint.anatomy.architecture, counts, choice.plan.kept, scores)
        kept.save(folder, report=report.as_dict())
        return Fitted(report, kept, choice.match)

    def _report(self, choice: _Choice, after: dict[str, Quality], nbytes: int, command: str) -> Report:
        plan, seen = choice.plan, choice.seen
        unrouted = seen.unrouted([self.shape.num_experts] * self.shape.layers)
        layers = tuple(
            Layer(
                kept=plan.kept[number],
                scores=tuple(plan.scores[number].tolist()),
                tokens=int(seen.tokens[number]),
                unrouted=tuple(expert for layer, expert in unrouted if layer == number),
                cold=len(part.cold),
                moderate=len(part.moderate),
                hot=len(part.hot),
            )
            for number, part in enumerate(plan.partitions)
        )
        return Report(
            model=self.model,
            command=command,
            task=choice.task.name,
            method=self.settings.method,
            budget=plan.budget.asked,
            reasons=(*plan.reasons, *(_lent(choice) if self.settings.index is not None else ())),
            layers=layers,
            bytes_before=self.full_bytes,
            bytes_after=nbytes,
            before={name: reference.quality for name, reference in choice.references.items()},
            after=after,
            seconds=self.seconds,
            warnings=(*self.warnings, *_unrouted(len(unrouted))),
        )

    @property
    def _loader(self) -> str:
        """What loads the result: see model_card."""
        if self.settings.bits:
            return "moedge"
        return "AutoModelForSeq2SeqLM" if self.blueprint.anatomy.encoder_decoder else "AutoModelForCausalLM"

    def _noting(self, title: str) -> Note:
        return lambda text: self.note(f"{title}: {text}")

    def _counting(self, title: str) -> Callable[[int, int], None]:
        return lambda done, total: self.note(f"{title}: {format_size(done)} of {format_size(total)}")


def choose(seen: Statistics, shape: Shape, budget: str, settings: Settings) -> FitPlan:
    """The experts that stay by the method, the budget (or beta) and the protection of `settings`.

    Super experts that are found are protected as far as there is room, those with the largest outliers first.
    """
    scores = METHODS[settings.method](seen)[:, : shape.num_experts]
    if settings.beta is None:
        chosen = parse_budget(budget, shape)
    else:
        chosen = by_thresholds(scores, shape, settings.alpha or 0.0, settings.beta)
    if settings.protect != "auto":
        return make_plan(scores, shape, chosen, parse_protected(settings.protect), settings.alpha)
    found = super_experts(seen, [shape.num_experts] * shape.layers)
    protect = with_room(found, seen.largest, shape, chosen.kept)
    plan = make_plan(scores, shape, chosen, protect, settings.alpha)
    if len(protect) == len(found):
        return plan
    left = f"{len(found) - len(protect)} of {len(found)} super experts are not protected: a layer keeps too few"
    return replace(plan, reasons=(*plan.reasons, left))


def parse_protected(text: str) -> list[tuple[int, int]]:
    """`0:3,5:17` as (layer, expert) pairs; `none` is none. Raises DataError."""
    if text == "none":
        return []
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(int(layer), int(expert)) for layer, expert in pairs]
    except ValueError as error:
        raise DataError(f"protect {text!r}: give auto, none, or layer:expert pairs such as 0:3,5:17") from error


def _lent(choice: _Choice) -> list[str]:
    match, first = choice.match, choice.first or []
    far = f"{match.distance:.3f} from {match.name}, near is up to {match.limit:.3f}" if match else ""
    if match is not None and match.near:
        return [f"statistics lent by the known task {match.name}: routing of the first layer is {far}"]
    known = "is known now" if len(first) > 1 else "is not remembered: its samples fill one pass, give more for that"
    found = f"no known task is near, routing of the first layer is {far}" if match else "no task was known"
    return [f"{found}: this one was profiled, and {known}"]


def _unrouted(count: int) -> list[str]:
    if not count:
        return []
    return [f"{count} experts were never routed to" if count > 1 else "1 expert was never routed to"]
