"""Write the backbone of a packed checkpoint: an ordinary safetensors file, its matrices dense or in int8 or int4.

Tensors go through in pieces, in the order of the original's files. Knows tensors and bytes; the experts are elsewhere.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from moedge.models.backbone import CodedMatrix, parts_of
from moedge.models.checkpoint import DTYPES, READ_BLOCK, Checkpoint, TensorInfo
from moedge.models.pack import checksum
from moedge.models.quantised import QuantisedCheckpoint
from moedge.runtime.extents import AT_ONCE
from moedge.runtime.formats import Format, part_shapes, quantise

Stored = tuple[torch.dtype, tuple[int, ...]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Backbone:
    """The tensors `infos` of `checkpoint`, those that are in `matrices` to be stored in `format`."""

    def __init__(self, checkpoint: Checkpoint, infos: Sequence[TensorInfo], matrices: set[str], format: Format) -> None:
        self._checkpoint, self._format = checkpoint, format
        self._infos = sorted(infos, key=lambda info: (info.file.name, info.offset, info.name))
        self.coded = {
            info.name: CodedMatrix(str(format), info.dtype, (info.shape[0], info.shape[1]))
            for info in self._infos
            if info.name in matrices
        }
        self.stored: dict[str, Stored] = {}
        self.shifts: dict[str, int] = {}  # address modulo 64 that a stock model gives each tensor
        for info in self._infos:
            made = self._parts(info) if info.name in self.coded else {info.name: (info.dtype, info.shape)}
            self.stored |= made
            self.shifts |= dict.fromkeys(made, 0 if info.name in self.coded else info.offset % 64)

    def _parts(self, info: TensorInfo) -> dict[str, Stored]:
        shapes = part_shapes((info.shape[0], info.shape[1]), info.dtype, self._format)
        return {parts_of(info.name)[part]: (dtype, shape) for part, (shape, dtype) in shapes.items()}

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(each) for each in self.stored.values())

    def write(self, path: Path, report: Callable[[int], None]) -> tuple[str, dict[str, str]]:
        """Write the file; checksums of its header and of each tensor. `report` hears how many bytes are written."""
        head, places = self._head()
        crcs, done = dict.fromkeys(self.stored, 0), 0
        with open(path, "wb") as file:
            file.write(head)
            for info in self._infos:
                for name, data in self._pieces(info):
                    file.seek(len(head) + places[name])
                    file.write(data)
                    places[name] += len(data)
                    crcs[name] = zlib.crc32(data, crcs[name])
                    done += len(data)
                    report(done)
        return checksum(head), {name: f"{crc:08x}" for name, crc in crcs.items()}

    def _head(self) -> tuple[bytes, dict[str, int]]:
        """The file's header, and where each tensor begins after it."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name, (dtype, shape) in self.stored.items():
            places[name], end = end, end + _nbytes((dtype, shape))
            entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [places[name], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-len(text) // 64) * 64
        return struct.pack("<Q", length) + text.ljust(length), places

    def _pieces(self, info: TensorInfo) -> Iterator[tuple[str, memoryview]]:
        """(stored tensor, its next bytes)."""
        if info.name not in self.coded:
            for block in _blocks(self._checkpoint, info):
                yield info.name, block.numpy().data
            return
        for begin, rows in _rows(self._checkpoint, info):
            label = f"rows {begin} to {begin + len(rows) - 1} of {info.name}"
            for part, made in quantise(rows, self._format, name=label).items():
                yield parts_of(info.name)[part], made.contiguous().view(torch.uint8).view(-1).numpy().data


def _nbytes(stored: Stored) -> int:
    return prod(stored[1]) * stored[0].itemsize


def _blocks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor's bytes as uint8."""
    if isinstance(checkpoint, QuantisedCheckpoint) and info.name in checkpoint.coded:
        yield from checkpoint.dense_bytes(info)
        return
    for begin in range(0, info.nbytes, READ_BLOCK):
        yield checkpoint.shard(info.file).pread(info.offset + begin, min(READ_BLOCK, info.nbytes - begin), info.name)


def _rows(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a matrix."""
    if isinstance(checkpoint, QuantisedCheckpoint) and info.name in checkpoint.coded:
        yield from checkpoint.blocks(info.name, checkpoint.raw(info.name))
        return
    rows, columns = info.shape
    each = columns * info.dtype.itemsize
    step = max(1, AT_ONCE // columns)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        raw = checkpoint.shard(info.file).pread(info.offset + begin * each, count * each, info.name, shift=0)
        yield begin, raw.view(info.dtype).view(count, columns)
