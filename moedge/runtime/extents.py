"""From an expert as a checkpoint has it to the bytes of its extent, and back to parameters. Tensors only: no files."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moedge.errors import CheckpointError
from moedge.models.anatomy import MoeLayer
from moedge.models.checkpoint import ALIGNMENT
from moedge.models.expert_map import ExpertMap, SlotLayout
from moedge.models.pack import PackedLayer, PackedTensor
from moedge.runtime.calibrate import best_clip
from moedge.runtime.formats import PLAIN, Extent, Format, Plane, Stored, dequantise, layout, part_shapes, quantise

AT_ONCE = 1 << 19  # numbers that are quantised at once
SCRATCH = 48 * AT_ONCE  # bytes that this takes: a dozen fp32 tensors


def describe(layer: MoeLayer, experts: ExpertMap, format: Format) -> PackedLayer:
    """The extents of a layer in `format`. Plain, they are slots as a DiskStore fills them from the checkpoint."""
    if format == PLAIN:
        fields = experts.layouts[layer.index].fields
        sources = [experts.sources(layer.index, expert) for expert in range(layer.num_experts)]
        shifts = {f.name: tuple(each[i].shift for each in sources) for i, f in enumerate(fields)}
        return _plain_layer(experts.layouts[layer.index], shifts, layer.num_experts)
    shapes = {
        name: (tuple(reversed(shape)) if layer.kind.transposed and len(shape) == 2 else tuple(shape), dtype)
        for name, (shape, dtype) in layer.parameters.items()
    }
    extent = layout(shapes, format)
    tensors = {
        name: PackedTensor(
            str(stored.format),
            stored.dtype,
            stored.shape,
            {part: (plane.dtype, plane.shape, plane.offset) for part, plane in stored.planes.items()},
        )
        for name, stored in extent.tensors.items()
    }
    return PackedLayer(layer.num_experts, extent.nbytes, tensors, {})


def _plain_layer(layout: SlotLayout, shifts: Mapping[str, tuple[int, ...]], num_experts: int) -> PackedLayer:
    """Extents that are slots of `layout`: every tensor as the model has it."""
    tensors = {
        f.name: PackedTensor(str(PLAIN), f.dtype, f.shape, {"values": (f.dtype, f.shape, f.offset)})
        for f in layout.fields
    }
    assert all(0 <= s < ALIGNMENT for each in shifts.values() for s in each)
    return PackedLayer(num_experts, layout.nbytes, tensors, {n: each for n, each in shifts.items() if any(each)})


def extent_of(packed: PackedLayer) -> Extent:
    """The layout that kernels take. Raises CheckpointError for a number format that this version does not know."""
    tensors = {}
    for name, tensor in packed.tensors.items():
        try:
            format = Format.parse(tensor.format)
        except ValueError as error:
            raise CheckpointError(f"the pack's {name} cannot be read: {error}") from error
        planes = {part: Plane(offset, shape, dtype) for part, (dtype, shape, offset) in tensor.parts.items()}
        tensors[name] = Stored(format, tensor.shape, tensor.dtype, planes)
    return Extent(tensors, packed.nbytes)


def fill(
    extent: Extent,
    parameters: Mapping[str, Tensor],
    transposed: bool,
    memory: Tensor,
    where: str,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Quantise one expert's parameters into `memory`, uint8. `where` names the expert in errors.

    With the second `moments` of its matrices' inputs, each group is clipped as it is best for them (calibrate.py).
    """
    for name, parts in extent.views(memory).items():
        stored, value = extent.tensors[name], parameters[name]
        if stored.format == PLAIN:
            parts["values"].copy_(value)
            continue
        matrix = value.mT if transposed else value
        rows = max(1, AT_ONCE // matrix.shape[1])
        for begin in range(0, len(matrix), rows):
            part_of, label = matrix[begin : begin + rows], f"{name} of {where}"
            clip = best_clip(part_of, stored.format, moments[name], label) if moments else 1.0
            some = quantise(part_of, stored.format, clip, label)
            assert some.keys() == part_shapes(stored.shape, stored.dtype, stored.format).keys()
            for part, made in some.items():
                parts[part][begin : begin + rows] = made


def parameters(extent: Extent, memory: Tensor, transposed: bool) -> dict[str, Tensor]:
    """One expert's parameters in the model's dtype and shapes, from the memory of its extent."""
    values = {}
    for name, parts in extent.views(memory).items():
        stored = extent.tensors[name]
        if stored.format == PLAIN:
            values[name] = parts["values"]
            continue
        matrix = torch.empty(stored.shape, dtype=stored.dtype)
        rows = max(1, AT_ONCE // stored.shape[1])
        for begin in range(0, len(matrix), rows):
            some = {part: whole[begin : begin + rows] for part, whole in parts.items()}
            matrix[begin : begin + rows] = dequantise(some, stored.format, stored.shape[1], stored.dtype)
        values[name] = matrix.mT if transposed else matrix
    return values
