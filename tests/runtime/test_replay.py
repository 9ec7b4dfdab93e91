"""Replay against plain simulations, the oracle against exhaustive search, and the cliff of a global cache."""

import itertools
import json
import random
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moedge.errors import DataError
from moedge.models.trace import RoutingTrace
from moedge.runtime.policy import POLICIES, LayerCache
from moedge.runtime.replay import ORACLE, Oracle, gap_closed, next_uses, replay
from moedge.runtime.verb_replay import command


def make_trace(tokens: int, layers: int = 2, experts: int = 8, k: int = 2, seed: int = 0) -> RoutingTrace:
    """Skewed routing, so that policies differ."""
    generator = np.random.default_rng(seed)
    chosen = np.stack(
        [
            generator.choice(
                experts, k, replace=False, p=(p := generator.dirichlet(np.full(experts, 0.4)) + 1e-9) / p.sum()
            )
            for _ in range(tokens * layers)
        ]
    ).reshape(tokens, layers, k)
    probs = generator.random(chosen.shape).astype(np.float32)
    return RoutingTrace(chosen.astype(np.int16), probs, np.array([0, tokens // 3, tokens]))


def rate(trace: RoutingTrace, policy: str, capacity: int) -> float:
    return replay(trace, [policy], [capacity])[0].hit_rate


def test_lru_is_a_plain_ordered_dictionary_with_atomic_events() -> None:
    trace, capacity, hits = make_trace(300), 3, 0
    for layer in range(trace.num_layers):
        held: OrderedDict[int, None] = OrderedDict()
        for event in trace.experts[:, layer].tolist():
            hits += sum(expert in held for expert in event)
            for expert in event:
                held.pop(expert, None)
                held[expert] = None
            while len(held) > capacity:
                held.popitem(last=False)
    assert rate(trace, "lru", capacity) == hits / trace.experts.size


def oracle_hits(events: list[list[int]], capacity: int) -> int:
    cache = LayerCache(8, capacity, Oracle(8, next_uses(events)))
    return sum(len(cache.access(event).hits) for event in events)


def best_by_search(events: list[list[int]], capacity: int) -> int:
    @cache
    def most(at: int, resident: frozenset[int]) -> int:
        if at == len(events):
            return 0
        here = sum(expert in resident for expert in events[at])
        every = resident | set(events[at])
        kept = itertools.combinations(sorted(every), min(capacity, len(every)))
        return here + max(most(at + 1, frozenset(choice)) for choice in kept)

    return most(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
def test_oracle_is_the_best_of_all_choices(seed: int) -> None:
    chance = random.Random(seed)
    events = [chance.sample(range(5), chance.randint(1, 2)) for _ in range(9)]
    for capacity in (1, 2, 3):
        assert oracle_hits(events, capacity) == best_by_search(events, capacity)


@pytest.mark.parametrize("policy", [*POLICIES, ORACLE])
def test_every_policy_lies_between_nothing_and_the_oracle(policy: str) -> None:
    trace = make_trace(400, seed=2)
    assert 0 < rate(trace, policy, 3) <= rate(trace, "oracle", 3) < 1
    everything = rate(trace, policy, 8)
    assert everything == 1 - trace.num_layers * 8 / trace.experts.size  # each expert misses once
    assert rate(trace, policy, 99) == everything


def test_a_global_cache_below_one_tokens_working_set_never_hits() -> None:
    """Why slots belong to layers: with 4 layers of top-2, 7 global LRU slots hit nothing and 2 per layer do."""
    trace = make_trace(200, layers=4)
    trace.experts[:] = trace.experts[:1]  # every token takes the same experts
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in trace.experts.tolist():
        for layer, event in enumerate(token):
            for expert in event:
                hits += (layer, expert) in held
                held.pop((layer, expert), None)
                held[layer, expert] = None
                if len(held) > 7:
                    held.popitem(last=False)
    assert hits == 0
    assert rate(trace, "lru", 2) > 0.99


def test_processes_give_the_same_rows_and_progress_goes_to_one() -> None:
    trace = make_trace(60)
    seen: list[float] = []
    here = replay(trace, ["default", "lru"], [2, 3])
    assert replay(trace, ["default", "lru"], [2, 3], workers=2, progress=seen.append) == here
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_gap_closed_is_the_way_from_lru_to_the_oracle() -> None:
    rows = replay(make_trace(200), ["lru", "default", "oracle"], [3])
    low, middle, high = (row.hit_rate for row in rows)
    assert [gap_closed(rows, row) for row in rows] == [0, pytest.approx((middle - low) / (high - low)), 1]
    assert gap_closed(rows[:2], rows[0]) is None


def test_absent_experts_are_no_accesses() -> None:
    trace = make_trace(50)
    trace.experts[10:, :, 1] = -1
    accesses = int((trace.experts >= 0).sum())
    assert (
        rate(trace, "lru", 8)
        == 1 - len({(e, x) for x in range(2) for e in trace.experts[:, x].ravel() if e >= 0}) / accesses
    )


@pytest.mark.parametrize(("policies", "capacities"), [(["psychic"], [2]), (["lru"], [0])])
def test_bad_policies_and_capacities_are_named(policies: list[str], capacities: list[int]) -> None:
    with pytest.raises(ValueError, match=r"psychic|capacity 0"):
        replay(make_trace(5), policies, capacities)
    with pytest.raises(DataError, match="no tokens"):
        replay(make_trace(5).part(0, 0), ["lru"], [2])


def test_command_prints_rows(tmp_path: Path) -> None:
    make_trace(80).save(tmp_path / "t.npz")
    arguments = [str(tmp_path / "t.npz"), "--policy", "default,lru,oracle", "--capacity", "2,4"]
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    rows = json.loads(done.stdout)
    pairs = [(row["policy"], row["capacity"]) for row in rows]
    assert pairs == list(itertools.product(("default", "lru", "oracle"), (2, 4)))
    assert all(set(row) == {"policy", "capacity", "hit_rate"} for row in rows)
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "100.0%" in shown.stdout  # the oracle goes all of the way
    part = CliRunner().invoke(command, [*arguments, "--sequences", "1:", "--json"], catch_exceptions=False)
    assert json.loads(part.stdout) != rows
    for wrong in (["--capacity", "two"], ["--sequences", "3"]):
        assert CliRunner().invoke(command, [arguments[0], *wrong]).exit_code == 2
