"""The experts of a packed checkpoint: where they lie in it, and what a slot that holds one is. Reads nothing itself."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from moedge.errors import CheckpointError
from moedge.models.anatomy import Anatomy
from moedge.models.expert_map import UNRELATED, Field, Part, SlotLayout, largest
from moedge.models.pack import EXPERTS, PLAIN, PackedCheckpoint, PackedLayer, PackedTensor, extent_name
from moedge.models.shorten import restore
from moedge.units import whole_pages

EXTENT = "extent"  # the name under which a store hands out an expert whose tensors are not plain


class PackedExperts:
    """Where the experts of a packed checkpoint lie, in the place of an ExpertMap.

    A slot holds an expert's extent as it is in the file; only where the model is loaded in another dtype than it was
    packed in, plain tensors are converted. Raises CheckpointError when the pack does not fit the model.
    """

    def __init__(self, anatomy: Anatomy, checkpoint: PackedCheckpoint) -> None:
        self._checkpoint, self._verified = checkpoint, set[tuple[int, int]]()
        self.layers = checkpoint.manifest.layers
        packed = [{name: t.shape for name, t in layer.tensors.items()} for layer in self.layers]
        needed = [{name: shape for name, (shape, _) in layer.parameters.items()} for layer in anatomy.layers]
        counts = [layer.num_experts for layer in self.layers], [layer.num_experts for layer in anatomy.layers]
        same = len(packed) == len(needed) and counts[0] == counts[1]
        if not same or any(not _fit(p, n, layer) for p, n, layer in zip(packed, needed, self.layers, strict=True)):
            raise CheckpointError(f"{checkpoint.folder / EXPERTS} has experts of other shapes: {UNRELATED}")
        self.tensors = frozenset(extent_name(*key) for key in checkpoint.manifest.keys)
        self._direct = tuple(
            not own.plain or all(own.tensors[name].dtype == dtype for name, (_, dtype) in layer.parameters.items())
            for own, layer in zip(self.layers, anatomy.layers, strict=True)
        )
        self.layouts = tuple(
            (_slot_layout(own) if direct else SlotLayout.of(layer))
            for own, layer, direct in zip(self.layers, anatomy.layers, self._direct, strict=True)
        )

    @property
    def conversion_bytes(self) -> int:
        """Memory that reading one expert takes besides its slot."""
        converted = [layer for layer, direct in zip(self.layers, self._direct, strict=True) if not direct]
        return max((layer.stride + layer.short * whole_pages(layer.nbytes) for layer in converted), default=0)

    @property
    def short(self) -> bool:
        """Whether slots hold extents that have to be restored before `views`: all of one checkpoint, or none."""
        return all(layer.short for layer in self.layers) and all(self._direct)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest expert as it is read."""
        return max(layer.stride for layer in self.layers) if self.short else largest(self.layouts)

    def nbytes(self, layer: int, expert: int) -> int:
        """Bytes of the expert on disk."""
        return self.layers[layer].stride

    def is_direct(self, layer: int) -> bool:
        """Whether the extents of a layer are read into slots as they are."""
        return self._direct[layer]

    def extent(self, layer: int, expert: int) -> Part:
        """All bytes of one expert."""
        return self._checkpoint.extent(layer, expert)

    def parts(self, layer: int, expert: int) -> list[Part]:
        """What a slot is filled from as it is: the extent, or nothing where it is converted."""
        return [self.extent(layer, expert)] if self._direct[layer] else []

    def check(self, layer: int, expert: int, extent: torch.Tensor) -> None:
        """Compare what was read with its checksum; only the first time for each expert."""
        if (layer, expert) not in self._verified:
            self._checkpoint.check(layer, expert, extent)
            self._verified.add((layer, expert))

    def convert(self, layer: int, expert: int, extent: torch.Tensor, slot: torch.Tensor) -> None:
        """From an extent into the slot of a layer that is not direct."""
        own = self.layers[layer]
        if own.short:
            short, extent = extent, torch.empty(whole_pages(own.nbytes), dtype=torch.uint8)
            restore(short, own.nbytes, extent)
        values = _views(own, expert, extent)
        for field in self.layouts[layer].fields:
            target = slot[field.offset : field.offset + field.nbytes]
            target.view(field.dtype).view(field.shape).copy_(values[field.name])

    def place(self, layer: int, expert: int, name: str) -> Field:
        """Where one plain parameter of an expert lies in its slot."""
        field = next(f for f in self.layouts[layer].fields if f.name == name)
        shifts = self.layers[layer].shifts
        shifted = name in shifts and self._direct[layer]
        return replace(field, offset=field.offset + shifts[name][expert]) if shifted else field

    def views(self, layer: int, expert: int, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The expert's parameters as views of its slot; those in number formats together, under EXTENT."""
        own, layout = self.layers[layer], self.layouts[layer]
        if not own.plain:
            return {EXTENT: slot}
        if self._direct[layer]:
            return _views(own, expert, slot)
        return {f.name: slot[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape) for f in layout.fields}


def _fit(packed: Mapping[str, Any], needed: Mapping[str, Any], layer: PackedLayer) -> bool:
    """Whether the shapes are the model's; of matrices in number formats either way round."""
    return packed.keys() == needed.keys() and all(
        shape == tuple(needed[name]) or (layer.tensors[name].format != PLAIN and shape == tuple(reversed(needed[name])))
        for name, shape in packed.items()
    )


def _slot_layout(own: PackedLayer) -> SlotLayout:
    fields = [
        Field(name, tensor.parts["values"][2], tensor.shape, tensor.dtype)
        for name, tensor in (own.tensors.items() if own.plain else ())
    ]
    return SlotLayout(tuple(fields), own.nbytes)


def _views(own: PackedLayer, expert: int, extent: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: extent[begin:end].view(t.dtype).view(t.shape) for name, t, begin, end in _plain(own, expert)}


def _plain(own: PackedLayer, expert: int) -> Iterator[tuple[str, PackedTensor, int, int]]:
    for name, tensor in own.tensors.items():
        shift = own.shifts[name][expert] if name in own.shifts else 0
        begin = tensor.parts["values"][2] + shift
        yield name, tensor, begin, begin + math.prod(tensor.shape) * tensor.dtype.itemsize
