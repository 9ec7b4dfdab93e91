"""A pack in int8 or int4 computes with the quantised weights, whether by kernel or as parameters of the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NAMED
from transformers import AutoConfig

from moedge.models.architecture import text_class
from moedge.runtime.extents import extent_of, fill, parameters
from moedge.runtime.formats import Format, dequantise, quantise
from moedge.runtime.lm import LM, load
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]
INT4 = Format("int4")


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 280, (2, 11), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, 4:]} if model.config.is_encoder_decoder else {})}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        value: torch.Tensor = model(**inputs(model)).logits
    return value


def rounded(folder: Path, format: Format) -> Any:
    """The stock model with every expert's matrices rounded, by hand."""
    config = AutoConfig.from_pretrained(folder)
    eager = {} if config.is_encoder_decoder else {"experts_implementation": "eager"}
    model = text_class(config).from_pretrained(folder, dtype="auto", **eager).eval()
    transposed = config.model_type == "gpt_oss"
    for name, parameter in model.named_parameters():
        if ".experts." in name and not name.endswith("bias"):
            stack = parameter.data if parameter.dim() == 3 else parameter.data[None]
            for matrix in stack:
                w = matrix.mT if transposed else matrix
                new = dequantise(quantise(w, format), format, w.shape[1])
                matrix.copy_(new.mT if transposed else new)
    return model


@pytest.mark.parametrize("format", [Format("int8"), INT4, Format("int4", 64, symmetric=False)], ids=str)
@pytest.mark.parametrize("model_type", NAMED)
def test_it_is_the_model_with_rounded_experts(
    model_type: str, format: Format, tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM]
) -> None:
    folder = tiny(model_type)
    expected = logits(rounded(folder, format))
    pack(folder, tmp_path / "out", format)
    for capacity in (0, 4):
        with load_with(capacity, tmp_path / "out") as lm:
            sources = [lm.model.get_submodule(x.experts) for x in lm.anatomy.layers if not x.kind.modular]
            assert all(module._moedge_source.coded.kernel is not None for module in sources)
            if format.bits == 4:  # the C kernels round inputs to int8: a router may then choose another expert
                for module in sources:
                    module._moedge_source.coded.kernel._library = None
            torch.testing.assert_close(logits(lm.model), expected, rtol=1e-3, atol=2e-3)


def test_without_a_kernel_it_is_the_model_with_rounded_experts(tiny: Tiny, tmp_path: Path) -> None:
    """Parameters are made from extents; transposed ones lie otherwise in memory, which moves the last bits of sums."""
    pack(tiny("gpt_oss"), tmp_path / "out", INT4)
    with load(tmp_path / "out") as lm:
        for layer in lm.anatomy.layers:
            lm.model.get_submodule(layer.experts)._moedge_source.coded.kernel = None
        torch.testing.assert_close(logits(lm.model), logits(rounded(tiny("gpt_oss"), INT4)), rtol=1e-5, atol=1e-5)


def test_token_by_token_in_bf16(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe", dtype=torch.bfloat16), tmp_path / "out", Format("int8"))
    with load(tmp_path / "out") as lm, torch.inference_mode():
        ids = inputs(lm.model)["input_ids"]
        whole = lm.model(ids).logits
        cache, rows = None, []
        for piece in ids.split(1, dim=1):
            output = lm.model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits)
        torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=0.05, atol=0.05)


def test_gradients_flow_through(tiny: Tiny, tmp_path: Path) -> None:
    """Those of the backbone are those of the model with rounded experts."""
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("int8"))
    reference = rounded(tiny("qwen3_moe"), Format("int8"))
    with load(tmp_path / "out") as lm:
        gradients = []
        for model in (lm.model, reference):
            weight = model.get_input_embeddings().weight
            model(**inputs(model)).logits.square().mean().backward()
            gradients.append(weight.grad)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)


def test_a_smaller_format_leaves_room_for_more_experts(tiny: Tiny, tmp_path: Path) -> None:
    sizes = []
    for format in (Format("plain"), Format("int8"), INT4):
        pack(tiny("qwen3_moe", moe_intermediate_size=512, dtype=torch.bfloat16), tmp_path / str(format), format)
        with load(tmp_path / str(format)) as lm:
            sizes.append(lm.plan.slot_bytes)
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.32 * sizes[0]


def test_what_one_piece_at_a_time_makes_is_what_the_whole_makes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from moedge.models.load import draw
    from moedge.models.pack import PackedLayer
    from moedge.runtime import extents

    blueprint = draw(tiny("gpt_oss"))
    layer = blueprint.anatomy.layers[0]
    packed = extents.describe(layer, blueprint.experts, INT4)  # type: ignore[arg-type]
    blueprint.checkpoint.close()
    assert PackedLayer.from_dict(packed.as_dict()) == packed
    values = {name: torch.randn(shape, dtype=dtype) for name, (shape, dtype) in layer.parameters.items()}
    made = []
    for at_once in (1 << 19, 1000):
        monkeypatch.setattr(extents, "AT_ONCE", at_once)
        memory = torch.zeros(packed.stride, dtype=torch.uint8)
        fill(extent_of(packed), values, layer.kind.transposed, memory, "an expert")
        made.append((memory, parameters(extent_of(packed), memory, layer.kind.transposed)))
    assert torch.equal(made[0][0], made[1][0])
    for name, value in made[0][1].items():
        assert torch.equal(value, made[1][1][name])
        assert value.shape == values[name].shape
        torch.testing.assert_close(value, values[name], rtol=0, atol=0.4)
