"""Experts in bf16 kept in 12 bits a number, bit for bit: a third more fit into memory, and a quarter less is read.

What is computed with is restored from it: that takes about as long as copying it, and far less than reading it from
disk. native/shorten.c has the code; without the kernels what was shortened can still be restored. Knows bytes: slots
and extents, no cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import Field, Part, SlotLayout
from moedge.native import library

SAMPLE = 64 << 10  # bytes of each tensor that are looked at
LAYERS = 4  # in so many layers
_BLOCK, _HEAD = 32, 64  # numbers that are shortened together, bytes before them
_ROOM, _ENTRY = 512, 6  # a list has room for one of so many numbers, and 16 more; bytes of each


class Extents(Protocol):
    """What is asked of the experts of a checkpoint, packed or not."""

    @property
    def layouts(self) -> Sequence[SlotLayout]: ...

    def parts(self, layer: int, expert: int) -> list[Part]: ...


class ShortExpert(Mapping[str, Tensor]):
    """The parameters of an expert in 12 bits a number: restored, all at once, when the first of them is asked for.

    `memory` holds the expert, `nbytes` bytes when restored; `place` says where each parameter begins then.
    """

    def __init__(
        self, memory: Tensor, nbytes: int, place: Callable[[str], Field], restored: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self.memory, self.place, self.numbers = memory, place, _numbers(nbytes)
        self._make = restored
        self._restored: Mapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def _parameters(self) -> Mapping[str, Tensor]:
        if self._restored is None:
            self._restored = self._make()
        return self._restored


def short_bytes(nbytes: int) -> int:
    """Bytes that `nbytes` bytes of bf16 take when they are shortened."""
    numbers = _numbers(nbytes)
    return _HEAD + numbers * 3 // 2 + (numbers // _ROOM + 16) * _ENTRY


def shorten(slot: Tensor, nbytes: int, into: Tensor) -> bool:
    """The first `nbytes` bytes of `slot` into `into`, both uint8, that much rounded up to 64 bytes.

    False where its numbers are of too many sizes, and without the kernels.
    """
    kernels = library.load()
    return kernels is not None and kernels.shorten(slot.data_ptr(), _numbers(nbytes), into.data_ptr())


def restore(short: Tensor, nbytes: int, slot: Tensor) -> None:
    """What `shorten` was given, to `slot`."""
    kernels = library.load()
    if kernels is None:
        restore_plain(short, nbytes, slot)
    else:
        kernels.restore(short.data_ptr(), _numbers(nbytes), slot.data_ptr())


def restore_plain(short: Tensor, nbytes: int, slot: Tensor) -> None:
    """As restore, without the kernels."""
    numbers = _numbers(nbytes)
    raw = short.numpy()
    base, listed = (int(value) for value in raw[:8].view(np.uint32))
    rest = raw[_HEAD : _HEAD + numbers].astype(np.uint16)
    codes = raw[_HEAD + numbers : _HEAD + numbers * 3 // 2].reshape(-1, _BLOCK // 2)
    code = np.concatenate([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.uint16)
    exponents = np.where(code > 0, code + (base - 1), 0).astype(np.uint16)
    x = slot.numpy()[: 2 * numbers].view(np.uint16)
    x[:] = (rest & 0x80) << 8 | exponents << 7 | (rest & 0x7F)
    start = _HEAD + numbers * 3 // 2
    values = start + 4 * (numbers // _ROOM + 16)
    places = raw[start : start + 4 * listed].view(np.uint32)
    x[places] = raw[values : values + 2 * listed].view(np.uint16)


def can_shorten(experts: Extents, checkpoint: Checkpoint) -> bool:
    """Whether all slots hold bf16, and the start of some tensors can be shortened here."""
    dtypes = [{field.dtype for field in layout.fields} for layout in experts.layouts]
    if any(each != {torch.bfloat16} for each in dtypes) or library.load() is None:
        return False
    step = -(-len(dtypes) // LAYERS)
    parts = [part for layer in range(0, len(dtypes), step) for part in experts.parts(layer, 0)]
    return all(_start_is_short(checkpoint, part) for part in parts)


def _start_is_short(checkpoint: Checkpoint, part: Part) -> bool:
    nbytes = min(SAMPLE, part.nbytes)
    start = checkpoint.shard(part.info.file).pread(part.offset, nbytes, part.info.name, shift=0)
    if part.info.dtype != torch.uint8:
        start = start.view(part.info.dtype).to(torch.bfloat16).view(torch.uint8)
    nbytes = len(start) // (2 * _BLOCK) * 2 * _BLOCK
    return part.offset % 2 == 0 and shorten(start, nbytes, torch.empty(short_bytes(nbytes), dtype=torch.uint8))


def _numbers(nbytes: int) -> int:
    return -(-nbytes // (2 * _BLOCK)) * _BLOCK
