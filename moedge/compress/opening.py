"""A model opened for a fit: offloaded, for passes of several samples, in the dtype that this machine is quick in.

Knows the model and the memory limit; nothing of what is done with it.
"""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from moedge.models.hub import resolve
from moedge.models.load import draw
from moedge.runtime.device import return_freed_memory
from moedge.runtime.fitted import Experts
from moedge.runtime.lm import LM, load

PASS = 1024  # tokens read at once: each pass may read every expert from the disk


@contextmanager
def opened(
    model: str | Path, memory: int | None = None, dtype: str | None = None, experts: Experts | None = None
) -> Iterator[LM]:
    """The model for passes of PASS tokens, closed at the end and its memory given back."""
    folder = resolve(model)
    blueprint = draw(folder)
    blueprint.checkpoint.close()
    context = min(PASS, blueprint.max_context or PASS)
    lm = load(
        folder,
        memory,
        dtype or _quicker(blueprint.dtype),
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
