"""What this machine and this process are: memory, cores, disk speed. Measures; decides nothing."""

import ctypes
import mmap
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

KEPT_PRODUCTS = 16  # of oneDNN; decoding needs about eight
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # glibc's mallopt parameters


def process_memory() -> tuple[int, int]:
    """(bytes resident now, highest so far) of this process. Off Linux both are the highest so far."""
    if found := _status("VmRSS", "VmHWM"):
        return found[0], found[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def private_memory() -> int:
    """Bytes resident now that no file backs, so that the system cannot drop them. Off Linux all that is resident."""
    return sum(_status("RssAnon", "RssShmem")) or process_memory()[0]


def _status(*names: str) -> list[int]:
    """Bytes in these fields of what Linux says of this process; nothing where it does not say them."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return [int(fields[name].split()[0]) * 1024 for name in names if name in fields]


def machine_memory() -> int:
    """Bytes that this process may hope for: physical memory, or its control group's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_control_group_limits()])


def _control_group_limits() -> list[int]:
    groups = Path("/proc/self/cgroup")
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        if controllers in ("", "memory"):
            for name in ("memory.max", "memory.limit_in_bytes"):
                file = root / path.lstrip("/") / name
                if file.exists() and (text := file.read_text().strip()).isdigit():
                    limits.append(int(text))
    return limits


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_speed(file: Path, seconds: float = 0.3, block: int = 4 << 20) -> float | None:
    """Bytes per second of reading `file` past the page cache, for at most `seconds`; None where that is refused."""
    if not hasattr(os, "O_DIRECT") or file.stat().st_size < block:
        return None
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    buffer, done, start = mmap.mmap(-1, block), 0, time.perf_counter()
    try:
        while time.perf_counter() - start < seconds and (count := os.preadv(fd, [buffer], done)) == block:
            done += count
    except OSError:
        return None
    finally:
        os.close(fd)
    return done / (time.perf_counter() - start) if done else None


def return_freed_memory() -> None:
    """Have malloc give large freed blocks back to the system at once, so that a limit on the process can hold.

    glibc raises its threshold for doing so as blocks are freed, and keeps an arena per thread; other C libraries are
    left alone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_ARENA_MAX, 2)
        libc.malloc_trim(0)


def keep_few_products() -> None:
    """Have oneDNN keep what it made for the last few shapes of a product, not for 1,024, which takes half a GiB.

    It makes code for each number of rows, and an expert gets another number from each chunk. The settings are read
    when a process first multiplies bf16 matrices, on processors with instructions for that; later they change nothing.
    Those that are set already stay.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's own cache, and oneDNN's behind it
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def forget_peak() -> None:
    """Let the process's peak memory be counted from now on. Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
