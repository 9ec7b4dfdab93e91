"""The profile's sums are those of a stock model, computed token by token; batches, limits and pauses change nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moedge
from moedge.compress.importance import Statistics
from moedge.compress.profile import Question, first_layer, identity_of, passes, profile
from moedge.models.anatomy import dissect
from moedge.models.load import draw

Tiny = Callable[..., Path]


@dataclass(frozen=True)
class Sample:
    ids: tuple[int, ...]
    mask: Any


def samples(count: int = 5, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    return [Sample(tuple(rng.integers(0, 64, n).tolist()), np.arange(n) >= n // 3) for n in lengths]


def total(parts: list[Statistics]) -> Statistics:
    found = Statistics.empty(*parts[0].counts.shape)
    for part in parts:
        found.add(part)
    return found


def run(folder: Path, some: list[Sample], most: int, **options: Any) -> Statistics:
    with moedge.load(folder, dtype="fp32", **options) as lm:
        return total(list(profile(lm, passes(some, most, alone=False))))


def assert_alike(one: Statistics, other: Statistics, rtol: float = 1e-5) -> None:
    for name, value in vars(one).items():
        np.testing.assert_allclose(value, getattr(other, name), rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe"])
def test_sums_are_those_of_a_token_by_token_count(tiny: Tiny, model_type: str) -> None:
    folder, some = tiny(model_type), samples()
    assert_alike(run(folder, some, 64), by_hand(folder, some))


@torch.no_grad()
def by_hand(folder: Path, some: list[Sample]) -> Statistics:
    """Every sample by itself through the stock model; what goes into its experts computed again, expert by expert."""
    with moedge.load(folder, dtype="fp32") as lm:
        stock: Any = type(lm.model).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        anatomy = dissect(lm.model)
    found = Statistics.empty(anatomy.num_layers, max(layer.num_experts for layer in anatomy.layers))
    for layer in anatomy.layers:
        calls: list[Any] = []
        module = stock.get_submodule(layer.experts)
        hooks = [
            module.register_forward_pre_hook(lambda m, a, kw, c=calls: c.append([*a, *kw.values()]), with_kwargs=True),
            stock.get_submodule(layer.router).register_forward_hook(lambda m, a, out, c=calls: c.append(out)),
        ]
        for sample in some:
            calls.clear()
            stock(torch.tensor([sample.ids]), use_cache=False)
            out, (hidden, index, weights) = calls
            logits = (out[0] if isinstance(out, tuple) else out).float()
            for at in np.flatnonzero(sample.mask):
                count(found, layer, module, logits[at], hidden[at], index[at], weights[at])
        for hook in hooks:
            hook.remove()
    return found


def count(found: Statistics, layer: Any, module: Any, logits: Any, hidden: Any, index: Any, weights: Any) -> None:
    at = layer.index
    found.tokens[at] += 1
    found.mass[at, : layer.num_experts] += logits.softmax(-1).double().numpy()
    top = logits.sort(descending=True)
    kept = top.values[: layer.top_k].softmax(-1)
    for place in range(layer.top_k):
        if kept[place] >= 1 / layer.top_k - 1e-6:
            found.utility[at, int(top.indices[place])] += float(top.values[place] - logits.min())
    for expert, weight in zip(index.tolist(), weights.tolist(), strict=True):
        only = torch.zeros(1, module.num_experts if hasattr(module, "num_experts") else layer.num_experts)
        only[0, expert] = 1
        output = module(hidden[None], torch.tensor([[expert]]), torch.ones(1, 1))[0].float()
        norm = float(output.norm())
        found.counts[at, expert] += 1
        found.gate[at, expert] += weight
        found.norm[at, expert] += norm
        found.gate_norm[at, expert] += weight * norm
        found.even_gate_norm[at, expert] += weight / float(weights.sum()) * norm
        found.energy[at, expert] += (weight * norm) ** 2
        found.largest[at, expert] = max(found.largest[at, expert], float(output.abs().max()))


def test_groups_and_memory_limit_change_nothing(tiny: Tiny) -> None:
    folder, some = tiny("qwen3_moe", num_experts=16), samples(8)
    assert_alike(run(folder, some, 8), run(folder, some, 400))


def test_pass_of_several_samples_fills_at_most_its_tokens() -> None:
    groups = passes(samples(30), 50, alone=False)
    assert sum(map(len, groups)) == 30
    assert all(len(group) == 1 or len(group) * len(group[-1].ids) <= 50 for group in groups)
    assert all(len(group) == 1 for group in passes(samples(4), 50, alone=True))


def test_profile_goes_on_where_it_stopped(tiny: Tiny) -> None:
    groups = passes(samples(6), 20, alone=False)
    with moedge.load(tiny("qwen3_moe"), dtype="fp32") as lm:
        whole = list(profile(lm, groups))
        assert_alike(total(whole[2:]), total(list(profile(lm, groups, done=2))))


def test_first_layer_is_that_of_the_whole_profile_and_runs_no_expert(tiny: Tiny) -> None:
    with moedge.load(tiny("qwen3_moe"), dtype="fp32") as lm:
        groups = passes(samples(6), 40, alone=False)
        first = total(list(first_layer(lm, groups)))
        assert lm.store.counters.misses == lm.store.counters.hits == 0
        whole = total(list(profile(lm, groups)))
    np.testing.assert_allclose(first.mass[0], whole.mass[0])
    assert not first.mass[1:].any()


def test_nothing_is_watched_afterwards(tiny: Tiny) -> None:
    with moedge.load(tiny("qwen3_moe"), dtype="fp32") as lm:
        before = lm.model(torch.tensor([[1, 2, 3]])).logits
        list(profile(lm, passes(samples(2), 40, alone=False)))
        assert torch.equal(lm.model(torch.tensor([[1, 2, 3]])).logits, before)
        hooks = [len(m._forward_hooks) for m in lm.model.modules()]
    assert not any(hooks)


def test_switch_transformers_encodes_and_decodes(tiny: Tiny) -> None:
    """A prompt counts in the layers of the encoder, the tokens that predict an answer in those of the decoder."""
    questions = [Question((5, 6, 7, 8), (9, 10, 11)), Question((12, 13), (14,))]
    with moedge.load(tiny("switch_transformers"), dtype="fp32") as lm:
        seen = total(list(profile(lm, passes(questions, 64, alone=True))))
    assert seen.tokens.tolist() == [6, 6, 4, 4]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(seen.counts.sum(1), seen.tokens)  # none beyond an expert's capacity
    np.testing.assert_allclose(seen.even_gate_norm, seen.norm)  # one expert a token: its even weight is 1


def test_an_encoder_decoder_takes_questions_only(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match="profiled on Questions, not on Sample"):
        run(tiny("switch_transformers"), samples(1), 64)


def test_router_whose_choices_are_not_what_runs_is_refused(tiny: Tiny) -> None:
    groups = passes([Question((5, 6, 7, 8), (9, 10, 11))], 64, alone=True)
    with (
        moedge.load(tiny("nllb-moe"), dtype="fp32") as lm,
        pytest.raises(moedge.MoedgeError, match="routing cannot be profiled"),
    ):
        list(profile(lm, groups))


def test_identity_changes_with_tokens_masks_and_groups() -> None:
    groups = passes(samples(6), 20, alone=False)
    other = [[Sample(groups[0][0].ids, ~groups[0][0].mask), *groups[0][1:]], *groups[1:]]
    found = [identity_of(each) for each in (groups, groups[1:], groups[::-1], other)]
    assert len(set(found)) == 4
    assert identity_of(passes(samples(6), 20, alone=False)) == found[0]


def test_blueprints_of_the_tiny_models_have_the_layers_that_are_summed(tiny: Tiny) -> None:
    blueprint = draw(tiny("qwen3_moe"))
    blueprint.checkpoint.close()
    assert blueprint.anatomy.num_layers == run(tiny("qwen3_moe"), samples(2), 64).counts.shape[0]
