"""The loss of a step against hand computations and against the stock model."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from moedge.train.data import Mixture, Row, stack
from moedge.train.kernels import install
from moedge.train.loss import (
    LIFT,
    Part,
    RouterLoss,
    attention_inputs,
    balance_terms,
    combine,
    floor_terms,
    forward,
    router_sums,
    row_entropy,
    usage,
)
from moedge.train.replicas import Replicas


def part(probs: list[float], counts: list[float]) -> Part:
    return Part(torch.tensor(0.0), 1.0, [], torch.tensor([probs]), torch.tensor([counts]))


def test_balance_equals_a_hand_computation_over_the_whole_step() -> None:
    # Two parts of one token each, three experts, top-1: f = (1/2, 1/2, 0), P = (0.5, 0.35, 0.15).
    parts = [part([0.8, 0.1, 0.1], [1.0, 0.0, 0.0]), part([0.2, 0.6, 0.2], [0.0, 1.0, 0.0])]
    used = usage(parts)
    terms = balance_terms(parts, used)
    assert used[0].tolist() == [[0.5, 0.5, 0.0]]
    assert float(sum(terms)) == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.35))


def test_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    even, alone = (
        balance_terms(parts, usage(parts))
        for parts in ([part([2.0] * 4, [2.0] * 4)], [part([8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0])])
    )
    assert float(even[0]) == pytest.approx(1.0)
    assert float(alone[0]) == pytest.approx(4.0)


def test_two_sequences_with_an_expert_each_are_balanced_together() -> None:
    """Balance per sequence would be 2 here: the point of the global batch."""
    parts = [part([1.0, 0.0], [1.0, 0.0]), part([0.0, 1.0], [0.0, 1.0])]
    assert float(sum(balance_terms(parts, usage(parts)))) == pytest.approx(1.0)


def test_router_sums_leave_padding_out() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    probs, counts = router_sums(logits, 1, torch.tensor([True, False]))
    assert counts.tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(probs, logits[0].softmax(-1))


def test_the_entropy_of_a_row_is_that_of_its_mean_without_padding_to_the_fourth() -> None:
    one, other = [9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]
    logits = torch.tensor([one, one, other, one, other, one]) * 10  # rows of two tokens
    real = torch.tensor([[True, True], [True, True], [True, False]])
    assert float(row_entropy(logits, real)) == pytest.approx(0 + (math.log(2) / math.log(4)) ** 4 + 0, abs=1e-5)
    assert float(row_entropy(torch.zeros(2, 4), torch.tensor([[True, True]]))) == pytest.approx(1.0)


def test_focus_adds_the_mean_entropy_over_rows_and_parts() -> None:
    parts = [part([0.5, 0.5], [1.0, 1.0]), part([0.5, 0.5], [1.0, 1.0])]
    for number, each in enumerate(parts):
        parts[number] = replace(each, rows=[0.0], entropy=torch.tensor(0.25 + number))
    result, without = (combine(parts, RouterLoss(focus=focus)) for focus in (0.5, 0.0))
    assert result.focus == pytest.approx(0.75)
    assert float(sum(result.parts) - sum(without.parts)) == pytest.approx(0.5 * 0.75)


def test_the_floor_is_the_logarithm_to_first_order() -> None:
    """Its gradient is that of -mean(w log P) over all parts: the most for an expert that is never chosen."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, requires_grad=True)  # two parts of six tokens
    with torch.no_grad():
        logits[..., 3] -= 12
    chosen = [[4.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 0.0]]
    parts = [replace(part([0.0], c), probs=x.softmax(-1).sum(0)[None]) for x, c in zip(logits, chosen, strict=True)]
    weights = torch.tensor([0.5, 1.0, 1.0, LIFT])  # 1 over 4 times 1/2, 1/4, 1/4 and nothing
    (found,) = torch.autograd.grad(sum(floor_terms(parts, usage(parts))), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(weights * logits.softmax(-1).mean((0, 1)).log()).mean(), logits)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(found[..., 3].sum()) == pytest.approx(-LIFT / 4, rel=0.01)


def test_usage_is_a_mean_over_steps() -> None:
    parts = [part([0.5, 0.5], [1.0, 1.0])]
    before = torch.tensor([[[0.0, 1.0]], [[0.25, 0.75]]])
    router = RouterLoss(balance=1.0, floor=2.0, steps=2)
    first, later = combine(parts, router), combine(parts, router, before)
    assert first.used.tolist() == [[[0.5, 0.5]]] * 2
    assert later.used.tolist() == [[[0.25, 0.75]], [[0.375, 0.625]]]
    assert later.load.tolist() == [[0.5, 0.5]]
    assert float(first.parts[0]) == pytest.approx(1 - 2 * 1)
    assert float(later.parts[0]) == pytest.approx(1 - 2 * (2 * 0.5 / 0.375 + 0.5 / 0.625 / 1.5) / 2)
    assert combine(parts, RouterLoss(balance=1.0), before).used.tolist() == [[[0.5, 0.5]]] * 2


def test_documents_of_a_row_do_not_see_each_other(make_model: Callable[[], Any]) -> None:
    model = make_model()
    alone = torch.tensor([[3, 4, 5, 6]])
    packed = torch.tensor([[9, 8, 7, 3, 4, 5, 6, 0]])
    extra = attention_inputs(np.array([[0, 0, 0, 1, 1, 1, 1, -1]], np.int32))
    with torch.no_grad():
        inside = model(packed, use_cache=False, **extra).logits[0, 3:7]
        outside = model(alone, use_cache=False).logits[0]
    assert torch.allclose(inside, outside, atol=1e-5)
    assert extra["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


def test_the_text_loss_is_the_weighted_mean_over_the_step(make_model: Callable[[], Any]) -> None:
    model = make_model()
    ids = np.arange(12).reshape(2, 6) % 40
    weights = np.array([[0, 1, 1, 0, 2, 0], [0, 0, 4, 0, 0, 0]], np.float32)
    batch = Row(ids, weights, np.zeros((2, 6), np.int32))
    result = combine([forward(model, batch, routed=False)], RouterLoss(balance=0.0))
    logits = model(torch.from_numpy(ids)).logits
    nll = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten(), reduction="none"
    )
    expected = (nll * torch.from_numpy(weights[:, 1:]).flatten()).sum() / 8
    assert float(result.parts[0]) == pytest.approx(float(expected), rel=1e-5)
    assert result.balance == 0.0


def gradients(model: Any, workers: int, rows: Row) -> dict[str, torch.Tensor]:
    replicas = Replicas(model, workers)
    replicas.gradients(rows, RouterLoss(balance=0.1, focus=0.2, floor=0.3))
    replicas.close()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def rows(make_mixture: Callable[[], Mixture]) -> Row:
    return stack(make_mixture().batch({"text": 0.5, "copy": 0.5}, 5, 30))


def test_threads_give_the_gradient_of_the_whole_step(make_model: Callable[[], Any], rows: Row) -> None:
    whole, threads = gradients(make_model(), 1, rows), gradients(make_model(), 3, rows)
    for name, gradient in whole.items():
        assert torch.allclose(gradient, threads[name], atol=1e-6), name


@pytest.mark.parametrize("block", [128, 8])
def test_the_kernels_agree_with_the_stock_model(
    make_model: Callable[[], Any], rows: Row, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moedge.train.kernels.BLOCK", block)
    stock, ours = make_model(), make_model()
    install(ours)
    expected, found = gradients(stock, 1, rows), gradients(ours, 1, rows)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name
    ids = torch.from_numpy(rows.ids)
    with torch.no_grad():  # without a mask: plain causal rows
        assert torch.allclose(stock(ids, use_cache=False).logits, ours(ids, use_cache=False).logits, atol=1e-5)


def test_kernels_refuse_other_experts(make_model: Callable[[], Any]) -> None:
    model = make_model()
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="own kernels"):
        install(model)
