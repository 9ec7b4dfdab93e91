"""A model with some of its experts is the full one whose router may choose no others; the rest is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from fitting import FAMILIES, halves, logits_of, only, stock
from safetensors.torch import load_file, save_file

from moedge.errors import ModelError
from moedge.models import narrow as module
from moedge.models.anatomy import dissect
from moedge.models.load import Blueprint, draw
from moedge.models.narrow import Constraints, constraints, narrow
from moedge.models.tiny import make_tiny
from moedge.runtime.lm import load
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]


def drawn(folder: Path, kept: Sequence[Sequence[int]] | None = None) -> Blueprint:
    blueprint = draw(folder)
    blueprint.checkpoint.close()
    return blueprint if kept is None else narrow(blueprint, kept)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_the_full_model_that_may_not_choose_the_others(model_type: str, tiny: Tiny) -> None:
    folder = tiny(model_type)
    model = stock(folder, torch.float32)
    kept = halves(dissect(model).num_layers)
    whole = logits_of(model)
    with only(model, kept):
        expected = logits_of(model)
    with load(folder, experts=kept) as lm:
        assert {layer.num_experts for layer in lm.anatomy.layers} == {4}
        assert torch.allclose(logits_of(lm.model), expected, atol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-2)


@pytest.mark.parametrize("model_type", ["gpt_oss", "switch_transformers"])
def test_dropped_experts_are_not_read(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = make_tiny(model_type, tmp_path)
    blueprint = draw(folder)
    kept = halves(blueprint.anatomy.num_layers)
    with load(folder, experts=kept) as lm:
        expected = logits_of(lm.model)
    keys = {(layer.index, expert) for layer in blueprint.anatomy.layers for expert in range(8)}
    for layer, expert in sorted(keys - {(layer, expert) for layer, each in enumerate(kept) for expert in each}):
        for source in blueprint.experts.sources(layer, expert):  # type: ignore[union-attr]
            for part in source.parts:
                with open(part.info.file, "r+b") as file:
                    file.seek(part.offset)
                    file.write(b"\xff" * part.nbytes)  # not a number
    blueprint.checkpoint.close()
    with load(folder, experts=kept) as lm:
        assert torch.equal(logits_of(lm.model), expected)


def test_a_packed_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("gpt_oss", dtype=torch.bfloat16)
    kept = halves(drawn(folder).anatomy.num_layers)
    pack(folder, tmp_path / "packed")
    with load(tmp_path / "packed", experts=kept) as packed, load(folder, experts=kept) as lm:
        assert torch.equal(logits_of(packed.model), logits_of(lm.model))


def test_what_a_layer_must_keep(tiny: Tiny) -> None:
    assert constraints(drawn(tiny("mixtral"))) == Constraints(minimum=2)
    assert constraints(drawn(tiny("switch_transformers"))) == Constraints(minimum=1)
    grouped = tiny("deepseek_v3", num_experts_per_tok=3)  # two groups of four, of which a token takes one
    assert constraints(drawn(grouped)) == Constraints(minimum=6, groups=2)
    assert constraints(drawn(tiny("deepseek_v3"))) == Constraints(minimum=4, groups=2)
    assert constraints(drawn(tiny("deepseek_v2"))) == Constraints(minimum=2)
    limited = tiny("deepseek_v2", topk_method="group_limited_greedy", num_experts_per_tok=1)
    assert constraints(drawn(limited)) == Constraints(minimum=2, groups=2)


@pytest.mark.parametrize(
    ("model_type", "each", "message"),
    [
        ("mixtral", (3,), r"layer 0 would keep 1 of 8 experts, its router needs 2 to choose 2: keep more"),
        ("mixtral", (0, 8), r"layer 0 has experts 0 to 7, not \[0, 8\]"),
        ("mixtral", (1, 1), r"layer 0 has experts 0 to 7, not \[1, 1\]"),
        ("deepseek_v3", (0, 1, 2, 4, 5), r"would keep 3, 2 experts of its 2 groups of 4"),
        ("deepseek_v3", (0, 4), r"its router needs 4 in 2 groups to choose 2"),
        ("deepseek_v4", (0, 1, 2, 3), r"DeepseekV4ForCausalLM cannot .*tid2eid is a table from tokens to experts"),
    ],
)
def test_what_cannot_be_kept(model_type: str, each: tuple[int, ...], message: str, tiny: Tiny) -> None:
    blueprint = drawn(tiny(model_type))
    with pytest.raises(ModelError, match=message):
        narrow(blueprint, [each] * blueprint.anatomy.num_layers)


def test_layers_keep_equally_many(tiny: Tiny) -> None:
    blueprint = drawn(tiny("mixtral"))
    layers = blueprint.anatomy.num_layers
    with pytest.raises(ModelError, match=r"from 2 to 3 experts: MixtralForCausalLM has one number"):
        narrow(blueprint, [(0, 1, 2)] + [(0, 1)] * (layers - 1))
    with pytest.raises(ModelError, match=f"experts of 1 layers are given, the model has {layers}"):
        narrow(blueprint, [(0, 1)])


def test_a_count_under_an_unknown_name(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTS", ("num_experts",))  # granite calls it num_local_experts
    blueprint = drawn(tiny("granitemoe"))
    with pytest.raises(ModelError, match=r"GraniteMoeForCausalLM cannot be given 4 .*layer 0 keeps 8; tried num_exp"):
        narrow(blueprint, halves(blueprint.anatomy.num_layers))


def test_a_tensor_that_depends_on_the_count_in_an_unknown_way(tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path)
    for file in folder.glob("*.safetensors"):
        transposed = {n: t.mT.contiguous() if n.endswith("gate.weight") else t for n, t in load_file(file).items()}
        save_file(transposed, file, {"format": "pt"})
    blueprint = drawn(folder)
    with pytest.raises(ModelError, match=r"gate.weight \[64, 8\] of Mixtral\w+ depends on the number of experts"):
        narrow(blueprint, halves(blueprint.anatomy.num_layers))


def test_the_plan_is_of_what_is_kept(tiny: Tiny) -> None:
    full, small = (drawn(tiny("qwen3_moe"), kept) for kept in (None, halves(4)))
    assert small.anatomy.expert_bytes * 2 == full.anatomy.expert_bytes
    rows = sum(4 * 64 * 4 for _ in full.anatomy.layers)  # of the routers
    assert full.backbone_bytes - small.backbone_bytes == rows
    assert [full.experts.nbytes(0, 2), full.config.num_local_experts] == [small.experts.nbytes(0, 1), 8]
