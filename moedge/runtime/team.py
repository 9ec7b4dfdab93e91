"""One team of threads while a token is decoded: the kernels' own, awake; torch computes on the calling thread.

Two teams on the same cores wait for each other: with both awake a token took three times as long (docs/log.md). What
torch does for one token is too small to share out. Changes how long a step takes, and for packed models only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moedge.native.library import Library


@contextmanager
def one_team(library: Library | None) -> Iterator[None]:
    """Inside, the kernels' threads wait awake and torch has one. None changes nothing."""
    threads = torch.get_num_threads()
    if library is None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    library.stay_awake(True)
    try:
        yield
    finally:
        library.stay_awake(False)
        torch.set_num_threads(threads)
