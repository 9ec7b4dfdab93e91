"""What the machine is, read from a made-up /proc and /sys, and with a made-up clock."""

import os
import sys
from itertools import count
from pathlib import Path

import pytest

from moedge.runtime import device

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
BLOCK = 4096


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the file system that the module sees: empty."""
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / str(name).lstrip("/"))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_memory_is_the_machines(system: Path) -> None:
    assert device.machine_memory() == PHYSICAL


@pytest.mark.parametrize(
    ("groups", "file", "text", "expected"),
    [
        ("0::/app\n", "app/memory.max", "1048576\n", 1 << 20),
        ("0::/app\n", "app/memory.max", "max\n", PHYSICAL),
        ("0::/app\n", "other/memory.max", "1048576\n", PHYSICAL),
        ("8:pids:/app\n4:memory:/app\n", "memory/app/memory.limit_in_bytes", "2097152\n", 2 << 20),
        ("4:memory:/\n", "memory/memory.limit_in_bytes", "9223372036854771712\n", PHYSICAL),
        ("8:pids:/app\n", "memory/app/memory.limit_in_bytes", "2097152\n", PHYSICAL),
    ],
)
def test_the_control_groups_limit_counts_where_it_is_less(
    system: Path, groups: str, file: str, text: str, expected: int
) -> None:
    write(system / "proc/self/cgroup", groups)
    write(system / "sys/fs/cgroup" / file, text)
    assert device.machine_memory() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_follows_what_is_written() -> None:
    before, peak_before = device.process_memory()
    held = b"x" * (64 << 20)
    now, peak = device.process_memory()
    assert now - before > 48 << 20
    assert peak >= max(now, peak_before)
    assert len(held) == 64 << 20


def test_without_proc_both_figures_are_the_highest(system: Path) -> None:
    now, peak = device.process_memory()
    assert now == peak > 1 << 20


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert device.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert device.cores() == 6


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten blocks, read with the page cache where the file system has no O_DIRECT, by a clock of 1/8 s a look."""
    monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)
    ticks = count()
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(ticks) / 8)
    path = tmp_path / "shard"
    path.write_bytes(bytes(10 * BLOCK))
    return path


def test_read_speed_is_bytes_over_time(file: Path) -> None:
    # looks at 0, then 1/8 to 7/8 before each block, at 1 which is the end, and at 9/8
    assert device.read_speed(file, seconds=1.0, block=BLOCK) == 7 * BLOCK / 1.125


def test_read_speed_ends_with_the_file(file: Path) -> None:
    file.write_bytes(bytes(2 * BLOCK + 5))
    assert device.read_speed(file, seconds=9.0, block=BLOCK) == 2 * BLOCK / 0.5


def test_read_speed_of_less_than_a_block_is_unknown(file: Path) -> None:
    assert device.read_speed(file, block=11 * BLOCK) is None


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_read_speed_where_direct_reads_are_refused_is_unknown(
    file: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, call, refuse)
    assert device.read_speed(file, block=BLOCK) is None


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is counted anew on Linux only")
def test_a_peak_is_forgotten() -> None:
    bytearray(64 << 20).count(0)  # which is touched, and given back
    now, peak = device.process_memory()
    assert peak - now > 32 << 20
    device.forget_peak()
    now, peak = device.process_memory()
    assert peak - now < 8 << 20
