"""The fake at the seam: a stock tiny transformers model with a tokenizer of its own and counters that count calls."""

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

CORPUS = [
    "The sea was calm and the old man slept. ",
    "Hello world, hello moon: 12 + 7 = 19. ",
    "Größe, naïve, 中文 🌍 ",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "olmoe": dict(SIZES, num_experts=8, num_experts_per_tok=2),
    "mixtral": dict(SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "gpt_oss": dict(SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8),
    "jamba": dict(
        SIZES,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "deepseek_v3": dict(
        SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "decoder_start_token_id": 2,
        "max_position_embeddings": 512,
    },
}


@cache
def tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as the mini model's: `<eos>` 0, `<bos>` 1, `<pad>` 2 and the roles of a chat."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<bos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT
    return fast


def without(words: Any, **changes: Any) -> Any:
    """A copy of a tokenizer with other attributes."""
    words = copy.deepcopy(words)
    for name, value in changes.items():
        setattr(words, name, value)
    return words


def with_bos(lm: "FakeLM") -> "FakeLM":
    """The tokenizer puts <bos> before every text, as Llama's does."""
    words = without(lm.tokenizer, bos_token="<bos>")
    assert isinstance(words, PreTrainedTokenizerFast)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    lm.tokenizer = words
    return lm


@dataclass
class FakeCounters:
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


@dataclass
class FakeStore:
    counters: FakeCounters = field(default_factory=FakeCounters)


@dataclass
class FakeLM:
    model: Any
    tokenizer: Any
    store: FakeStore | None = None
    context: int | None = None
    prefill_chunk: int = 512


def tiny_lm(architecture: str = "qwen3_moe", seed: int = 0, **overrides: Any) -> FakeLM:
    """A random model whose vocabulary is the tokenizer's. Each forward counts as one hit and two misses of 10 bytes."""
    words = tokenizer()
    special = {"vocab_size": len(words), "pad_token_id": 2, "eos_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(architecture, **(SHAPES[architecture] | special | overrides))
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "norm" not in name:
                weight.mul_(4)  # peaked logits: an untrained model's are too flat to tell right from wrong
    store = FakeStore()

    def count(*_: Any) -> None:
        store.counters.hits += 1
        store.counters.misses += 2
        store.counters.bytes_read += 20

    model.register_forward_hook(count)
    return FakeLM(model, words, store)
