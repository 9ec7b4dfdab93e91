"""Experts in bf16 kept in 12 bits a number, bit for bit, so that a third more of them stay in memory.

What is computed with is restored from it: that takes about as long as copying it, and far less than reading it again.
The code is in native/shorten.c. Knows slots, no cache and no model.
"""

import torch
from torch import Tensor

from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import ExpertMap, Part
from moedge.models.pack import PackedExperts
from moedge.native import library

SAMPLE = 64 << 10  # bytes of each tensor that is looked at
LAYERS = 4  # in so many layers
_BLOCK = 64  # bytes of the numbers that are shortened at once


def short_bytes(nbytes: int) -> int | None:
    """Bytes that a slot of `nbytes` bytes takes when it is shortened; None without the kernels."""
    kernels = library.load()
    return None if kernels is None else kernels.short_bytes(_numbers(nbytes))


def shorten(slot: Tensor, nbytes: int, into: Tensor) -> bool:
    """The first `nbytes` bytes of a slot into another; both uint8. False where it holds numbers of too many sizes."""
    return _kernels().shorten(slot.data_ptr(), _numbers(nbytes), into.data_ptr())


def restore(short: Tensor, nbytes: int, slot: Tensor) -> None:
    """What `shorten` was given, to `slot`."""
    _kernels().restore(short.data_ptr(), _numbers(nbytes), slot.data_ptr())


def can_shorten(experts: ExpertMap | PackedExperts, checkpoint: Checkpoint) -> bool:
    """Whether all slots hold bf16, and the start of some tensors in the checkpoint can be shortened."""
    if any(field.dtype != torch.bfloat16 for layout in experts.layouts for field in layout.fields):
        return False
    if not all(layout.fields for layout in experts.layouts) or library.load() is None:
        return False
    count = len(experts.layouts)
    parts = [part for layer in range(0, count, -(-count // LAYERS)) for part in _parts(experts, layer)]
    return all(_start_is_short(checkpoint, part) for part in parts)


def _parts(experts: ExpertMap | PackedExperts, layer: int) -> list[Part]:
    if isinstance(experts, PackedExperts):
        return [experts.extent(layer, 0)] if experts.is_direct(layer) else []
    return [part for source in experts.sources(layer, 0) for part in source.parts]


def _start_is_short(checkpoint: Checkpoint, part: Part) -> bool:
    nbytes = min(SAMPLE, part.nbytes)
    if part.info.dtype not in (torch.bfloat16, torch.uint8) or part.offset % 2 or nbytes < SAMPLE:
        return part.nbytes < SAMPLE and part.offset % 2 == 0
    start = checkpoint.shard(part.info.file).pread(part.offset, nbytes, part.info.name, shift=0)
    return shorten(start, nbytes, torch.empty(short_bytes(nbytes) or 0, dtype=torch.uint8))


def _numbers(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK // 2


def _kernels() -> library.Library:
    kernels = library.load()
    assert kernels is not None, "nothing is shortened without the kernels"
    return kernels
