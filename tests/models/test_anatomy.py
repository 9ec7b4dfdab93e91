"""Kinds of experts, shared experts and routers that dissect tells apart, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moedge.errors import ModelError
from moedge.models.anatomy import Anatomy, ExpertKind, dissect, expert_modules
from moedge.models.architecture import meta_model, text_class, text_config
from moedge.models.tiny import tiny_config

PLAIN = ExpertKind(gated=True, biased=False, transposed=False, interleaved=False, modular=False)


def anatomy(model_type: str, **overrides: Any) -> Anatomy:
    return dissect(meta_model(tiny_config(model_type, **overrides), torch.bfloat16))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("mixtral", PLAIN),
        ("aria_text", replace(PLAIN, transposed=True)),
        ("gpt_oss", replace(PLAIN, biased=True, transposed=True, interleaved=True)),
        ("nemotron_h", replace(PLAIN, gated=False)),
        ("switch_transformers", replace(PLAIN, gated=False, modular=True)),
        ("nllb-moe", replace(PLAIN, gated=False, biased=True, modular=True)),
    ],
)
def test_the_kind_of_expert(model_type: str, kind: ExpertKind) -> None:
    assert {layer.kind for layer in anatomy(model_type).layers} == {kind}


def test_the_paths_of_a_layer() -> None:
    layer = anatomy("deepseek_v3").layers[0]
    assert layer.block == "model.layers.1.mlp"
    assert layer.experts == "model.layers.1.mlp.experts"
    assert layer.router == "model.layers.1.mlp.gate"
    assert layer.shared == "model.layers.1.mlp.shared_experts"
    assert layer.parameters == {"gate_up_proj": ((96, 64), torch.bfloat16), "down_proj": ((64, 48), torch.bfloat16)}
    assert layer.expert_parameters == 3 * 48 * 64
    assert layer.expert_bytes == 2 * layer.expert_parameters


def test_shared_experts_beside_the_block_and_gates_that_are_none() -> None:
    assert anatomy("granitemoeshared").layers[1].shared == "model.layers.1.shared_mlp"
    assert anatomy("qwen2_moe").layers[0].shared == "model.layers.0.mlp.shared_expert"
    assert anatomy("mixtral").layers[0].shared is None
    assert anatomy("gemma4_text").layers[0].block == "model.layers.0"


def test_counts_follow_the_config() -> None:
    found = anatomy("qwen3_moe", num_experts=12, num_experts_per_tok=5, mlp_only_layers=[1])
    assert [(layer.index, layer.num_experts, layer.top_k) for layer in found.layers] == [(i, 12, 5) for i in range(3)]
    assert found.layers[1].block == "model.layers.2.mlp"
    assert found.num_layers == 3
    assert found.expert_bytes == 3 * 12 * found.layers[0].expert_bytes
    assert found.expert_parameters == found.expert_bytes // 2
    assert not found.encoder_decoder
    assert anatomy("nllb-moe").encoder_decoder


def test_what_every_expert_shares_is_not_an_experts_parameter() -> None:
    config: Any = tiny_config("mixtral")
    model = meta_model(config)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    experts.post_expert_norm = nn.LayerNorm(64)  # as Muse Spark has it
    assert set(dissect(model).layers[0].parameters) == {"gate_up_proj", "down_proj"}


def test_a_model_without_its_experts_carries_its_anatomy() -> None:
    model: Any = meta_model(tiny_config("mixtral"))
    before = dissect(model)
    for layer in before.layers:
        for name in layer.parameters:
            delattr(model.get_submodule(layer.experts), name)
    with pytest.raises(ModelError, match="no expert parameters"):
        dissect(model)
    model._moedge_anatomy = before
    assert dissect(model) is before


def test_a_dense_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is dense.*run a dense one with transformers"):
        dissect(meta_model(tiny_config("llama")))


def test_experts_that_transformers_does_not_mark_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Llama4ForCausalLM has experts, but not of a kind"):
        dissect(meta_model(tiny_config("llama4_text", intermediate_size_mlp=32)))


def _broken(change: str) -> PreTrainedModel:
    model: Any = meta_model(tiny_config("mixtral"))
    block = model.get_submodule("model.layers.0.mlp")
    if change == "router":
        del block.gate
    elif change == "top_k":
        del block.gate.top_k, block.top_k
        model.config = AutoConfig.for_model("llama")
        block.experts.config = model.config
    else:
        block.experts.extra = nn.Parameter(torch.empty(3, 4, device="meta"))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("router", "has experts but no router"),
        ("top_k", "does not say how many experts a token takes"),
        ("extra", r"parameters of \[3, 8\] experts"),
    ],
)
def test_layers_that_cannot_be_understood_are_refused(change: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dissect(_broken(change))


def test_a_router_is_found_by_its_class_where_it_has_another_name() -> None:
    model: Any = meta_model(tiny_config("mixtral"))
    block = model.get_submodule("model.layers.0.mlp")
    block.chooser = block.gate
    del block.gate
    assert dissect(model).layers[0].router == "model.layers.0.mlp.chooser"


def test_modules_of_experts_leave_out_what_is_not_an_expert() -> None:
    model = meta_model(tiny_config("nllb-moe"))
    experts = model.get_submodule(dissect(model).layers[0].experts)
    assert list(expert_modules(experts)) == [f"expert_{e}" for e in range(8)]
    assert len(list(experts.children())) == 9


def test_the_class_comes_from_architectures() -> None:
    config = AutoConfig.for_model("mixtral", architectures=["MixtralForCausalLM"])
    assert text_class(config).__name__ == "MixtralForCausalLM"
    assert text_config(config) is config
    for architectures, message in (
        (["MixtralModel"], "does not predict tokens"),
        (["NeverHeardOfForCausalLM"], "NeverHeardOfForCausalLM is not in transformers"),
    ):
        config.architectures = architectures
        with pytest.raises(ModelError, match=message):
            text_class(config)


def test_of_a_multimodal_config_the_text_part_is_taken() -> None:
    config = tiny_config("qwen3_5_moe", architectures=["Qwen3_5MoeForConditionalGeneration"])
    assert text_class(config).__name__ == "Qwen3_5MoeForCausalLM"
    assert text_config(config).model_type == "qwen3_5_moe_text"
    model = meta_model(config, torch.bfloat16)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert model.dtype == torch.bfloat16
    assert config.dtype != torch.bfloat16  # the caller's config is not changed
    config = tiny_config("qwen3_vl_moe", architectures=["Qwen3VLMoeForConditionalGeneration"])
    assert text_class(config).__name__ == "Qwen3VLMoeForConditionalGeneration"  # no class for its text part alone
    assert text_config(config) is config


def test_a_folder_without_config_is_named(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        meta_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(ModelError, match=r"config\.json that transformers"):
        meta_model(tmp_path)
