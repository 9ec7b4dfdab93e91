"""Slots: pieces of memory that experts are read into, stay in, and are used from. Knows bytes, no cache."""

import mmap
from contextlib import suppress
from typing import NamedTuple

import torch

from moedge.models.expert_map import ExpertMap, largest
from moedge.models.packed_experts import PackedExperts
from moedge.units import whole_pages


class Slots:
    """`count` pieces of `nbytes` bytes in one anonymous mapping; memory is taken when a slot is first written."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.stride = whole_pages(nbytes)
        self.free = list(range(count))
        memory = torch.frombuffer(_anonymous(max(1, count) * self.stride), dtype=torch.uint8)
        self._each = memory.view(-1, self.stride).unbind()  # at once: a slice for each use takes time in decoding

    def __getitem__(self, slot: int) -> torch.Tensor:
        return self._each[slot]


def _anonymous(nbytes: int) -> mmap.mmap:
    """Memory of this process, in huge pages where the system has them: with small ones, finding each page takes longer
    than computing with what is in it."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class SlotSets(NamedTuple):
    """The slots of a store. Two sets, or all three, are one and the same where experts need not change their form."""

    read: Slots  # what reads fill
    kept: Slots  # where experts stay between events
    used: Slots  # what is computed with


def slot_sets(experts: ExpertMap | PackedExperts, stay: int, spare: int, short: int | None) -> SlotSets:
    """Slots for `stay` experts and for `spare` reads under way. `short`: bytes of one that stays, if in fewer bits."""
    if experts.short:
        read = Slots(stay + spare, experts.slot_bytes)
        return SlotSets(read, read, Slots(1, largest(experts.layouts)))
    if short is not None:
        read = Slots(spare, experts.slot_bytes)
        return SlotSets(read, Slots(stay, short), read)
    one = Slots(stay + spare, experts.slot_bytes)
    return SlotSets(one, one, one)
