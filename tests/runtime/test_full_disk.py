"""Packing onto a disk that is really full, see `disk` in conftest.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from packing import contents, take_all

from moedge.errors import CheckpointError
from moedge.runtime.formats import PLAIN, Format
from moedge.runtime.pack import pack, verify

Tiny = Callable[..., Path]
TEXT = "The old house stood at the end of the lane.\n" * 30


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
