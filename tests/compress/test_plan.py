"""From a budget to the experts that stay: as many as asked, ascending, protected ones among them, groups even."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedge.compress.plan import Budget, Shape, by_thresholds, make_plan, parse_budget, with_room
from moedge.errors import DataError

MIB = 1 << 20
SHAPE = Shape(num_experts=32, layers=2, least=4, groups=1, expert_bytes=MIB, other_bytes=10 * MIB)
GROUPED = Shape(num_experts=8, layers=2, least=4, groups=2, expert_bytes=MIB, other_bytes=0)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("50%", 16),
        (" 12.5 % ", 4),
        ("99%", 31),  # at most that share
        ("100%", 32),
        ("experts=5", 5),
        ("experts = 32", 32),
        ("20MiB", 10),
        ("20.9MiB", 10),
        ("14MiB", 4),
        ("42MiB", 32),
        ("42.5MiB", 32),  # less than one more expert would take
    ],
)
def test_budget(asked: str, kept: int) -> None:
    found = parse_budget(asked, SHAPE)
    assert (found.kept, found.asked) == (kept, asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("0%", "share of the experts is above 0% and at most 100%"),
        ("101%", "share of the experts is above 0% and at most 100%"),
        ("10%", r"leaves 3 experts a layer, the model's router needs 4: give experts=4 or at least 14 MiB"),
        ("experts=0", "leaves 0 experts a layer"),
        ("experts=33", "the model has 32 experts a layer, 33 are more than that"),
        ("1MiB", "leaves 0 experts a layer"),
        ("13.9MiB", "leaves 3 experts a layer"),
        ("43MiB", r"budget 43MiB is above the whole model, which takes 42 MiB: give less"),
        ("half", r"'half' is not a share \(50%\), a size \(800MiB\) or experts=16"),
        ("", "is not a share"),
        ("-5%", "is not a share"),
        ("experts=-1", "is not a share"),
        ("nan%", "is not a share"),
    ],
)
def test_bad_budget_is_named_with_the_remedy(asked: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_budget(asked, SHAPE)


def test_remedy_for_a_budget_that_is_too_small_works() -> None:
    """Also where the size, written short, would be rounded down."""
    for expert_bytes in (MIB, 1_234_567, 999):
        shape = replace(GROUPED, expert_bytes=expert_bytes, other_bytes=77)
        with pytest.raises(DataError) as caught:
            parse_budget("1KiB", shape)
        found = re.search(r"give (experts=4) or at least (.*)", str(caught.value))
        assert found is not None
        assert parse_budget(found[1], shape).kept == parse_budget(found[2], shape).kept == 4


def test_budget_is_rounded_down_to_whole_groups_and_says_so() -> None:
    found = parse_budget("experts=7", GROUPED)
    assert found.kept == 6
    assert "rounded down to a multiple of the router's 2 groups" in found.reason


@given(st.integers(0, 60 * MIB))
def test_bytes_are_never_exceeded_and_no_expert_more_would_fit(limit: int) -> None:
    try:
        kept = parse_budget(str(limit), SHAPE).kept
    except DataError:
        assert limit < SHAPE.bytes_with(SHAPE.least) or limit >= SHAPE.bytes_with(SHAPE.num_experts + 1)
        return
    assert SHAPE.bytes_with(kept) <= limit
    assert kept == SHAPE.num_experts or SHAPE.bytes_with(kept + 1) > limit


def test_the_best_stay_the_first_of_equal_ones() -> None:
    scores = np.array([[1.0, 5, 5, 5], [9, 0, 0, 0]])
    shape = Shape(4, 2, 1, 1, MIB, 0)
    assert make_plan(scores, shape, Budget("", 2, "")).kept == ((1, 2), (0, 1))


def test_each_group_keeps_its_best() -> None:
    scores = np.array([[9.0, 8, 7, 6, 1, 2, 3, 4]] * 2)
    assert make_plan(scores, GROUPED, Budget("", 4, "")).kept == ((0, 1, 6, 7),) * 2


def test_protected_experts_stay_and_cost_the_last() -> None:
    scores = np.array([[9.0, 8, 7, 6, 1, 2, 3, 4]] * 2)
    plan = make_plan(scores, GROUPED, Budget("", 4, ""), [(1, 4), (0, 0), (1, 4)])
    assert plan.kept == ((0, 1, 6, 7), (0, 1, 4, 7))
    assert plan.protected == ((0, 0), (1, 4))
    assert any("2 experts protected, 1 only by that" in reason for reason in plan.reasons)


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ([(2, 0)], "protect 2:0: the model has layers 0 to 1, experts 0 to 7"),
        ([(0, 8)], "protect 0:8"),
        ([(-1, 0)], "protect -1:0"),
        ([(1, 0), (1, 1), (1, 2)], "layer 1 has 3 protected experts and keeps 2 of that group: give a larger budget"),
    ],
)
def test_bad_protection_is_named(protect: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_plan(np.zeros((2, 8)), GROUPED, Budget("", 4, ""), protect)


def test_room_goes_to_the_strongest_of_each_group() -> None:
    strength = np.array([[1.0, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]])
    found = [(0, 0), (0, 1), (0, 2), (0, 7), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert with_room(found, strength, GROUPED, 4) == [(0, 1), (0, 2), (0, 7), (1, 0), (1, 1)]


def test_thresholds_give_the_layer_with_most_hot_experts_what_it_needs() -> None:
    scores = np.array([[97.0, 1, 1, 1], [40, 30, 20, 10]])
    shape = Shape(4, 2, 1, 1, MIB, 0)
    assert by_thresholds(scores, shape, 0, 0.15).kept == 3
    assert by_thresholds(scores, shape, 0, 0.5).kept == 1
    assert by_thresholds(scores, shape, 0, 1).kept == 1  # none is hot: the least
    assert by_thresholds(scores, Shape(4, 2, 2, 2, MIB, 0), 0, 0.15).kept == 4  # whole groups
    assert by_thresholds(np.zeros((2, 4)), shape, 0, 0).kept == 4


@given(st.data())
def test_plan_properties(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    shape = Shape(groups * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), groups, groups, MIB, 0)
    kept = groups * data.draw(st.integers(1, shape.num_experts // groups))
    cell = st.one_of(st.just(0.0), st.floats(0, 1e9, allow_subnormal=False))
    rows = st.lists(cell, min_size=shape.num_experts, max_size=shape.num_experts)
    scores = np.array(data.draw(st.lists(rows, min_size=shape.layers, max_size=shape.layers)))
    pairs = st.tuples(st.integers(0, shape.layers - 1), st.integers(0, shape.num_experts - 1))
    protect = with_room(data.draw(st.lists(pairs, unique=True)), scores, shape, kept)
    plan = make_plan(scores, shape, Budget("", kept, ""), protect)
    size = shape.num_experts // groups
    for layer, experts in enumerate(plan.kept):
        assert len(experts) == kept
        assert list(experts) == sorted(set(experts))
        assert {expert for at, expert in protect if at == layer} <= set(experts)
        assert {sum(expert // size == group for expert in experts) for group in range(groups)} == {kept // groups}
        for expert in set(range(shape.num_experts)) - set(experts):  # none that goes is better than one that stays
            stays = [e for e in experts if e // size == expert // size and (layer, e) not in protect]
            assert all(scores[layer, expert] <= scores[layer, e] for e in stays)
