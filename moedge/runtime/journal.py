"""A folder that is being made: under another name until it is whole, with a record of what is done in it.

A run that was killed, at any moment, is continued by the next one. Knows names, sizes and text; not what is written.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moedge.errors import CheckpointError
from moedge.units import format_size

JOURNAL = "journal"
_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]{8})")


class Unfinished:
    """`out` while it is being written, in `out`.partial. `done`: (layer, expert) -> checksum of what was written.

    `identity` says what is being made; a record of something else is refused, as is a second process at the same.
    Raises CheckpointError.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        if out.exists() or out.is_symlink():
            raise CheckpointError(f"{out} exists already: choose another name, or delete it")
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()) and not (self.folder / JOURNAL).exists():
            raise CheckpointError(f"{self.folder} is in the way, and nothing that moedge began: delete it")
        self._fd = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self.done = self._read(json.dumps(identity, sort_keys=True))
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{self.folder} is being written by another moedge process: wait for it") from error

    def _read(self, identity: str) -> dict[tuple[int, int], str]:
        text = (self.folder / JOURNAL).read_text(encoding="utf-8")
        first, end, rest = text.partition("\n")
        if not end:  # killed before the first line was whole
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{identity}\n".encode())
            return {}
        if first != identity:
            raise CheckpointError(
                f"{self.folder} was begun from another model or with other settings: delete it, or use those"
            )
        os.write(self._fd, b"\n")  # ends a line that a kill cut
        found = (match for line in rest.split("\n") if (match := _LINE.fullmatch(line)))
        return {(int(match[1]), int(match[2])): match[3] for match in found}

    def record(self, layer: int, expert: int, checksum: str) -> None:
        """To be called after the bytes were written; from any thread."""
        os.write(self._fd, f"{layer} {expert} {checksum}\n".encode())

    def check_space(self, nbytes: int) -> None:
        """Raises CheckpointError where the disk has not room for `nbytes`, less what is written already."""
        have = sum(f.stat().st_blocks * 512 for f in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        if nbytes - have > free:
            raise CheckpointError(
                f"{self.out} will take {format_size(nbytes)}, its disk has {format_size(free + have)} for it: "
                f"free {format_size(nbytes - have - free)} or choose another disk"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Names the folder and the remedy where the disk becomes full."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"the disk of {self.folder} is full: free some space and give the same command again, which goes on "
                f"from here, or delete {self.folder}"
            ) from error

    def finish(self, *scratch: str) -> None:
        """Put everything on the disk, give the folder its name, delete the journal and the `scratch` files in it.

        In this order: a kill before the last step leaves a run that can go on, or a folder that is whole.
        """
        for path in (*self.folder.iterdir(), self.folder):
            sync(path)
        os.rename(self.folder, self.out)
        for name in (JOURNAL, *scratch):
            (self.out / name).unlink(missing_ok=True)
        sync(self.out)
        sync(self.out.parent)

    def forget(self) -> None:
        """Delete the folder where nothing was done in it yet, so that the next run may be another one."""
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} <= {JOURNAL}:
            (self.folder / JOURNAL).unlink(missing_ok=True)
            self.folder.rmdir()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
