"""Router metrics against counting by hand."""

from itertools import pairwise

import numpy as np
import pytest

from moedge.errors import DataError
from moedge.measure.router import (
    best_half_mass,
    expert_load,
    load_entropy,
    mutual_information,
    segment_cache_hits,
    segment_routing_performance,
)
from moedge.models.trace import RoutingTrace


def random_trace(lengths: list[int], layers: int = 2, experts: int = 6, k: int = 2, seed: int = 0) -> RoutingTrace:
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(experts)[:k] for _ in range(sum(lengths) * layers)])
    probs = random.random(chosen.shape).astype(np.float32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    shape = (sum(lengths), layers, k)
    return RoutingTrace(chosen.reshape(shape).astype(np.int16), probs.reshape(shape), offsets)


def test_load_counts_choices_and_weights_and_skips_missing_experts() -> None:
    trace = random_trace([40])
    trace.experts[3, 1, 0] = -1
    for weighted in (False, True):
        load = expert_load(trace, 6, weighted)
        for layer in range(2):
            for expert in range(6):
                at = trace.experts[:, layer] == expert
                assert load[layer, expert] == pytest.approx(trace.probs[:, layer][at].sum() if weighted else at.sum())


def test_entropy_and_best_half_at_their_ends() -> None:
    load = np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0]])
    assert load_entropy(load) == pytest.approx([1, 0, -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) / 2])
    assert best_half_mass(load) == pytest.approx([0.5, 1, 1])


def test_mutual_information_from_none_to_all() -> None:
    same = [np.array([[1.0, 3.0]]), np.array([[10.0, 30.0]])]
    apart = [np.array([[5.0, 0.0]]), np.array([[0.0, 2.0]])]
    assert mutual_information(same) == pytest.approx([0.0], abs=1e-12)
    assert mutual_information(apart) == pytest.approx([1.0])
    half = mutual_information([np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])])
    joint = np.array([[0.5, 0.0], [0.25, 0.25]])
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    expected = sum(joint[i] * np.log2(joint[i] / outer[i]) for i in np.ndindex(2, 2) if joint[i])
    assert half == pytest.approx([expected])


@pytest.mark.parametrize("window", [1, 4, 7])
def test_srp_by_hand(window: int) -> None:
    trace = random_trace([30, 5, 12], seed=3)
    counts = []
    for start, stop in pairwise(trace.offsets):
        for p in range(start, stop - window + 1):
            for layer in range(2):
                for expert in range(6):
                    counts.append(int((trace.experts[p : p + window, layer] == expert).sum()))
    f = np.array(counts)
    best, size = max(
        (2 * f[f >= a].sum() / (window * (f >= a).sum() + f.sum()), window * (f >= a).sum() / f.sum())
        for a in range(1, window + 1)
    )
    result = segment_routing_performance(trace, 6, window)
    assert result.srp == pytest.approx(best)
    assert result.size == pytest.approx(size)


def test_srp_of_constant_routing_is_one() -> None:
    trace = random_trace([20], layers=1)
    trace.experts[:] = [0, 4]
    result = segment_routing_performance(trace, 6, 8)
    assert result.srp == pytest.approx(1)
    assert result.size == pytest.approx(1)


def test_srp_needs_a_long_enough_sequence() -> None:
    with pytest.raises(DataError, match="16 tokens"):
        segment_routing_performance(random_trace([15, 3]), 6, 16)


def test_sch_of_a_cache_that_holds_all_is_one_and_grows_with_size_and_foresight() -> None:
    trace = random_trace([200], layers=1, experts=8, seed=5)
    assert segment_cache_hits(trace, 8, 4, 8) == 1
    rates = [segment_cache_hits(trace, 8, 16, capacity) for capacity in (2, 3, 4, 6)]
    assert rates == sorted(rates)
    assert segment_cache_hits(trace, 8, 64, 3) > segment_cache_hits(trace, 8, 0, 3)


def test_sch_by_hand() -> None:
    # capacity 2; 0 and 1 are preloaded; 2 misses; then 0 is next and stays with 2, as 1 is not used again
    trace = RoutingTrace(
        np.array([0, 1, 2, 0, 2, 3, 3], dtype=np.int16).reshape(7, 1, 1), np.ones((7, 1, 1)), np.array([0, 7])
    )
    assert segment_cache_hits(trace, 4, 2, 2) == pytest.approx(5 / 7)
    with pytest.raises(DataError, match="no tokens"):
        segment_cache_hits(trace.part(0, 0), 4, 2, 2)
