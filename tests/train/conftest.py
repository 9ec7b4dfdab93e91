"""A model small enough to train in a test, and streams that it can learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moedge.train.data import ExampleStream, Mixture, TextStream


@pytest.fixture
def make_model() -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=48,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
        return Qwen3MoeForCausalLM(config)

    return make


@pytest.fixture
def make_mixture() -> Callable[[], Mixture]:
    """Text that counts upwards, and examples `x x` of four tokens with the last one weighted."""

    def make() -> Mixture:
        text = TextStream(np.arange(3000, dtype=np.uint16) % 40, seed=5)
        first = np.arange(200) % 40
        ids = np.stack([first, np.full(200, 41), first, np.full(200, 42)], axis=1).flatten().astype(np.uint16)
        weights = np.tile(np.array([0.0, 0.0, 3.0, 1.0], np.float32), 200)
        return Mixture({"text": text, "copy": ExampleStream(ids, weights, np.arange(0, 801, 4), seed=5)})

    return make
