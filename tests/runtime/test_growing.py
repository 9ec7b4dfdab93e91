"""A cache that appends in place: the same numbers as transformers' own, and no copy for each token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moedge import load
from moedge.runtime.forward import croppable, last_logits
from moedge.runtime.growing import LEAST, GrowingLayer, GrowingWindow, let_grow


def states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_dynamic_layer_holds() -> None:
    plain, growing = DynamicCache(), DynamicCache()
    for step, tokens in enumerate([3, 1, 1, LEAST, 1, 2 * LEAST, 1]):
        if step in (3, 5):  # go back, as a session does whose next text differs
            plain.crop(-2)
            growing.crop(-2)
        for cache in (plain, growing):
            cache.update(states(tokens, step), states(tokens, step + 100), 0)
        let_grow(growing)
        assert isinstance(growing.layers[0], GrowingLayer)
        assert not isinstance(plain.layers[0], GrowingLayer)
        assert torch.equal(plain.layers[0].keys, growing.layers[0].keys)
        assert torch.equal(plain.layers[0].values, growing.layers[0].values)
    assert croppable(growing)


@pytest.mark.parametrize("window", [2, 5, LEAST])
def test_it_holds_what_a_sliding_window_holds(window: int) -> None:
    plain, growing = (DynamicCache() for _ in range(2))
    plain.layers, growing.layers = ([DynamicSlidingWindowLayer(window)] for _ in range(2))
    for step, tokens in enumerate([3, 1, 1, LEAST - 1, *[1] * LEAST, 2 * LEAST, 1, LEAST, 2, 1]):
        given = states(tokens, step), states(tokens, step + 1000)
        for one, other in zip(plain.update(*given, 0), growing.update(*given, 0), strict=True):
            assert torch.equal(one, other)
        let_grow(growing)
        (expected,), (found,) = plain.layers, growing.layers
        assert isinstance(found, GrowingWindow)
        assert torch.equal(expected.keys, found.keys)
        assert torch.equal(expected.values, found.values)
        assert expected.get_mask_sizes(1) == found.get_mask_sizes(1)
        assert found.keys.untyped_storage().nbytes() <= 8 * 4 * (window + 2 * LEAST)


def test_a_window_that_is_not_full_can_go_back() -> None:
    plain, growing = (DynamicCache() for _ in range(2))
    plain.layers, growing.layers = ([DynamicSlidingWindowLayer(9)] for _ in range(2))
    for step in range(12):
        for cache in (plain, growing):
            cache.update(states(1, step), states(1, step), 0)
            if step == 5:
                cache.crop(-2)
        let_grow(growing)
        assert torch.equal(plain.layers[0].keys, growing.layers[0].keys)
    assert not croppable(growing)


def test_a_token_is_appended_without_a_copy() -> None:
    cache = DynamicCache()
    places = set()
    for step in range(LEAST - 1):
        cache.update(states(1, step), states(1, step), 0)
        let_grow(cache)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 2  # where the first token was, and the room


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next"]
)
def test_logits_are_bit_equal(model_type: str, tiny: Callable[..., Path]) -> None:
    with load(tiny(model_type)) as lm, torch.inference_mode():
        ours, stock, grown = None, None, False
        for token in range(3, 12):
            ours, found = last_logits(lm.model, [token], ours)
            output = lm.model(torch.tensor([[token]]), past_key_values=stock, use_cache=True)
            stock = output.past_key_values
            assert torch.equal(found, output.logits[0, -1])
            grown |= any(isinstance(layer, GrowingLayer) for layer in ours.layers)
            assert not any(isinstance(layer, GrowingLayer) for layer in stock.layers)
        assert grown == any(type(layer) is DynamicLayer for layer in stock.layers)
