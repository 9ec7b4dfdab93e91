"""Recorded routing against the eviction policies, and against the best that could be done (Belady).

Integers only: a trace in, hit rates out; knows no model and no bytes. Every (token, layer, expert) is one access, a hit
when it was resident before that token's layer; the cache stays warm from one sequence to the next.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from multiprocessing import get_context
from signal import SIG_IGN, SIGINT, signal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.errors import DataError
from moedge.models.trace import RoutingTrace
from moedge.runtime.policy import POLICIES, LayerCache, Policy

ORACLE = "oracle"
NEVER = 1 << 60  # later than any event

Run = tuple[str, int]  # policy, capacity


@dataclass(frozen=True)
class Row:
    """The hit rate, 0 to 1, of one policy with room for `capacity` experts in every layer."""

    policy: str
    capacity: int
    hit_rate: float


class Oracle:
    """The offline optimum: whoever is used again last goes, which may be the newcomer (Belady 1966, with bypass).

    next_uses[t][i] is the event at which the i-th expert of event t is used again, NEVER without one.
    """

    def __init__(self, num_experts: int, next_uses: Sequence[Sequence[int]]) -> None:
        self._next = [NEVER] * num_experts
        self._coming = iter(next_uses)

    def used(self, experts: Sequence[int], weights: Sequence[float] | None) -> None:
        for expert, event in zip(experts, next(self._coming), strict=True):
            self._next[expert] = event

    def evict(self, resident: Collection[int], count: int) -> list[int]:
        return sorted(resident, key=self._next.__getitem__, reverse=True)[:count]


def next_uses(events: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each expert of each event the index of the next event that uses it, NEVER without one."""
    seen: dict[int, int] = {}
    found: list[list[int]] = []
    for index in range(len(events) - 1, -1, -1):
        found.append([seen.get(expert, NEVER) for expert in events[index]])
        for expert in events[index]:
            seen[expert] = index
    return found[::-1]


def replay(
    trace: RoutingTrace,
    policies: Sequence[str],
    capacities: Sequence[int],
    workers: int = 1,
    progress: Callable[[float], None] | None = None,
) -> list[Row]:
    """A row for each policy and capacity, in this order. `progress` gets the share done.

    policies: keys of POLICIES, or "oracle"; capacities: experts per layer. workers: processes; with more than one the
    caller's main module must be importable. Raises DataError for a trace without tokens, ValueError for an unknown
    policy or a capacity below one.
    """
    for policy in policies:
        if policy not in POLICIES and policy != ORACLE:
            raise ValueError(f"policy {policy!r} does not exist: choose {', '.join([*POLICIES, ORACLE])}")
    if min(capacities, default=1) < 1:
        raise ValueError(f"capacity {min(capacities)} is not a number of experts: at least 1")
    if not (trace.experts >= 0).any():
        raise DataError("the trace has no tokens: record some with moedge trace")
    runs = list(product(policies, capacities))
    hits, accesses = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0)
    tasks = list(product(range(trace.num_layers), runs))
    for done, ((_, run), (found, asked)) in enumerate(zip(tasks, _results(trace, tasks, workers), strict=True), 1):
        hits[run] += found
        accesses[run] += asked
        if progress is not None:
            progress(done / len(tasks))
    return [Row(*run, hits[run] / accesses[run]) for run in runs]


def gap_closed(rows: Sequence[Row], row: Row) -> float | None:
    """How far `row` gets from lru (0) to the oracle (1) at its capacity; None when these are not among `rows`."""
    rates = {other.policy: other.hit_rate for other in rows if other.capacity == row.capacity}
    if "lru" not in rates or ORACLE not in rates or rates["lru"] == rates[ORACLE]:
        return None
    return (row.hit_rate - rates["lru"]) / (rates[ORACLE] - rates["lru"])


def _results(trace: RoutingTrace, tasks: Sequence[tuple[int, Run]], workers: int) -> Iterator[tuple[int, int]]:
    layers = [(trace.experts[:, layer], trace.probs[:, layer], *run) for layer, run in tasks]
    calls = (replay_layer, *zip(*layers, strict=True), repeat(trace.num_experts))
    if workers == 1 or len(tasks) == 1:
        yield from map(*calls)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal, initargs=(SIGINT, SIG_IGN))
    try:
        yield from pool.map(*calls)
    finally:
        pool.shutdown(cancel_futures=True)


def replay_layer(
    experts: NDArray[np.integer[Any]],
    probs: NDArray[np.floating[Any]],
    policy: str,
    capacity: int,
    num_experts: int,
) -> tuple[int, int]:
    """Hits and accesses of one layer: experts, probs [N, k], -1 where a token took fewer experts."""
    events, weights = _events(experts, probs)
    num_experts = max(num_experts, capacity)
    chooser: Policy = (
        Oracle(num_experts, next_uses(events)) if policy == ORACLE else POLICIES[policy](num_experts, capacity)
    )
    access = LayerCache(num_experts, capacity, chooser).access
    hits = sum(len(access(event, weight).hits) for event, weight in zip(events, weights, strict=True))
    return hits, sum(map(len, events))


def _events(
    experts: NDArray[np.integer[Any]], probs: NDArray[np.floating[Any]]
) -> tuple[list[list[int]], list[list[float]]]:
    """The distinct experts of each token and their weights, leaving out tokens that took none."""
    ordered = np.sort(experts, axis=-1)
    if (ordered[:, :1] >= 0).all() and (ordered[:, 1:] != ordered[:, :-1]).all():
        return experts.tolist(), probs.tolist()
    events, weights = [], []
    for chosen, share in zip(experts.tolist(), probs.tolist(), strict=True):
        distinct = {expert: weight for expert, weight in zip(chosen, share, strict=True) if expert >= 0}
        if distinct:
            events.append(list(distinct))
            weights.append(list(distinct.values()))
    return events, weights
