"""Packing: the same model, bit for bit, from other files; what is wrong with those is named, and nothing half made."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NAMED
from packing import contents, kill_and_go_on, logits
from safetensors import safe_open
from safetensors.torch import load_file

from moedge.errors import CheckpointError, MemoryLimitError, ModelError
from moedge.models import pack as format_module
from moedge.models.pack import BACKBONE, EXPERTS, PackedCheckpoint, checksum
from moedge.models.tiny import make_tiny
from moedge.native import library
from moedge.runtime import journal
from moedge.runtime import pack as module
from moedge.runtime.formats import SHORT, Format
from moedge.runtime.lm import LM, load
from moedge.runtime.pack import pack, verify
from moedge.runtime.reader import DirectReader

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of qwen3_moe; do not change it."""
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(tiny("qwen3_moe", tokenizer=True), out)
    return out


def assert_same_model(original: Path, other: Path, load_with: Callable[..., LM], **settings: Any) -> None:
    with load_with(8, original, **settings) as lm:
        expected = logits(lm)
    assert expected.isfinite().all()
    for capacity in (0, 4):
        with load_with(capacity, other, **settings) as lm:
            assert torch.equal(logits(lm), expected)
            assert torch.equal(logits(lm), expected), "now partly from memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", NAMED)
def test_a_plain_pack_is_the_same_model(
    model_type: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM]
) -> None:
    original = tiny(model_type, dtype=dtype)
    pack(original, tmp_path / "out")
    assert_same_model(original, tmp_path / "out", load_with)


@pytest.mark.parametrize("model_type", NAMED)
def test_a_pack_in_12_bits_is_the_same_model_and_smaller(
    model_type: str, tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM]
) -> None:
    original = tiny(model_type, dtype=torch.bfloat16)
    plain, short = pack(original, tmp_path / "plain"), pack(original, tmp_path / "short", SHORT)
    assert short["experts_bytes"] < plain["experts_bytes"]
    assert_same_model(original, tmp_path / "short", load_with)
    verify(tmp_path / "short")


def test_a_pack_in_12_bits_in_another_dtype_and_without_kernels(
    tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny("qwen3_moe", dtype=torch.bfloat16)
    pack(original, tmp_path / "out", SHORT)
    assert_same_model(original, tmp_path / "out", load_with, dtype="fp32")
    monkeypatch.setattr(library, "load", lambda: None)
    assert_same_model(original, tmp_path / "out", load_with)


def test_what_12_bits_cannot_hold_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"is float32: --bits 12 is for bf16 .* take --bits 16"):
        pack(tiny("qwen3_moe"), tmp_path / "out", SHORT)
    monkeypatch.setattr(module, "shorten", lambda *_: False)
    with pytest.raises(ModelError, match=r"expert \d+ of layer \d+ has numbers of too many sizes"):
        pack(tiny("qwen3_moe", dtype=torch.bfloat16), tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()


def test_tensors_keep_the_address_that_they_have_in_files(tiny: Tiny, tmp_path: Path) -> None:
    """Switch's experts are taken from the mapped file as they lie there, which may be at any multiple of 4."""
    original = tiny("switch_transformers", dtype=torch.bfloat16)
    pack(original, tmp_path / "out")
    checkpoint = PackedCheckpoint(tmp_path / "out")
    assert any(any(each) for layer in checkpoint.manifest.layers for each in layer.shifts.values())
    assert any(shift for _, shift in checkpoint.manifest.backbone.values())
    for name, (_, shift) in checkpoint.manifest.backbone.items():
        assert checkpoint.read(name).data_ptr() % 64 == shift
    checkpoint.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_dtype_than_it_was_packed_in(
    dtype: str, tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM]
) -> None:
    original = tiny("qwen3_moe", dtype=torch.bfloat16 if dtype == "fp32" else torch.float32)
    pack(original, tmp_path / "out")
    assert_same_model(original, tmp_path / "out", load_with, dtype=dtype)


def test_an_expert_is_one_read_into_its_slot(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = DirectReader.read_extent

    def spy(self: DirectReader, part: Any, memory: torch.Tensor) -> int:
        reads.append((part.offset, part.nbytes, memory.data_ptr(), memory.untyped_storage().data_ptr()))
        return real(self, part, memory)

    monkeypatch.setattr(DirectReader, "read_extent", spy)
    monkeypatch.delattr(DirectReader, "read")
    with load(packed) as lm:
        logits(lm)
        slots = lm.store._slots.read[0].untyped_storage().data_ptr()
        assert lm.store.counters.misses == len(reads) > 0
        assert lm.store.counters.bytes_read == sum(nbytes for _, nbytes, _, _ in reads)
    assert all(offset % 4096 == nbytes % 4096 == address % 4096 == 0 for offset, nbytes, address, _ in reads)
    assert all(storage == slots for *_, storage in reads)


def test_other_tools_open_it(packed: Path, tiny: Tiny) -> None:
    original: dict[str, torch.Tensor] = {}
    for file in tiny("qwen3_moe", tokenizer=True).glob("*.safetensors"):
        original |= load_file(file)
    backbone = load_file(packed / BACKBONE)
    assert backbone.keys() == {name for name in original if ".experts." not in name}
    assert all(torch.equal(backbone[name], original[name]) for name in backbone)
    with safe_open(packed / EXPERTS, "pt") as file:
        metadata = file.metadata()
        layers = json.loads(metadata["layers"])
        own = json.loads(metadata["backbone"])["tensors"]
        extent = file.get_tensor("layers.1.experts.3")
        index = sum(layer["experts"] for layer in layers[:1]) + 3
        assert metadata["extents"][8 * index :][:8] == checksum(extent)
    assert own.keys() == backbone.keys()
    down = layers[1]["tensors"]["down_proj"]
    _, shape, offset = down["parts"]["values"]
    count = shape[0] * shape[1] * 4
    stored = extent[offset : offset + count].view(torch.float32).view(shape)
    wanted = next(t for n, t in original.items() if n.endswith("layers.1.mlp.experts.3.down_proj.weight"))
    assert torch.equal(stored, wanted)


@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 32, symmetric=False), SHORT], ids=str)
def test_the_same_model_gives_the_same_bytes(format: Format, tiny: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(tiny("gpt_oss", dtype=torch.bfloat16), tmp_path / name, format)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_run_that_is_killed_again_and_again_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    model, formats = tiny("qwen3_moe", num_experts=16, dtype=torch.bfloat16), ("plain", "bf16-12", "int4-g32")
    for format in formats:
        pack(model, tmp_path / "whole" / format, Format.parse(format))
    (tmp_path / "out").mkdir()
    kills = kill_and_go_on(10, *((model, tmp_path / "out" / format, format) for format in formats))
    assert kills == [10, 10, 10], "it was done before"
    for format in formats:
        assert contents(tmp_path / "out" / format) == contents(tmp_path / "whole" / format)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """The disk fails from the `count`th extent on."""
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > count:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_disk_that_becomes_full_and_going_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny("qwen3_moe"), tmp_path / "out"
    pack(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(CheckpointError, match=r"disk of .*out\.partial is full: free some space"):
            pack(model, out)
    assert not out.exists()
    written = []
    with monkeypatch.context() as patch:
        real = os.pwrite
        patch.setattr(os, "pwrite", lambda fd, data, offset: written.append(offset) or real(fd, data, offset))
        pack(model, out)
    assert len(written) == 4 * 8 - 5, "what was there was written again"
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_what_an_earlier_run_recorded_but_the_disk_lost_is_written_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny("qwen3_moe"), tmp_path / "out"
    pack(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(CheckpointError, match="full"):
            pack(model, out)
    with open(tmp_path / "out.partial" / EXPERTS, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 5000)
        file.write(bytes(4000))
    pack(model, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_started_pack_of_something_else_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(CheckpointError, match="full"):
            pack(tiny("qwen3_moe"), out)
    for model, format in ((tiny("qwen3_moe"), Format("int8")), (tiny("qwen3_moe", num_experts=16), Format("plain"))):
        with pytest.raises(CheckpointError, match="begun from another model or with other settings"):
            pack(model, out, format)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    first = journal.Unfinished(tmp_path / "out", {})
    with pytest.raises(CheckpointError, match="another moedge process"):
        journal.Unfinished(tmp_path / "out", {})
    first.close()
    journal.Unfinished(tmp_path / "out", {}).close()


def test_what_is_in_the_way_is_left_alone(packed: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists already"):
        pack(tiny("qwen3_moe"), tmp_path / "out")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match=r"other\.partial is in the way"):
        pack(tiny("qwen3_moe"), tmp_path / "other")
    assert (tmp_path / "other.partial" / "mine").read_text() == "precious"
    with pytest.raises(ModelError, match="packed already"):
        pack(packed, tmp_path / "again")


def test_too_small_a_disk_is_seen_before(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    stop_after(0, monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError, match=r"will take .* its disk has 29. KiB for it: free .* or choose"):
        pack(tiny("qwen3_moe"), tmp_path / "out")


def test_too_small_a_limit(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(MemoryLimitError, match=r"packing needs .* MiB, .* for one expert, --memory gives 10 MiB"):
        pack(tiny("qwen3_moe"), tmp_path / "out", memory=10 << 20)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = make_tiny("qwen3_moe", tmp_path / "model")
    file = next(f for f in sorted(model.glob("*.safetensors")) if any(".experts.5.down" in n for n in load_file(f)))
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts.5.down" in n)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    layer = name.split("layers.")[1].split(".")[0]
    with pytest.raises(CheckpointError, match=f"down_proj of expert 5 of layer {layer} holds NaN"):
        pack(model, tmp_path / "out", Format("int8"))


# ---- damage ----


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def use(folder: Path) -> None:
    """Load and use every expert."""
    with load(folder) as lm:
        for layer in lm.anatomy.layers:
            for _ in lm.store.fetch(layer.index, range(layer.num_experts)):
                pass


def test_a_sound_pack_passes(copy: Path) -> None:
    use(copy)
    assert verify(copy) == {"experts": 32, "tensors": 39, "files": 5}


def test_every_flipped_bit_is_found(copy: Path) -> None:
    """At random places of every file: with --verify all, when loading and using all experts as well."""
    chance = torch.Generator().manual_seed(5)
    for path in sorted(copy.iterdir()):
        size = path.stat().st_size
        head = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0] if path.suffix == ".safetensors" else size
        places = [int(torch.randint(8 * end, (1,), generator=chance)) for end in (head, head, head, size, size)]
        for bit in (*places, 0, 63, 8 * size - 1):
            flip(path, bit)
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                verify(copy)
            flip(path, bit)
    verify(copy)


@pytest.mark.parametrize("name", [EXPERTS, BACKBONE, "config.json", "tokenizer.json", "generation_config.json"])
def test_a_flipped_bit_is_found_in_use(name: str, copy: Path) -> None:
    flip(copy / name, 8 * (copy / name).stat().st_size // 2)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        use(copy)


def test_a_damaged_expert_is_named_and_the_others_can_be_used(copy: Path) -> None:
    checkpoint = PackedCheckpoint(copy)
    part = checkpoint.extent(2, 6)
    checkpoint.close()
    flip(copy / EXPERTS, 8 * (part.offset + 77))
    message = rf"expert 6 of layer 2 in .*{EXPERTS} is damaged .*copy the pack again"
    with load(copy) as lm:
        with pytest.raises(CheckpointError, match=message):
            list(lm.store.fetch(2, [1, 6]))
        assert [expert for expert, _ in lm.store.fetch(2, [1, 5])]
    with pytest.raises(CheckpointError, match=message):
        verify(copy)


def test_an_expert_is_checked_once(packed: Path, monkeypatch: pytest.MonkeyPatch, load_with: Any) -> None:
    checked: list[tuple[int, int]] = []
    real = PackedCheckpoint.check
    monkeypatch.setattr(
        PackedCheckpoint, "check", lambda self, *a: checked.append(a[:2]) or real(self, *a)
    )  # fmt: skip
    with load_with(0, packed) as lm:
        for _ in range(2):
            list(lm.store.fetch(1, [2, 3]))
        assert lm.store.counters.misses == 4
    assert sorted(checked) == [(1, 2), (1, 3)]


@pytest.mark.parametrize("name", [EXPERTS, BACKBONE])
@pytest.mark.parametrize("change", [-1, -5000, 1, 4096])
def test_files_that_are_too_short_or_too_long(name: str, change: int, copy: Path) -> None:
    with open(copy / name, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(size + change)
    with pytest.raises(CheckpointError, match=name):
        load(copy)


@pytest.mark.parametrize("name", [EXPERTS, BACKBONE, "generation_config.json"])
def test_files_that_are_not_there(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(copy)


def test_parts_of_another_model(copy: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Of the same shapes; of other shapes."""
    for key, settings in (("same", {"seed": 7}), ("wider", {"moe_intermediate_size": 96})):
        other = tmp_path / key
        pack(tiny("qwen3_moe", tokenizer=True, **settings), other)
        for name in (EXPERTS, BACKBONE) if key == "same" else (EXPERTS, "config.json"):
            mixed = shutil.copytree(copy, tmp_path / f"{key}-{name}")
            shutil.copy(other / name, mixed / name)
            named = BACKBONE if key == "same" else r"config\.json"
            with pytest.raises(CheckpointError, match=named):
                load(mixed)


def test_a_newer_version(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(format_module, "VERSION", 3)
        pack(tiny("qwen3_moe", dtype=torch.bfloat16), tmp_path / "out", SHORT)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS} has pack format 3, this moedge reads up to 2: install"):
        load(tmp_path / "out")


def test_a_folder_that_is_no_pack(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="not a packed model"):
        verify(tiny("qwen3_moe"))
