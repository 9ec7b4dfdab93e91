"""What a router does: load, entropy, mass on the best half, mutual information with labels, local consistency.

Functions of integer arrays; letters: N tokens, L MoE layers, k experts per token, E experts. Knows no models and no
files: traces come from moedge/models/trace.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moedge.errors import DataError
from moedge.models.trace import RoutingTrace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def expert_load(trace: RoutingTrace, num_experts: int, weighted: bool = False) -> Floats:
    """How often each expert was chosen, or with `weighted` the router weight it got, [L, E]."""
    load = np.zeros((trace.num_layers, num_experts))
    for layer in range(trace.num_layers):
        chosen = trace.experts[:, layer].reshape(-1)
        weights = trace.probs[:, layer].reshape(-1).astype(np.float64) if weighted else None
        kept = chosen >= 0
        load[layer] = np.bincount(
            chosen[kept], weights=None if weights is None else weights[kept], minlength=num_experts
        )[:num_experts]
    return load


def load_entropy(load: Floats) -> Floats:
    """Entropy of each layer's load over its experts as a share of the largest possible, [L]: 1 is perfectly even."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1e-300)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.asarray(entropy / max(np.log(load.shape[-1]), 1e-300))


def best_half_mass(load: Floats) -> Floats:
    """Share of each layer's load that its most loaded half of the experts carries, [L]: 0.5 is even."""
    ordered = np.sort(load, axis=-1)[..., ::-1]
    half = load.shape[-1] // 2
    return np.asarray(ordered[..., :half].sum(-1) / np.maximum(load.sum(-1), 1e-300))


def mutual_information(loads: Sequence[Floats]) -> Floats:
    """Bits that a layer's expert tells about which of the labels a token has, labels equally likely, [L].

    `loads` holds one [L, E] load per label. 0: experts do not depend on the label; log2(labels): they give it away.
    """
    joint = np.stack([load / np.maximum(load.sum(-1, keepdims=True), 1e-300) for load in loads]) / len(loads)  # [D,L,E]
    marginal = joint.sum(0)  # [L, E]
    ratio = np.divide(joint * len(loads), marginal, out=np.ones_like(joint), where=marginal > 0)
    return np.asarray((joint * np.log2(np.where(joint > 0, ratio, 1))).sum((0, 2)))


@dataclass(frozen=True)
class Consistency:
    """Segment routing best performance: the F1 of the best fixed choice of experts for `window` tokens, and its size.

    size is the number of experts that the best choice holds, as a multiple of the experts that a token takes.
    """

    window: int
    srp: float
    size: float


def segment_routing_performance(trace: RoutingTrace, num_experts: int, window: int) -> Consistency:
    """SRP over all layers, arXiv 2505.16056 (section 3.1, in the form of its code).

    f counts the uses of an expert in a window of `window` tokens, windows overlapping, within sequences. A threshold a
    keeps the experts with f >= a: TP = sum of their f, P = window * their number, A = all uses; SRP is the largest
    2 TP / (P + A), with one a for all experts and layers. Raises DataError when no sequence is that long.
    """
    histogram = np.zeros(window + 1, dtype=np.int64)  # how many (window, layer, expert) have f uses
    for sequence in trace.sequences():
        if len(sequence) >= window:
            uses = _cumulative_uses(sequence, num_experts)  # [N+1, L, E]
            histogram += np.bincount((uses[window:] - uses[:-window]).reshape(-1), minlength=window + 1)
    if not histogram.sum():
        raise DataError(f"no sequence of the trace has {window} tokens: choose a shorter window")
    counts = np.arange(window + 1)
    at_least = np.cumsum(histogram[::-1])[::-1]  # (window, layer, expert) with f >= a
    true = np.cumsum((histogram * counts)[::-1])[::-1]
    positive, total = window * at_least, true[0]
    scores = 2 * true[1:] / (positive[1:] + total)
    best = int(scores.argmax())
    return Consistency(window, float(scores[best]), float(positive[1 + best] / total))


def segment_cache_hits(trace: RoutingTrace, num_experts: int, window: int, capacity: int) -> float:
    """SCH: hit rate of a cache of `capacity` experts per layer that sees `window` tokens ahead, arXiv 2505.16056.

    The expert with the fewest uses in the next `window` tokens leaves, of equal ones the least recent. Each sequence
    starts with the first `capacity` distinct experts in the cache, as in the paper's code.
    """
    hits = requests = 0
    for sequence in trace.sequences():
        uses = _cumulative_uses(sequence, num_experts)
        for layer in range(sequence.num_layers):
            found, asked = _cache_hits(sequence.experts[:, layer], uses[:, layer], window, capacity)
            hits, requests = hits + found, requests + asked
    if not requests:
        raise DataError("the trace has no tokens: record some with moedge trace")
    return hits / requests


def _cache_hits(experts: NDArray[np.integer], uses: Ints, window: int, capacity: int) -> tuple[int, int]:
    """Hits and requests of one layer, experts [N, k], cumulative uses [N+1, E]."""
    cached: dict[int, int] = {}  # expert -> token of its last use
    hits = requests = 0
    for token, chosen in enumerate(_distinct(experts)):
        for expert in chosen:
            requests += 1
            hits += expert in cached or len(cached) < capacity  # the first ones are there from the start
            cached[expert] = token
        if len(cached) > capacity:
            ahead = uses[min(token + 1 + window, len(uses) - 1)] - uses[token + 1]
            keep = sorted(cached, key=lambda e: (ahead[e], cached[e]), reverse=True)[:capacity]
            cached = {expert: cached[expert] for expert in keep}
    return hits, requests


def _distinct(experts: NDArray[np.integer]) -> Iterator[list[int]]:
    return ([e for e in dict.fromkeys(row) if e >= 0] for row in experts.tolist())


def _cumulative_uses(sequence: RoutingTrace, num_experts: int) -> Ints:
    """How many of the tokens before t used an expert, [N+1, L, E]."""
    tokens, layers, _ = sequence.experts.shape
    used = np.zeros((tokens, layers, num_experts + 1), dtype=bool)  # the last column takes the -1 of "no expert"
    np.put_along_axis(used, sequence.experts.astype(np.int64), True, axis=-1)
    uses = np.zeros((tokens + 1, layers, num_experts), dtype=np.int64)
    np.cumsum(used[..., :num_experts], axis=0, out=uses[1:])
    return uses
