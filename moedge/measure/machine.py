"""What a measured figure has to be read with: device, load, commit, the disk's settings. Imports no torch."""

import mmap
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moedge.runtime.device import cores

PACKAGE = Path(__file__).resolve().parent.parent
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PAGE = 4096


def surroundings() -> dict[str, Any]:
    """Device, load average, version, commit and date."""
    return {
        "device": device(),
        "load_average": load_average(),
        "version": version("moedge"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def device() -> dict[str, Any]:
    """CPU, cores that may be used, memory, system."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
    }


def load_average() -> list[float]:
    """How busy the machine is, over 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit(*folders: Path) -> str | None:
    """Short hash of the commit that `folders` (by default this package) are at, with + when their files differ.

    None where git is not there or does not know the first of them: moedge is installed, perhaps inside somebody
    else's repository.
    """
    paths = [str(folder) for folder in folders or (PACKAGE,)]
    try:
        if _git(paths[0], "ls-files", "--error-unmatch", ".") is None:
            return None
        head = _git(paths[0], "rev-parse", "--short", "HEAD")
        changed = _git(paths[0], "diff", "--quiet", "HEAD", "--", *paths) is None
    except FileNotFoundError:  # no git here
        return None
    return None if head is None else head + ("+" if changed else "")


def _git(folder: str, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def readahead_kib(file: Path) -> int | None:
    """What the kernel reads ahead on the disk that holds `file`; None where it does not say."""
    device = os.stat(file).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = Path(f"/sys/dev/block/{number}")
    places = [Path(f"/sys/class/bdi/{number}/read_ahead_kb")]
    if block.exists():  # a partition: its disk has the setting
        places.append(block.resolve().parent / "queue" / "read_ahead_kb")
    return next((int(place.read_text()) for place in places if place.exists()), None)


def reads_past_page_cache(file: Path) -> bool:
    """Whether O_DIRECT works on `file`, as expert reads try it."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, PAGE)], 0)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def drop_page_cache() -> bool:
    """Have the kernel forget every cached page of the machine; False where that is not allowed (Linux, root)."""
    if not os.access(DROP_CACHES, os.W_OK):
        return False
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:  # root of a container that must not
        return False
    return True
