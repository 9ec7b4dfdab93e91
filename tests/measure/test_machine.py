"""What stands beside a figure: commit, readahead, direct reads, and whether caches could be dropped."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moedge.measure import machine
from moedge.models.checkpoint import Checkpoint
from moedge.runtime.reader import DirectReader


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_files(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert machine.commit(package) is None
    git(tmp_path, "init")
    assert machine.commit(package) is None, "installed inside a repository that is another's"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = machine.commit(package)
    assert clean is not None
    assert not clean.endswith("+")
    (tmp_path / "README").write_text("elsewhere")
    assert machine.commit(package) == clean
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "script.py").write_text("")
    git(tmp_path, "add", "beside")
    assert machine.commit(package) == clean
    assert machine.commit(package, beside) == clean + "+"
    (package / "__init__.py").write_text("changed")
    assert machine.commit(package) == clean + "+"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None


def test_direct_reads_as_the_reader_finds_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny())
    reader = DirectReader(checkpoint)
    assert machine.reads_past_page_cache(checkpoint.files[0]) == reader.bypasses_page_cache
    reader.close()
    checkpoint.close()
    assert not machine.reads_past_page_cache(tmp_path / "nosuch")


def test_dropping_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(machine, "DROP_CACHES", tmp_path / "drop_caches")
    assert not machine.drop_page_cache(), "no such file, or not to be written"
    (tmp_path / "drop_caches").write_text("")
    assert machine.drop_page_cache()
    assert (tmp_path / "drop_caches").read_text() == "3"


def test_dropping_caches_may_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(machine, "DROP_CACHES", Path("/dev/full"))
    assert not machine.drop_page_cache()


def test_the_surroundings_are_complete(tmp_path: Path) -> None:
    found = machine.surroundings()
    assert set(found) == {"device", "load_average", "version", "commit", "date"}
    assert found["device"]["cpu"]
    assert found["device"]["cores"] >= 1
    assert found["device"]["memory_bytes"] > 1 << 28
    readahead = machine.readahead_kib(Path(__file__))
    assert readahead is None or readahead >= 0
