"""Brings experts that were read into the fewer bits in which they stay, on threads of its own: decoding goes on
meanwhile. Knows slots; no disk, no cache.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from moedge.models.shorten import compact
from moedge.runtime.slots import SlotSets

THREADS = 3  # the first expert of a slot waits for the memory, on some machines longer than for the disk


@dataclass(frozen=True)
class _Pending:
    future: Future[bool]
    layer: int
    expert: int
    slot: int  # that was read into, and is free when this is done


class Keeper:
    """`lost` is told of an expert that cannot be kept. One thread at a time may call."""

    def __init__(self, slots: SlotSets, lost: Callable[[int, int], None]) -> None:
        self._slots, self._lost = slots, lost
        self._pending: list[_Pending] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="moedge-keep")

    def keep(self, layer: int, expert: int, slot: int, nbytes: int) -> int:
        """The slot in which an expert that was read into `slot` will stay, once it is settled."""
        kept = self._slots.kept.free.pop()
        future = self._pool.submit(compact, self._slots.read[slot], nbytes, self._slots.kept[kept])
        self._pending.append(_Pending(future, layer, expert, slot))
        return kept

    def settle(self, layer: int | None = None) -> None:
        """Free the slots of what is done. Of `layer`, wait for all."""
        for each in tuple(self._pending):
            if each.layer == layer or each.future.done():
                self._end(each)

    def wait_for_one(self) -> bool:
        """Wait for the slot that will be free next; False where none will."""
        if not self._pending:
            return False
        self._end(self._pending[0])
        return True

    def _end(self, each: _Pending) -> None:
        kept = each.future.result()
        self._pending.remove(each)
        self._slots.read.free.append(each.slot)
        if not kept:
            self._lost(each.layer, each.expert)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
