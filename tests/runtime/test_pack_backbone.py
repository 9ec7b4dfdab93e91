"""A backbone in int8 or int4: the same model as with its matrices rounded so; which they are, where they lie."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import coded_names, contents, logits
from quantising import fp8, quantised
from safetensors.torch import load_file, save_file

from moedge.errors import CheckpointError, ModelError
from moedge.models.backbone import CodedMatrix
from moedge.models.pack import BACKBONE, PackedCheckpoint
from moedge.models.tiny import make_tiny
from moedge.runtime.formats import PLAIN, Format, dequantise, part_shapes, quantise
from moedge.runtime.lm import load
from moedge.runtime.pack import pack, verify

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def rounded(folder: Path, out: Path, names: set[str], format: Format) -> Path:
    """The checkpoint with some of its matrices as they are after quantising."""
    out.mkdir()
    for file in folder.glob("*.json"):
        if not file.name.endswith(".index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(folder)
    for name in names:
        w = tensors[name]
        tensors[name] = dequantise(quantise(w, format), format, w.shape[1], w.dtype)
    save_file({name: each.contiguous() for name, each in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("columns", [32, 64, 80, 7])
@pytest.mark.parametrize("code", ["int8", "int4"])
def test_matrices_are_dense_again_as_the_formats_say(code: str, columns: int) -> None:
    format = Format(code)
    w = torch.randn(9, columns, generator=torch.Generator().manual_seed(2))
    parts = quantise(w, format)
    for dtype in (torch.float32, torch.bfloat16):
        dense = CodedMatrix(str(format), dtype, (9, columns)).dense(parts)
        assert torch.equal(dense, dequantise(parts, format, columns, dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "switch_transformers", "mixtral"])
def test_it_is_the_model_with_its_matrices_rounded(model_type: str, bits: int, tiny: Tiny, tmp_path: Path) -> None:
    original = tiny(model_type, dtype=torch.bfloat16)
    pack(original, tmp_path / "out", backbone=bits)
    names = coded_names(original)
    assert names, "nothing to round"
    expected = rounded(original, tmp_path / "rounded", names, Format(f"int{bits}"))
    checkpoint = PackedCheckpoint(tmp_path / "out")
    for name, wanted in tensors_of(expected).items():
        if name in checkpoint.tensors:  # else an expert's
            assert torch.equal(checkpoint.read(name), wanted)
    assert names <= checkpoint.tensors.keys()
    checkpoint.close()
    with load(tmp_path / "out") as lm:
        assert logits(lm).isfinite().all()
    verify(tmp_path / "out")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_can_be_read_alone_by_other_tools(bits: int, tiny: Tiny, tmp_path: Path) -> None:
    """From the file's header and three short reads, with the formula of the documentation."""
    original = tiny("qwen3_moe")
    pack(original, tmp_path / "out", backbone=bits)
    data = (tmp_path / "out" / BACKBONE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, name, row = json.loads(data[8 : 8 + length]), "model.embed_tokens.weight", 77

    def read(part: str, dtype: torch.dtype) -> torch.Tensor:
        entry = header[f"{name}.{part}"]
        begin, end = entry["data_offsets"]
        each = (end - begin) // entry["shape"][0]
        start = 8 + length + begin + row * each
        return torch.frombuffer(bytearray(data[start : start + each]), dtype=dtype)

    values = read("values", torch.int8 if bits == 8 else torch.uint8)
    if bits == 4:
        byte = values.view(-1, 16)
        values = torch.cat((byte & 15, byte >> 4), 1).view(-1).to(torch.int8) - 8
    scale = read("scales", torch.float16).float().repeat_interleave(32) * read("factors", torch.float32)
    checkpoint = PackedCheckpoint(tmp_path / "out")
    assert torch.equal((values * scale)[:64], checkpoint.read(name)[row])
    assert checkpoint.tensors[name].shape == (288, 64)
    assert name not in checkpoint.stored
    checkpoint.close()
    error = tensors_of(original)[name][row] - (values * scale)[:64]
    assert error.abs().max() < (0.005 if bits == 8 else 0.05)


def test_parts_have_the_shapes_of_the_format(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", backbone=4)
    stored = load_file(tmp_path / "out" / BACKBONE)
    shapes = part_shapes((288, 64), torch.float32, Format("int4"))
    for part, (shape, dtype) in shapes.items():
        tensor = stored[f"lm_head.weight.{part}"]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert "lm_head.weight" not in stored
    assert stored["model.norm.weight"].dtype == torch.float32


def test_a_quantised_checkpoint_is_rounded_once(tmp_path: Path) -> None:
    original = make_tiny("deepseek_v3", tmp_path / "original", dtype=torch.bfloat16, num_hidden_layers=2)
    config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    dense = quantised(original, tmp_path / "model", lambda n: n.endswith("o_proj.weight"), fp8((16, 32)), config)
    pack(tmp_path / "model", tmp_path / "out", PLAIN, backbone=8)
    checkpoint = PackedCheckpoint(tmp_path / "out")
    name = "model.layers.0.self_attn.o_proj.weight"
    found, w = checkpoint.read(name), dense[name].float()
    checkpoint.close()
    expected = dequantise(quantise(w, Format("int8")), Format("int8"), w.shape[1], torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("part", ["values", "scales", "factors"])
def test_a_flipped_bit_is_found(part: str, tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", backbone=8)
    checkpoint = PackedCheckpoint(tmp_path / "out")
    info = checkpoint.stored[f"lm_head.weight.{part}"]
    checkpoint.close()
    data = bytearray(info.file.read_bytes())
    data[info.offset + info.nbytes // 2] ^= 4
    info.file.write_bytes(data)
    for use in (load, verify):
        with pytest.raises(CheckpointError, match=rf"lm_head\.weight\.{part} in .* is damaged"):
            use(tmp_path / "out")


def test_the_same_bytes_twice_and_another_backbone_is_another_pack(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        pack(tiny("qwen3_moe"), tmp_path / name, backbone=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moedge.runtime.pack_backbone.Backbone.write", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(tiny("qwen3_moe"), tmp_path / "c", backbone=8)
    with pytest.raises(CheckpointError, match="with other settings"):
        pack(tiny("qwen3_moe"), tmp_path / "c", backbone=4)
    pack(tiny("qwen3_moe"), tmp_path / "c", backbone=8)
    verify(tmp_path / "c")


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    file = next(f for f in model.glob("*.safetensors") if "lm_head.weight" in load_file(f))
    tensors = load_file(file)
    tensors["lm_head.weight"][5, 6] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinity"):
        pack(model, tmp_path / "out", backbone=8)


def test_the_command(tiny: Tiny, tmp_path: Path, moedge_here: Any) -> None:
    done = moedge_here("pack", tiny("qwen3_moe"), tmp_path / "out", "--backbone", "4", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["backbone_bits"] == 4
    assert moedge_here("info", tmp_path / "out").status == 0
    done = moedge_here("pack", "--verify", tmp_path / "out", "--backbone", "4")
    assert "no other settings" in done.err
    with pytest.raises(ModelError, match="packed already"):
        pack(tmp_path / "out", tmp_path / "again")
