"""Direct, buffered and plain reads of the same bytes; files that fail while they are read."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moedge.errors import CheckpointError
from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import Part
from moedge.native.library import Library
from moedge.runtime import reader as module
from moedge.runtime.reader import DirectReader, Target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    """Tensors of odd sizes, so that nothing is aligned, one of them larger than two blocks would be."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 63, 4096, 4097, 70_001, 8191)
    save_file(
        {f"t{i}": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(sizes)},
        tmp_path / "model.safetensors",
    )
    opened = Checkpoint(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C kernels, which read what they can in one call."""
    monkeypatch.setattr(module.library, "load", lambda: None)


@pytest.fixture(params=["in one call", "in blocks"], autouse=True)
def both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "in blocks":
        request.getfixturevalue("in_blocks")


def targets(checkpoint: Checkpoint) -> list[Target]:
    infos = checkpoint.tensors.values()
    return [(Part(i, i.name, i.offset, i.nbytes, i.shape), torch.zeros(i.nbytes, dtype=torch.uint8)) for i in infos]


def check(checkpoint: Checkpoint, reader: DirectReader) -> int:
    wanted = targets(checkpoint)
    count = reader.read(wanted)
    for part, memory in wanted:
        assert torch.equal(memory, checkpoint.read(part.info.name)), part.info.name
    return count


@pytest.mark.parametrize("block", [4096, 8192, 4 << 20])
def test_any_block_size_gives_the_bytes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    reader = DirectReader(checkpoint)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert total <= check(checkpoint, reader) <= total + 3 * 4096
    reader.close()


def test_what_one_call_cannot_read_is_read_in_blocks(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DirectReader(checkpoint)
    monkeypatch.setattr(Library, "read", lambda *_: -1)
    check(checkpoint, reader)


def test_parts_far_apart_are_separate_reads(checkpoint: Checkpoint) -> None:
    first, last = targets(checkpoint)[1], targets(checkpoint)[3]
    reader = DirectReader(checkpoint)
    assert reader.read([last, first]) < sum(info.nbytes for info in checkpoint.tensors.values())
    for part, memory in (first, last):
        assert torch.equal(memory, checkpoint.read(part.info.name))


def refuse_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opened(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", opened)


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT to refuse")
@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("refuse", [refuse_opening, refuse_reading])
def test_buffered_where_direct_reads_are_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    refuse(monkeypatch)
    reader = DirectReader(checkpoint)
    check(checkpoint, reader)
    assert not reader.bypasses_page_cache


def test_plain_reads_where_the_system_has_neither(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    reader = DirectReader(checkpoint)
    check(checkpoint, reader)
    assert not reader.bypasses_page_cache


@pytest.mark.usefixtures("in_blocks")
def test_a_disk_error_names_file_and_tensor(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    reader = DirectReader(checkpoint)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at byte .* for t\d .*check the disk"):
        reader.read(targets(checkpoint))


def test_truncated_while_open(checkpoint: Checkpoint) -> None:
    reader = DirectReader(checkpoint)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    os.truncate(last.file, last.offset)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        reader.read(targets(checkpoint))


@pytest.mark.usefixtures("in_blocks")
def test_short_file_that_looks_unchanged_is_truncated(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DirectReader(checkpoint)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(CheckpointError, match="is truncated"):
        reader.read(targets(checkpoint))
