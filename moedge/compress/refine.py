"""The choice of experts made better swap by swap: `moedge fit --refine ROUNDS`.

A score rates each expert of the full model by itself; dropping half of them is no small step, and what is left is
routed anew. So here the smaller model itself is looked at. A round finds for every expert that is there, or not, what
its going, or coming, would change (see routed.py), and makes the swaps that promise most as long as the measured KL on
the samples falls, fewer of them where it does not. Knows no text and no weights.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moedge.compress import page
from moedge.compress.opening import PASS
from moedge.compress.partition import for_kept
from moedge.compress.plan import FitPlan, Shape
from moedge.compress.profile import Counted, passes
from moedge.compress.routed import Distance, Weighted
from moedge.errors import DataError, ModelError
from moedge.models.anatomy import Anatomy
from moedge.runtime.lm import LM

TRIES = 8  # single swaps that are measured in a round before it is given up
Swap = tuple[int, int, int]  # layer, the expert that goes, the one that comes


class Measured(Protocol):
    """What a search asks of a model; see routed.Distance."""

    def of(self, kept: Sequence[Sequence[int]]) -> float: ...
    def effects(self, kept: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]: ...


@dataclass
class Search:
    """Where a search stands: enough to go on from."""

    kept: list[list[int]]
    kl: float  # with `kept`
    first_kl: float  # before anything was swapped
    width: int  # swaps to try at once
    rounds: int = 0
    ended: bool = False  # no swap makes it better
    damping: float | None = None  # what a step of size 1 is expected to cost, from those that were measured
    failed: list[Swap] = field(default_factory=list)  # that made it worse, each by itself

    def learn(self, fell: float, promised: float, size: float) -> None:
        """From a step that was measured: half of what it cost, as bad steps are among them; the last count most."""
        cost = max(0.0, promised - fell) / size / 2
        self.damping = cost if self.damping is None else 0.7 * self.damping + 0.3 * cost

    def save(self, path: Path) -> None:
        page.write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Search":
        found: dict[str, Any] = json.loads(path.read_text())
        return cls(**found | {"failed": [tuple(swap) for swap in found["failed"]]})


def check_refinable(anatomy: Anatomy, memory: int | None) -> None:
    """Raises DataError with a memory limit, ModelError for an encoder-decoder or a module per expert."""
    if memory is not None:
        raise DataError(
            f"refining needs gradients, whose memory is not planned: leave --refine out, or --memory {memory}"
        )
    if anatomy.encoder_decoder or any(layer.kind.modular for layer in anatomy.layers):
        raise ModelError(f"{anatomy.architecture} cannot be refined, only decoders can: leave --refine out")


def refined(
    lm: LM, some: Sequence[Weighted], plan: FitPlan, shape: Shape, rounds: int, keep: Path, note: Callable[[str], None]
) -> FitPlan:
    """`plan` with better experts by the samples; protected ones stay. `keep`: a file to go on from.

    Raises ModelError for a model whose routers cannot be restricted.
    """
    distance = Distance(lm, passes(some, PASS, alone=False))
    if keep.exists():
        search = Search.load(keep)
    else:
        kl = distance.of(plan.kept)
        search = Search([list(each) for each in plan.kept], kl, kl, 2 * shape.layers)
    while search.rounds < rounds and not search.ended:
        advance(search, distance, shape, plan.protected)
        search.save(keep)
        note(f"refine: round {search.rounds} of up to {rounds}, KL {search.first_kl:.3g} to {search.kl:.3g}")
    kept = tuple(tuple(sorted(each)) for each in search.kept)
    alphas = [part.alpha for part in plan.partitions]
    parts = tuple(for_kept(row, each, a) for row, each, a in zip(plan.scores, kept, alphas, strict=True))
    swapped = sum(len(set(new) - set(old)) for new, old in zip(kept, plan.kept, strict=True))
    reason = (
        f"refined: {_many(swapped, 'expert')} swapped in {_many(search.rounds, 'round')}, KL on the samples "
        f"{search.first_kl:.3g} before and {search.kl:.3g} after"
    )
    return replace(plan, kept=kept, partitions=parts, reasons=(*plan.reasons, reason))


def _many(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def advance(search: Search, model: Measured, shape: Shape, protected: Sequence[tuple[int, int]]) -> None:
    """One round: the most promising swaps, half as many where the KL does not fall, until it does.

    A step promises its first-order fall less its size times `damping`: the larger it is, the less of it comes true.
    """
    falls, sizes = model.effects(search.kept)
    width, tries = search.width, 0
    search.rounds += 1
    while tries < TRIES:
        gains = falls - (search.damping or 0.0) * sizes
        swaps = promising(gains, search.kept, shape, protected, search.failed, width)
        if not swaps:  # damped too much, it may be: the best one
            raised = torch.where(sizes > 0, gains - gains[gains.isfinite()].min(), -torch.inf)
            swaps = promising(raised, search.kept, shape, protected, search.failed, 1)
        if not swaps:
            break
        kept = [list(each) for each in search.kept]
        for layer, goes, comes in swaps:
            kept[layer][kept[layer].index(goes)] = comes
        kl = model.of(kept)
        moved = [(layer, expert) for layer, *pair in swaps for expert in pair]
        search.learn(search.kl - kl, *(sum(float(what[at]) for at in moved) for what in (falls, sizes)))
        if kl < search.kl:
            search.kept, search.kl = kept, kl
            search.width = min(2 * shape.layers, 2 * len(swaps))
            return
        if len(swaps) == 1:
            search.failed.append(swaps[0])
            falls[swaps[0][0], list(swaps[0][1:])] = -torch.inf  # other swaps of these experts promise as falsely
            tries += 1
        width = max(1, len(swaps) // 2)
    search.ended = True


def promising(
    gains: Tensor,
    kept: Sequence[Sequence[int]],
    shape: Shape,
    protected: Sequence[tuple[int, int]],
    failed: Sequence[Swap],
    most: int,
) -> list[Swap]:
    """At most `most` swaps whose gains [L, E] sum to more than 0, the largest first, each expert in one only.

    Swaps are within a router's group; a layer has its share of them, at least one.
    """
    size, out = shape.num_experts // shape.groups, set(failed)
    found = []
    for layer, each in enumerate(kept):
        row, inside = gains[layer].tolist(), set(each)
        for goes in inside - {expert for at, expert in protected if at == layer}:
            for comes in set(range(shape.num_experts)) - inside:
                gain = row[goes] + row[comes]
                if gain > 0 and goes // size == comes // size and (layer, goes, comes) not in out:
                    found.append((-gain, layer, goes, comes))
    chosen: list[Swap] = []
    for _, layer, goes, comes in sorted(found):
        own = [swap for swap in chosen if swap[0] == layer]
        taken = {expert for swap in own for expert in swap[1:]}
        if len(own) < max(1, most // shape.layers) and not taken & {goes, comes}:
            chosen.append((layer, goes, comes))
        if len(chosen) == most:
            break
    return chosen


def weigh(counted: Iterable[Counted], answers: Iterable[Counted] | None) -> list[Weighted]:
    """How much each prediction of the samples counts: what is counted 1, and answers as much as all of it together."""
    masks = [sample.mask.astype(float) for sample in counted]
    if answers is not None:
        marks = [sample.mask.astype(float) for sample in answers]
        more = sum(mask.sum() for mask in masks) / max(1.0, sum(mark.sum() for mark in marks))
        masks = [mask + more * mark for mask, mark in zip(masks, marks, strict=True)]
    return [Weighted(tuple(s.ids), tuple(mask.tolist())) for s, mask in zip(counted, masks, strict=True)]
