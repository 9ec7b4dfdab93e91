"""Packing onto a disk that is really full: a small file system of its own. Needs Linux and the right to mount."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moedge.errors import CheckpointError
from moedge.runtime.formats import PLAIN, Format
from moedge.runtime.pack import pack, verify

Tiny = Callable[..., Path]
SIZE = 1 << 21  # bytes of the file system
TEXT = "The old house stood at the end of the lane.\n" * 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of SIZE bytes; what needs it is skipped where mounting is not allowed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts a tmpfs, which only Linux has")
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={SIZE}".encode()):
        pytest.skip(f"may not mount a small disk here (needs root): {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        assert libc.umount2(bytes(folder), 2) == 0  # MNT_DETACH


def take_all(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        while shutil.disk_usage(path).free:
            file.write(bytes(4096))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", [PLAIN, Format("int4")], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9])
def test_it_becomes_full_while_packing(format: Format, share: float, tiny: Tiny, tmp_path: Path, disk: Path) -> None:
    """Among the experts or in the backbone: named, nothing under the final name, and the same command goes on."""
    model, out = tiny("qwen3_moe", tokenizer=True), disk / "out"
    pack(model, tmp_path / "whole", format)

    def other_program(done: int, total: int) -> None:
        if done >= share * total and not (disk / "ballast").exists():
            take_all(disk / "ballast")

    with pytest.raises(CheckpointError, match=r"disk of .*out\.partial is full: free some space and give the same"):
        pack(model, out, format, report=other_program)
    assert not out.exists()
    with pytest.raises(CheckpointError, match=r"out will take .*, its disk has .* for it: free|is full"):
        pack(model, out, format)
    assert not out.exists()
    (disk / "ballast").unlink()
    pack(model, out, format)
    assert contents(out) == contents(tmp_path / "whole")
    assert [path.name for path in disk.iterdir()] == ["out"]
    verify(out)


def test_it_becomes_full_while_calibrating(tiny: Tiny, tmp_path: Path, disk: Path) -> None:
    model, out, texts = tiny("qwen3_moe", tokenizer=True), disk / "out", tmp_path / "texts.txt"
    texts.write_text(TEXT)
    pack(model, tmp_path / "whole", Format("int4"), calibrate=texts)

    def other_program(done: int, total: int) -> None:
        if not (disk / "ballast").exists():
            take_all(disk / "ballast")

    with pytest.raises(CheckpointError, match=r"disk of .*out\.partial is full"):
        pack(model, out, Format("int4"), calibrate=texts, reading=other_program)
    assert not out.exists()
    (disk / "ballast").unlink()
    pack(model, out, Format("int4"), calibrate=texts)
    assert contents(out) == contents(tmp_path / "whole")
