"""Which experts of one layer stay in memory, and which go when room is needed.

Integers only: no tensors, no devices, no bytes. A policy is told what each event used and is asked for victims; the
cache of one layer holds the resident set. An event is the distinct experts of one token (or of one chunk of tokens) at
one layer. The offline optimum (Belady) needs the future and lives in replay.py.
"""

import math
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

HALF_LIFE = 16.0  # events after which a use counts half; 8 to 24 measure alike (docs/log.md)
WINDOW = 2048  # Recall remembers between one and two windows of events
NEIGHBOURS = 12  # past moments that Recall consults
REACH = 4  # events that make up the near future of a moment, at most
RECALL_WEIGHT = 0.7  # of their mean vote beside the rate of use; 0.5 to 1 measure alike
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

    def access(
        self,
        experts: Sequence[int],
        weights: Sequence[float] | None = None,
        tokens: Iterable[Sequence[int]] | None = None,
    ) -> Access:
        """Uses the distinct `experts`; returns hits, misses (both in the order given) and the experts dropped after.

        For a chunk, `tokens` may give the distinct experts of each of its tokens, in order: then the policy learns from
        every token and not from the chunk as a whole.
        """
        resident = self.resident
        misses = [e for e in experts if e not in resident]
        if not misses and self.capacity == self.num_experts:  # nobody ever goes: no policy has to know
            return Access(tuple(experts), (), ())
        if tokens is None:
            self.policy.used(experts, weights)
        else:
            for token in tokens:
                self.policy.used(token, None)
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

    def __init__(self, num_experts: int, capacity: int, half_life: float = HALF_LIFE) -> None:
        self._growth = math.exp2(1.0 / half_life)
        self._weight = 1.0
        self.score = [0.0] * num_experts

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._weight *= self._growth
        if self._weight > _LARGE:
            self.score = [score / self._weight for score in self.score]
            self._weight = 1.0
        for expert in experts:
            self.score[expert] += self._weight

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        return _lowest(resident, count, self.score)

    @property
    def per_event(self) -> float:
        """Times a score: uses per event over about the last half-life, 0 to 1."""
        return (1.0 - 1.0 / self._growth) / self._weight


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
    """A given set stays, the rest follows another policy, LRU unless given.

    Without a set, the half of the capacity used most so far stays.
    """

    def __init__(
        self, num_experts: int, capacity: int, pinned: Iterable[int] | None = None, rest: Policy | None = None
    ) -> None:
        self._rest = Lru(num_experts, capacity) if rest is None else rest
        self._frequency = Lfu(num_experts, capacity)
        self._pinned = None if pinned is None else frozenset(pinned)
        self._learned = capacity // 2
        if self._pinned is not None and len(self._pinned) > capacity:
            raise ValueError(f"{len(self._pinned)} experts are pinned, the layer's cache holds {capacity}: pin fewer")

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._rest.used(experts, weights)
        if self._pinned is None:
            self._frequency.used(experts, weights)

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        if self._pinned is None:
            loose = set(self._frequency.evict(resident, len(resident) - self._learned))
        else:
            loose = set(resident) - self._pinned
        return self._rest.evict(loose, count)


class Recall:
    """Least likely to be used soon goes: by its recent rate of use, plus what followed the most similar past moments.

    Text repeats itself and so does its routing: this is a nearest-neighbour forecast, learnt while running. A moment's
    likeness to now is twice the experts that the two events share, plus those that the events one and two before them
    share. Up to NEIGHBOURS moments vote, those most like now; each step less of likeness halves a vote, four void it.
    A vote counts the uses in the next capacity/k events after the moment (about as long as a slot is kept), and half
    those in as many events again, k being the experts of an event.

    Likeness is counted for all moments at once: per expert one integer has bit t set when moment t used it, and these
    are added up bit-sliced. With nothing to recall the ranking is AgeingLfu's. The last WINDOW to twice as many moments
    are kept, about 0.2 MB per layer.
    """

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._num_experts = num_experts
        self._capacity = capacity
        self._rate = AgeingLfu(num_experts, capacity)
        self._uses = array("H")  # the experts of all moments, one moment after the other
        self._starts = array("L", [0])  # where in it each moment starts, and where the next one will
        self._marks = [0] * num_experts  # bit t: moment t used the expert
        self._in_moment = False  # whether the last event is the last moment

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        self._rate.used(experts, weights)
        self._in_moment = 0 < 2 * len(experts) <= self._num_experts  # else a chunk, like everything and nothing
        if not self._in_moment:
            return
        marks, now = self._marks, len(self._starts) - 1
        if now == 2 * WINDOW:
            now, cut = WINDOW, self._starts[WINDOW]
            del self._uses[:cut]
            self._starts = array("L", [start - cut for start in self._starts[WINDOW:]])
            marks[:] = [mark >> WINDOW for mark in marks]
        for expert in experts:
            marks[expert] |= 1 << now
        self._uses.extend(experts)
        self._starts.append(len(self._uses))

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        rate = self._rate.score
        votes, total = self._votes() if self._in_moment else ([], 0)
        if not total:
            return _lowest(resident, count, rate)
        share = RECALL_WEIGHT / total / self._rate.per_event
        score = {expert: rate[expert] + share * votes[expert] for expert in resident}
        return sorted(score, key=score.__getitem__)[:count]

    def _votes(self) -> tuple[list[int], int]:
        """Votes for each expert, and how many would mean a use in every event."""
        uses, starts = self._uses, self._starts
        now = len(starts) - 2
        reach = min(REACH, max(1, round(self._capacity / (starts[now + 1] - starts[now]))))
        votes, total = [0] * self._num_experts, 0
        neighbours = self._neighbours(now)
        for moment, likeness in neighbours:
            weight = 8 >> (neighbours[0][1] - likeness)
            if not weight:
                break
            after = starts[moment + 1]
            near, far = starts[min(moment + 1 + reach, now + 1)], starts[min(moment + 1 + 2 * reach, now + 1)]
            for expert in uses[after:near]:
                votes[expert] += 2 * weight
            for expert in uses[near:far]:
                votes[expert] += weight
            total += 2 * weight
        return votes, total

    def _neighbours(self, now: int) -> list[tuple[int, int]]:
        """The past moments most like moment `now`, and their likeness; the more recent first among equals."""
        uses, starts, marks = self._uses, self._starts, self._marks
        digits: list[int] = []  # bit t of digits[i] is bit i of moment t's likeness
        for back in range(1, min(now, 2) + 1):
            for expert in uses[starts[now - back] : starts[now - back + 1]]:
                _add(digits, marks[expert] << back, 0)
        for expert in uses[starts[now] :]:
            _add(digits, marks[expert], 1)
        found: list[tuple[int, int]] = []
        stack = [((1 << now) - 1, len(digits), 0)]  # moments alike in the digits above, digits left, likeness so far
        while stack:
            alike, digit, likeness = stack.pop()
            if digit:
                digit -= 1
                ones = alike & digits[digit]
                if alike != ones:
                    stack.append((alike ^ ones, digit, likeness))
                if ones:
                    stack.append((ones, digit, likeness + (1 << digit)))
                continue
            while alike and likeness:
                moment = alike.bit_length() - 1
                alike ^= 1 << moment
                found.append((moment, likeness))
                if len(found) == NEIGHBOURS:
                    return found
        return found


def _lowest(resident: Collection[int], count: int, score: Sequence[float]) -> list[int]:
    if count == 1:
        return [min(resident, key=score.__getitem__)]
    return sorted(resident, key=score.__getitem__)[:count]


def _add(digits: list[int], carry: int, digit: int) -> None:
    """Adds `carry` (one bit for each of many counters) at binary digit `digit` of bit-sliced counters, in place."""
    while len(digits) < digit:
        digits.append(0)
    while carry:
        if digit == len(digits):
            digits.append(carry)
            return
        digits[digit], carry = digits[digit] ^ carry, digits[digit] & carry
        digit += 1


# name -> (experts of the layer, capacity) -> policy; docs and the command line list these keys
POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "default": Recall,
    "lru": Lru,
    "lfu": Lfu,
    "ageing-lfu": AgeingLfu,
    "lfru": Lfru,
    "pinned": Pinned,
    "recall": Recall,
}
