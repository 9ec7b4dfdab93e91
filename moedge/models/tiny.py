"""Random checkpoints of any MoE architecture, small enough for tests and examples.

Knows configs and the names of their sizes; the weights mean nothing. Writes the standard layout, in several shards.
Adding an architecture is nothing, or one row in `_ROWS`.
"""

from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moedge.errors import ModelError
from moedge.models.anatomy import dissect
from moedge.models.architecture import text_class

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_LAYERS = 4
_SIZES: dict[str, Any] = {  # applied where the config has the field
    "vocab_size": 288,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}
_TOWER: dict[str, Any] = {  # sizes of what a multimodal model has besides its text part
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "out_hidden_size": _SIZES["hidden_size"],
    "text_hidden_size": _SIZES["hidden_size"],
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [],
}
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "full_attention"] * 2
_ROWS: dict[str, dict[str, Any]] = {  # what an architecture needs besides, or instead
    "bailing_hybrid": {"layer_types": _HYBRID},
    "beam": {"mlp_layer_types": _SPARSE},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"], "o_groups": 2, "o_lora_rank": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [48, 32],
        "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 288,
        "global_head_dim": 16,
    },
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "mlp_layer_types": _SPARSE},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_n_heads": 8, "mamba_d_state": 16},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 64},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "muse_spark": {
        "audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4, "out_hidden_size": _SIZES["hidden_size"]},
        "projector_hidden_size": 32,
        "out_hidden_size": 32,
    },
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h": {
        "num_hidden_layers": None,
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
    },
    "nllb-moe": {
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "switch_transformers": {
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def make_tiny(
    model_type: str,
    out_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `model_type` with at least two MoE layers into `out_dir`; returns that folder.

    `overrides` are fields of the config. With `tokenizer`, a byte-level one with a chat template goes along. Weights
    are large enough (std 0.08) that routing and logits differ from token to token. Raises ModelError for a type that
    transformers does not know, or that has no experts.
    """
    out = Path(out_dir)
    config = tiny_config(model_type, **overrides)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = _model_class(config)._from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        dissect(model)
        _randomise(model)
    finally:
        torch.random.set_rng_state(random_state)
    model.to(dtype).save_pretrained(out, max_shard_size="300KB")
    if tokenizer:
        _byte_tokenizer().save_pretrained(out)
    return out


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of `model_type` with small sizes."""
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"model type {model_type!r} is not one that transformers knows: see its docs for the names")
    cls = CONFIG_MAPPING[model_type]
    if "text_config" in cls.sub_configs:
        given = {**_ROWS.get(model_type, {}), **overrides}
        parts = {name: type(getattr(cls(), name)) for name in cls.sub_configs if name not in given}
        for name, part in parts.items():
            given[name] = tiny_config(part.model_type) if name == "text_config" else part(**_that_fit(_TOWER, part))
        return cls(**given)
    sizes = _that_fit(_SIZES, cls)
    if "kv_lora_rank" in sizes:  # multi-head latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return cls(**{**sizes, **_ROWS.get(model_type, {}), **overrides})


def _that_fit(sizes: dict[str, Any], cls: type[PreTrainedConfig]) -> dict[str, Any]:
    fields = signature(cls.__init__).parameters
    return {name: size for name, size in sizes.items() if name in fields}


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Of a multimodal config the whole model, else the text model."""
    if "text_config" in config.sub_configs and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return cast(type[PreTrainedModel], MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
    return text_class(config)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Matrices and all-zero vectors (biases) get noise; norms and other vectors keep what the architecture sets."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.08)
        elif not parameter.any():
            parameter.normal_(0, 0.02)
    saved = model.state_dict()
    experts = min(layer.num_experts for layer in dissect(model).layers)
    for name, buffer in model.named_buffers():
        if name in saved and not buffer.is_floating_point():  # a table from token to expert (DeepSeek V4)
            buffer.random_(0, experts)
        elif name in saved and not buffer.any():  # a router's correction bias
            buffer.normal_(0, 0.02)


def _byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
