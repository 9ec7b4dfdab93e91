"""Quantised checkpoints as dense ones: numbers are those of the formats' definitions; what does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantising import Made, Write, awq, fp8, gptq, mxfp4, quantised
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moedge.errors import CheckpointError, ModelError
from moedge.models.load import draw
from moedge.models.quantised import QuantisedCheckpoint, quantisation, scheme_of, without_quantisation

Config = dict[str, Any]
GPTQ: Config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
KINDS: dict[str, tuple[Config, Write, tuple[int, ...]]] = {
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4, (3, 96, 40)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8((16, 32)), (40, 80)),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None), (40, 80)),
    "gptq": (GPTQ, gptq(4, 32), (24, 96)),
    "gptq 8 bits": (GPTQ | {"bits": 8}, gptq(8, 32), (24, 96)),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 32, v2=True), (24, 96)),
    "gptq act-order": (GPTQ | {"desc_act": True}, gptq(4, 32, act_order=True), (24, 96)),
    "gptq by row": (GPTQ | {"group_size": -1}, gptq(4, -1), (24, 96)),
    "gptq last group short": (GPTQ | {"group_size": 64}, gptq(4, 64), (24, 96)),
    "gptq symmetric": (GPTQ | {"sym": True}, gptq(4, 32, sym=True), (24, 96)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq(32), (24, 96)),
    "auto-round as gptq": (GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
                           gptq(4, 32), (24, 96)),
    "auto-round as awq": (GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
                          awq(32), (24, 96)),
}  # fmt: skip


def write(folder: Path, config: Config, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def open_checkpoint(folder: Path) -> QuantisedCheckpoint:
    config = quantisation(folder)
    assert config is not None
    return QuantisedCheckpoint(folder, scheme_of(folder, config))


def make(kind: str, folder: Path) -> tuple[QuantisedCheckpoint, Made]:
    config, writer, shape = KINDS[kind]
    stored, dense = writer(shape, torch.Generator().manual_seed(1))
    write(folder, config, {end.replace("NAME", "a.b"): part for end, part in stored.items()} | {"c": torch.ones(3)})
    return open_checkpoint(folder), (stored, dense)


def test_auto_rounds_awq_has_zero_points_unless_it_is_symmetric(tmp_path: Path) -> None:
    kinds = []
    for symmetric in (True, False):
        config = GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": symmetric}
        scheme = scheme_of(tmp_path, config)
        assert scheme.native is not None
        kinds.append(scheme.native.symmetric)
    assert kinds == [True, False]


@pytest.mark.parametrize("at_once", [1 << 19, 96 * 5], ids=["whole", "five rows at a time"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_definition(
    kind: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moedge.models.quantised.AT_ONCE", at_once)
    checkpoint, (_, dense) = make(kind, tmp_path)
    (name,) = checkpoint.tensors.keys() - {"c"}
    assert name == ("a.b" if kind == "mxfp4" else "a.b.weight")
    assert checkpoint.tensors[name].shape == tuple(dense.shape)
    torch.testing.assert_close(checkpoint.read(name).double(), dense, rtol=1e-6, atol=0)
    half = checkpoint.presented_as(torch.bfloat16)
    assert torch.equal(half.read(name), checkpoint.read(name).bfloat16())
    pieces = torch.cat(list(half.dense_bytes(half.tensors[name])))
    assert torch.equal(pieces.view(torch.bfloat16).view(dense.shape), half.read(name))
    assert torch.equal(half.read("c"), torch.ones(3))


def test_mxfp4_as_transformers_has_it(tmp_path: Path) -> None:
    checkpoint, (stored, _) = make("mxfp4", tmp_path)
    expected = convert_moe_packed_tensors(stored["NAME_blocks"], stored["NAME_scales"])
    assert torch.equal(checkpoint.presented_as(torch.bfloat16).read("a.b"), expected)


def test_fp8_as_transformers_has_it(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    stored, _ = fp8((16, 32))((48, 64), torch.Generator().manual_seed(1))
    write(tmp_path, config, {"b.weight": stored["NAME.weight"], "b.weight_scale_inv": stored["NAME.weight_scale_inv"]})
    expected = Fp8Dequantize(None)._dequantize_one(*stored.values(), output_dtype=torch.bfloat16)
    assert torch.equal(open_checkpoint(tmp_path).presented_as(torch.bfloat16).read("b.weight"), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_fp8_scales_that_are_exponents(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[124], [129]], dtype=torch.uint8)
    config = {"quant_method": "fp8", "weight_block_size": [1, 2], "scale_fmt": "ue8m0"}
    write(tmp_path, config, {"w": weight, "w_scale_inv": scales.view(dtype)})
    assert open_checkpoint(tmp_path).read("w").tolist() == [[0.125, -0.25], [2.0, 12.0]]


@pytest.mark.parametrize(
    ("kind", "drop", "message"),
    [
        ("mxfp4", "a.b_scales", "has a.b_blocks but no a.b_scales"),
        ("mxfp4", "a.b_blocks", "has a.b_scales .* but not the tensors that it belongs to"),
        ("fp8", "a.b.weight_scale_inv", "has a.b.weight but no a.b.weight_scale_inv"),
        ("gptq", "a.b.scales", "has a.b.qweight but no a.b.scales"),
        ("gptq", "a.b.qweight", "has a.b.(qzeros|scales|g_idx) .* but not"),
        ("awq", "a.b.qzeros", "has a.b.qweight but no a.b.qzeros"),
    ],
)
def test_what_is_missing_is_named(kind: str, drop: str, message: str, tmp_path: Path) -> None:
    make(kind, tmp_path)[0].close()
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[drop]
    write(tmp_path, KINDS[kind][0], tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("mxfp4", "a.b_scales", lambda t: t[:, 1:], r"a.b_blocks, a.b_scales .*scales \[39, 3\] do not fit"),
        ("mxfp4", "a.b_scales", lambda t: t[1:], "are not all of 3 experts"),
        ("fp8", "a.b.weight_scale_inv", lambda t: t[1:], r"scales \[2, 3\] do not fit weights \[40, 80\], .*\[3, 3\]"),
        ("fp8 per tensor", "a.b.weight_scale_inv", lambda t: t.repeat(2), "scales .* need one number"),
        ("gptq", "a.b.scales", lambda t: t[1:], "qweight .* qzeros .* do not fit"),
        ("gptq", "a.b.g_idx", lambda t: t[1:], r"g_idx \[95\] does not fit 96 inputs"),
        ("gptq", "a.b.qzeros", lambda t: t[:, :1], "is in 1 bits, only 4 and 8 are read"),
        ("gptq", "a.b.scales", lambda t: t.int(), "a.b.scales in .* is torch.int32, which is not read there"),
        ("awq", "a.b.qweight", lambda t: t[40:], "a.b.qweight, .* has 3 groups for 56 inputs"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    kind: str, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    make(kind, tmp_path)[0].close()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = change(tensors[name])
    write(tmp_path, KINDS[kind][0], tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    make("gptq", tmp_path)[0].close()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["a.b.g_idx"][7] = 3
    write(tmp_path, GPTQ, tensors)
    with pytest.raises(CheckpointError, match=r"a\.b\.weight in .* has a g_idx that is not one of its 3 groups"):
        open_checkpoint(tmp_path).read("a.b.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "by bitsandbytes, which moedge does not read"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"quant_method": "gptq"}, "not read .*bits"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round"}, "packing_format 'auto_round'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    ],
)
def test_formats_that_are_not_read_are_named(config: Config, message: str, tiny: Any, tmp_path: Path) -> None:
    quantised(tiny("qwen3_moe"), tmp_path / "model", lambda name: False, mxfp4, config)
    for settings in ({}, {"quantised": True}):
        with pytest.raises(ModelError, match=message):
            draw(tmp_path / "model", **settings)


def test_the_config_of_the_dense_model() -> None:
    given = {"a": 1, "quantization_config": {}, "text_config": {"quantization_config": {}, "torch_dtype": "float16"}}
    found = json.loads(without_quantisation(json.dumps(given).encode(), torch.bfloat16))
    assert found == {"a": 1, "text_config": {"torch_dtype": "float16"}}
    assert json.loads(without_quantisation(b'{"quantization_config": {}}', torch.float16)) == {"dtype": "float16"}
