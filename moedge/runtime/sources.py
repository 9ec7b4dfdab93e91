"""What `moedge pack` reads a quantised checkpoint with: experts dequantised, or their integers kept as they are.

Knows the number formats of packs and those that a checkpoint says it has; how these are stored is in models/scheme.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moedge.models.anatomy import Anatomy
from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import ExpertMap, Part
from moedge.models.load import Blueprint
from moedge.models.quantised import QuantisedCheckpoint, quantisation, scheme_of
from moedge.models.scheme import Codes, Native
from moedge.runtime.formats import GROUPS, PLAIN, SHORT, Extent, Format, Parts, from_integers, from_mxfp4
from moedge.runtime.reader import DirectReader, Target


def choose_format(folder: Path, bits: int, group: int | None, asymmetric: bool) -> Format:
    """The experts' format where the user says so much; what is not said is as the checkpoint in `folder` has it.

    So integers of as many bits are kept. What is in 16 bits gets groups of 32.
    """
    if bits in (16, 12):
        return PLAIN if bits == 16 else SHORT
    given = quantisation(folder)
    native = scheme_of(folder, given).native if given else None
    if native is None or native.code not in (f"int{bits}", f"mxfp{bits}"):
        return Format(f"int{bits}", group or 32, symmetric=not asymmetric)
    if native.code == "mxfp4":
        kept = group in (None, native.group) and not asymmetric
        return Format("mxfp4") if kept else Format("int4", group or 32, symmetric=not asymmetric)
    own = max((g for g in GROUPS if native.group == -1 or native.group % g == 0), default=32)
    return Format(native.code, group or own, symmetric=native.symmetric and not asymmetric)


class Source:
    """The experts of a checkpoint as a pack in `format` is made from them.

    Of a quantised one, `experts` gives fp32 values where they are quantised again, so that they are rounded once.
    """

    def __init__(self, blueprint: Blueprint, format: Format) -> None:
        assert isinstance(blueprint.experts, ExpertMap)
        self.experts, self.checkpoint = blueprint.experts, blueprint.checkpoint
        if isinstance(self.checkpoint, QuantisedCheckpoint) and format != PLAIN:
            self.checkpoint = self.checkpoint.presented_as(torch.float32)
            self.experts = ExpertMap(blueprint.meta, _in_fp32(blueprint.anatomy), self.checkpoint)
        self.formats = tuple(self._format(layer.index, format) for layer in blueprint.anatomy.layers)
        self._transposed = [layer.kind.transposed for layer in blueprint.anatomy.layers]

    def reader(self) -> DirectReader:
        return _reader(self.checkpoint)

    def _format(self, layer: int, format: Format) -> Format:
        """MXFP4 is kept only where it is: other layers of such a checkpoint are quantised to int4."""
        if format.code != "mxfp4" or self._native(layer) == Native("mxfp4", format.group, symmetric=True):
            return format
        return Format("int4", format.group)

    def _native(self, layer: int) -> Native | None:
        """The scheme's own format where all matrices of the layer's experts are in it."""
        if not isinstance(self.checkpoint, QuantisedCheckpoint):
            return None
        matrices = {f.name for f in self.experts.layouts[layer].fields if len(f.shape) == 2}
        coded = all(
            source.converter is None and all(part.info.name in self.checkpoint.coded for part in source.parts)
            for source in self.experts.sources(layer, 0)
            if source.name in matrices
        )
        return self.checkpoint.scheme.native if coded else None

    @property
    def overhead(self) -> int:
        """Bytes that one matrix takes as it is stored, while it is dequantised."""
        coded = self.checkpoint.coded.values() if isinstance(self.checkpoint, QuantisedCheckpoint) else ()
        return max((each.nbytes for each in coded), default=0)

    def keep(
        self, reader: DirectReader, key: tuple[int, int], slot: Tensor, extent: Extent, memory: Tensor, where: str
    ) -> bool:
        """Make an expert's extent in `memory` with the integers that the checkpoint has, its other tensors by `slot`.

        False where they cannot be kept; some of `memory` may have been written then.
        """
        layer, format = key[0], self.formats[key[0]]
        native = self._native(layer)
        if native is None or native.code != format.code:
            return False
        views, experts = extent.views(memory), self.experts
        for field, source in zip(experts.layouts[layer].fields, experts.sources(*key), strict=True):
            if extent.tensors[field.name].format != PLAIN:
                if not self._keep_matrix(layer, source.parts, views[field.name], f"{field.name} of {where}"):
                    return False
                continue
            raw = [torch.empty(part.nbytes, dtype=torch.uint8) for part in source.parts]
            reader.read(list(zip(source.parts, raw, strict=True)))
            experts.convert_into(field, source, raw, slot)
            value = experts.memory(field, source, slot).view(field.dtype).view(field.shape)
            views[field.name]["values"].copy_(value)
        return True

    def _keep_matrix(self, layer: int, parts: Sequence[Part], target: Parts, name: str) -> bool:
        """Rows of one part after the other."""
        assert isinstance(self.checkpoint, QuantisedCheckpoint)
        transposed = self.checkpoint.scheme.transposed
        if transposed != self._transposed[layer] or (transposed and len(parts) > 1):
            return False
        if any(part.info.name not in self.checkpoint.coded for part in parts):
            return False
        row = 0
        for part in parts:
            raw = self.checkpoint.raw(part.info.name, part.offset // part.nbytes)
            for begin, codes in self.checkpoint.codes(part.info.name, raw):
                made = _as_parts(codes, self.formats[layer], name) if codes is not None else None
                if made is None:
                    return False
                for key, values in made.items():
                    target[key][row + begin : row + begin + len(values)] = values
            row += self.checkpoint.coded[part.info.name].rows
        return True


def _as_parts(codes: Codes, format: Format, name: str) -> Parts | None:
    if codes.code != format.code:
        return None
    if codes.zeros is None:
        return from_mxfp4(codes.values, codes.scales, name)
    return from_integers(codes.values, codes.scales, codes.zeros, codes.group, format, name)


def _in_fp32(anatomy: Anatomy) -> Anatomy:
    layers = (
        replace(each, parameters={name: (shape, torch.float32) for name, (shape, _) in each.parameters.items()})
        for each in anatomy.layers
    )
    return replace(anatomy, layers=tuple(layers))


def _reader(checkpoint: Checkpoint) -> DirectReader:
    return _DequantisingReader(checkpoint) if isinstance(checkpoint, QuantisedCheckpoint) else DirectReader(checkpoint)


class _DequantisingReader(DirectReader):
    """Reads parts of dense tensors, whose bytes are in no file, from the tensors that are stored."""

    def __init__(self, checkpoint: QuantisedCheckpoint) -> None:
        super().__init__(checkpoint)
        self._checkpoint = checkpoint

    def read(self, targets: Sequence[Target]) -> int:
        coded = self._checkpoint.coded
        count = super().read([target for target in targets if target[0].info.name not in coded])
        for part, memory in targets:
            if part.info.name in coded:
                self._checkpoint.fill(part.info, part.offset // part.nbytes, memory)
                count += coded[part.info.name].nbytes
        return count
