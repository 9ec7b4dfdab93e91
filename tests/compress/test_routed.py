"""The full model with some experts shut off is the smaller model, and what a toggle promises is what autograd says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import FAMILIES, halves, only, stock

import moedge
from moedge.compress.routed import Distance, Weighted, toggled
from moedge.errors import ModelError
from moedge.models.anatomy import dissect
from moedge.runtime.lm import LM

Tiny = Callable[..., Path]
DECODERS = [family for family in FAMILIES if family != "switch_transformers"]


def samples(lengths: tuple[int, ...] = (9, 14)) -> list[Weighted]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        found.append(Weighted(tuple(ids), (0.0, 1.0, *(3.0,) * (length - 3), 0.0)))
    return found


def log_probabilities(model: Any, sample: Weighted) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(torch.tensor([sample.ids])).logits[0].float().log_softmax(-1)
    return value


@pytest.mark.parametrize("model_type", DECODERS)
def test_it_is_the_distance_of_the_smaller_model(model_type: str, tiny: Tiny) -> None:
    """Samples of different lengths in one pass, another pass with one; the full model is as it was afterwards."""
    folder = tiny(model_type)
    one, two, three = samples((9, 14, 6))
    with moedge.load(folder, dtype="fp32") as lm:
        kept = halves(lm.anatomy.num_layers)
        before = log_probabilities(lm.model, one)
        distance = Distance(lm, [[one, two], [three]])
        found = distance.of(kept)
        distance.effects(kept)
        assert torch.equal(log_probabilities(lm.model, one), before)
        assert all(p.requires_grad for p in lm.model.parameters() if p.is_floating_point()) or model_type == "gpt_oss"
        full = [log_probabilities(lm.model, each) for each in (one, two, three)]
    total = weight = 0.0
    with moedge.load(folder, dtype="fp32", experts=kept) as lm:
        for each, reference in zip((one, two, three), full, strict=True):
            own, w = log_probabilities(lm.model, each), torch.tensor(each.weights)
            total += float((w * (reference.exp() * (reference - own)).sum(-1)).sum())
            weight += float(w.sum())
    assert found > 1e-4
    assert found == pytest.approx(total / weight, rel=1e-3)


@pytest.mark.parametrize("normalised", [True, False])
def test_effects_are_those_of_the_layer_with_one_expert_more_or_less(normalised: bool, tiny: Tiny) -> None:
    """By stock transformers and autograd: each layer's block again with one expert more or less."""
    folder, (sample, _) = tiny("qwen3_moe", norm_topk_prob=normalised), samples()
    with moedge.load(folder, dtype="fp32") as lm:
        kept = halves(lm.anatomy.num_layers)
        falls, sizes = Distance(lm, [[sample]]).effects(kept)
    model = stock(folder, torch.float32)
    layers = dissect(model).layers
    full, weights = log_probabilities(model, sample), torch.tensor(sample.weights)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[index] = args[0].detach(), output

        return hook

    for layer in layers:
        model.get_submodule(layer.block).register_forward_hook(keep(layer.index))
    with only(model, kept), torch.enable_grad():
        own = model(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        (weights * (full.exp() * (full - own)).sum(-1)).sum().backward()
    for layer in layers:
        hidden, output = seen[layer.index]
        assert output.grad is not None
        for expert in range(layer.num_experts):
            toggled = [list(each) for each in kept]
            toggled[layer.index] = sorted(set(kept[layer.index]) ^ {expert})
            with only(model, toggled):
                other = model.get_submodule(layer.block).forward(hidden)
            step, whole = other - output.detach(), float(weights.sum())
            fall = -float((step * output.grad).sum())
            size = float(step.square().sum() * output.grad.norm(dim=-1).mean())
            assert float(falls[layer.index, expert]) == pytest.approx(fall / whole, rel=1e-3, abs=1e-6)
            assert float(sizes[layer.index, expert]) == pytest.approx(size / whole, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("top_k", "allowed", "normalised"),
    [(1, 3, True), (2, 2, True), (2, 5, True), (3, 7, True), (1, 3, False), (2, 5, False), (3, 7, False)],
)
def test_weights_change_as_those_of_a_router_do(top_k: int, allowed: int, normalised: bool) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(40, 8, generator=generator)
    mask = torch.arange(8) < allowed

    def weights(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        top, experts = shares.topk(min(top_k, int(mask.sum())))
        return 1.5 * (top / top.sum(-1, keepdim=True) if normalised else top), experts

    def dense(mask: torch.Tensor) -> torch.Tensor:
        top, experts = weights(mask)
        return torch.zeros(40, 8).scatter(1, experts, top)

    found = toggled(logits, weights(mask)[0].sum(-1), mask, top_k)
    for expert in range(8):
        other = mask.clone()
        other[expert] = not mask[expert]
        if int(other.sum()) >= max(1, top_k):
            assert torch.allclose(found[expert], dense(other) - dense(mask), atol=1e-6)


def test_router_that_chooses_what_is_shut_off(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that makes its logits in another way than by a product is refused, not measured wrongly."""
    with moedge.load(tiny("qwen3_moe"), dtype="fp32") as lm:
        distance = Distance(lm, [samples()])
        router: Any = lm.model.get_submodule(lm.anatomy.layers[0].router)
        real = router.forward
        monkeypatch.setattr(router, "forward", lambda *args: _last_ones(lm, real(*args)))
        with pytest.raises(ModelError, match="cannot be kept from choosing some experts"):
            distance.of(halves(lm.anatomy.num_layers))


def _last_ones(lm: LM, output: Any) -> Any:
    logits, weights, index = output
    return logits, weights, torch.full_like(index, lm.anatomy.layers[0].num_experts - 2)
