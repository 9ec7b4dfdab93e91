"""How many threads a layer's experts are computed with: as many as measured faster here. Changes no result.

A call of N threads is taken to last `seconds + bytes / speed`, with both measured once for this machine and library on
a small and a large layer, and kept in the user's cache folder. Takes 48 MiB for less than a second: before a model is
loaded.
"""

import contextlib
import ctypes
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from moedge.native.build import source_hash
from moedge.native.library import INT8, Library, run_once, square_expert

Speeds = Mapping[int, tuple[float, float]]  # threads -> (seconds that a call takes with no work, bytes per second)
_EXPERTS, _SIDE, _SMALL, _CALLS = 8, 1408, 64, 9  # the large layer: 48 MiB
_LONG = 1e-3  # seconds of a call with no work: undisturbed it takes a tenth

_DISTURBED: dict[str, Speeds] = {}  # what this process goes by where measuring was disturbed


def best(speeds: Speeds, nbytes: int) -> int:
    """The number of threads that computes with `nbytes` of weights soonest; the fewest among equals."""
    return min(sorted(speeds), key=lambda n: speeds[n][0] + nbytes / speeds[n][1])


def calibrated(library: Library | None, most: int) -> Speeds:
    """The speeds of 1 to `most` threads (1, 2, 4, ...), measured here once and then taken from the cache folder.

    Without a library, one thread. What others disturbed is not kept: then one thread, and the next process measures.
    """
    if library is None or most < 2:
        return {1: (0.0, 1.0)}
    file = _cache_file()
    key = f"{source_hash()}-{library.variant}-{platform.machine()}-{os.cpu_count()}-{most}"
    known = _read(file)
    if key not in known:
        if key in _DISTURBED:
            return _DISTURBED[key]
        speeds = measure(library, most)
        if _disturbed(speeds):
            _DISTURBED[key] = {1: speeds[1]}
            return _DISTURBED[key]
        known = {key: {str(n): speed for n, speed in speeds.items()}}
        _write(file, known)
    return {int(n): (seconds, speed) for n, (seconds, speed) in known[key].items()}


def _disturbed(speeds: Speeds) -> bool:
    """Whether threads had to wait for others: an empty call took long, or more were faster than can be, or none."""
    alone = speeds[1][1]
    odd = any(seconds > _LONG or speed > 2 * n * alone for n, (seconds, speed) in speeds.items())
    return odd or all(speed <= alone for n, (_, speed) in speeds.items() if n > 1)


def measure(library: Library, most: int) -> Speeds:
    """Time a small and a large layer of int8 experts with each number of threads."""
    counts = [n for n in (2**i for i in range(7)) if n < most] + [most]
    large, nbytes = square_expert(_SIDE, INT8, asymmetric=False)
    small, _ = square_expert(_SMALL, INT8, asymmetric=False)
    memory = ctypes.create_string_buffer(_EXPERTS * nbytes)
    ctypes.memset(memory, 1, len(memory))
    start = ctypes.addressof(memory)
    extents = [start + e * nbytes for e in range(_EXPERTS)]
    x, out = (ctypes.c_float * _SIDE)(), (ctypes.c_float * _SIDE)()
    ends = ctypes.addressof(x), ctypes.addressof(out)
    times: dict[tuple[int, int], float] = {}
    for _ in range(_CALLS):  # in turn, and the shortest counts: others may be using the machine just now
        for threads in counts:
            for which, expert in enumerate((small, large)):
                begin = time.perf_counter()
                run_once(library, expert, extents, ends, 1, threads)
                taken = time.perf_counter() - begin
                times[threads, which] = min(taken, times.get((threads, which), taken))
    # three matrices share one extent: the last two of the three reads come from a cache where it is larger
    work = 3 * _EXPERTS * nbytes
    return {n: (times[n, 0], work / max(times[n, 1] - times[n, 0], 1e-9)) for n in counts}


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "moedge" / "kernels.json"


def _read(file: Path) -> dict[str, dict[str, tuple[float, float]]]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or not ours: measured again
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, known: object) -> None:
    """Replace the file in one step; where the folder cannot be written, the next process measures again."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known))
        os.replace(partial, file)
