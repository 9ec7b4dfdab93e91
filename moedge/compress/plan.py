"""One dial: from a budget to the experts that each layer keeps, with the reason for every number.

Every layer keeps the same number, because that is what stock loaders read. Knows counts, bytes and scores; no weights.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moedge.compress.partition import Partition, for_kept, partition, ranking
from moedge.errors import DataError
from moedge.units import format_size, parse_size

Floats = NDArray[np.float64]
Experts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shape:
    """What a plan has to know of a model. `groups`: its router picks groups first, so each must keep as many."""

    num_experts: int
    layers: int
    least: int  # experts a layer must keep
    groups: int
    expert_bytes: int  # of one expert of every layer, on disk
    other_bytes: int  # of everything else

    @property
    def nbytes(self) -> int:
        return self.bytes_with(self.num_experts)

    def bytes_with(self, kept: int) -> int:
        """The checkpoint's bytes when every layer keeps `kept` experts."""
        return self.other_bytes + kept * self.expert_bytes


@dataclass(frozen=True)
class Budget:
    """How many experts a layer keeps, and why."""

    asked: str
    kept: int
    reason: str


def parse_budget(asked: str, shape: Shape) -> Budget:
    """`50%` of the experts, `experts=16` of each layer, or `800MiB` for the whole checkpoint on disk.

    Raises DataError for a budget below the least that the model can do with, or above what it has.
    """
    text = asked.strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        wanted = int(float(match[1]) / 100 * shape.num_experts + 1e-9)
        if not 0 < float(match[1]) <= 100:
            raise DataError(f"budget {asked}: a share of the experts is above 0% and at most 100%")
        reason = f"{text} of {shape.num_experts} experts"
    elif match := re.fullmatch(r"experts\s*=\s*(\d+)", text):
        wanted, reason = int(match[1]), f"{match[1]} experts a layer were asked for"
    else:
        wanted, reason = _by_bytes(asked, shape)
    if wanted > shape.num_experts:
        raise DataError(
            f"budget {asked}: the model has {shape.num_experts} experts a layer, {wanted} are more than that"
        )
    kept = wanted - wanted % shape.groups
    if kept != wanted:
        reason += f", rounded down to a multiple of the router's {shape.groups} groups"
    if kept < shape.least:
        raise DataError(
            f"budget {asked} leaves {kept} experts a layer, the model's router needs {shape.least}: "
            f"give experts={shape.least} or at least {_enough(shape.bytes_with(shape.least))}"
        )
    return Budget(asked, kept, reason)


def _enough(nbytes: int) -> str:
    """A size that is not below `nbytes`, as short as it may be written."""
    short = format_size(nbytes)
    return short if parse_size(short) >= nbytes else f"{-(-nbytes // 1024)} KiB"


def _by_bytes(asked: str, shape: Shape) -> tuple[int, str]:
    try:
        limit = parse_size(asked)
    except ValueError as error:
        raise DataError(f"budget {asked!r} is not a share (50%), a size (800MiB) or experts=16") from error
    if limit >= shape.bytes_with(shape.num_experts + 1):
        raise DataError(f"budget {asked} is above the whole model, which takes {format_size(shape.nbytes)}: give less")
    wanted = max(0, min(shape.num_experts, (limit - shape.other_bytes) // shape.expert_bytes))
    each = format_size(shape.expert_bytes)
    return (
        wanted,
        f"{asked} less {format_size(shape.other_bytes)} besides experts, {each} for one expert of every layer",
    )


@dataclass(frozen=True)
class FitPlan:
    """Which experts stay. `scores` [L, E] are those that decided, `partitions` one a layer."""

    budget: Budget
    kept: Experts
    protected: tuple[tuple[int, int], ...]  # (layer, expert) that stay whatever their score
    partitions: tuple[Partition, ...]
    scores: Floats
    reasons: tuple[str, ...]


def make_plan(
    scores: Floats,
    shape: Shape,
    budget: Budget,
    protect: Sequence[tuple[int, int]] = (),
    alpha: float | None = None,
) -> FitPlan:
    """The experts [L, kept] that stay: the protected ones, then the most important, of each group as many.

    Raises DataError when a layer has more protected experts than it keeps, or an id that is not there.
    """
    for layer, expert in protect:
        if not (0 <= layer < shape.layers and 0 <= expert < shape.num_experts):
            raise DataError(f"protect {layer}:{expert}: the model has layers 0 to {shape.layers - 1}, experts 0 to "
                            f"{shape.num_experts - 1}")  # fmt: skip
    kept = tuple(
        _keep(scores[layer], shape, budget.kept, {e for at, e in protect if at == layer}, layer)
        for layer in range(shape.layers)
    )
    parts = tuple(for_kept(row, experts, alpha) for row, experts in zip(scores, kept, strict=True))
    reasons = [f"{budget.kept} experts a layer: {budget.reason}"]
    if shape.groups > 1:
        reasons.append(f"the best {budget.kept // shape.groups} of each of {shape.groups} groups of the router")
    if protect:
        many = "1 expert" if len(set(protect)) == 1 else f"{len(set(protect))} experts"
        reasons.append(f"{many} protected, {_won(scores, kept, protect)} only by that")
    reasons.append(_thresholds(parts, alpha))
    return FitPlan(budget, kept, tuple(sorted(set(protect))), parts, scores, tuple(reasons))


def with_room(found: Sequence[tuple[int, int]], strength: Floats, shape: Shape, kept: int) -> list[tuple[int, int]]:
    """Of (layer, expert) pairs those that a layer can keep among `kept`, in each group the strongest [L, E] first."""
    size, room = shape.num_experts // shape.groups, kept // shape.groups
    taken: Counter[tuple[int, int]] = Counter()
    held = []
    for layer, expert in sorted(found, key=lambda pair: (-strength[pair], pair)):
        taken[layer, expert // size] += 1
        if taken[layer, expert // size] <= room:
            held.append((layer, expert))
    return sorted(held)


def by_thresholds(scores: Floats, shape: Shape, alpha: float, beta: float) -> Budget:
    """The budget that thresholds imply: as many experts as the layer with the most hot ones has.

    Rounded up to whole groups and to the least that the router needs.
    """
    hot = max(len(partition(row[: shape.num_experts], alpha, beta).hot) for row in scores)
    kept = max(shape.least, -(-hot // shape.groups) * shape.groups)
    return Budget(f"beta={beta:g}", kept, f"at most {hot} experts of a layer have a share above beta {beta:g}")


def _keep(scores: Floats, shape: Shape, count: int, protected: set[int], layer: int) -> tuple[int, ...]:
    size = shape.num_experts // shape.groups
    found: list[int] = []
    for group in range(shape.groups):
        members = range(group * size, (group + 1) * size)
        first = [expert for expert in members if expert in protected]
        if len(first) > count // shape.groups:
            raise DataError(
                f"layer {layer} has {len(first)} protected experts and keeps {count // shape.groups}"
                f"{' of that group' if shape.groups > 1 else ''}: give a larger budget, or protect fewer"
            )
        order = [group * size + expert for expert in ranking(scores[members.start : members.stop])]
        rest = [expert for expert in order if expert not in protected]
        found += first + rest[: count // shape.groups - len(first)]
    return tuple(sorted(found))


def _won(scores: Floats, kept: Experts, protect: Sequence[tuple[int, int]]) -> int:
    """How many protected experts are not among the best of their layer."""
    return sum(expert not in ranking(scores[layer])[: len(kept[layer])] for layer, expert in set(protect))


def _thresholds(parts: Sequence[Partition], alpha: float | None) -> str:
    betas = [part.beta for part in parts]
    alphas = [part.alpha for part in parts]
    how = "found from what is negligible" if alpha is None else "as given"
    return (
        f"beta {min(betas):.2g} to {max(betas):.2g} of a layer's importance, found from the budget; "
        f"alpha {min(alphas):.2g} to {max(alphas):.2g}, {how}"
    )
