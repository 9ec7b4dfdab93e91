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
from moedge.train.loss import Part, attention_inputs, balance_terms, combine, forward, router_sums, row_entropy
from moedge.train.replicas import Replicas


def part(probs: list[float], counts: list[float]) -> Part:
    return Part(torch.tensor(0.0), 1.0, [], torch.tensor([probs]), torch.tensor([counts]))


def test_balance_equals_a_hand_computation_over_the_whole_step() -> None:
    # Two parts of one token each, three experts, top-1: f = (1/2, 1/2, 0), P = (0.5, 0.35, 0.15).
    terms, load = balance_terms([part([0.8, 0.1, 0.1], [1.0, 0.0, 0.0]), part([0.2, 0.6, 0.2], [0.0, 1.0, 0.0])])
    assert load.tolist() == [[0.5, 0.5, 0.0]]
    assert float(sum(terms)) == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.35))


def test_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    even, _ = balance_terms([part([2.0] * 4, [2.0] * 4)])
    alone, _ = balance_terms([part([8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0])])
    assert float(even[0]) == pytest.approx(1.0)
    assert float(alone[0]) == pytest.approx(4.0)


def test_two_sequences_with_an_expert_each_are_balanced_together() -> None:
    """Balance per sequence would be 2 here: the point of the global batch."""
    terms, _ = balance_terms([part([1.0, 0.0], [1.0, 0.0]), part([0.0, 1.0], [0.0, 1.0])])
    assert float(sum(terms)) == pytest.approx(1.0)


def test_router_sums_leave_padding_out() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    probs, counts = router_sums(logits, 1, torch.tensor([True, False]))
    assert counts.tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(probs, logits[0].softmax(-1))


def test_the_entropy_of_a_row_is_that_of_its_mean_without_padding() -> None:
    one, other = [9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]
    logits = torch.tensor([one, one, other, one, other, one]) * 10  # rows of two tokens
    real = torch.tensor([[True, True], [True, True], [True, False]])
    assert float(row_entropy(logits, real)) == pytest.approx(0 + math.log(2) / math.log(4) + 0, abs=1e-5)
    assert float(row_entropy(torch.zeros(2, 4), torch.tensor([[True, True]]))) == pytest.approx(1.0)


def test_focus_adds_the_mean_entropy_over_rows_and_parts() -> None:
    parts = [part([0.5, 0.5], [1.0, 1.0]), part([0.5, 0.5], [1.0, 1.0])]
    for number, each in enumerate(parts):
        parts[number] = replace(each, rows=[0.0], entropy=torch.tensor(0.25 + number))
    result, without = combine(parts, 0.01, focus=0.5), combine(parts, 0.01)
    assert result.focus == pytest.approx(0.75)
    assert float(sum(result.parts) - sum(without.parts)) == pytest.approx(0.5 * 0.75)


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
    result = combine([forward(model, batch, routed=False)], balance=0.0)
    logits = model(torch.from_numpy(ids)).logits
    nll = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten(), reduction="none"
    )
    expected = (nll * torch.from_numpy(weights[:, 1:]).flatten()).sum() / 8
    assert float(result.parts[0]) == pytest.approx(float(expected), rel=1e-5)
    assert result.balance == 0.0


def gradients(model: Any, workers: int, rows: Row) -> dict[str, torch.Tensor]:
    replicas = Replicas(model, workers)
    replicas.gradients(rows, balance=0.1, focus=0.2)
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
