"""`moedge fit` from end to end: read the samples, profile, choose, measure what it costs, write the smaller model.

The model stays offloaded all the time: experts stream through the memory that `memory` leaves. Everything is written
under another name until it is whole; a run that was interrupted goes on with the profile that it had. Puts the parts
together; what each of them does is in its own module.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.compress.evaluate import Quality, Reference, check_reads, measure
from moedge.compress.export import export
from moedge.compress.importance import METHODS, Statistics, super_experts
from moedge.compress.index import Match, TaskIndex, spread
from moedge.compress.opening import PASS, opened
from moedge.compress.plan import FitPlan, Shape, by_thresholds, make_plan, parse_budget
from moedge.compress.profile import first_layer, passes, profile
from moedge.compress.report import Layer, Report, model_card
from moedge.compress.samples import Scope, Task, Windows, read_task, windows
from moedge.errors import DataError, ModelError
from moedge.models.hub import resolve
from moedge.models.kept import Kept
from moedge.models.load import Blueprint, draw
from moedge.models.narrow import constraints
from moedge.models.pack import PackedExperts
from moedge.runtime.journal import Unfinished
from moedge.runtime.lm import LM
from moedge.runtime.pack import pack, source_of
from moedge.runtime.sources import choose_format
from moedge.units import format_size

PROFILE = "profile.npz"
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
    memory: int | None = None
    bits: int | None = None  # the result packed so
    index: Path | None = None  # a folder of known tasks
    force: bool = False  # fit also to samples that the full model cannot read

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DataError(f"method {self.method!r} does not exist: choose {', '.join(METHODS)}")
        if self.tokens < 2 or not 0 < self.test_share < 1:
            raise DataError(f"tokens {self.tokens} and test share {self.test_share}: give at least 2, and 0 to 1")


@dataclass(frozen=True)
class Fitted:
    """What a fit made: the report, which experts of the full model were kept, and the known task that was looked at."""

    report: Report
    kept: Kept
    match: Match | None


def shape_of(blueprint: Blueprint) -> Shape:
    """What a plan has to know of a model. Raises ModelError for one that cannot do with fewer experts."""
    layers = blueprint.anatomy.layers
    counts = {layer.num_experts for layer in layers}
    if isinstance(blueprint.experts, PackedExperts):
        raise ModelError(f"{blueprint.folder} is packed: fit the original, with --bits to pack the result")
    if len(counts) > 1:
        raise ModelError(f"{blueprint.folder} has layers of {min(counts)} to {max(counts)} experts: fit another model")
    rules = constraints(blueprint)
    each = sum(blueprint.experts.nbytes(layer.index, 0) for layer in layers)
    total = sum(info.nbytes for info in blueprint.checkpoint.tensors.values())
    (count,) = counts
    return Shape(count, len(layers), rules.minimum, rules.groups, each, total - count * each)


def divide(spec: str, settings: Settings) -> tuple[Task, Task]:
    """The task's samples to profile and, disjoint, to test on."""
    return read_task(spec).split(settings.seed, settings.test_share)


def up_to(task: Task, tokenizer: Any, tokens: int) -> Task:
    """The first samples with about `tokens` tokens together, at least one."""
    total = 0
    for count, sample in enumerate(task.samples, start=1):
        total += len(tokenizer(sample.text, add_special_tokens=False, verbose=False)["input_ids"])
        if total >= tokens:
            return task.take(0, count)
    return task


def profiled(
    lm: LM, some: Windows, keep: Path | None = None, note: Note = lambda _: None
) -> tuple[Statistics, list[Floats]]:
    """The statistics of a task, and of each of its passes the first layer's mass [E]. `keep`: a file to go on from."""
    groups = passes(list(some), PASS, lm.anatomy.encoder_decoder)
    layers = lm.anatomy.layers
    total, first = Statistics.empty(len(layers), max(layer.num_experts for layer in layers)), list[Floats]()
    done = 0
    if keep is not None and keep.exists():
        total, more = Statistics.load(keep)
        first, done = list(more["first"]), len(more["first"])
    for count, seen in enumerate(profile(lm, groups, done), start=done + 1):
        total.add(seen)
        first.append(seen.mass[0])
        if keep is not None:
            total.save(keep, first=np.array(first))
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
    parts = divide(spec, settings)
    others = [read_task(each) for each in also]
    blueprint = draw(resolve(model))
    try:
        run = _Run(model, blueprint, settings, note)
        run.check(budget)
        unfinished = Unfinished(out, run.identity([*parts, *others], budget))
        try:
            with unfinished.writing():
                choice = run.choose(*parts, others, budget, unfinished.folder / PROFILE)
                fitted = run.write(choice, unfinished.folder, command)
            unfinished.finish(PROFILE)
        finally:
            unfinished.close()
    finally:
        blueprint.checkpoint.close()
    return fitted


@dataclass(frozen=True)
class _Choice:
    """What is known before anything is written."""

    task: str
    plan: FitPlan
    seen: Statistics
    match: Match | None
    before: dict[str, Quality]
    after: dict[str, Quality]


class _Run:
    """The steps of one fit, and how long each took."""

    def __init__(self, model: str, blueprint: Blueprint, settings: Settings, note: Note) -> None:
        self.model, self.blueprint, self.settings, self.note = model, blueprint, settings, note
        self.shape = shape_of(blueprint)
        self.seconds: dict[str, float] = {}

    def check(self, budget: str) -> None:
        """Raises DataError for settings that cannot be, before anything is read."""
        if self.settings.beta is None:
            parse_budget(budget, self.shape)
        if self.settings.protect != "auto":
            parse_protected(self.settings.protect)

    def identity(self, tasks: Sequence[Task], budget: str) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        chosen = {name: str(value) for name, value in asdict(self.settings).items()}
        samples = [task.fingerprint for task in tasks]
        return {"fit": chosen, "budget": budget, "samples": samples, "source": source_of(self.blueprint)}

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def choose(self, task: Task, test: Task, others: Sequence[Task], budget: str, keep: Path) -> _Choice:
        """Profile and choose, and measure the full and the smaller model on what was kept for the test."""
        with ExitStack() as stack:
            references, seen, match = self._with_full_model(stack, task, [test, *others], keep)
            plan = choose(seen, self.shape, budget, self.settings)
            after = {}
            with (
                self._step("smaller model measured"),
                opened(self.model, self.settings.memory, experts=plan.kept) as lm,
            ):
                for name, reference in references.items():
                    after[name] = measure(lm, reference.task, reference, self._noting(f"smaller model, {name}"))
            before = {name: reference.quality for name, reference in references.items()}
        return _Choice(task.name, plan, seen, match, before, after)

    def _with_full_model(
        self, stack: ExitStack, task: Task, tests: Sequence[Task], keep: Path
    ) -> tuple[dict[str, Reference], Statistics, Match | None]:
        """What needs the full model in memory, which it is not afterwards."""
        tokens, references = self.settings.tokens, dict[str, Reference]()
        with opened(self.model, self.settings.memory) as lm:
            with self._step("full model measured"):
                for test in tests:
                    tested = up_to(test, lm.tokenizer, tokens // 2)
                    reference = Reference.of(lm, tested, note=self._noting(f"full model, {test.name}"))
                    references[test.name] = stack.enter_context(reference)
                    if test is tests[0] and not self.settings.force:
                        check_reads(reference)
            with self._step("profile"):
                task = up_to(task, lm.tokenizer, tokens)
                some = windows(task, lm.tokenizer, min(PASS, lm.context or PASS), self.settings.scope)
                seen, match = self._statistics(lm, task, some, keep)
        return references, seen, match

    def _statistics(self, lm: LM, task: Task, some: Windows, keep: Path) -> tuple[Statistics, Match | None]:
        """Those of a known task that is near, where there is an index; else of a profile, which the index then has."""
        if self.settings.index is None:
            return profiled(lm, some, keep, self.note)[0], None
        index = TaskIndex(self.settings.index, json.dumps(source_of(self.blueprint)))
        groups = passes(list(some), PASS, lm.anatomy.encoder_decoder)
        match = index.nearest(np.sum([seen.mass[0] for seen in first_layer(lm, groups)], axis=0))
        if match is not None and match.near:
            return index.read(match.name)[0], match
        seen, first = profiled(lm, some, keep, self.note)
        index.add(task.name, seen, spread(first), {"samples": task.fingerprint, "tokens": some.tokens})
        return seen, match

    def write(self, choice: _Choice, folder: Path, command: str) -> Fitted:
        """The smaller model with fit.json, the reports and a model card into `folder`."""
        made = folder / "model"
        for left in (made, folder / "packed", folder / "packed.partial"):
            shutil.rmtree(left, ignore_errors=True)
        made.mkdir()
        with self._step("export"):
            export(self.blueprint, choice.plan.kept, made, self._counting("export"))
        if self.settings.bits:
            with self._step("pack"):
                made = self._pack(made, folder / "packed")
        report = self._report(choice, sum(file.stat().st_size for file in made.iterdir()), command)
        for file in sorted(made.iterdir()):
            os.replace(file, folder / file.name)
        made.rmdir()
        card = self.blueprint.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
        (folder / "README.md").write_text(model_card(report, text), encoding="utf-8")
        report.save(folder)
        scores = tuple(tuple(row) for row in choice.plan.scores.tolist())
        counts = (self.shape.num_experts,) * self.shape.layers
        kept = Kept(self.blueprint.anatomy.architecture, counts, choice.plan.kept, scores)
        kept.save(folder, report=report.as_dict())
        return Fitted(report, kept, choice.match)

    def _pack(self, model: Path, packed: Path) -> Path:
        format = choose_format(model, self.settings.bits or 16, None, False)
        pack(model, packed, format, self.settings.memory, self._counting("pack"))
        shutil.rmtree(model)
        return packed

    def _report(self, choice: _Choice, nbytes: int, command: str) -> Report:
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
            task=choice.task,
            method=self.settings.method,
            budget=plan.budget.asked,
            reasons=(*plan.reasons, *_lent(choice.match)),
            layers=layers,
            bytes_before=self.shape.nbytes,
            bytes_after=nbytes,
            before=choice.before,
            after=choice.after,
            seconds=self.seconds,
            warnings=(f"{len(unrouted)} experts were never routed to",) if unrouted else (),
        )

    def _noting(self, title: str) -> Note:
        return lambda text: self.note(f"{title}: {text}")

    def _counting(self, title: str) -> Callable[[int, int], None]:
        return lambda done, total: self.note(f"{title}: {format_size(done)} of {format_size(total)}")


def choose(seen: Statistics, shape: Shape, budget: str, settings: Settings) -> FitPlan:
    """The experts that stay by the method, the budget (or beta) and the protection of `settings`."""
    scores = METHODS[settings.method](seen)[:, : shape.num_experts]
    if settings.beta is None:
        chosen = parse_budget(budget, shape)
    else:
        chosen = by_thresholds(scores, shape, settings.alpha or 0.0, settings.beta)
    counts = [shape.num_experts] * shape.layers
    protect = super_experts(seen, counts) if settings.protect == "auto" else parse_protected(settings.protect)
    return make_plan(scores, shape, chosen, protect, settings.alpha)


def parse_protected(text: str) -> list[tuple[int, int]]:
    """`0:3,5:17` as (layer, expert) pairs; `none` is none. Raises DataError."""
    if text == "none":
        return []
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(int(layer), int(expert)) for layer, expert in pairs]
    except ValueError as error:
        raise DataError(f"protect {text!r}: give auto, none, or layer:expert pairs such as 0:3,5:17") from error


def _lent(match: Match | None) -> list[str]:
    if match is None:
        return []
    far = f"{match.distance:.3f} from {match.name}, near is up to {match.limit:.3f}"
    if match.near:
        return [f"statistics lent by the known task {match.name}: routing of the first layer is {far}"]
    return [f"no known task is near: routing of the first layer is {far}; this one was profiled and is known now"]
