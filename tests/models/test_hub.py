"""From a name to a folder: local, and the hub cache."""

from pathlib import Path

import pytest

from moedge.errors import CheckpointError
from moedge.models.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path


def test_hub_cache_folder_gives_its_main_snapshot(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    assert resolve(cache) == cache / "snapshots" / COMMIT
    (cache / "refs" / "main").write_text("another")
    with pytest.raises(CheckpointError, match="no finished snapshot"):
        resolve(cache)


@pytest.mark.parametrize("name", ["./missing", "/no/such/model", "a/b/c", "owner name"])
def test_what_can_be_no_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "model.safetensors")


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nor in the hub cache"):
        resolve("owner/tiny")
