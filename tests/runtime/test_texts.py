"""Text files in documents and lines: nothing is lost, and what is not text is an error."""

from pathlib import Path

import pytest

from moedge.errors import DataError
from moedge.runtime.texts import read_documents, read_lines


def test_documents_end_with_lines_and_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {number} ü\r\n" for number in range(50)) + "x" * 70 + "\nend"
    file = tmp_path / "text"
    file.write_bytes(text.encode())
    parts = list(read_documents(file, 60))
    assert "".join(parts) == text
    assert all(part.endswith("\n") or len(part) >= 60 for part in parts[:-1])
    assert max(map(len, parts)) < 60 + 60
    assert list(read_documents(file)) == [text]
    file.write_bytes(b"")
    assert list(read_documents(file)) == []


def test_a_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="x is not UTF-8"):
        list(read_documents(tmp_path / "x"))


def test_lines_are_those_with_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("one\n\n  \ntwo \r\nthree")
    assert list(read_lines(tmp_path / "x")) == ["one", "two ", "three"]
