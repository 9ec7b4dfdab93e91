"""Text files in pieces that fit into memory: documents of some size, lines, or records. Knows no tokens."""

import json
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


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents of a text file; of a .jsonl file those of its records: `text`, or `prompt` and `answer`.

    Raises DataError, naming file and line, for a record that has neither.
    """
    if Path(path).suffix != ".jsonl":
        yield from read_documents(path)
        return
    for number, line in enumerate(_file_lines(path), start=1):
        if line.strip():
            yield _text_of(line, f"{path}:{number}")


def _file_lines(path: str | Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from error


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}): one record a line") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("prompt"), str) and "answer" in record:
        return f"{record['prompt']} {str(record['answer']).lstrip()}"
    raise DataError(f"{where} has neither text nor prompt and answer: {line[:80]!r}")
