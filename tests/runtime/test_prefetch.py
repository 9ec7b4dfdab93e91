"""Guessing the next layer's experts: right when nothing stands between the layers, given up where it proves wrong."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import moedge
from moedge.models.anatomy import dissect
from moedge.runtime import prefetch
from moedge.runtime.lm import LM
from moedge.runtime.prefetch import Prefetcher
from moedge.runtime.store import Glimpse


class Guesses:
    """A store that only remembers what it was told to read, and is told what was used."""

    def __init__(self, layers: int) -> None:
        self.glimpses = [Glimpse()] * layers
        self.told: list[tuple[int, tuple[int, ...]]] = []

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self.told.append((layer, tuple(experts)))


@pytest.fixture
def model(tiny: Callable[..., Path]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).eval()


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess counts as right until it proves wrong."""
    monkeypatch.setattr(prefetch, "UNKNOWN", 1.0)


def test_guesses_have_to_prove_themselves_first(model: torch.nn.Module) -> None:
    store = Guesses(len(model.model.layers))
    Prefetcher(model, dissect(model), store)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.tensor([[7]]))
    assert store.told == []


@pytest.mark.usefixtures("trusting")
def test_without_attention_the_guess_is_what_the_router_chooses(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    chosen: dict[int, set[int]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, index=index: chosen.__setitem__(index, set(args[1].flatten().tolist()))
        )
    store = Guesses(len(model.model.layers))
    Prefetcher(model, dissect(model), store)
    with torch.inference_mode():
        model(torch.tensor([[7]]))  # shows where the norms are
        for token in range(5):
            store.told.clear()
            model(torch.tensor([[token]]))
            assert [layer for layer, _ in store.told] == list(range(1, len(chosen)))
            for layer, experts in store.told:
                assert set(experts) == chosen[layer]
                store.glimpses[layer] = Glimpse(used=tuple(chosen[layer]))


def test_guesses_that_are_wrong_are_given_up_and_come_back(model: torch.nn.Module) -> None:
    store = Guesses(len(model.model.layers))
    Prefetcher(model, dissect(model), store)
    with torch.inference_mode():
        for _ in range(240):  # nothing of a guess is ever used
            model(torch.tensor([[3]]))
        store.told.clear()
        model(torch.tensor([[3]]))
        assert store.told == []
        every = tuple(range(model.config.num_experts))
        store.glimpses = [Glimpse(used=every)] * len(store.glimpses)
        for _ in range(240):
            model(torch.tensor([[3]]))
    assert store.told


@pytest.mark.parametrize("how", ["several tokens", "grad", "disabled"])
def test_nothing_is_guessed(model: torch.nn.Module, how: str) -> None:
    store = Guesses(len(model.model.layers))
    prefetcher = Prefetcher(model, dissect(model), store)
    prefetcher.enabled = how != "disabled"
    ids = torch.tensor([[1, 2, 3]] if how == "several tokens" else [[1]])
    with torch.set_grad_enabled(how == "grad"):
        model(ids)
        model(ids)
    assert store.told == []


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "mixtral", "granitemoe", "jamba"])
def test_answers_and_cache_are_those_without_guesses(
    tiny: Callable[..., Path], load_with: Callable[..., LM], name: str
) -> None:
    found = []
    for enabled in (True, False):
        with load_with(3, tiny(name)) as lm:
            assert lm.prefetcher is not None
            lm.prefetcher.enabled = enabled
            told = _listen(lm)
            steps = list(lm.generate([1, 2, 3, 4], max_new_tokens=12, temperature=0))
            found.append([(s.token, s.hits, s.misses) for s in steps])
            assert bool(told) == enabled
    assert found[0] == found[1]


def test_nothing_is_guessed_for_experts_that_all_stay(tiny: Callable[..., Path]) -> None:
    with moedge.load(tiny("qwen3_moe")) as lm:
        assert lm.prefetcher is None


def _listen(lm: LM) -> list[tuple[int, ...]]:
    """What the store is told to read, which it then does."""
    told: list[tuple[int, ...]] = []
    start = lm.store.prefetch

    def prefetch(layer: int, experts: Sequence[int]) -> None:
        told.append(tuple(experts))
        start(layer, experts)

    lm.store.prefetch = prefetch  # type: ignore[method-assign]
    return told
