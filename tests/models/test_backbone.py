"""Which matrices of a backbone may be stored in groups."""

from collections.abc import Callable
from pathlib import Path

from packing import coded_names


def test_which_they_are(tiny: Callable[..., Path]) -> None:
    found = {name.replace("model.layers.", "") for name in coded_names(tiny("qwen3_moe"))}
    attention = {f"{layer}.self_attn.{p}_proj.weight" for layer in range(4) for p in "qkvo"}
    assert found == attention | {"model.embed_tokens.weight", "lm_head.weight"}


def test_shared_experts_are_routers_and_gates_are_not(tiny: Callable[..., Path]) -> None:
    found = coded_names(tiny("qwen2_moe"))
    assert "model.layers.1.mlp.shared_expert.up_proj.weight" in found
    assert not any(name.endswith(("gate.weight", "norm.weight", "bias")) for name in found)
    assert not any("router" in name for name in coded_names(tiny("switch_transformers")))
