"""The only training loop: rows in, checkpoints out; stops and continues without losing a step.

Knows any causal language model of transformers on the CPU; one forward pass per step, so the balance of experts is
over the global batch. Knows no data sets: a curriculum says which streams are mixed when.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moedge.errors import CheckpointError, DataError
from moedge.terminal import console
from moedge.train.data import Mixture, stack
from moedge.train.loss import Losses, RouterLoss
from moedge.train.muon import Muon
from moedge.train.replicas import Replicas

Curriculum = Callable[[int, float], tuple[Mapping[str, float], int]]
"""(step, how far the decay is: 0 before it, 1 at the end) -> shares of the streams, tokens per row."""


@dataclass(frozen=True)
class Settings:
    """`tokens` is the plan; with a `deadline` (seconds since the epoch) the end comes as early as it must."""

    tokens: int
    batch_tokens: int = 8192
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup_tokens: int = 200_000
    decay: float = 0.3
    router: RouterLoss = field(default_factory=RouterLoss)
    clip: float = 1.0
    checkpoint_seconds: float = 300.0
    deadline: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.batch_tokens <= 0 or not 0 <= self.decay <= 1:
            raise DataError(
                f"tokens {self.tokens} and batch_tokens {self.batch_tokens} must be positive, "
                f"decay {self.decay} between 0 and 1"
            )


@dataclass
class Progressed:
    """Where a run stands. `used` is how experts were in late steps, see loss.usage.

    `finished` is False after an interrupt.
    """

    step: int = 0
    tokens: int = 0
    used: Tensor | None = None  # [2, L, E]
    finished: bool = False


def end_of_plan(settings: Settings, tokens: int, tokens_per_second: float | None, now: float) -> int:
    """Tokens at which the run ends: the plan, or what the deadline leaves at the measured speed if that is less."""
    if settings.deadline is None or tokens_per_second is None:
        return settings.tokens
    return min(settings.tokens, tokens + int(tokens_per_second * max(0.0, settings.deadline - now)))


def schedule(settings: Settings, tokens: int, end: int) -> tuple[float, float]:
    """(learning rate as a share of its peak, how far the decay is): warm-up, constant, straight line to zero."""
    left = max(0.0, (end - tokens) / max(1.0, settings.decay * end))
    warm = min(1.0, (tokens + settings.batch_tokens) / max(1, settings.warmup_tokens))
    return min(1.0, left) * warm, 1.0 - min(1.0, left)


def optimisers(model: Any, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embeddings, head, norms, biases and routers."""
    fused, single, other = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        aside = any(part in name for part in ("embed", "lm_head", "router", ".gate."))
        if parameter.dim() < 2 or aside:
            other.append(parameter)
        elif "gate_up" in name:
            fused.append(parameter)
        else:
            single.append(parameter)
    found: list[torch.optim.Optimizer] = []
    for worker in range(settings.workers):  # every worker updates its share of the matrices
        groups = [{"params": fused[worker :: settings.workers], "split": 2}]
        groups.append({"params": single[worker :: settings.workers], "split": 1})
        if any(group["params"] for group in groups):
            found.append(Muon([group for group in groups if group["params"]], lr=settings.muon_lr))
    if other:
        found.append(torch.optim.AdamW(other, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0))
    return found


def train(
    model: Any,
    mixture: Mixture,
    curriculum: Curriculum,
    settings: Settings,
    out: Path,
    *,
    tokenizer: Any = None,
) -> Progressed:
    """Trains `model` in place until the plan's end; continues from the newest checkpoint in `out` when there is one.

    A SIGINT ends the run after the step in progress with a checkpoint; the result then has finished=False.
    """
    out.mkdir(parents=True, exist_ok=True)
    optims = optimisers(model, settings)
    at = resume(out, model, optims, mixture)
    model.train()
    replicas = Replicas(model, settings.workers)
    saved, log = time.monotonic(), Log(out / "log.jsonl")
    with _interrupts() as interrupted, _progress(settings) as advance:
        while True:
            end = end_of_plan(settings, at.tokens, log.tokens_per_second, time.time())
            scale, decay = schedule(settings, at.tokens, end)
            if at.tokens >= end or interrupted():
                break
            _step(replicas, mixture, curriculum, settings, optims, at, (scale, decay), log)
            advance(at, end)
            if time.monotonic() - saved > settings.checkpoint_seconds:
                save(out, model, optims, mixture, at, tokenizer)
                saved = time.monotonic()
    replicas.close()
    at.finished = not interrupted()
    save(out, model, optims, mixture, at, tokenizer)
    return at


def _step(
    replicas: Replicas,
    mixture: Mixture,
    curriculum: Curriculum,
    settings: Settings,
    optims: list[torch.optim.Optimizer],
    at: Progressed,
    rates: tuple[float, float],
    log: "Log",
) -> None:
    """One optimisation step: `rates` is (learning rate as a share of its peak, how far the decay is)."""
    scale, decay = rates
    shares, length = curriculum(at.step, decay)
    picked = [mixture.next(shares, length) for _ in range(max(1, settings.batch_tokens // length))]
    rows = stack([row for _, row in picked])
    result, means = replicas.gradients(rows, settings.router, at.used)
    if not math.isfinite(result.text):
        raise DataError(f"the loss of step {at.step} is {result.text}: lower the learning rate and continue")
    for optimiser in optims:
        peak = settings.muon_lr if isinstance(optimiser, Muon) else settings.adam_lr
        for group in optimiser.param_groups:
            group["lr"] = peak * scale
            if not isinstance(optimiser, Muon):
                torch.nn.utils.clip_grad_norm_(group["params"], settings.clip)
    replicas.map(lambda optimiser: optimiser.step(), optims)
    for optimiser in optims:
        optimiser.zero_grad(set_to_none=True)
    at.step += 1
    at.used = result.used
    at.tokens += len(picked) * length
    log.add(at, result, list(zip((name for name, _ in picked), means, strict=True)), len(picked) * length, scale)


class Log:
    """One JSON line every few steps: mean losses by stream, balance, load of the experts, speed."""

    def __init__(self, path: Path, every: int = 20) -> None:
        self.path, self.every = path, every
        self.tokens_per_second: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._began, self._tokens, self._steps = time.monotonic(), 0, 0
        self._streams: dict[str, list[float]] = defaultdict(list)
        self._balance = self._focus = 0.0
        self._load: Any = 0.0

    def add(self, at: Progressed, result: Losses, means: list[tuple[str, float]], tokens: int, scale: float) -> None:
        self._tokens += tokens
        self._steps += 1
        self._balance += result.balance
        self._focus += result.focus
        self._load = self._load + result.load
        for name, value in means:
            if not math.isnan(value):
                self._streams[name].append(value)
        if self._steps < self.every:
            return
        speed = self._tokens / (time.monotonic() - self._began)
        known = self.tokens_per_second
        self.tokens_per_second = speed if known is None else 0.7 * known + 0.3 * speed
        line: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "rate": round(scale, 4)}
        line |= {"tokens_per_second": round(speed), "balance": round(self._balance / self._steps, 4)}
        line |= {"focus": round(self._focus / self._steps, 4)}
        if self._load.numel():
            load = self._load / self._steps * self._load.shape[-1]
            line |= {"least_load": round(float(load.min()), 3), "most_load": round(float(load.max()), 3)}
        line["loss"] = {name: round(sum(each) / len(each), 4) for name, each in sorted(self._streams.items())}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()


def save(
    out: Path, model: Any, optims: list[torch.optim.Optimizer], mixture: Mixture, at: Progressed, tokenizer: Any
) -> Path:
    """Writes `out/step-N` whole or not at all, and keeps the newest two."""
    final, part = out / f"step-{at.step:06d}", out / f".step-{at.step:06d}.tmp"
    if final.exists():
        return final
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    state = {
        "model": model.state_dict(),
        "optimisers": _moments(model, optims),
        "mixture": mixture.state(),
        "progress": {"step": at.step, "tokens": at.tokens, "used": at.used},
        "torch_rng": torch.get_rng_state(),
    }
    with (part / "training.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(final)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)
    return final


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in out.glob("step-*") if (path / "training.pt").is_file())


def resume(out: Path, model: Any, optims: list[torch.optim.Optimizer], mixture: Mixture) -> Progressed:
    """Loads the newest checkpoint of `out` into model, optimisers and mixture; a fresh start when there is none."""
    found = checkpoints(out)
    if not found:
        return Progressed()
    state = torch.load(found[-1] / "training.pt", weights_only=True)
    try:
        model.load_state_dict(state["model"])
        for name, kept in _moments(model, optims, all_parameters=True).items():
            kept.update(state["optimisers"][name])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{found[-1]} is of another model: give another folder or delete it ({error})") from error
    mixture.restore(state["mixture"])
    torch.set_rng_state(state["torch_rng"])
    return Progressed(**state["progress"])


def _moments(
    model: Any, optims: list[torch.optim.Optimizer], all_parameters: bool = False
) -> dict[str, dict[str, Any]]:
    """What the optimisers keep, by parameter name: so it does not matter how the parameters are spread over them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: optimiser.state[parameter]
        for optimiser in optims
        for group in optimiser.param_groups
        for parameter in group["params"]
        if all_parameters or parameter in optimiser.state
    }


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether a SIGINT has come. A second one ends at once, as usual. Only the main thread can listen."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        console.print("stopping after this step; run again to continue")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(settings: Settings) -> Iterator[Callable[[Progressed, int], None]]:
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:.1f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=settings.tokens, step=0)
        yield lambda at, end: bar.update(task, completed=at.tokens, total=end, step=at.step)
