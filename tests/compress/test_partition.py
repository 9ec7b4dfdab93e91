"""Cold, moderate and hot: by thresholds that are given, and thresholds found for the experts that stay."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedge.compress.partition import NEGLIGIBLE, for_kept, partition, ranking, shares
from moedge.errors import DataError

SCORES = np.array([1.0, 40.0, 9.0, 0.0, 50.0])
layers = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).map(np.array)


def test_thresholds_are_shares_of_the_layers_sum() -> None:
    found = partition(SCORES, 0.01, 0.4)
    assert (found.cold, found.moderate, found.hot) == ((0, 3), (1, 2), (4,))  # a share equal to a threshold is below it
    np.testing.assert_allclose(shares(SCORES), [0.01, 0.4, 0.09, 0, 0.5])


def test_scores_of_zero_are_equal_shares() -> None:
    np.testing.assert_allclose(shares(np.zeros(4)), 0.25)
    assert partition(np.zeros(4), 0.1, 0.2).hot == (0, 1, 2, 3)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.1), (-0.1, 0.1)])
def test_thresholds_in_the_wrong_order_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(DataError, match=r"alpha .* and beta 0\.1: they need 0 <= alpha <= beta"):
        partition(SCORES, alpha, beta)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_scores_that_are_no_importance_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="importance must be finite and not below 0"):
        shares(np.array([1.0, bad]))


def test_of_equal_scores_the_first_ranks_first() -> None:
    assert ranking(np.array([1.0, 3.0, 1.0, 3.0])) == [1, 3, 0, 2]


def test_beta_is_the_largest_share_that_goes() -> None:
    found = for_kept(SCORES, (1, 4))
    assert (found.beta, found.hot) == (pytest.approx(0.09), (1, 4))
    assert (found.cold, found.moderate) == ((0, 3), (2,))  # 0 and 3 together carry 1%, with 2 it would be 10%
    assert found.alpha == pytest.approx(0.01)


def test_equal_experts_are_cold_together_or_not_at_all() -> None:
    found = for_kept(np.array([1.0, 1.0, 98.0]), (2,))
    assert (found.cold, found.moderate) == ((), (0, 1))  # one carries 1%, both 2%


def test_alpha_that_is_given_is_used_but_not_above_beta() -> None:
    found = for_kept(SCORES, (1, 4), alpha=0.005)
    assert (found.cold, found.moderate, found.alpha) == ((3,), (0, 2), 0.005)
    found = for_kept(SCORES, (1, 4), alpha=0.3)
    assert (found.cold, found.moderate, found.alpha) == ((0, 2, 3), (), found.beta)


def test_all_kept() -> None:
    found = for_kept(SCORES, range(5))
    assert (found.cold, found.moderate, found.hot, found.alpha, found.beta) == ((), (), (0, 1, 2, 3, 4), 0, 0)


def test_protected_expert_is_hot_whatever_its_share() -> None:
    found = for_kept(SCORES, (3, 4))
    assert found.hot == (3, 4)
    assert found.beta == pytest.approx(0.4)


@given(layers, st.data())
def test_kinds_divide_the_layer(scores: np.ndarray, data: st.DataObject) -> None:
    thresholds = sorted([data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))])
    count = data.draw(st.integers(1, len(scores)))
    kept = tuple(sorted(ranking(scores)[:count]))
    for found in (partition(scores, *thresholds), for_kept(scores, kept)):
        assert sorted([*found.cold, *found.moderate, *found.hot]) == list(range(len(scores)))
        assert found.alpha <= found.beta
    share, found = shares(scores), for_kept(scores, kept)
    assert found.hot == kept
    assert share[list(found.cold)].sum() <= NEGLIGIBLE * (1 + 1e-9)
    assert all(share[expert] <= found.beta for expert in (*found.cold, *found.moderate))
    assert not found.cold or share[list(found.cold)].max() <= found.alpha
