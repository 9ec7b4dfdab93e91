"""Text files in pieces that fit into memory: documents of some size, or lines. Knows no tokens."""

from collections.abc import Iterator
from pathlib import Path

from moedge.errors import DataError

DOCUMENT = 1 << 16  # characters


def read_documents(path: str | Path, size: int = DOCUMENT) -> Iterator[str]:
    """The text of a file in documents of about `size` characters, cut after a line where there is one."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            kept, length = [], 0
            while line := file.readline(size):
                kept.append(line)
                length += len(line)
                if length >= size:
                    yield "".join(kept)
                    kept, length = [], 0
            if kept:
                yield "".join(kept)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from error


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file that are not blank, without their ends."""
    for document in read_documents(path):
        yield from (line for line in document.splitlines() if line.strip())
