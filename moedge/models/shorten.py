"""Experts in bf16 kept in fewer bits, bit for bit: 12 a number in packs, about 10.8 in memory, so that more fit.

native/shorten.c and native/levels.c have the two codes. What is in 12 bits can be restored without the kernels too.
Knows bytes: slots and extents, no cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import Field, Part, SlotLayout
from moedge.native import library

SAMPLE = 64 << 10  # bytes of each tensor that are looked at
LAYERS = 8  # in so many layers
MARGIN = 1.01  # of a slot over what the largest sample needs
_BLOCK, _HEAD = 32, 64  # numbers that are shortened together, bytes before them
_ROOM, _ENTRY = 512, 6  # a list has room for one of so many numbers, and 16 more; bytes of each


class Extents(Protocol):
    """What is asked of the experts of a checkpoint, packed or not."""

    @property
    def layouts(self) -> Sequence[SlotLayout]: ...

    def parts(self, layer: int, expert: int) -> list[Part]: ...


class ShortExpert(Mapping[str, Tensor]):
    """The parameters of an expert in fewer bits: restored, all at once, when the first of them is asked for.

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


def compact(slot: Tensor, nbytes: int, into: Tensor) -> bool:
    """As shorten, in as few bits as there is room for in `into`."""
    kernels = library.load()
    if kernels is None:
        return False
    if kernels.compact(slot.data_ptr(), _numbers(nbytes), into.data_ptr(), into.numel()):
        return True
    return into.numel() >= short_bytes(nbytes) and shorten(slot, nbytes, into)


def restore(short: Tensor, nbytes: int, slot: Tensor) -> None:
    """What `shorten` or `compact` was given, to `slot`."""
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
    samples = _samples(experts, checkpoint)
    return bool(samples) and all(_is_short(sample) for sample in samples)


def compact_bytes(experts: Extents, checkpoint: Checkpoint, nbytes: int) -> int | None:
    """Bytes in which `compact` will probably keep each expert of `nbytes` bytes; None where it cannot.

    Judged by the start of some tensors. An expert that does not fit is not kept.
    """
    kernels = library.load()
    samples = _samples(experts, checkpoint)
    if kernels is None or not samples:
        return None
    shares = []
    for sample in samples:
        memory = torch.empty(2 * len(sample) + SAMPLE, dtype=torch.uint8)
        taken = kernels.compact(sample.data_ptr(), _numbers(len(sample)), memory.data_ptr(), len(memory))
        shares.append(taken / len(sample))
    least = math.ceil(max(shares) * MARGIN * nbytes) if all(shares) else nbytes
    if least < short_bytes(nbytes):
        return least
    return short_bytes(nbytes) if all(_is_short(sample) for sample in samples) else None


def _is_short(sample: Tensor) -> bool:
    return shorten(sample, len(sample), torch.empty(short_bytes(len(sample)), dtype=torch.uint8))


def _samples(experts: Extents, checkpoint: Checkpoint) -> list[Tensor]:
    """The start of every tensor of an expert in some layers, bytes of bf16; none where slots hold others."""
    dtypes = [{field.dtype for field in layout.fields} for layout in experts.layouts]
    if any(each != {torch.bfloat16} for each in dtypes) or library.load() is None:
        return []
    step = -(-len(dtypes) // LAYERS)
    parts = [part for layer in range(0, len(dtypes), step) for part in experts.parts(layer, 0)]
    return [_start(checkpoint, part) for part in parts] if all(part.offset % 2 == 0 for part in parts) else []


def _start(checkpoint: Checkpoint, part: Part) -> Tensor:
    nbytes = min(SAMPLE, part.nbytes)
    start = checkpoint.shard(part.info.file).pread(part.offset, nbytes, part.info.name, shift=0)
    if part.info.dtype != torch.uint8:
        start = start.view(part.info.dtype).to(torch.bfloat16).view(torch.uint8)
    return start[: len(start) // (2 * _BLOCK) * 2 * _BLOCK]


def _numbers(nbytes: int) -> int:
    return -(-nbytes // (2 * _BLOCK)) * _BLOCK
