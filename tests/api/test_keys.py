"""The file of keys: what is written is a hash, and what is wrong is named."""

from pathlib import Path

import pytest

from moedge.api.keys import make_key, read_keys
from moedge.errors import DataError


def test_a_key_is_not_in_its_line(tmp_path: Path) -> None:
    key, line = make_key("laptop")
    assert key not in line
    assert make_key("laptop")[0] != key
    path = tmp_path / "keys"
    path.write_text(f"{line}\n{make_key('phone')[1]}\n")
    assert list(read_keys(path)) == ["laptop", "phone"]


@pytest.mark.parametrize("text", ["", "# none\n", "laptop moedge-abc\n", "laptop sha256:12\n", "sha256:" + "0" * 64])
def test_what_is_no_file_of_keys(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(DataError, match=r"python -m moedge\.api\.keys"):
        read_keys(path)


@pytest.mark.parametrize("name", ["", "two words", "a\n"])
def test_a_name_is_one_word(name: str) -> None:
    with pytest.raises(DataError):
        make_key(name)
