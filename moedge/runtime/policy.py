"""Which experts of one layer stay in memory, and which go when room is needed.

Integers only: no tensors, no devices, no bytes. A policy is told what each event used and is asked for victims; the
cache of one layer holds the resident set. An event is the distinct experts of one token (or of one chunk of tokens) at
one layer. The offline optimum (Belady) needs the future and lives in replay.py.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

AGEING_HALF_LIFE = 64.0  # events after which a use counts half
_LARGE = 2.0**512  # rescale decayed counts before a double overflows
_RECENCY_BITS = 40  # below a count, so that equal counts are ranked by their last use


class Policy(Protocol):
    """Ranks the experts of one layer. Knows nothing of what is resident until it is asked for victims."""

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        """One event: its distinct experts and, optionally, the router's probability of each."""

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        """`count` distinct members of `resident` to drop, worst first; the last event's experts may be among them."""


@dataclass(frozen=True, slots=True)
class Access:
    """What one event did to a cache. An expert in both `misses` and `evicted` was read, used and dropped (bypassed)."""

    hits: tuple[int, ...]
    misses: tuple[int, ...]
    evicted: tuple[int, ...]


class LayerCache:
    """The resident experts of one layer, at most `capacity` between two events.

    An event is atomic: all its experts are classified against the residents before it, the misses are read, then the
    policy learns of the event, then victims go until the rest fits. During an event up to `capacity` plus its misses
    are held.
    """

    def __init__(self, num_experts: int, capacity: int, policy: Policy) -> None:
        if not 0 <= capacity <= num_experts:
            raise ValueError(f"capacity {capacity} is not between 0 and the layer's {num_experts} experts")
        self.num_experts = num_experts
        self.capacity = capacity
        self.policy = policy
        self.resident: set[int] = set()

    def access(self, experts: Sequence[int], weights: Sequence[float] | None = None) -> Access:
        """Uses the distinct `experts`; returns hits, misses (both in the order given) and the experts dropped after."""
        resident = self.resident
        misses = [e for e in experts if e not in resident]
        self.policy.used(experts, weights)
        if not misses:
            return Access(tuple(experts), (), ())
        hits = [e for e in experts if e in resident]
        resident.update(misses)
        surplus = len(resident) - self.capacity
        if surplus <= 0:
            return Access(tuple(hits), tuple(misses), ())
        evicted = self.policy.evict(resident, surplus)
        resident.difference_update(evicted)
        return Access(tuple(hits), tuple(misses), tuple(evicted))

    def forget(self, expert: int) -> None:
        """The expert could not be read after all, or its slot was taken away: it is no longer resident."""
        self.resident.discard(expert)


class Lru:
    """Least recently used goes. Within one event, later in the sequence is more recent."""

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._clock = 0
        self._last = [0] * num_experts

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        for expert in experts:
            self._clock += 1
            self._last[expert] = self._clock

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        return _lowest(resident, count, self._last)


class Lfu:
    """Least used since the start goes; equal counts by recency."""

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._clock = 0
        self._score = [0] * num_experts  # uses << 40 | clock of the last one

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._clock += 1
        for expert in experts:
            uses = (self._score[expert] >> _RECENCY_BITS) + 1
            self._score[expert] = (uses << _RECENCY_BITS) | self._clock

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        return _lowest(resident, count, self._score)


class AgeingLfu:
    """Least used goes, where a use counts half after `half_life` events.

    Nothing decays: each event's uses weigh more than the last one's by 2^(1/half_life), and all is rescaled before it
    overflows.
    """

    def __init__(self, num_experts: int, capacity: int, half_life: float = AGEING_HALF_LIFE) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._weight = 1.0
        self._score = [0.0] * num_experts

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._weight *= self._growth
        if self._weight > _LARGE:
            self._score = [score / self._weight for score in self._score]
            self._weight = 1.0
        for expert in experts:
            self._score[expert] += self._weight

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        return _lowest(resident, count, self._score)


class Lfru:
    """Keeps the largest uses / (age + 1), age in events since the last use (arXiv 2608.07911)."""

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._clock = 0
        self._uses = [0] * num_experts
        self._last = [0] * num_experts

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._clock += 1
        for expert in experts:
            self._uses[expert] += 1
            self._last[expert] = self._clock

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        uses, last, now = self._uses, self._last, self._clock + 1
        return sorted(resident, key=lambda expert: (uses[expert] / (now - last[expert]), expert))[:count]


class Pinned:
    """A given set stays, the rest is LRU. Without a set, the half of the capacity used most so far stays."""

    def __init__(self, num_experts: int, capacity: int, pinned: Iterable[int] | None = None) -> None:
        self._recency = Lru(num_experts, capacity)
        self._frequency = Lfu(num_experts, capacity)
        self._pinned = None if pinned is None else frozenset(pinned)
        self._learned = capacity // 2
        if self._pinned is not None and len(self._pinned) > capacity:
            raise ValueError(f"{len(self._pinned)} experts are pinned, the layer's cache holds {capacity}: pin fewer")

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._recency.used(experts, weights)
        if self._pinned is None:
            self._frequency.used(experts, weights)

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        if self._pinned is None:
            loose = set(self._frequency.evict(resident, len(resident) - self._learned))
        else:
            loose = set(resident) - self._pinned
        return self._recency.evict(loose, count)


def _lowest(resident: Collection[int], count: int, score: Sequence[float]) -> list[int]:
    if count == 1:
        return [min(resident, key=score.__getitem__)]
    return sorted(resident, key=score.__getitem__)[:count]


# name -> (experts of the layer, capacity) -> policy; docs and the command line list these keys
POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "default": AgeingLfu,
    "lru": Lru,
    "lfu": Lfu,
    "ageing-lfu": AgeingLfu,
    "lfru": Lfru,
    "pinned": Pinned,
}
