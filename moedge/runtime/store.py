"""Where expert bytes live: a fixed set of slots in memory, a cache per layer, and threads that fill slots from disk.

A slot is never written while someone computes with it. Experts may be kept shortened (models/shorten.py), because they
were read so or to have room for more: then each is restored elsewhere before it is used. Misses may be handed out in
the order in which their reads end; who needs a fixed order (experts.py) restores it. Knows layers and experts as
integers and their bytes; no routing.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from moedge.models.expert_map import ExpertMap
from moedge.models.packed_experts import PackedExperts
from moedge.models.shorten import ShortExpert, restore
from moedge.runtime.keeper import Keeper
from moedge.runtime.policy import LayerCache
from moedge.runtime.reader import DirectReader, Target
from moedge.runtime.slots import Slots, slot_sets

READ_THREADS = 4
Parameters = Mapping[str, torch.Tensor]


@dataclass
class Counters:
    """What the store has done since it was made. A hit is an expert that was resident before its event."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A layer after its last event: the experts that are resident, and which the event used and had to read."""

    resident: tuple[int, ...] = ()
    used: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()


class ExpertStore(Protocol):
    """Gives experts to those who compute with them."""

    counters: Counters

    def fetch(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Iterator[tuple[int, Parameters]]:
        """Each of the distinct `experts` once, in any order, with its parameters.

        The parameters are valid until the iterator goes on. `weights`: the router's probability of each expert.
        """

    def batches(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Iterator[list[tuple[int, Parameters]]]:
        """As fetch, but all that are in memory at once: for who computes several experts in one call."""

    def close(self) -> None: ...


class MemoryStore:
    """All experts in memory: the fake of ExpertStore for tests, `parameters[layer][expert]`."""

    def __init__(self, parameters: Sequence[Sequence[Parameters]]) -> None:
        self.counters = Counters()
        self._parameters = parameters

    def fetch(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Iterator[tuple[int, Parameters]]:
        self.counters.hits += len(experts)
        for expert in experts:
            yield expert, self._parameters[layer][expert]

    def batches(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Iterator[list[tuple[int, Parameters]]]:
        yield list(self.fetch(layer, experts, weights))

    def close(self) -> None:
        pass


def read_expert(
    experts: ExpertMap | PackedExperts, reader: DirectReader, layer: int, expert: int, memory: torch.Tensor
) -> int:
    """Bring one expert into `memory`, a slot. Returns the bytes read. Raises CheckpointError."""
    if isinstance(experts, PackedExperts):
        return _read_extent(experts, reader, layer, expert, memory)
    targets: list[Target] = []
    conversions: list[Callable[[], None]] = []
    for field, source in zip(experts.layouts[layer].fields, experts.sources(layer, expert), strict=True):
        if experts.is_copied(layer, source):
            target, start = experts.memory(field, source, memory), 0
            for part in source.parts:
                targets.append((part, target[start : start + part.nbytes]))
                start += part.nbytes
        else:
            raw = [torch.empty(part.nbytes, dtype=torch.uint8) for part in source.parts]
            targets.extend(zip(source.parts, raw, strict=True))
            conversions.append(lambda f=field, s=source, r=raw: experts.convert_into(f, s, r, memory))  # type: ignore[misc]
    count = reader.read(targets)
    for convert in conversions:
        convert()
    return count


def _read_extent(experts: PackedExperts, reader: DirectReader, layer: int, expert: int, memory: torch.Tensor) -> int:
    part = experts.extent(layer, expert)
    direct = experts.is_direct(layer)
    extent = memory[: part.nbytes] if direct else Slots(1, part.nbytes)[0]
    count = reader.read_extent(part, extent)
    experts.check(layer, expert, extent)
    if not direct:
        experts.convert(layer, expert, extent, memory)
    return count


class DiskStore:
    """Experts on disk, as many in memory as there are slots.

    `caches[l].capacity` experts of layer l stay between events, with `short` in so many bytes each; `spare` more slots
    (at least 1, best the experts of one token) hold what is being read. Events exclude each other: a second thread
    waits until the first is done.
    """

    def __init__(
        self,
        experts: ExpertMap | PackedExperts,
        reader: DirectReader,
        caches: Sequence[LayerCache],
        spare: int,
        short: int | None = None,
    ) -> None:
        self.counters = Counters()
        self.caches = tuple(caches)
        self.glimpses = [Glimpse() for _ in caches]  # replaced whole, so that any thread may read them
        self._map, self._reader = experts, reader
        self._slots = slot_sets(experts, sum(c.capacity for c in caches), spare, short)
        self._held: tuple[dict[int, int], ...] = tuple({} for _ in caches)  # per layer: resident expert -> kept slot
        self._keeper = Keeper(self._slots, self._lose)
        self._ahead: dict[tuple[int, int], tuple[Future[int], int]] = {}  # (layer, expert) -> its early read, its slot
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="moedge-read")
        self._early = ThreadPoolExecutor(1, thread_name_prefix="moedge-ahead")  # one by one, the likeliest first
        self._event = threading.Lock()
        self._owner: int | None = None

    @property
    def resident_bytes(self) -> int:
        return sum(len(held) for held in self._held) * self._slots.kept.stride

    def resident(self, layer: int) -> frozenset[int]:
        return frozenset(self._held[layer])

    def fetch(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Iterator[tuple[int, Parameters]]:
        with closing(self.batches(layer, experts, weights)) as batches:
            for batch in batches:
                yield from batch

    def batches(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> Generator[list[tuple[int, Parameters]], None, None]:
        self._begin()
        try:
            event = _Event(self, layer, experts, weights)
            try:
                yield from event.hits()
                yield from event.misses()
            finally:
                event.finish()
        finally:
            self._owner = None
            self._event.release()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Start to read those of `experts` that are not in memory, as far as slots are free, for the next event.

        A guess: what it holds changes no cache, and an event of that layer that does not ask for it gives it up.
        """
        if not self._event.acquire(blocking=False):  # another thread's event is under way, it needs the slots
            return
        try:
            self._keeper.settle()
            free = self._slots.read.free
            for expert in experts:
                if len(free) < 2:  # one remains, so that an event of any layer gets on
                    return
                if expert not in self._held[layer] and (layer, expert) not in self._ahead:
                    slot = free.pop()
                    self._ahead[layer, expert] = self._early.submit(self._load, layer, expert, slot), slot
        finally:
            self._event.release()

    def _claim(self, layer: int, experts: Sequence[int]) -> dict[Future[int], tuple[int, int]]:
        """The early reads of `experts` (all of one layer) that have begun; what has not, or was wrong, is given up."""
        claimed, free = {}, self._slots.read.free
        for key, (future, slot) in list(self._ahead.items()):
            if future.cancel():
                free.append(slot)
            elif key[0] == layer and key[1] in experts:
                claimed[future] = (key[1], slot)
            elif future.done():
                if not future.exception():  # a guess that cannot be read is no error until someone needs it
                    self.counters.bytes_read += future.result()
                free.append(slot)
            else:
                continue
            del self._ahead[key]
        return claimed

    def _begin(self) -> None:
        """Wait for other threads' events."""
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError("fetch was called while this thread was still using the experts of another fetch")
        self._event.acquire()
        self._owner = me

    def _views(self, layer: int, expert: int, used: int) -> Parameters:
        return self._map.views(layer, expert, self._slots.used[used])

    def _short(self, layer: int, expert: int, kept: int, used: int) -> ShortExpert:
        """An expert as it is kept, to be restored into a slot if that is needed."""
        memory, nbytes = self._slots.kept[kept], self._map.layouts[layer].nbytes

        def restored() -> Parameters:
            restore(memory, nbytes, self._slots.used[used])
            return self._views(layer, expert, used)

        return ShortExpert(memory, nbytes, partial(self._map.place, layer, expert), restored)

    def _keep(self, layer: int, expert: int, slot: int) -> None:
        """The expert that was read into `slot` stays from now on."""
        if self._slots.kept is self._slots.read:
            self._held[layer][expert] = slot
            return
        self._held[layer][expert] = self._keeper.keep(layer, expert, slot, self._map.layouts[layer].nbytes)

    def _lose(self, layer: int, expert: int) -> None:
        """The expert cannot stay, as it takes more bits than there is room for."""
        self._slots.kept.free.append(self._held[layer].pop(expert))
        self.caches[layer].forget(expert)

    def _load(self, layer: int, expert: int, slot: int) -> int:
        """Bring one expert into a slot (on a reading thread). Returns the bytes read."""
        return read_expert(self._map, self._reader, layer, expert, self._slots.read[slot])

    def close(self) -> None:
        for pool in (self._early, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._keeper.close()
        self._reader.close()


class _Event:
    """One use of one layer's experts: classified at once, then hits, then misses as they arrive.

    The cache decides at the start who will stay. Whoever leaves gives up its slot as soon as it has been used, so the
    spare slots and these are enough for any number of misses.
    """

    def __init__(self, store: DiskStore, layer: int, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        store._keeper.settle(layer)
        access = store.caches[layer].access(experts, weights)
        self._store, self._layer, self._access = store, layer, access
        self._leaving = frozenset(access.evicted)
        self._held, self._slots = store._held[layer], store._slots
        self._reading = store._claim(layer, access.misses)
        early = {expert for expert, _ in self._reading.values()}
        self._waiting = deque(expert for expert in access.misses if expert not in early)
        store.counters.hits += len(access.hits)
        store.counters.misses += len(access.misses)
        for expert in self._leaving.intersection(self._held).difference(access.hits):
            self._give_up(expert)
        shortened = self._slots.kept is not self._slots.read
        self._reserve = int(shortened and bool(access.hits))  # a slot for hits to be restored in
        self._start_reads(self._reserve)

    def _give_up(self, expert: int) -> None:
        self._slots.kept.free.append(self._held.pop(expert))

    def _start_reads(self, leave: int = 0) -> None:
        """As many as there are free slots, but for `leave`."""
        free = self._slots.read.free
        while self._waiting:
            if len(free) > leave:
                expert, slot = self._waiting.popleft(), free.pop()
                self._reading[self._store._pool.submit(self._store._load, self._layer, expert, slot)] = (expert, slot)
            elif not self._store._keeper.wait_for_one():
                return

    def hits(self) -> Iterator[list[tuple[int, Parameters]]]:
        """The experts that were in memory."""
        if not self._access.misses:  # then nobody leaves, and nothing waits
            return self._handed([(expert, self._held[expert]) for expert in self._access.hits], self._slots.kept)
        return self._hits_among_misses()

    def _hits_among_misses(self) -> Iterator[list[tuple[int, Parameters]]]:
        """First those that are to leave: their slots are what waiting reads may need."""
        leaving = [expert for expert in self._access.hits if expert in self._leaving]
        staying = [expert for expert in self._access.hits if expert not in self._leaving]
        for experts in (leaving, staying):
            yield from self._handed([(expert, self._held[expert]) for expert in experts], self._slots.kept)
            if experts is leaving:
                for expert in leaving:
                    self._give_up(expert)
                self._start_reads(self._reserve)
        self._start_reads()

    def misses(self) -> Iterator[list[tuple[int, Parameters]]]:
        while self._reading:
            done, _ = wait(self._reading, return_when=FIRST_COMPLETED)
            self._store.counters.bytes_read += sum(future.result() for future in done)
            yield from self._handed([self._reading[future] for future in done], self._slots.read)
            for future in done:
                expert, slot = self._reading.pop(future)
                if expert in self._leaving:
                    self._slots.read.free.append(slot)
                else:
                    self._store._keep(self._layer, expert, slot)
            self._start_reads()
        assert not self._waiting, "the store has fewer slots than its caches and one spare"

    def _handed(self, experts: Sequence[tuple[int, int]], slots: Slots) -> Iterator[list[tuple[int, Parameters]]]:
        """Experts and their slots as they are used: all at once, or one by one where they may have to be restored."""
        if slots is not self._slots.used:
            yield from self._short(experts)
        elif experts:
            yield [(expert, self._store._views(self._layer, expert, slot)) for expert, slot in experts]

    def _short(self, experts: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, Parameters]]]:
        free = self._slots.used.free
        for expert, slot in experts:
            if not free:
                self._store._keeper.wait_for_one()
            used = free.pop()
            try:
                yield [(expert, self._store._short(self._layer, expert, slot, used))]
            finally:
                free.append(used)

    def finish(self) -> None:
        """Give back the slots of whatever was not handed out: after an error, or when the consumer stopped early."""
        if self._access.misses:
            wait(self._reading)
            self._slots.read.free.extend(slot for _, slot in self._reading.values())
            self._reading.clear()
            for expert in self._leaving.intersection(self._held):
                self._give_up(expert)
            for expert in self._store.caches[self._layer].resident - self._held.keys():
                self._store.caches[self._layer].forget(expert)
        hits, misses = self._access.hits, self._access.misses
        self._store.glimpses[self._layer] = Glimpse(tuple(self._held), hits + misses, misses)
