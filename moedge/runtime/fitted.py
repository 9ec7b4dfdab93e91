"""What `experts=` and `fallback=` of `moedge.load` mean: fewer experts, or all of them with some that stay in memory.

Knows ids and capacities; how a model is narrowed is in models/narrow.py, who evicts in policy.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from moedge.errors import ModelError
from moedge.models.kept import Kept
from moedge.models.load import Blueprint
from moedge.models.narrow import narrow
from moedge.runtime.policy import POLICIES, LayerCache, Pinned

Experts = str | os.PathLike[str] | Kept | Sequence[Sequence[int]]  # a fit's folder, its choice, or ids per MoE layer


@dataclass(frozen=True)
class Pins:
    """The experts that stay in memory as far as there are slots: per MoE layer, the most important first."""

    order: tuple[tuple[int, ...], ...]

    def within(self, capacities: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Those that have a slot."""
        return tuple(each[:capacity] for each, capacity in zip(self.order, capacities, strict=True))


def fit(blueprint: Blueprint, experts: Experts | None, fallback: bool) -> tuple[Blueprint, Pins | None]:
    """The blueprint of what is to be run, and with `fallback` what is to be pinned of it.

    Without `fallback`, the model has the given experts only. With it, the model is whole. Raises DataError for a fit
    that cannot be read or is another model's, ModelError for ids that the model cannot keep.
    """
    if experts is None:
        if fallback:
            raise ModelError("fallback is for a fit, whose experts then stay in memory: give --experts as well")
        return blueprint, None
    kept = Kept.load(experts) if isinstance(experts, (str, os.PathLike)) else experts
    if isinstance(kept, Kept):
        kept.check(blueprint.anatomy)
        order = tuple(kept.order(layer) for layer in range(len(kept.experts)))
    else:
        order = tuple(tuple(each) for each in kept)
    if not fallback:
        return narrow(blueprint, order), None
    _check_ids(blueprint, order)
    return blueprint, Pins(order)


def make_caches(
    num_experts: Sequence[int], capacities: Sequence[int], policy: str, pins: Pins | None = None
) -> list[LayerCache]:
    """A cache for each layer that follows `policy`, a key of POLICIES; what is pinned is not evicted."""
    if pins is None:
        sizes = zip(num_experts, capacities, strict=True)
        return [LayerCache(count, capacity, POLICIES[policy](count, capacity)) for count, capacity in sizes]
    made = []
    for count, capacity, pinned in zip(num_experts, capacities, pins.within(capacities), strict=True):
        rest = POLICIES[policy](count, capacity - len(pinned))  # which has the other slots
        made.append(LayerCache(count, capacity, Pinned(count, capacity, pinned, rest)))
    return made


def _check_ids(blueprint: Blueprint, order: Sequence[Sequence[int]]) -> None:
    layers = blueprint.anatomy.layers
    if len(order) != len(layers):
        raise ModelError(f"experts of {len(order)} layers are given, the model has {len(layers)} MoE layers")
    for layer, each in zip(layers, order, strict=True):
        if len(set(each)) < len(each) or not all(0 <= expert < layer.num_experts for expert in each):
            last = layer.num_experts - 1
            raise ModelError(f"layer {layer.index} has experts 0 to {last}, not {list(each)}: name each once")
