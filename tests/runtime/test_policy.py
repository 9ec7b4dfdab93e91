"""Eviction policies against plain versions of themselves, and the cache's event-atomic rules."""

import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedge.runtime import policy as module
from moedge.runtime.policy import POLICIES, Access, AgeingLfu, LayerCache, Lfru, Lfu, Lru, Pinned, Policy, Recall

EXPERTS = 10
EVENTS = st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True), max_size=60)


def random_events(count: int, experts: int = EXPERTS, k: int = 3, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    phrases = [chance.sample(range(experts), k) for _ in range(12)]
    return [phrases[chance.randrange(12)] if chance.random() < 0.7 else chance.sample(range(experts), k)
            for _ in range(count)]  # fmt: skip


def hit_rate(cache: LayerCache, events: Sequence[Sequence[int]]) -> float:
    return sum(len(cache.access(event).hits) for event in events) / sum(map(len, events))


@pytest.mark.parametrize("name", POLICIES)
@given(events=EVENTS, capacity=st.integers(0, EXPERTS))
def test_cache_never_holds_more_than_its_capacity_and_accounts_for_every_expert(
    name: str, events: list[list[int]], capacity: int
) -> None:
    cache = LayerCache(EXPERTS, capacity, POLICIES[name](EXPERTS, capacity))
    again = LayerCache(EXPERTS, capacity, POLICIES[name](EXPERTS, capacity))
    for event in events:
        before = set(cache.resident)
        access = cache.access(event)
        assert [*access.hits] == [e for e in event if e in before]
        assert [*access.misses] == [e for e in event if e not in before]
        assert set(access.evicted) <= before | set(event)
        assert len(set(access.evicted)) == len(access.evicted)
        assert cache.resident == (before | set(event)) - set(access.evicted)
        assert len(cache.resident) == min(capacity, len(before | set(event)))  # room is never left unused
        assert again.access(event, [0.5] * len(event)) == access  # weights are optional, runs repeat themselves


def test_the_whole_event_is_classified_before_anything_leaves() -> None:
    cache = LayerCache(4, 2, Lru(4, 2))
    assert cache.access([0, 1]) == Access((), (0, 1), ())
    # read one by one, expert 2 would have driven out expert 0 before its own turn
    assert cache.access([2, 0]) == Access((0,), (2,), (1,))


def test_an_event_larger_than_the_cache_is_served_and_dropped() -> None:
    cache = LayerCache(6, 2, Lru(6, 2))
    assert cache.access([0, 1, 2, 3]) == Access((), (0, 1, 2, 3), (0, 1))
    assert cache.resident == {2, 3}


def test_capacity_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity 9 is not between 0 and the layer's 8"):
        LayerCache(8, 9, Lru(8, 9))


def test_forgotten_expert_is_a_miss() -> None:
    cache = LayerCache(4, 2, Lru(4, 2))
    cache.access([1])
    cache.forget(1)
    cache.forget(3)
    assert cache.access([1]).misses == (1,)


@given(events=EVENTS, capacity=st.integers(1, EXPERTS))
def test_lru_is_an_ordered_dict(events: list[list[int]], capacity: int) -> None:
    cache = LayerCache(EXPERTS, capacity, Lru(EXPERTS, capacity))
    plain: OrderedDict[int, None] = OrderedDict()
    for event in events:
        assert cache.access(event).hits == tuple(e for e in event if e in plain)
        for expert in event:
            plain[expert] = None
            plain.move_to_end(expert)
        while len(plain) > capacity:
            plain.popitem(last=False)
        assert cache.resident == set(plain)


def uses_of(events: Sequence[Sequence[int]], expert: int) -> list[int]:
    return [t for t, event in enumerate(events) if expert in event]


def plain_score(kind: str, events: Sequence[Sequence[int]], expert: int, half_life: float) -> tuple[float, float]:
    """The rank that a policy should give `expert` after `events`, computed from all of them."""
    uses, now = uses_of(events, expert), len(events)
    if kind == "lfu":
        return len(uses), max(uses)
    if kind == "lfru":
        return len(uses) / (now - 1 - max(uses) + 1), expert
    return sum(2.0 ** -((now - use) / half_life) for use in uses), 0.0


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("lfu", Lfu(EXPERTS, 4)), ("lfru", Lfru(EXPERTS, 4)), ("ageing", AgeingLfu(EXPERTS, 4, half_life=2.7))],
)
def test_frequency_policies_drop_the_lowest_of_their_formula(kind: str, policy: Policy) -> None:
    cache, seen = LayerCache(EXPERTS, 4, policy), []
    for event in random_events(400, k=2):
        held = cache.resident | set(event)
        seen.append(event)
        evicted = cache.access(event).evicted
        scores = {expert: plain_score(kind, seen, expert, 2.7) for expert in held}
        assert all(scores[gone] <= scores[kept] for gone in evicted for kept in cache.resident)


def test_ageing_ranks_alike_after_rescaling() -> None:
    # 64 doublings an event: rescaled every eight events
    quick, seen = LayerCache(EXPERTS, 4, AgeingLfu(EXPERTS, 4, half_life=1 / 64)), []
    for event in random_events(200, k=2):
        held = quick.resident | set(event)
        seen.append(event)
        evicted = quick.access(event).evicted
        last = {expert: max(uses_of(seen, expert)) for expert in held}  # such a short memory is recency
        assert all(last[gone] <= last[kept] for gone in evicted for kept in quick.resident)


def test_ageing_follows_a_change_of_topic_and_counting_does_not() -> None:
    events = [[0, 1]] * 500 + [[2, 3]] * 4
    for name, kept in (("ageing-lfu", {0, 1}), ("lfu", {0, 1}), ("lru", {2, 3})):
        cache = LayerCache(8, 2, POLICIES[name](8, 2))
        hit_rate(cache, events)
        assert cache.resident == kept, name
    events += [[2, 3]] * 30
    for name, kept in (("ageing-lfu", {2, 3}), ("lfu", {0, 1})):
        cache = LayerCache(8, 2, POLICIES[name](8, 2))
        hit_rate(cache, events)
        assert cache.resident == kept, name


def test_pinned_experts_stay_once_they_are_there() -> None:
    cache = LayerCache(EXPERTS, 4, Pinned(EXPERTS, 4, pinned=[0, 7]))
    plain = LayerCache(EXPERTS, 2, Lru(EXPERTS, 2))
    cache.access([0, 7])
    for event in random_events(200):
        assert {0, 7} <= cache.resident
        cache.access(event)
        plain.access([expert for expert in event if expert not in (0, 7)])
        assert cache.resident == plain.resident | {0, 7}  # the rest is LRU in what the pins leave


def test_pinned_learns_the_half_that_is_used_most() -> None:
    cache = LayerCache(8, 2, Pinned(8, 2))
    hit_rate(cache, [[0]] * 5 + [[1], [2], [3]])
    assert cache.resident == {0, 3}


def test_more_pins_than_room_are_refused() -> None:
    with pytest.raises(ValueError, match="3 experts are pinned, the layer's cache holds 2: pin fewer"):
        Pinned(8, 2, pinned=[0, 1, 2])


def plain_neighbours(events: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Recall's neighbours of the last event by comparing it with every other."""
    now = len(events) - 1
    found = []
    for t in range(now):
        likeness = 2 * len(set(events[t]) & set(events[now]))
        likeness += sum(len(set(events[t - back]) & set(events[now - back])) for back in (1, 2) if t >= back)
        if likeness:
            found.append((t, likeness))
    return sorted(found, key=lambda pair: (pair[1], pair[0]), reverse=True)[: module.NEIGHBOURS]


def plain_votes(events: Sequence[Sequence[int]], capacity: int, experts: int) -> tuple[list[int], int]:
    now, neighbours = len(events) - 1, plain_neighbours(events)
    reach = min(module.REACH, max(1, round(capacity / len(events[now]))))
    votes, total = [0] * experts, 0
    for t, likeness in neighbours:
        weight = {0: 8, 1: 4, 2: 2, 3: 1}.get(neighbours[0][1] - likeness, 0)
        total += 2 * weight
        for d, event in enumerate(events[t + 1 : min(t + 1 + 2 * reach, now + 1)]):
            for expert in event:
                votes[expert] += weight * (2 if d < reach else 1)
    return votes, total


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_recall_agrees_with_comparing_all_pairs_of_moments(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 30)
    policy, kept = Recall(EXPERTS, 6), []
    for event in random_events(150, k=size, seed=size):
        policy.used(event, None)
        kept = [*(kept if len(kept) < 60 else kept[30:]), event]  # forgets a window when it has two
        assert policy._neighbours(len(kept) - 1) == plain_neighbours(kept)
        assert policy._votes() == plain_votes(kept, 6, EXPERTS)


def test_recall_evicts_by_rate_and_votes() -> None:
    policy, seen = Recall(EXPERTS, 6), []
    for event in random_events(120):
        policy.used(event, None)
        seen.append(event)
        votes, total = plain_votes(seen, 6, EXPERTS)
        step = 1 - 0.5 ** (1 / module.HALF_LIFE)
        score = {
            expert: sum(step * 0.5 ** ((len(seen) - 1 - use) / module.HALF_LIFE) for use in uses_of(seen, expert))
            + (module.RECALL_WEIGHT * votes[expert] / total if total else 0)
            for expert in range(EXPERTS)
        }
        evicted = policy.evict(range(EXPERTS), 4)
        kept = set(range(EXPERTS)) - set(evicted)
        assert len(evicted) == 4
        assert max(score[e] for e in evicted) <= min(score[e] for e in kept) + 1e-12


def test_recall_sees_a_loop_coming_that_defeats_recency() -> None:
    loop = [[t % 12] for t in range(1200)]
    assert hit_rate(LayerCache(12, 6, Lru(12, 6)), loop) == 0
    assert hit_rate(LayerCache(12, 6, Recall(12, 6)), loop) > 0.3  # the optimum is a little over 6/12


def test_recall_counts_a_chunk_of_tokens_but_does_not_remember_it_as_a_moment() -> None:
    policy = Recall(8, 4)
    policy.used([0, 1], None)
    policy.used(range(8), None)
    assert len(policy._starts) - 1 == 1
    assert set(policy.evict(range(8), 6)) == set(range(2, 8))


def test_a_chunk_can_be_learnt_token_by_token() -> None:
    tokens = random_events(50)
    whole = LayerCache(EXPERTS, 4, Recall(EXPERTS, 4))
    whole.access(sorted({expert for token in tokens for expert in token}), tokens=tokens)
    single = Recall(EXPERTS, 4)
    for token in tokens:
        single.used(token, None)
    assert whole.resident == set(range(EXPERTS)) - set(single.evict(range(EXPERTS), EXPERTS - 4))


def test_more_experts_than_a_byte_counts() -> None:
    cache = LayerCache(600, 4, Recall(600, 4))
    assert hit_rate(cache, [[511, 599], [3, 300], [512, 1]] * 50) > 0.3


@pytest.mark.parametrize("name", POLICIES)
def test_repeating_text_is_worth_remembering(name: str) -> None:
    """On routing that repeats phrases, no policy falls behind chance and recall leads."""
    chance, events = random.Random(1), []
    phrases = [[chance.sample(range(32), 4) for _ in range(8)] for _ in range(20)]
    for _ in range(150):
        events += phrases[chance.randrange(20)]
    rate = hit_rate(LayerCache(32, 8, POLICIES[name](32, 8)), events)
    assert rate > (0.4 if name in ("default", "recall") else 0.15)


def test_one_lru_for_all_layers_never_hits_below_a_tokens_working_set() -> None:
    layers, experts, k = 6, 8, 2
    routing = [random_events(300, experts, k, seed=layer) for layer in range(layers)]
    slots = (layers - 1) * k  # all layers but one: whatever the routing, its last use is further back than that
    shared = LayerCache(layers * experts, slots, Lru(layers * experts, slots))
    own = [LayerCache(experts, slots // layers, Lru(experts, slots // layers)) for _ in range(layers)]
    shared_hits = own_hits = 0
    for token in range(300):
        for layer in range(layers):
            event = routing[layer][token]
            shared_hits += len(shared.access([layer * experts + expert for expert in event]).hits)
            own_hits += len(own[layer].access(event).hits)
    assert shared_hits == 0
    assert own_hits > 300  # of 3,600, with fewer slots


def test_one_lru_for_all_layers_one_slot_short_never_hits_even_if_every_token_is_the_same() -> None:
    working_set = [[expert] for expert in range(24)]  # one token's experts of all layers, read one after the other
    assert hit_rate(LayerCache(24, 23, Lru(24, 23)), working_set * 50) == 0
    assert hit_rate(LayerCache(24, 24, Lru(24, 24)), working_set * 50) == 49 / 50
