"""The experts implementation against transformers' eager one: values, gradients, and refusal after closing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moedge.errors import ModelError
from moedge.runtime.experts import ExpertSource, _distinct
from moedge.runtime.lm import LM, load
from moedge.runtime.store import MemoryStore


def gradient(model: Any, ids: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a random projection of them with respect to the input embeddings."""
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    extra = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=inputs, **extra).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    (logits * direction).sum().backward()
    assert inputs.grad is not None
    return logits.detach(), inputs.grad


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "switch_transformers"])
def test_gradients_are_those_of_eager_although_slots_are_reused(tiny: Callable[..., Path], model_type: str) -> None:
    folder = tiny(model_type)
    cls = AutoModelForSeq2SeqLM if model_type == "switch_transformers" else AutoModelForCausalLM
    stock: Any = cls.from_pretrained(folder).eval()
    if model_type != "switch_transformers":
        stock.set_experts_implementation("eager")
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with load(folder) as lm:
        shrink(lm)
        expected, actual = gradient(stock, ids), gradient(lm.model, ids)
        assert torch.equal(expected[0], actual[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-6)
        assert lm.store.counters.misses > 0


def shrink(lm: LM) -> None:
    """Keep no expert between events, so that backward finds other experts in the slots."""
    for cache in lm.store.caches:
        cache.capacity = 0


def test_router_weights_get_a_gradient(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_moe")
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = torch.arange(3, 14)[None]
    with load(folder) as lm:
        for model in (stock, lm.model):
            model(ids).logits.square().sum().backward()
        ours = dict(lm.model.named_parameters())
        compared = 0
        for name, parameter in stock.named_parameters():
            if name in ours:
                torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)
                compared += "gate" in name or "router" in name
        assert compared


def test_peft_trains_attention(tiny: Callable[..., Path]) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.arange(3, 20)[None]
    with load(tiny("qwen3_moe")) as lm:
        torch.manual_seed(0)
        model = peft.get_peft_model(lm.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


def test_a_closed_model_refuses_to_run(tiny: Callable[..., Path]) -> None:
    lm = load(tiny("qwen3_moe"))
    lm.close()
    lm.close()
    with pytest.raises(ModelError, match="closed"), torch.no_grad():
        lm.model(torch.arange(3, 6)[None])


def test_a_closed_model_refuses_to_run_with_what_it_still_holds(tiny: Callable[..., Path]) -> None:
    ids = torch.arange(3, 6)[None]
    with load(tiny("qwen3_moe")) as lm, torch.no_grad():
        for _ in range(2):
            before = lm.store.counters.misses
            lm.model(ids)
    assert lm.store.counters.misses == before, "all experts that it needs are in memory"
    with pytest.raises(ModelError, match="closed"), torch.no_grad():
        lm.model(ids)


def test_a_token_that_names_an_expert_twice(tiny: Callable[..., Path]) -> None:
    """As a table from token to experts may (DeepSeek V4): alone it is computed as it is among others."""
    with load(tiny("qwen3_moe")) as lm, torch.no_grad():
        module: Any = lm.model.get_submodule(lm.anatomy.layers[0].experts)
        hidden = torch.randn(2, lm.model.config.hidden_size, generator=torch.Generator().manual_seed(4))
        index, weights = torch.tensor([[5, 5], [2, 5]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        together = module(hidden, index, weights)
        for token in range(2):
            alone = module(hidden[token, None], index[token, None], weights[token, None])
            torch.testing.assert_close(alone[0], together[token])


def test_distinct_experts_and_their_router_mass() -> None:
    index = torch.tensor([[3, 1], [1, 5]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert _distinct(index, weights, 6) == ([1, 3, 5], [0.75, 0.75, 0.5])
    assert _distinct(index, weights, 5) == ([1, 3], [0.75, 0.75])  # 5 stands for "no expert"
    assert _distinct(index[:1], weights[:1], 6) == ([1, 3], [0.25, 0.75])
    assert _distinct(index, None, 6) == ([1, 3, 5], None)


def test_source_hands_the_store_each_expert_once(tiny: Callable[..., Path]) -> None:
    with load(tiny("qwen3_moe")) as lm:
        source = ExpertSource(lm.anatomy.layers[0])
    with pytest.raises(ModelError, match="closed"):
        source.fetch(torch.tensor([[0, 1]]), None)
    source.store = MemoryStore([[{"w": torch.tensor(float(e))} for e in range(8)]])
    got = list(source.fetch(torch.tensor([[2, 0], [0, 3]]), None))
    assert [(e, float(p["w"])) for e, p in got] == [(0, 0.0), (2, 2.0), (3, 3.0)]
