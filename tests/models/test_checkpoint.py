"""Single tensors out of a checkpoint, and every way in which its files can be wrong."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moedge.errors import CheckpointError
from moedge.models.checkpoint import INDEX, Checkpoint
from moedge.models.load import draw


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_reads_the_same_tensors_as_safetensors(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.files) > 1
    for shard in shards(folder):
        for name, expected in load_file(shard).items():
            assert torch.equal(checkpoint.read(name), expected), name
    checkpoint.close()


def test_a_tensor_has_the_alignment_that_it_has_in_the_file(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    remainders = set()
    for name, info in checkpoint.tensors.items():
        remainders.add(info.offset % 64)
        assert checkpoint.read(name).data_ptr() % 64 == info.offset % 64
    assert remainders != {0}, "the test needs a tensor that is not aligned"


def test_single_file_and_all_dtypes(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in (torch.float16, torch.int64, torch.bool)}
    tensors["empty"] = torch.empty(0, 3)
    tensors["scalar"] = torch.tensor(2.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name), expected)


def test_lazy_tensor_reads_only_when_indexed(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    name = next(iter(checkpoint.tensors))
    lazy = checkpoint.lazy_state_dict()[name]
    assert list(lazy.shape) == lazy.get_shape()
    assert torch.equal(lazy[...], checkpoint.read(name))
    assert name not in checkpoint.lazy_state_dict(without={name})
    checkpoint.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        lazy[...]


def test_missing_shard_names_file_and_tensor(folder: Path) -> None:
    lost = shards(folder)[1]
    tensor = next(t for t, s in json.loads((folder / INDEX).read_text())["weight_map"].items() if s == lost.name)
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name) as error:
        Checkpoint(folder)
    assert "missing" in str(error.value)
    assert tensor in str(error.value) or "model." in str(error.value)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_shard_names_file_and_tensor(folder: Path, keep: float) -> None:
    shard = shards(folder)[1]
    os.truncate(shard, int(shard.stat().st_size * keep))
    with pytest.raises(CheckpointError, match="truncated") as error:
        Checkpoint(folder)
    assert shard.name in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header"),
        (struct.pack("<Q", 9) + b'{"a": 1}', "its header would have 9 bytes"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
        (struct.pack("<Q", 5) + b"{nope", "damaged header"),
    ],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}, "20 bytes"),
        ({"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}, "dtype F4"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "truncated"),
        ({"dtype": "F32", "shape": [2, 3]}, "damaged header"),
    ],
)
def test_header_that_disagrees_with_the_file(tmp_path: Path, entry: object, message: str) -> None:
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 20)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_index_that_lies_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    tensor, shard = next(iter(index["weight_map"].items()))
    index["weight_map"][tensor] = next(s.name for s in shards(folder) if s.name != shard)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=tensor):
        Checkpoint(folder)
    index["weight_map"] = {**index["weight_map"], tensor: shard, "phantom.weight": shard}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"phantom\.weight"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_index_that_is_no_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="convert the checkpoint"):
        Checkpoint(tmp_path)


def test_replaced_rewritten_or_removed_while_open(folder: Path) -> None:
    shard = shards(folder)[0]
    name = next(iter(load_file(shard)))
    checkpoint = Checkpoint(folder)
    other = shard.with_suffix(".new")
    shutil.copy(shard, other)
    os.replace(other, shard)  # the same bytes, but another file
    with pytest.raises(CheckpointError, match=f"{shard.name} changed while {name}"):
        checkpoint.read(name)
    checkpoint.close()

    checkpoint = Checkpoint(folder)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while"):
        checkpoint.read(name)
    checkpoint.close()

    checkpoint = Checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="was removed"):
        checkpoint.read(name)
    checkpoint.close()


def test_shard_that_shrinks_while_open(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    last = max(checkpoint.tensors.values(), key=lambda t: (t.file == shards(folder)[0], t.offset))
    os.truncate(last.file, last.offset + 1)
    with pytest.raises(CheckpointError, match=last.name):
        checkpoint.read(last.name)


def test_only_experts_that_are_converted_take_memory_besides_their_slot(tiny: Callable[..., Path]) -> None:
    folder = tiny("olmoe", dtype=torch.bfloat16)
    sizes = {}
    for dtype in (torch.bfloat16, torch.float32):
        drawn = draw(folder, dtype)
        sizes[dtype] = drawn.experts.conversion_bytes
        assert sizes[dtype] in (0, 2 * drawn.experts.nbytes(0, 0))
        drawn.checkpoint.close()
    assert sizes[torch.bfloat16] == 0 < sizes[torch.float32]
