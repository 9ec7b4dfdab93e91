"""Read parts of checkpoint files past the page cache: O_DIRECT into an aligned bounce buffer, from there to memory.

Where O_DIRECT is refused, buffered reads that the page cache is told to forget; where neither exists (not Linux), plain
reads. Threads may read at once, each through its own buffer. Knows files and bytes, not experts.
"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moedge.errors import CheckpointError
from moedge.models.checkpoint import Checkpoint, ShardFile
from moedge.models.expert_map import Part
from moedge.native import library
from moedge.native.library import Piece
from moedge.units import PAGE, whole_pages

BLOCK = 1 << 20  # bytes per read: enough for full disk speed, and what is copied from it is still in the CPU cache
MAX_GAP = 32 << 10  # read over a gap of this many bytes rather than start another read

Target = tuple[Part, torch.Tensor]  # what to read, and the uint8 memory of the same length that it goes to


class DirectReader:
    """Reads parts of the files of one checkpoint. `close` it before the checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = {path: _DirectFile(checkpoint.shard(path)) for path in checkpoint.files}
        self._buffers = threading.local()

    @property
    def bypasses_page_cache(self) -> bool:
        return all(file.direct for file in self._files.values())

    def read(self, targets: Sequence[Target]) -> int:
        """Fill every target; neighbours in a file are read together. Returns the bytes read from files.

        Raises CheckpointError, naming file and tensor, when a file is truncated, unreadable or was replaced.
        """
        count = 0
        for path, run in _runs(targets):
            count += self._files[path].read(run, self._buffer())
        return count

    def read_extent(self, part: Part, memory: torch.Tensor) -> int:
        """Fill `memory`, uint8 that starts at a page, with a part that starts at one and is whole pages: no copy."""
        return self._files[part.info.file].read_extent(part, memory)

    def _buffer(self) -> mmap.mmap:
        buffer: mmap.mmap | None = getattr(self._buffers, "buffer", None)
        if buffer is None:
            buffer = self._buffers.buffer = mmap.mmap(-1, BLOCK)
        return buffer

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _DirectFile:
    def __init__(self, shard: ShardFile) -> None:
        self._shard = shard
        self._fd = -1
        if hasattr(os, "O_DIRECT"):
            try:
                self._fd = os.open(shard.path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: this file system has no direct reads
                    raise CheckpointError(f"shard {shard.path} cannot be opened ({error.strerror})") from error

    @property
    def direct(self) -> bool:
        return self._fd >= 0

    def read(self, run: Sequence[Target], buffer: mmap.mmap) -> int:
        """Read the run in blocks of the aligned superset and hand each target its bytes."""
        start, end = run[0][0].offset, max(part.offset + part.nbytes for part, _ in run)
        begin = start // PAGE * PAGE
        count = self._read_natively(run, begin, end, buffer) or self._read_blocks(run, begin, end, buffer)
        for part, _ in run:
            self._shard.check_unchanged(part.info.name)
        return count

    def _read_natively(self, run: Sequence[Target], begin: int, end: int, buffer: mmap.mmap) -> int:
        """One call for the whole run: the bytes read, or 0 where there are no kernels, or something is wrong."""
        kernels = library.load() if self.direct else None
        if kernels is None:
            return 0
        pieces = [Piece(part.offset, part.nbytes, target.data_ptr()) for part, target in run]
        block = torch.frombuffer(buffer, dtype=torch.uint8)
        return max(0, kernels.read(self._fd, pieces, (begin, end), block.data_ptr(), BLOCK))

    def _read_blocks(self, run: Sequence[Target], begin: int, end: int, buffer: mmap.mmap) -> int:
        block, count = np.frombuffer(buffer, dtype=np.uint8), 0
        for at in range(begin, end, BLOCK):
            want = min(BLOCK, whole_pages(end - at))
            got = self._fill(memoryview(buffer), at, want, min(want, end - at), run[0][0].info.name)
            count += got
            for part, target in run:
                low, high = max(part.offset, at), min(part.offset + part.nbytes, at + got)
                if low < high:
                    np.copyto(target.numpy()[low - part.offset : high - part.offset], block[low - at : high - at])
        return count

    def read_extent(self, part: Part, memory: torch.Tensor) -> int:
        count = self._fill(memory.numpy().data, part.offset, part.nbytes, part.nbytes, part.info.name)
        self._shard.check_unchanged(part.info.name)
        return count

    def _fill(self, view: memoryview, at: int, want: int, need: int, tensor: str) -> int:
        """At least `need` bytes from `at` into `view`, `want` where the file goes on; returns how many."""
        done = 0
        while done < need:
            try:
                count = self._pread(view[done:want], at + done)
            except OSError as error:
                raise CheckpointError(
                    f"shard {self._shard.path} cannot be read at byte {at + done} for {tensor} ({error.strerror}): "
                    "check the disk"
                ) from error
            if count == 0 or (done + count < need and self.direct and count % PAGE):
                self._shard.check_unchanged(tensor)
                raise CheckpointError(
                    f"shard {self._shard.path} is truncated: {tensor} goes on after byte {at + done + count}: "
                    "fetch it again"
                )
            done += count
        return done

    def _pread(self, view: memoryview, at: int) -> int:
        if self.direct:
            try:
                return os.preadv(self._fd, [view], at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.close()  # opened, but refuses direct reads: buffered from now on
        count = os.preadv(self._shard.fd, [view], at)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._shard.fd, at, count, os.POSIX_FADV_DONTNEED)
        return count

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _runs(targets: Sequence[Target]) -> Iterator[tuple[Path, list[Target]]]:
    """Targets that lie next to each other in a file, in the file's order."""
    ordered = sorted((t for t in targets if t[0].nbytes), key=lambda t: (str(t[0].info.file), t[0].offset))
    run: list[Target] = []
    end = 0
    for target in ordered:
        part = target[0]
        if run and (part.info.file != run[0][0].info.file or part.offset - end > MAX_GAP):
            yield run[0][0].info.file, run
            run = []
        end = max(end, part.offset + part.nbytes) if run else part.offset + part.nbytes
        run.append(target)
    if run:
        yield run[0][0].info.file, run
