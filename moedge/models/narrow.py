"""A model with some of its experts only: as a blueprint, from which it runs. No expert is read or copied.

The config gets the new count of experts; what else becomes smaller (router rows, biases, correction biases) is what
differs in shape between the two models on the meta device, so no architecture needs a line here. Knows configs, shapes
and ids; which experts are worth keeping is in compress/, the same model as files in compress/export.py.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.configuration_utils import PretrainedConfig

from moedge.errors import ModelError
from moedge.models.anatomy import Anatomy, MoeLayer, dissect
from moedge.models.architecture import meta_model
from moedge.models.checkpoint import Rows
from moedge.models.expert_map import ExpertMap, ParameterSource, Part, target_names
from moedge.models.load import Blueprint
from moedge.models.pack import PackedCheckpoint
from moedge.models.packed_experts import PackedExperts

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_SCORED = 2  # a group is chosen by the sum of its two best experts


@dataclass(frozen=True)
class Constraints:
    """What an architecture asks of the experts that a layer keeps: at least `minimum`, of each group equally many.

    Groups are contiguous and of equal size; the minimum is a multiple of their number.
    """

    minimum: int
    groups: int = 1

    def check(self, layer: MoeLayer, kept: Sequence[int]) -> None:
        """Raises ModelError when `kept` (ids of the full layer) cannot be all that the layer has."""
        name, count = f"layer {layer.index}", len(kept)
        if len(set(kept)) < count or not all(0 <= expert < layer.num_experts for expert in kept):
            raise ModelError(f"{name} has experts 0 to {layer.num_experts - 1}, not {list(kept)}: name each once")
        if count < self.minimum:
            of_groups = f" in {self.groups} groups" if self.groups > 1 else ""
            raise ModelError(
                f"{name} would keep {count} of {layer.num_experts} experts, its router needs {self.minimum}{of_groups} "
                f"to choose {layer.top_k}: keep more"
            )
        size = layer.num_experts // self.groups
        members = [sum(expert // size == group for expert in kept) for group in range(self.groups)]
        if len(set(members)) > 1:
            raise ModelError(
                f"{name} would keep {', '.join(map(str, members))} experts of its {self.groups} groups of {size}: "
                "its router chooses groups first, keep as many of each"
            )


def constraints(blueprint: Blueprint) -> Constraints:
    """What the model asks of the experts that are kept. Raises ModelError for one that cannot do with fewer."""
    _refuse_tables(blueprint)
    config: Any = blueprint.config.get_text_config(decoder=True)
    top_k = max(layer.top_k for layer in blueprint.anatomy.layers)
    groups, method = getattr(config, "n_group", None), getattr(config, "topk_method", None)
    if not isinstance(groups, int) or method == "greedy":
        return Constraints(top_k)
    least = 1 if method == "group_limited_greedy" else _SCORED  # DeepSeek-V2 takes a group's best expert for its score
    chosen = min(groups, getattr(config, "topk_group", None) or groups)
    return Constraints(groups * max(least, -(-top_k // chosen)), groups)


def narrow(blueprint: Blueprint, kept: Sequence[Sequence[int]]) -> Blueprint:
    """The model that has, of MoE layer l, only the experts `kept[l]`; expert i of it is the i-th of them, ascending.

    Layers must keep equally many, as the models of transformers have them. Raises ModelError for what cannot be kept.
    """
    anatomy = blueprint.anatomy
    chosen = tuple(tuple(sorted(each)) for each in kept)
    if len(chosen) != anatomy.num_layers:
        raise ModelError(f"experts of {len(chosen)} layers are given, the model has {anatomy.num_layers} MoE layers")
    counts = {len(each) for each in chosen}
    if len(counts) > 1:
        raise ModelError(
            f"layers would keep from {min(counts)} to {max(counts)} experts: {anatomy.architecture} has one number of "
            "experts for all layers, keep as many of each"
        )
    rules = constraints(blueprint)
    for layer, each in zip(anatomy.layers, chosen, strict=True):
        rules.check(layer, each)
    config = copy.deepcopy(blueprint.config)
    for part in (config, config.get_text_config(decoder=True)):
        for name in count_names(part, anatomy):
            setattr(part, name, len(chosen[0]))
    meta = meta_model(config, blueprint.dtype)
    found = dissect(meta)
    _check_counts(anatomy, found, len(chosen[0]))
    rows = _kept_rows(blueprint, meta.state_dict(), chosen)
    checkpoint, experts = blueprint.checkpoint.narrowed(rows), blueprint.experts
    fewer: ExpertMap | PackedExperts
    fewer = _FewerPacked(experts, chosen) if isinstance(experts, PackedExperts) else _FewerExperts(experts, chosen)
    return replace(blueprint, config=config, checkpoint=checkpoint, meta=meta, anatomy=found, experts=fewer)


def count_names(config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """The fields of `config` that say how many experts a layer has, under each of their names."""
    counts = {layer.num_experts for layer in anatomy.layers}
    return [name for name in COUNTS if getattr(config, name, None) in counts]


def _refuse_tables(blueprint: Blueprint) -> None:
    """A router that looks experts up by token has their ids in a table, which no slice makes smaller."""
    state = blueprint.meta.state_dict()
    for layer in blueprint.anatomy.layers:
        tables = [n for n, t in state.items() if n.startswith(f"{layer.router}.") and not t.is_floating_point()]
        if tables:
            raise ModelError(
                f"{blueprint.anatomy.architecture} cannot do with fewer experts: {tables[0]} is a table from tokens to "
                "experts, whose tokens would be left without"
            )


def _check_counts(full: Anatomy, found: Anatomy, count: int) -> None:
    wrong = next((layer for layer in found.layers if layer.num_experts != count), None)
    if wrong is not None or found.num_layers != full.num_layers:
        what = f"layer {wrong.index} keeps {wrong.num_experts}" if wrong else f"it would have {found.num_layers} layers"
        raise ModelError(
            f"{full.architecture} cannot be given {count} experts by its config ({what}; tried {', '.join(COUNTS)}): "
            "fit another model"
        )


def _kept_rows(blueprint: Blueprint, state: dict[str, Any], kept: Sequence[Sequence[int]]) -> dict[str, Rows]:
    """For each tensor of the checkpoint that the smaller model has a part of, which part; no expert's own."""
    full: dict[str, Any] = blueprint.meta.state_dict()
    checkpoint, target_of = blueprint.checkpoint, target_names(blueprint.meta)
    layer_of, found = _owner(blueprint.anatomy), {}
    wanted = {name for name, tensor in full.items() if name not in state or state[name].shape != tensor.shape}
    for name, info in checkpoint.tensors.items():
        if name in blueprint.experts.tensors or (target := target_of(name)[0]) not in wanted:
            continue
        layer = layer_of(target)
        rows = _rows(full[target].shape, state[target].shape, layer, kept) if layer and target in state else None
        coded = isinstance(checkpoint, PackedCheckpoint) and name in checkpoint.manifest.coded
        if rows is None or coded or info.shape != tuple(full[target].shape):
            raise ModelError(
                f"{name} {list(info.shape)} of {blueprint.anatomy.architecture} depends on the number of experts in a "
                "way that is not known, so none can be left out: fit another model"
            )
        found[name] = rows
    return found


def _rows(full: torch.Size, small: torch.Size, layer: MoeLayer, kept: Sequence[Sequence[int]]) -> Rows | None:
    """The rows of the kept experts, and those after the experts' (what is shared, or skips the layer)."""
    ids = kept[layer.index]
    axes = [axis for axis, (a, b) in enumerate(zip(full, small, strict=False)) if a != b]
    if len(full) != len(small) or len(axes) != 1:
        return None
    size, after = full[axes[0]], small[axes[0]] - len(ids)
    if after < 0 or size != layer.num_experts + after:
        return None
    return Rows(axes[0], (*ids, *range(layer.num_experts, size)))


def _owner(anatomy: Anatomy) -> Callable[[str], MoeLayer | None]:
    """From a parameter's name to the MoE layer that it is part of."""

    def find(name: str) -> MoeLayer | None:
        return next((layer for layer in anatomy.layers if name.startswith(f"{layer.block}.")), None)

    return find


class _FewerExperts(ExpertMap):
    """An ExpertMap's experts under new ids: expert e of layer l is its `kept[l][e]`."""

    def __init__(self, full: ExpertMap, kept: Sequence[Sequence[int]]) -> None:
        self._full, self._kept = full, kept
        self._config, self.layouts, self.tensors = full._config, full.layouts, full.tensors

    def sources(self, layer: int, expert: int) -> tuple[ParameterSource, ...]:
        return self._full.sources(layer, self._kept[layer][expert])


class _FewerPacked(PackedExperts):
    """The same of a packed checkpoint."""

    def __init__(self, full: PackedExperts, kept: Sequence[Sequence[int]]) -> None:
        self._full, self._kept = full, kept
        self.layers, self.layouts, self.tensors, self._direct = full.layers, full.layouts, full.tensors, full._direct

    def nbytes(self, layer: int, expert: int) -> int:
        return self._full.nbytes(layer, self._kept[layer][expert])

    def extent(self, layer: int, expert: int) -> Part:
        return self._full.extent(layer, self._kept[layer][expert])

    def check(self, layer: int, expert: int, extent: torch.Tensor) -> None:
        self._full.check(layer, self._kept[layer][expert], extent)

    def convert(self, layer: int, expert: int, extent: torch.Tensor, slot: torch.Tensor) -> None:
        self._full.convert(layer, self._kept[layer][expert], extent, slot)

    def views(self, layer: int, expert: int, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._full.views(layer, self._kept[layer][expert], slot)
