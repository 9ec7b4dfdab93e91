"""`moedge fit` from end to end: read the samples, profile, choose, measure what it costs, write the smaller model.

The model stays offloaded all the time: experts stream through the memory that `memory` leaves. Everything is written
under another name until it is whole; a run that was interrupted goes on with the profile that it had. Puts the parts
together; what each of them does is in its own module.
"""

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moedge.compress.evaluate import Quality, Reference, check_reads, measure
from moedge.compress.export import export
from moedge.compress.importance import METHODS, Statistics, super_experts
from moedge.compress.index import Match, TaskIndex, spread
from moedge.compress.plan import FitPlan, Shape, by_thresholds, make_plan, parse_budget
from moedge.compress.profile import first_layer, passes, profile
from moedge.compress.samples import Scope, Task, Windows, read_task, windows
from moedge.errors import DataError, ModelError
from moedge.models.hub import resolve
from moedge.models.kept import FILE, FORMAT, VERSION, Kept
from moedge.models.load import Blueprint, draw
from moedge.models.narrow import constraints
from moedge.models.pack import PackedExperts
from moedge.runtime.device import return_freed_memory
from moedge.runtime.journal import Unfinished
from moedge.runtime.lm import LM, load
from moedge.runtime.pack import pack, source_of
from moedge.runtime.sources import choose_format
from moedge.units import format_size

PASS = 1024  # tokens read at once: each pass may read every expert from the disk
PROFILE = "profile.npz"
Floats = NDArray[np.float64]
Note = Callable[[str], None]  # what is being done, for people


@dataclass(frozen=True)
class Settings:
    """How a model is fitted. Raises DataError for a value that cannot be."""

    method: str = "default"
    scope: Scope = "text"  # the tokens of a question whose experts count: all, or the answer's
    tokens: int = 16384  # that are profiled, and half as many that are tested on
    test_share: float = 0.2  # of the samples, kept out of the profile
    seed: int = 0  # of that division
    protect: str = "auto"  # super experts: auto, none, or layer:expert,...
    alpha: float | None = None  # of a layer's importance: below it an expert is cold; found unless given
    beta: float | None = None  # above it an expert is kept; given instead of a budget
    memory: int | None = None
    bits: int | None = None  # the result packed so
    index: Path | None = None  # a folder of known tasks
    dtype: str | None = None  # to compute in; fp32 where this machine multiplies that faster than the model's own

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DataError(f"method {self.method!r} does not exist: choose {', '.join(METHODS)}")
        if self.tokens < 2 or not 0 < self.test_share < 1:
            raise DataError(f"tokens {self.tokens} and test share {self.test_share}: give at least 2, and 0 to 1")


@dataclass
class Fitted:
    """What a fit found and made. Sizes in bytes, times in seconds by step."""

    model: str
    task: Task  # the samples that were profiled
    test: Task
    settings: Settings
    plan: FitPlan
    seen: Statistics
    num_experts: tuple[int, ...]
    match: Match | None  # the known task whose statistics were taken or looked at
    full: Quality
    small: Quality
    bytes_before: int
    bytes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


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


@contextmanager
def opened(model: str | Path, settings: Settings, experts: Any = None) -> Iterator[LM]:
    """The model for passes of PASS tokens, closed at the end and its memory given back."""
    folder = resolve(model)
    blueprint = draw(folder)
    blueprint.checkpoint.close()
    context = min(PASS, blueprint.max_context or PASS)
    lm = load(
        folder,
        settings.memory,
        settings.dtype or _quicker(blueprint.dtype),
        context=context,
        parallel=-(-PASS // context),
        prefill_chunk=PASS,
        experts=experts,
    )
    try:
        with lm:
            yield lm
    finally:
        del lm
        gc.collect()  # hooks and modules know each other
        return_freed_memory()


@cache
def _quicker(own: torch.dtype) -> torch.dtype:
    """float32 where this machine multiplies it at least twice as fast as `own`: many have no 16-bit arithmetic."""
    best = dict.fromkeys((own, torch.float32), math.inf)
    operands = {dtype: (torch.ones(512, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)) for dtype in best}
    for _ in range(6):  # in turns, the first one to warm up; the least of each, as the machine may be shared
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return torch.float32 if best[own] > 2 * best[torch.float32] else own


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


def fit(model: str, spec: str, budget: str, out: Path, settings: Settings, note: Note = lambda _: None) -> Fitted:
    """Write `model`, shrunk to `budget` for the task `spec` ([NAME=]FILE), to the folder `out`; what was found.

    Raises DataError, ModelError, CheckpointError, MemoryLimitError, each before anything long begins where it can be
    known by then.
    """
    task, test = divide(spec, settings)
    blueprint = draw(resolve(model))
    try:
        run = _Run(model, blueprint, settings, note)
        run.check(budget)
        unfinished = Unfinished(out, run.identity(task, test, budget))
        try:
            with unfinished.writing():
                fitted = run.find(task, test, budget, unfinished.folder / PROFILE)
                run.write(fitted, unfinished.folder)
            unfinished.finish(PROFILE)
        finally:
            unfinished.close()
    finally:
        blueprint.checkpoint.close()
    return fitted


class _Run:
    """The steps of one fit, and how long each took."""

    def __init__(self, model: str, blueprint: Blueprint, settings: Settings, note: Note) -> None:
        self.model, self.blueprint, self.settings, self.note = model, blueprint, settings, note
        self.shape = shape_of(blueprint)
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    def check(self, budget: str) -> None:
        """Raises DataError for a budget that cannot be, before anything is read."""
        if self.settings.beta is None:
            parse_budget(budget, self.shape)
        if self.settings.protect != "auto":
            _parse_protected(self.settings.protect)

    def identity(self, task: Task, test: Task, budget: str) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        chosen = {name: str(value) for name, value in asdict(self.settings).items()}
        samples = [task.fingerprint, test.fingerprint]
        return {"fit": chosen, "budget": budget, "samples": samples, "source": source_of(self.blueprint)}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def find(self, task: Task, test: Task, budget: str, keep: Path) -> Fitted:
        """Profile and choose, and measure the full and the smaller model on the test part."""
        with ExitStack() as stack:
            reference, seen, match, task = self._with_full_model(stack, task, test, keep)
            scores = METHODS[self.settings.method](seen)[:, : self.shape.num_experts]
            plan = self._plan(scores, seen, budget)
            with self.step("smaller model measured"), opened(self.model, self.settings, plan.kept) as lm:
                small = measure(lm, reference.task, reference, lambda text: self.note(f"smaller model: {text}"))
            del lm
        return Fitted(
            model=self.model,
            task=task,
            test=reference.task,
            settings=self.settings,
            plan=plan,
            seen=seen,
            num_experts=(self.shape.num_experts,) * self.shape.layers,
            match=match,
            full=reference.quality,
            small=small,
            bytes_before=self.shape.nbytes,
            seconds=self.seconds,
            warnings=self.warnings,
        )

    def _with_full_model(
        self, stack: ExitStack, task: Task, test: Task, keep: Path
    ) -> tuple[Reference, Statistics, Match | None, Task]:
        """What needs the full model in memory, which it is not afterwards."""
        with opened(self.model, self.settings) as lm:
            tokens = self.settings.tokens
            with self.step("full model measured"):
                tested = up_to(test, lm.tokenizer, tokens // 2)
                reference = Reference.of(lm, tested, note=lambda text: self.note(f"full model: {text}"))
                stack.enter_context(reference)
                check_reads(reference)
            with self.step("profile"):
                task = up_to(task, lm.tokenizer, tokens)
                some = windows(task, lm.tokenizer, min(PASS, lm.context or PASS), self.settings.scope)
                seen, match = self._statistics(lm, task, some, keep)
        return reference, seen, match, task

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

    def _plan(self, scores: Floats, seen: Statistics, budget: str) -> FitPlan:
        settings, shape = self.settings, self.shape
        if settings.beta is None:
            chosen = parse_budget(budget, shape)
        else:
            chosen = by_thresholds(scores, shape, settings.alpha or 0.0, settings.beta)
        counts = (shape.num_experts,) * shape.layers
        protect = super_experts(seen, counts) if settings.protect == "auto" else _parse_protected(settings.protect)
        if unrouted := seen.unrouted(counts):
            self.warnings.append(f"{len(unrouted)} experts were never routed to by the {int(seen.tokens[0])} tokens")
        return make_plan(scores, shape, chosen, protect, settings.alpha)

    def write(self, fitted: Fitted, folder: Path) -> None:
        """The smaller model with fit.json and the reports into `folder`."""
        made = folder / "model"
        for left in (made, folder / "packed", folder / "packed.partial"):
            shutil.rmtree(left, ignore_errors=True)
        made.mkdir()
        with self.step("export"):
            export(self.blueprint, fitted.plan.kept, made, lambda done, total: self.note(f"export: {_of(done, total)}"))
        if self.settings.bits:
            with self.step("pack"):
                made = self._pack(made, folder / "packed")
        fitted.bytes_after = sum(file.stat().st_size for file in made.iterdir())
        for file in sorted(made.iterdir()):
            os.replace(file, folder / file.name)
        made.rmdir()
        text = json.dumps(self._record(fitted), indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        self.kept(fitted).save(folder)

    def _pack(self, model: Path, packed: Path) -> Path:
        format = choose_format(model, self.settings.bits or 16, None, False)
        pack(model, packed, format, self.settings.memory, lambda done, total: self.note(f"pack: {_of(done, total)}"))
        shutil.rmtree(model)
        return packed

    def kept(self, fitted: Fitted) -> Kept:
        """What running the full model with these experts needs to know."""
        scores = tuple(tuple(row) for row in fitted.plan.scores.tolist())
        return Kept(self.blueprint.anatomy.architecture, fitted.num_experts, fitted.plan.kept, scores)

    def _record(self, fitted: Fitted) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self.settings).items() if value is not None}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "task": fitted.task.name,
            "budget": fitted.plan.budget.asked,
            "settings": settings | ({"index": str(settings["index"])} if "index" in settings else {}),
            "reasons": fitted.plan.reasons,
            "full": fitted.full.as_dict(),
            "fitted": fitted.small.as_dict(),
            "bytes": {"full": fitted.bytes_before, "fitted": fitted.bytes_after},
            "seconds": self.seconds,
            "warnings": fitted.warnings,
        }


def _of(done: int, total: int) -> str:
    return f"{format_size(done)} of {format_size(total)}"


def _parse_protected(text: str) -> list[tuple[int, int]]:
    """`0:3,5:17` as (layer, expert) pairs; `none` is none."""
    if text == "none":
        return []
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(int(layer), int(expert)) for layer, expert in pairs]
    except ValueError as error:
        raise DataError(f"protect {text!r}: give auto, none, or layer:expert pairs such as 0:3,5:17") from error
