"""Where the bytes of each expert lie in a checkpoint, and how they become the expert's parameters.

The model's own weight converters (transformers' conversion mapping) say which checkpoint tensors make up an expert.
Where they only stack and concatenate, an expert's bytes are copied as they are; otherwise the converters are replayed
on that one expert's tensors. So no architecture needs code here. Knows no cache and reads nothing itself.

Alignment decides the last bit of a product, so each parameter gets the address modulo 64 that it has in a stock model:
tensors that transformers makes are aligned, those that it takes from the mapped file lie where the file has them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moedge.errors import CheckpointError, ModelError
from moedge.models.anatomy import Anatomy, MoeLayer
from moedge.models.checkpoint import ALIGNMENT, Checkpoint, TensorInfo

UNRELATED = "config.json and weights do not belong together"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Part:
    """One expert's share of one checkpoint tensor: `nbytes` bytes at `offset` of the tensor's file."""

    info: TensorInfo
    pattern: str  # the converter's name for this source
    offset: int
    nbytes: int
    shape: tuple[int, ...]  # without the expert axis


@dataclass(frozen=True)
class ParameterSource:
    """How one parameter of one expert is made: copied from `parts` in order, or converted from them."""

    name: str
    parts: tuple[Part, ...]
    converter: WeightConverter | None  # None: the parts' bytes, one after the other, are the parameter
    stacked: bool  # the converter expects lists of 2-D tensors, one per expert
    shift: int  # address modulo 64 that a stock model gives it


@dataclass(frozen=True)
class Field:
    """One parameter's place in a slot."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class SlotLayout:
    """The parameters of one expert of a layer, one after the other, each with room to be shifted by up to 63 bytes."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, layer: MoeLayer) -> "SlotLayout":
        fields, end = [], 0
        for name, (shape, dtype) in layer.parameters.items():
            fields.append(Field(name, end, tuple(shape), dtype))
            end += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return cls(tuple(fields), end)


def largest(layouts: Iterable[SlotLayout]) -> int:
    """Bytes of a slot that an expert of any layer fits into."""
    return max(layout.nbytes for layout in layouts)


class ExpertMap:
    """For every (layer, expert), the sources of its parameters in `checkpoint`.

    `model` is the meta model with its expert parameters still in place. Raises CheckpointError, naming file and
    tensor, when an expert has no source or one of the wrong shape.
    """

    short = False  # slots hold experts as they are

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint) -> None:
        self.layouts = tuple(SlotLayout.of(layer) for layer in anatomy.layers)
        self._config = model.config
        targets = {
            target: (layer.index, expert, name)
            for layer in anatomy.layers
            for expert, name, target in _targets(model, layer)
        }
        found = _find_sources(model, checkpoint, targets)
        self.tensors = frozenset(
            info.name for by_pattern, _ in found.values() for s in by_pattern.values() for info in s
        )
        self._sources: dict[tuple[int, int], dict[str, ParameterSource]] = {}
        for target, (index, expert, name) in targets.items():
            if target not in found:
                raise CheckpointError(f"{checkpoint.folder} has no tensor for {target}: it is not a whole checkpoint")
            by_pattern, converter = found[target]
            layer = anatomy.layers[index]
            experts = range(layer.num_experts) if expert is None else (expert,)
            for e in experts:
                source = _source(layer, name, target, e if expert is None else None, by_pattern, converter)
                self._sources.setdefault((index, e), {})[name] = source

    def sources(self, layer: int, expert: int) -> tuple[ParameterSource, ...]:
        """The expert's parameters in the order of the layer's slot layout."""
        sources = self._sources[layer, expert]
        return tuple(sources[f.name] for f in self.layouts[layer].fields)

    def memory(self, field: Field, source: ParameterSource, slot: torch.Tensor) -> torch.Tensor:
        """The bytes of `slot` (uint8, 64-byte aligned) that one parameter takes."""
        start = field.offset + source.shift
        return slot[start : start + field.nbytes]

    def place(self, layer: int, expert: int, name: str) -> Field:
        """Where one parameter of an expert lies in its slot."""
        field = next(f for f in self.layouts[layer].fields if f.name == name)
        shift = self._sources[layer, expert][name].shift
        return replace(field, offset=field.offset + shift) if shift else field

    def views(self, layer: int, expert: int, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The expert's parameters by name as views of the slot that holds it."""
        pairs = zip(self.layouts[layer].fields, self.sources(layer, expert), strict=True)
        return {f.name: self.memory(f, source, slot).view(f.dtype).view(f.shape) for f, source in pairs}

    def parts(self, layer: int, expert: int) -> list[Part]:
        """All that one expert is made of."""
        return [part for source in self.sources(layer, expert) for part in source.parts]

    def nbytes(self, layer: int, expert: int) -> int:
        """Bytes of the expert on disk."""
        return sum(part.nbytes for part in self.parts(layer, expert))

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest expert as it is read."""
        return largest(self.layouts)

    @property
    def conversion_bytes(self) -> int:
        """Memory that reading one expert takes besides its slot, an upper estimate."""

        def of(layer: int) -> int:
            converted = (source for source in self.sources(layer, 0) if not self.is_copied(layer, source))
            return 2 * sum(part.nbytes for source in converted for part in source.parts)

        return max(of(layer) for layer in range(len(self.layouts)))

    def is_copied(self, layer: int, source: ParameterSource) -> bool:
        """Whether the bytes of the source's parts, one after the other, are the parameter."""
        field = next(f for f in self.layouts[layer].fields if f.name == source.name)
        return source.converter is None and all(part.info.dtype == field.dtype for part in source.parts)

    def convert_into(self, field: Field, source: ParameterSource, raw: list[torch.Tensor], slot: torch.Tensor) -> None:
        """Write a parameter that is not copied into `slot`, from the bytes of its parts (`raw`: uint8, one each)."""
        values = [_typed(piece, part) for part, piece in zip(source.parts, raw, strict=True)]
        value = self._convert(field, source, values)
        if tuple(value.shape) != field.shape:
            raise CheckpointError(
                f"tensor {source.parts[0].info.name} in {source.parts[0].info.file} gives {source.name} of shape "
                f"{list(value.shape)}, the model wants {list(field.shape)}: {UNRELATED}"
            )
        self.memory(field, source, slot).view(field.dtype).view(field.shape).copy_(value)

    def _convert(self, field: Field, source: ParameterSource, values: list[torch.Tensor]) -> torch.Tensor:
        """Replay the converter on one expert: its operations see an expert axis of length one."""
        if source.converter is None:  # stacked and concatenated, but in another dtype
            return torch.cat(values)
        got: dict[str, Any] = {}
        for part, value in zip(source.parts, values, strict=True):
            got.setdefault(part.pattern, []).append(value if source.stacked else value[None])
        for operation in source.converter.operations:
            got = operation.convert(
                got,
                source_patterns=source.converter.source_patterns,
                target_patterns=source.converter.target_patterns,
                full_layer_name=source.name,
                model=_OneExpert(field),
                config=self._config,
                missing_keys=None,
            )
        (value,) = got.values()
        if isinstance(value, list):
            (value,) = value
        result: torch.Tensor = value[0]
        return result


class _OneExpert:
    """Stands for the model in converters that compare shapes (Qwen3-VL-MoE): there is one expert."""

    def __init__(self, field: Field) -> None:
        self._field = field

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(1, *self._field.shape, dtype=self._field.dtype, device="meta")


def _typed(piece: torch.Tensor, part: Part) -> torch.Tensor:
    return piece.view(part.info.dtype).view(part.shape)


def _targets(model: PreTrainedModel, layer: MoeLayer) -> Iterable[tuple[int | None, str, str]]:
    """(expert or None for all in one tensor, parameter, its full name in the model's state dict)."""
    if not layer.kind.modular:
        return [(None, name, f"{layer.experts}.{name}") for name in layer.parameters]
    experts = range(layer.num_experts)
    return [(e, name, f"{layer.experts}.expert_{e}.{name}") for e in experts for name in layer.parameters]


def target_names(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """From a checkpoint's name of a tensor to the model's, and the source pattern of the converter that it takes."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    meta: dict[str, Any] = model.state_dict()

    def name(key: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if target not in meta and key in meta:  # as transformers' loader does: the key was the model's own already
            return rename_source_key(key, [], [], model.base_model_prefix, meta)
        return target, pattern

    return name


Found = tuple[dict[str, list[TensorInfo]], WeightConverter | None]


def _find_sources(model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, Any]) -> dict[str, Found]:
    """Checkpoint tensors by the model parameter they end in, grouped by the converter's source pattern."""
    converters = [m for m in get_model_conversion_mapping(model) if isinstance(m, WeightConverter)]
    by_source = {pattern: c for c in converters for pattern in c.source_patterns}
    target_of = target_names(model)
    found: dict[str, Found] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = target_of(key)
        if target in targets:
            by_pattern, _ = found.setdefault(target, ({}, by_source[pattern] if pattern is not None else None))
            by_pattern.setdefault(pattern if pattern is not None else key, []).append(checkpoint.tensors[key])
    return found


def _source(
    layer: MoeLayer,
    name: str,
    target: str,
    expert: int | None,
    by_pattern: dict[str, list[TensorInfo]],
    converter: WeightConverter | None,
) -> ParameterSource:
    """The source of one parameter of one expert; `expert` is None where the tensor holds a single expert."""
    if converter is not None and len(converter.target_patterns) > 1:
        raise ModelError(
            f"{target} is stored mixed with others ({', '.join(converter.target_patterns)}), single experts cannot be "
            "read: save the model again with transformers' save_pretrained(save_original_format=False)"
        )
    if converter is not None and _is_left_alone(converter, layer.parameters[name][0], by_pattern):
        converter = None
    operations = converter.operations if converter is not None else []
    stacked = any(isinstance(op, MergeModulelist) for op in operations)
    patterns = [p for p in converter.source_patterns if p in by_pattern] if converter is not None else list(by_pattern)
    if converter is not None and len(patterns) < len(converter.source_patterns) and stacked:
        absent = next(p for p in converter.source_patterns if p not in by_pattern)
        raise CheckpointError(f"the checkpoint has no {absent} for {target}: it is not a whole checkpoint")
    parts = []
    for pattern in patterns:
        infos = by_pattern[pattern]
        if stacked and len(infos) != layer.num_experts:
            raise CheckpointError(
                f"{target} needs {layer.num_experts} experts, the checkpoint has {len(infos)} like {infos[0].name}: "
                "a tensor is missing or config.json belongs to another model"
            )
        parts.append(_part(layer, pattern, infos, expert, stacked))
    plain = all(isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == 1) for op in operations)
    shape, dtype = layer.parameters[name]
    if plain:
        _check_shape(parts, tuple(shape), name)
    as_in_file = converter is None and parts[0].info.dtype == dtype
    return ParameterSource(
        name, tuple(parts), None if plain else converter, stacked, parts[0].offset % ALIGNMENT if as_in_file else 0
    )


def _is_left_alone(converter: WeightConverter, shape: tuple[int, ...], found: dict[str, list[TensorInfo]]) -> bool:
    """Whether the converter transposes older files only (Qwen3-VL-MoE), and these are not older."""
    checks = all(isinstance(op, Transpose) and op.check_dims for op in converter.operations)
    return checks and all(info.shape[1:] == tuple(shape) for infos in found.values() for info in infos)


def _part(layer: MoeLayer, pattern: str, infos: list[TensorInfo], expert: int | None, stacked: bool) -> Part:
    if stacked:
        info = infos[expert or 0]
        part = Part(info, pattern, info.offset, info.nbytes, info.shape)
    elif expert is None:
        info = infos[0]
        part = Part(info, pattern, info.offset, info.nbytes, info.shape)
    else:
        info = infos[0]
        if not info.shape or info.shape[0] != layer.num_experts:
            raise CheckpointError(
                f"tensor {info.name} in {info.file} has shape {list(info.shape)}, the model has {layer.num_experts} "
                "experts: config.json and weights do not belong together"
            )
        nbytes = info.nbytes // layer.num_experts
        part = Part(info, pattern, info.offset + expert * nbytes, nbytes, info.shape[1:])
    if part.info.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {part.info.name} in {part.info.file} is {part.info.dtype}, and config.json does not say how the "
            "checkpoint is quantised: use the original one"
        )
    return part


def _check_shape(parts: list[Part], shape: tuple[int, ...], name: str) -> None:
    rows = sum(part.shape[0] for part in parts) if len(parts) > 1 else parts[0].shape[0]
    tails_agree = all(a.shape[1:] == b.shape[1:] for a, b in pairwise(parts))
    if not tails_agree or (rows, *parts[0].shape[1:]) != shape:
        info = parts[0].info
        got = " and ".join(str(list(part.shape)) for part in parts)
        raise CheckpointError(
            f"tensor {info.name} in {info.file} has shape {got}, {name} wants {list(shape)}: {UNRELATED}"
        )
