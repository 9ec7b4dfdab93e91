"""A memory cgroup for one child process: version 2 where its memory controller is mounted, else version 1. Linux, root.

Knows nothing of models. Swap is off inside; page cache that the child reads counts, as the kernel does it.
"""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Run:
    """What a child did: exit status (negative: the signal), output, wall seconds; memory in bytes, by the kernel."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    vm_hwm: int  # peak resident set of the process, shared libraries included
    cgroup_peak: int  # resident set and page cache together
    failcnt: int  # times the limit was met: the kernel then drops page cache, or kills
    oom_kills: int

    @property
    def killed(self) -> bool:
        return self.status == -9


def version() -> int:
    """2 or 1; RuntimeError where there is no memory controller to use."""
    if "memory" in _words(V2 / "cgroup.controllers"):
        return 2
    if (V1 / "memory.limit_in_bytes").exists():
        return 1
    raise RuntimeError("no memory cgroup controller is mounted under /sys/fs/cgroup: run as root on Linux")


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _field(path: Path, name: str) -> int:
    words = _words(path)
    return int(words[words.index(name) + 1]) if name in words else 0


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A fresh group that may hold `limit` bytes; removed at the end."""
    root = V2 if version() == 2 else V1
    if root is V2:
        (V2 / "cgroup.subtree_control").write_text("+memory")
    group = root / f"moedge-bench-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        if root is V2:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        else:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "memory.memsw.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        for _ in range(50):  # a killed child's pages leave the group a moment later
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def run_within(limit: int | None, command: Sequence[str], timeout: float, env: dict[str, str]) -> Run:
    """Run `command` in its own group of `limit` bytes (None: no group) and return what the kernel counted."""
    if limit is None:
        return _run(None, command, timeout, env)
    with memory_cgroup(limit) as group:
        return _run(group, command, timeout, env)


def _run(group: Path | None, command: Sequence[str], timeout: float, env: dict[str, str]) -> Run:
    prefix = [] if group is None else ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        child = subprocess.Popen([*prefix, *command], stdout=out, stderr=err, env=env)
        deadline = started + timeout
        pid = 0
        while pid == 0:  # wait4 for the child's own peak; Popen.wait would drop it
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0 and time.perf_counter() > deadline:
                child.kill()
                deadline = float("inf")
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        peak, failcnt, kills = _counters(group)
        return Run(
            child.returncode, out.read(), err.read(), seconds, usage.ru_maxrss * 1024, peak, failcnt, kills
        )  # fmt: skip


def _counters(group: Path | None) -> tuple[int, int, int]:
    """Peak bytes, times at the limit, kills."""
    if group is None:
        return 0, 0, 0
    if (group / "memory.max").exists():
        peak = group / "memory.peak"
        events = group / "memory.events"
        return int(peak.read_text()) if peak.exists() else 0, _field(events, "max"), _field(events, "oom_kill")
    return (
        int((group / "memory.max_usage_in_bytes").read_text()),
        # with equal limits the kernel charges memory+swap first, and counts there
        sum(int((group / f"memory.{kind}failcnt").read_text()) for kind in ("", "memsw.")),
        _field(group / "memory.oom_control", "oom_kill"),
    )


def drop_caches() -> None:
    """Write back and forget every cached page of the machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextlib.contextmanager
def readahead(folder: Path, kib: int) -> Iterator[int | None]:
    """Set the readahead of `folder`'s disk, yield what is now in force (None: not settable), restore it."""
    device = os.stat(folder).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if not setting.exists():
        yield None
        return
    before = setting.read_text()
    try:
        setting.write_text(str(kib))
        yield int(setting.read_text())
    finally:
        setting.write_text(before)
