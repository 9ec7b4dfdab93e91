"""Packing quantised checkpoints: the model that transformers dequantises, and integers that are not rounded again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import contents, kill_and_go_on, logits
from quantising import Tensors, Write, awq, dense_copy, fp8, gptq, mxfp4, quantised

from moedge.errors import MemoryLimitError, ModelError
from moedge.models.load import draw
from moedge.models.pack import EXPERTS, PackedCheckpoint
from moedge.models.quantised import QuantisedCheckpoint
from moedge.models.tiny import make_tiny
from moedge.native import library as native
from moedge.runtime import sources
from moedge.runtime.extents import extent_of, parameters
from moedge.runtime.formats import PLAIN, Format
from moedge.runtime.lm import LM, load
from moedge.runtime.pack import pack, verify
from moedge.runtime.sources import choose_format

BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
SETTINGS: dict[str, tuple[str, Callable[[str], bool], Write, dict[str, Any]]] = {
    "mxfp4": ("gpt_oss", lambda n: n.endswith(("gate_up_proj", "down_proj")), mxfp4, {"quant_method": "mxfp4"}),
    "fp8": ("deepseek_v3", lambda n: "layers." in n and n.endswith("_proj.weight"), fp8((16, 16)), BLOCK),
    "gptq": ("qwen3_moe", lambda n: n.endswith("_proj.weight"), gptq(4, 32),
             {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}),
    "gptq8": ("qwen3_moe", lambda n: n.endswith("_proj.weight"), gptq(8, 64, v2=True, sym=True),
              {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True, "checkpoint_format": "gptq_v2"}),
    "act-order": ("qwen3_moe", lambda n: n.endswith("_proj.weight"), gptq(4, 32, act_order=True),
                  {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
    "awq": ("qwen3_moe", lambda n: n.endswith("_proj.weight"), awq(32),
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
}  # fmt: skip
Case = tuple[Path, Tensors]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """`case("fp8")`: a quantised checkpoint and its dense tensors."""
    made: dict[str, Case] = {}

    def make(kind: str) -> Case:
        if kind not in made:
            model_type, is_quantised, write, config = SETTINGS[kind]
            folder = tmp_path_factory.mktemp(kind)
            sizes = {"moe_intermediate_size": 64} if model_type == "qwen3_moe" else {}
            original = make_tiny(model_type, folder / "original", dtype=torch.bfloat16, num_hidden_layers=2, **sizes)
            made[kind] = folder / "model", quantised(original, folder / "model", is_quantised, write, config)
        return made[kind]

    return make


def experts_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The parameters of every expert of a pack that is not plain, dequantised in fp32."""
    found = []
    with load(folder, dtype="fp32") as lm:
        anatomy = lm.anatomy
    checkpoint = PackedCheckpoint(folder)
    for layer, expert in checkpoint.manifest.keys:
        packed = checkpoint.manifest.layers[layer]
        memory = checkpoint.read(f"layers.{layer}.experts.{expert}")
        extent = extent_of(packed)
        wide = type(extent)({n: type(t)(t.format, t.shape, torch.float32, t.planes) if t.format != PLAIN else t
                             for n, t in extent.tensors.items()}, extent.nbytes)  # fmt: skip
        found.append(parameters(wide, memory, anatomy.layers[layer].kind.transposed))
    checkpoint.close()
    return found


def wanted(dense: Tensors, kind: str) -> list[dict[str, torch.Tensor]]:
    """The matrices of the same experts, by the names that the model has for them."""
    names = [name for name in dense if ".experts." in name]
    layers = sorted({name.split(".experts.")[0] for name in names})
    found = []
    for layer in layers:
        own = {name.removeprefix(f"{layer}.experts."): dense[name] for name in names if name.startswith(layer)}
        if "down_proj" in own:
            found += [{name: each[e] for name, each in own.items() if each.dim() == 3} for e in range(8)]
            continue
        for e in range(8):
            gate, up, down = (own[f"{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            found.append({"gate_up_proj": torch.cat((gate, up)), "down_proj": down})
    return found


@pytest.mark.parametrize("kind", SETTINGS)
def test_in_16_bits_it_is_the_dequantised_model(kind: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    model, dense = case(kind)
    pack(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    verify(tmp_path / "out")
    with load(dense_copy(model, tmp_path / "dense", dense, torch.bfloat16)) as lm:
        expected = logits(lm)
    assert expected.isfinite().all()
    with load(tmp_path / "out") as lm:
        assert lm.model.dtype == torch.bfloat16
        assert torch.equal(logits(lm), expected)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_transformers_dequantises_it_to_the_same_model(kind: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    model, _ = case(kind)
    pack(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, experts_implementation="eager")
    with load(tmp_path / "out") as lm:
        ids = torch.randint(3, 280, (2, 11), generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            assert torch.equal(lm.model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "bits", "expected"),
    [
        ("mxfp4", 4, "mxfp4-g32"),
        ("gptq", 4, "int4-g32-asym"),
        ("gptq8", 8, "int8-g64"),
        ("awq", 4, "int4-g32-asym"),
    ],
)
def test_integers_are_kept(
    kind: str, bits: int, expected: str, case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = case(kind)
    format = choose_format(model, bits, None, False)
    assert str(format) == expected
    with monkeypatch.context() as patch:
        patch.setattr("moedge.runtime.pack.fill", None)  # nothing is quantised
        pack(model, tmp_path / "out", format)
    for found, values in zip(experts_of(tmp_path / "out"), wanted(dense, kind), strict=True):
        for name, each in values.items():
            torch.testing.assert_close(found[name].double(), each.double(), rtol=1e-6, atol=0)
    with load(tmp_path / "out", dtype="fp32") as lm:
        by_kernel = logits(lm)
    monkeypatch.setattr(native, "load", lambda: None)  # torch computes, from the same integers (-128 is one of them)
    with load(tmp_path / "out", dtype="fp32") as lm:
        tolerance = 1e-3 if bits == 8 else 0.1  # for 4 bits the C kernels round inputs to int8
        torch.testing.assert_close(by_kernel, logits(lm), rtol=0, atol=tolerance)


def test_a_wider_group_is_kept_in_narrower_ones(case: Callable[[str], Case], tmp_path: Path) -> None:
    model, dense = case("gptq8")
    pack(model, tmp_path / "out", Format("int8", 32, symmetric=False))
    for found, values in zip(experts_of(tmp_path / "out"), wanted(dense, "gptq8"), strict=True):
        torch.testing.assert_close(found["down_proj"].double(), values["down_proj"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("mxfp4", Format("int8")),
        ("mxfp4", Format("int4", 64)),
        ("fp8", Format("int8", 32)),
        ("fp8", Format("int4", 32, symmetric=False)),
        ("act-order", Format("int4", 32, symmetric=False)),
        ("awq", Format("int8")),
    ],
    ids=str,
)
def test_other_formats_are_made_from_the_dense_numbers_in_fp32(
    kind: str, format: Format, case: Callable[[str], Case], tmp_path: Path
) -> None:
    model, dense = case(kind)
    pack(model, tmp_path / "out", format)
    exact = dense_copy(model, tmp_path / "dense", dense, torch.float32)
    pack(exact, tmp_path / "expected", format)
    for found, expected in zip(experts_of(tmp_path / "out"), experts_of(tmp_path / "expected"), strict=True):
        assert found.keys() == expected.keys()
        for name, each in found.items():
            torch.testing.assert_close(
                each.float(), expected[name].float(), rtol=1e-2 if each.dim() == 1 else 2e-6, atol=0
            )


def test_what_is_not_said_is_as_the_checkpoint_has_it(case: Callable[[str], Case], tiny: Any) -> None:
    def chosen(folder: Path, bits: int, group: int | None = None, asymmetric: bool = False) -> str:
        return str(choose_format(folder, bits, group, asymmetric)).replace("-g", " ")

    mx, awq4, int8, plain = case("mxfp4")[0], case("awq")[0], case("gptq8")[0], tiny("qwen3_moe")
    assert [chosen(mx, 4), chosen(mx, 4, 32), chosen(mx, 8)] == ["mxfp4 32", "mxfp4 32", "int8 32"]
    assert [chosen(mx, 4, 64), chosen(mx, 4, None, True), chosen(mx, 16)] == ["int4 64", "int4 32-asym", "plain"]
    assert [chosen(awq4, 4, 64), chosen(awq4, 8)] == ["int4 64-asym", "int8 32"]
    assert [chosen(int8, 8, 32), chosen(int8, 8, None, True), chosen(int8, 4)] == ["int8 32", "int8 64-asym", "int4 32"]
    assert [chosen(plain, 8), chosen(plain, 4, 128, True)] == ["int8 32", "int4 128-asym"]


def test_layers_that_are_not_in_mxfp4_are_quantised(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, is_quantised, write, config = SETTINGS["mxfp4"]
    original = case("mxfp4")[0].parent / "original"
    quantised(original, tmp_path / "model", lambda n: is_quantised(n) and "layers.0." in n, write, config)
    pack(tmp_path / "model", tmp_path / "out", Format("mxfp4"))
    checkpoint = PackedCheckpoint(tmp_path / "out")
    formats = [layer.tensors["down_proj"].format for layer in checkpoint.manifest.layers]
    checkpoint.close()
    assert formats == ["mxfp4-g32", "int4-g32"]
    with load(tmp_path / "out") as lm:
        assert logits(lm).isfinite().all()


def test_a_run_that_is_killed_gives_the_same_bytes(case: Callable[[str], Case], tmp_path: Path) -> None:
    kinds, format = ("fp8", "awq"), "int4-g32-asym"
    for kind in kinds:
        pack(case(kind)[0], tmp_path / "whole" / kind, Format.parse(format))
    (tmp_path / "out").mkdir()
    kills = kill_and_go_on(4, *((case(kind)[0], tmp_path / "out" / kind, format) for kind in kinds))
    assert min(kills) >= 2, "it was not killed"
    for kind in kinds:
        assert contents(tmp_path / "out" / kind) == contents(tmp_path / "whole" / kind)


def test_the_largest_matrix_counts_as_it_is_stored(case: Callable[[str], Case]) -> None:
    blueprint = draw(case("fp8")[0], quantised=True)
    checkpoint = blueprint.checkpoint
    assert isinstance(checkpoint, QuantisedCheckpoint)
    sizes = {coded.nbytes for coded in checkpoint.coded.values()}
    assert len(sizes) > 1
    assert sources.Source(blueprint, Format.parse("int4-g32")).overhead == max(sizes)
    checkpoint.close()


def test_a_limit_counts_what_dequantising_takes(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case("fp8")[0]
    monkeypatch.setattr(sources.Source, "overhead", 1 << 40)
    with pytest.raises(MemoryLimitError, match="packing needs 1 TiB, 1 TiB of it for one expert"):
        pack(model, tmp_path / "out", memory=1 << 34)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["info", "plan", "run", "eval"])
def test_other_verbs_name_the_remedy(verb: str, case: Callable[[str], Case], moedge_here: Any) -> None:
    model = case("fp8")[0]
    more = {"run": ["-p", "x"], "eval": ["--text", "README.md"]}.get(verb, [])
    done = moedge_here(verb, model, *more)
    assert done.status == 1
    assert f"is quantised (fp8): convert it with `moedge pack {model} OUT`" in done.err.replace("\n", " ")


def test_the_command(case: Callable[[str], Case], moedge_here: Any, tmp_path: Path) -> None:
    done = moedge_here("pack", case("mxfp4")[0], tmp_path / "out", "--bits", "4")
    assert done.status == 0, done.err
    assert "mxfp4-g32" in done.out
    assert (tmp_path / "out" / EXPERTS).exists()
    with load(tmp_path / "out") as lm:
        assert isinstance(lm, LM)
    with pytest.raises(ModelError, match="packed already"):
        pack(tmp_path / "out", tmp_path / "again")
