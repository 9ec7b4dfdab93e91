"""The expert store: right bytes in the right slot, whatever the order of reads, threads, failures and cache sizes."""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moedge.errors import CheckpointError
from moedge.models.load import Blueprint, draw
from moedge.models.shorten import short_bytes
from moedge.native.library import Library
from moedge.runtime import keeper
from moedge.runtime.policy import LayerCache, Lru
from moedge.runtime.reader import DirectReader, Target
from moedge.runtime.store import DiskStore, MemoryStore

SHORT = False


@pytest.fixture(params=["as they are", "in 12 bits", "in fewest bits"], autouse=True)
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """In what form the stores of `opened` keep experts."""
    chosen = request.param != "as they are"
    monkeypatch.setattr(sys.modules[__name__], "SHORT", chosen)
    if request.param == "in 12 bits":
        monkeypatch.setattr(Library, "compact", lambda *_: 0)
    return chosen


@pytest.fixture
def blueprint(tiny: Callable[..., Path]) -> Iterator[Blueprint]:
    drawn = draw(tiny("qwen3_moe", dtype=torch.bfloat16))
    yield drawn
    drawn.checkpoint.close()


def truth(blueprint: Blueprint, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """The expert's parameters, by hand."""
    prefix = f"{blueprint.anatomy.layers[layer].block}.experts.{expert}"
    gate, up, down = (blueprint.checkpoint.read(f"{prefix}.{n}_proj.weight") for n in ("gate", "up", "down"))
    return {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}


@contextmanager
def opened(
    blueprint: Blueprint, capacity: int, spare: int = 1, reader: DirectReader | None = None
) -> Iterator[DiskStore]:
    layers = blueprint.anatomy.layers
    caches = [LayerCache(x.num_experts, capacity, Lru(x.num_experts, capacity)) for x in layers]
    room = short_bytes(blueprint.experts.slot_bytes) if SHORT else None
    store = DiskStore(blueprint.experts, reader or DirectReader(blueprint.checkpoint), caches, spare, room)
    yield store
    store.close()


def free_slots(store: DiskStore) -> int:
    """All that are free once nothing is under way; experts that stay in fewer bits have slots of their own."""
    while store._keeper.wait_for_one():
        pass
    return sum(len(slots.free) for slots in {id(slots): slots for slots in store._slots}.values())


def check(blueprint: Blueprint, store: DiskStore, layer: int, experts: Sequence[int]) -> None:
    """Every expert comes once, with its own bytes, which do not change while they are in use."""
    seen = []
    for expert, parameters in store.fetch(layer, experts):
        seen.append(expert)
        for name, expected in truth(blueprint, layer, expert).items():
            assert torch.equal(parameters[name], expected), (layer, expert, name)
            assert parameters[name].data_ptr() % 64 == 0
    assert sorted(seen) == sorted(experts)


class Hostile(DirectReader):
    """Reads end in random order and as late as possible; with `fail`, every read of that tensor fails."""

    def __init__(self, blueprint: Blueprint, seed: int, fail: str = "") -> None:
        super().__init__(blueprint.checkpoint)
        self.random, self.fail = random.Random(seed), fail

    def read(self, targets: Sequence[Target]) -> int:
        time.sleep(self.random.random() * 0.003)
        if self.fail and any(self.fail in part.info.name for part, _ in targets):
            raise CheckpointError("no such luck")
        return super().read(targets)


@pytest.mark.parametrize(("capacity", "spare"), [(0, 1), (0, 2), (1, 1), (3, 2), (8, 1)])
def test_any_sequence_of_events_gives_the_right_bytes(blueprint: Blueprint, capacity: int, spare: int) -> None:
    chance = random.Random(capacity)
    layers = blueprint.anatomy.layers
    with opened(blueprint, capacity, spare, Hostile(blueprint, seed=spare)) as store:
        requested = 0
        for _ in range(60):
            layer = chance.randrange(len(layers))
            experts = sorted(chance.sample(range(8), chance.randint(1, 8)))
            check(blueprint, store, layer, experts)
            requested += len(experts)
            assert len(store.resident(layer)) <= capacity
            assert store.resident(layer) == store.caches[layer].resident
        assert store.counters.hits + store.counters.misses == requested
        assert (store.counters.hits > 0) == (capacity > 0)
        assert store.resident_bytes <= capacity * len(layers) * store._slots.kept.stride


def test_a_hit_reads_nothing_and_a_miss_reads_the_expert(blueprint: Blueprint) -> None:
    with opened(blueprint, capacity=4, spare=2) as store:
        check(blueprint, store, 0, [1, 2])
        read = store.counters.bytes_read
        assert read >= sum(blueprint.experts.nbytes(0, e) for e in (1, 2))
        check(blueprint, store, 0, [1, 2])
        assert (store.counters.hits, store.counters.misses, store.counters.bytes_read) == (2, 2, read)


def test_threads_share_one_store(blueprint: Blueprint) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(25):
                experts = sorted(chance.sample(range(8), 3))
                check(blueprint, store, chance.randrange(len(blueprint.anatomy.layers)), experts)
        except BaseException as error:
            errors.append(error)

    with opened(blueprint, capacity=2, spare=1, reader=Hostile(blueprint, seed=7)) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert store.counters.hits + store.counters.misses == 4 * 25 * 3


def test_fetch_inside_a_fetch_of_the_same_thread_is_refused(blueprint: Blueprint) -> None:
    with opened(blueprint, capacity=2) as store:
        outer = store.fetch(0, [0, 1])
        next(outer)
        with pytest.raises(RuntimeError, match="still using"):
            next(store.fetch(1, [0]))
        outer.close()
        check(blueprint, store, 1, [0])


@pytest.mark.parametrize("used", [0, 1, 3])
def test_a_consumer_that_stops_early_loses_no_slot(blueprint: Blueprint, used: int) -> None:
    with opened(blueprint, capacity=2, spare=2) as store:
        free = free_slots(store)
        for _ in range(10):
            event = store.fetch(0, [0, 1, 2, 3, 4])
            for _ in range(used):
                next(event)
            event.close()
        held = sum(len(store.resident(layer)) for layer in range(len(store.caches)))
        assert free_slots(store) + held == free
        check(blueprint, store, 0, list(range(8)))


def test_a_failed_read_is_reported_and_forgotten(blueprint: Blueprint) -> None:
    reader = Hostile(blueprint, seed=1, fail="experts.3.")
    with opened(blueprint, capacity=8, spare=2, reader=reader) as store:
        free = free_slots(store)
        for _ in range(5):
            with pytest.raises(CheckpointError, match="no such luck"):
                check(blueprint, store, 0, [2, 3, 4])
        assert 3 not in store.resident(0)
        assert store.caches[0].resident == store.resident(0)
        assert free_slots(store) + len(store.resident(0)) == free
        reader.fail = ""
        check(blueprint, store, 0, [2, 3, 4])


def test_memory_store_is_a_store(blueprint: Blueprint) -> None:
    store = MemoryStore([[truth(blueprint, 0, e) for e in range(8)]])
    assert [e for e, _ in store.fetch(0, [5, 2])] == [5, 2]
    assert store.counters.hits == 2


def test_a_right_guess_is_read_once_and_is_still_a_miss(blueprint: Blueprint) -> None:
    with opened(blueprint, capacity=2, spare=3) as store:
        store.prefetch(1, [4, 5])
        check(blueprint, store, 1, [4, 5])
        assert (store.counters.hits, store.counters.misses) == (0, 2)
        once = store.counters.bytes_read
        store.prefetch(1, [4, 5])  # resident already
        check(blueprint, store, 1, [4, 5])
        assert (store.counters.hits, store.counters.bytes_read) == (2, once)


@pytest.mark.parametrize(("capacity", "spare"), [(0, 1), (1, 2), (3, 4)])
def test_guesses_right_or_wrong_change_no_bytes_and_no_cache(blueprint: Blueprint, capacity: int, spare: int) -> None:
    chance = random.Random(capacity)
    layers = len(blueprint.anatomy.layers)
    with opened(blueprint, capacity, spare, Hostile(blueprint, seed=5)) as store, opened(blueprint, capacity) as plain:
        for _ in range(80):
            layer, experts = chance.randrange(layers), sorted(chance.sample(range(8), chance.randint(1, 8)))
            store.prefetch(chance.randrange(layers), chance.sample(range(8), 4))
            check(blueprint, store, layer, experts)
            check(blueprint, plain, layer, experts)
            assert store.resident(layer) == plain.resident(layer)
        assert (store.counters.hits, store.counters.misses) == (plain.counters.hits, plain.counters.misses)
        for layer in range(layers):  # give up the last guesses
            check(blueprint, store, layer, [0])
        wait([future for future, _ in store._ahead.values()])
        check(blueprint, store, 0, [0])
        held = sum(len(store.resident(layer)) for layer in range(layers))
        assert held + free_slots(store) == capacity * layers + spare, "a slot was lost"


def test_a_guess_that_cannot_be_read_is_no_error_until_it_is_needed(blueprint: Blueprint) -> None:
    broken = Hostile(blueprint, seed=1, fail="layers.1.mlp.experts.6.")
    with opened(blueprint, capacity=2, spare=3, reader=broken) as store:
        store.prefetch(1, [6])
        check(blueprint, store, 1, [2])
        check(blueprint, store, 1, [3])
        store.prefetch(1, [6])
        with pytest.raises(CheckpointError, match="no such luck"):
            check(blueprint, store, 1, [6])
        check(blueprint, store, 1, [2, 3])


def test_a_guess_during_an_event_waits_for_nothing(blueprint: Blueprint) -> None:
    with opened(blueprint, capacity=2, spare=3) as store:
        for _ in store.fetch(0, [1]):
            store.prefetch(1, [1])
        assert not store._ahead


def test_an_expert_that_cannot_be_shortened_is_used_and_not_kept(
    blueprint: Blueprint, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "compact", lambda *_: False)
    with opened(blueprint, capacity=2, spare=2) as store:
        free = free_slots(store)
        for _ in range(3):
            check(blueprint, store, 0, [1, 2])
        assert free_slots(store) + (0 if short else 2) == free
        assert store.resident(0) == store.caches[0].resident == (set() if short else {1, 2})
        assert store.counters.hits == (0 if short else 4)
