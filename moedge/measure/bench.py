"""How fast a model reads and writes within a memory limit: rows as llama-bench has them, each limit in its own process.

`pp512` reads a prompt of 512 tokens; `tg128` writes 128 tokens after a context of one, 128 passes of one token each.
Prompts are ids drawn from the vocabulary, answers are sampled at temperature 1; both have the repetition's number as
their seed, so every limit has the same work, no repetition is measured on the text that warmed the cache, and no answer
runs into a loop, which would flatter any cache. Knows Steps and processes; no table and no terminal.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moedge import errors
from moedge.errors import CheckpointError, ContextError, MoedgeError
from moedge.measure.machine import drop_page_cache
from moedge.units import parse_size

if TYPE_CHECKING:
    from moedge.runtime.lm import LM
    from moedge.runtime.session import Model
    from moedge.runtime.tally import Tally

PROMPTS = "ids drawn from the vocabulary, without special ones; the seed is the repetition's number"
LAST_WORDS = 2000  # characters of a failed process's messages that are shown


@dataclass(frozen=True)
class Spec:
    """What one process measures. `prompts` and `answers`: lengths in tokens, a row each. `memory` in bytes."""

    model: str
    memory: int | None = None
    prompts: tuple[int, ...] = (512,)
    answers: tuple[int, ...] = (128,)
    repetitions: int = 5
    warm_up: bool = True
    drop_page_cache: bool = True
    dtype: str | None = None
    policy: str = "default"
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.repetitions < 1 or not (self.prompts or self.answers) or min(*self.prompts, *self.answers, 1) < 1:
            raise ValueError(f"{self} measures nothing: give lengths and repetitions of at least 1")

    @property
    def context(self) -> int:
        """Tokens to reserve: the longest prompt and one token of answer, or one token and the longest answer."""
        return max(*self.prompts, *self.answers, 1) + 1

    @property
    def cases(self) -> tuple["Case", ...]:
        return (*(Case(f"pp{n}", n, 1) for n in self.prompts), *(Case(f"tg{n}", 1, n) for n in self.answers))


@dataclass(frozen=True)
class Case:
    """One row: a prompt of `reads` tokens is answered with `writes` tokens."""

    name: str
    reads: int
    writes: int

    @property
    def tokens(self) -> int:
        """What is counted: the prompt where one token is written, otherwise the answer."""
        return max(self.reads, self.writes)


@dataclass(frozen=True)
class Limit:
    """A memory limit as it was asked for: a share of the checkpoint's size, bytes, or neither (no limit)."""

    text: str
    share: float | None = None
    size: int | None = None

    def nbytes(self, checkpoint_bytes: int) -> int | None:
        return self.size if self.share is None else int(self.share * checkpoint_bytes)


def parse_limit(text: str) -> Limit:
    """`25%` (of the checkpoint's size), `600MiB` or `none`. Raises ValueError on anything else."""
    text = text.strip()
    if text == "none":
        return Limit(text)
    if text.endswith("%") and text[:-1].replace(".", "", 1).isdecimal():
        return Limit(text, share=float(text[:-1]) / 100)
    return Limit(text, size=parse_size(text))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, those of its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"index {index} is not readable ({error!r}): fetch it again") from error
        return tuple(sorted(folder / name for name in names))
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors files: name the folder of a checkpoint")
    return files


def random_ids(lm: "Model", count: int, seed: int) -> list[int]:
    """`count` ids of the vocabulary that are not special; the same for the same seed."""
    from moedge.runtime.forward import vocabulary

    size, special = vocabulary(lm.model), set[int]()
    with suppress(CheckpointError):  # without a tokenizer every id is as good
        size, special = min(size, len(lm.tokenizer)), set(lm.tokenizer.all_special_ids)
    draw, ids = random.Random(seed), list[int]()
    while len(ids) < count:
        token = draw.randrange(size)
        if token not in special:
            ids.append(token)
    return ids


def repeat(lm: "Model", case: Case, number: int) -> "Tally":
    """One repetition: what its Steps add up to."""
    from moedge.runtime.generate import generate
    from moedge.runtime.tally import Tally

    tally = Tally()
    for step in generate(lm, random_ids(lm, case.reads, number), case.writes, temperature=1.0, seed=number):
        tally.add(step)
    return tally


def measure(spec: Spec) -> Iterator[dict[str, Any]]:
    """In this process: {"note": progress} after each repetition, {"row": figures} after each case.

    Raises the errors of `moedge.load`.
    """
    from moedge.runtime.lm import load

    try:
        lm = load(
            spec.model,
            memory=spec.memory,
            dtype=spec.dtype,
            policy=spec.policy,
            context=spec.context,
            prefill_chunk=spec.prefill_chunk,
        )
    except ContextError as error:
        raise ContextError(f"{', '.join(c.name for c in spec.cases)} need {spec.context} tokens: {error}") from error
    with lm:
        lm.model.generation_config.eos_token_id = None  # an answer has the length that was asked for
        for case in spec.cases:
            yield from _measure_case(lm, spec, case)


def _measure_case(lm: "LM", spec: Spec, case: Case) -> Iterator[dict[str, Any]]:
    if spec.warm_up:
        yield {"note": f"{case.name}, warm-up"}
        repeat(lm, case, 0)
    tallies, dropped = list["Tally"](), True
    for number in range(1, spec.repetitions + 1):
        last = f", {case.tokens / tallies[-1].seconds:.3g} tokens/s" if tallies else ""
        yield {"note": f"{case.name}, {number} of {spec.repetitions}{last}"}
        dropped = spec.drop_page_cache and drop_page_cache() and dropped
        tallies.append(repeat(lm, case, number))
    yield {"row": _row(lm, case, tallies) | {"warm_up": spec.warm_up, "page_cache_dropped": dropped}}


def _row(lm: "LM", case: Case, tallies: "list[Tally]") -> dict[str, Any]:
    """The figures of one case. Hit rate and bytes are of all repetitions, the peak is the process's until now."""
    import numpy as np
    import torch

    from moedge.runtime.device import process_memory

    speeds = [case.tokens / tally.seconds for tally in tallies]
    low, median, high = np.quantile(speeds, [0.25, 0.5, 0.75]).tolist()
    hits = sum(tally.hits for tally in tallies)
    asked = hits + sum(tally.misses for tally in tallies)
    return {
        "test": case.name,
        "tokens_per_second": median,
        "quartile_1": low,
        "quartile_3": high,
        "repetitions": speeds,
        "hit_rate": hits / asked if asked else None,
        "bytes_per_token": sum(tally.bytes_read for tally in tallies) / (case.tokens * len(tallies)),
        "peak_memory": process_memory()[1],
        "resident_share": lm.plan.resident_share,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def measure_apart(spec: Spec, command: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    """The same in a fresh process, which ends with this iterator: close it, and it is gone.

    `command` and the spec as JSON start a process that calls `speak`. Raises what that raised; MoedgeError when the
    process ended in another way.
    """
    with tempfile.TemporaryFile("w+") as messages:
        # A session of its own: Ctrl-C reaches this process only, which then ends the other.
        with subprocess.Popen(
            [*command, json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            start_new_session=True,
        ) as child:
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    said = json.loads(line)
                    if "error" in said:
                        raise getattr(errors, said["error"])(said["message"])
                    yield said
                status = child.wait()
            finally:
                child.kill()
        if status:
            raise MoedgeError(_ending(spec, status, messages))


def _ending(spec: Spec, status: int, messages: IO[str]) -> str:
    messages.seek(0)
    last = messages.read().strip()[-LAST_WORDS:]
    how = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    hint = ", which the kernel sends when memory runs out" if status == -signal.SIGKILL else ""
    return f"the process that measured {spec.model} ended with {how}{hint}: {last or 'it said nothing'}"


def _end_with_parent() -> None:
    """End this process as soon as nobody holds the other end of its standard input."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def speak(spec: str) -> int:
    """What the fresh process does: measure, one JSON object a line on stdout. Returns its exit status."""
    _end_with_parent()
    fields = json.loads(spec)
    fields |= {name: tuple(fields[name]) for name in ("prompts", "answers")}
    lines = sys.stdout
    with redirect_stdout(sys.stderr):  # whatever else is printed is none of these lines
        try:
            for said in measure(Spec(**fields)):
                print(json.dumps(said), file=lines, flush=True)
        except MoedgeError as error:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=lines, flush=True)
            return 1
    return 0
