"""From what a user calls a model (folder, hub cache folder, hub id) to a local folder.

Downloads through huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN. Reads no weights.
"""

import os
import re
from pathlib import Path

from moedge.errors import CheckpointError

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(model: str | os.PathLike[str]) -> Path:
    """The local folder of `model`; fetches a hub id first. Raises CheckpointError when there is no such model."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _snapshot(path) if path.name.startswith("models--") else path
    if path.is_file():
        raise CheckpointError(f"{path} is a file: name the folder that holds config.json and the safetensors files")
    name = os.fspath(model)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"there is no folder {name}: check the path")
    return _download(name)


def _snapshot(cache: Path) -> Path:
    """The snapshot that `main` (or the only ref) names in a hub cache folder `models--owner--name`."""
    refs = sorted((cache / "refs").glob("*")) if (cache / "refs").is_dir() else []
    chosen = next((ref for ref in refs if ref.name == "main"), refs[0] if len(refs) == 1 else None)
    if chosen is not None:
        folder = cache / "snapshots" / chosen.read_text(encoding="utf-8").strip()
        if folder.is_dir():
            return folder
    raise CheckpointError(f"hub cache folder {cache} has no finished snapshot of main: download the model again")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise CheckpointError(f"hub model {name} is gated: accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {name}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor in the hub cache, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set): check the path or the connection"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"hub model {name} cannot be fetched: {error}") from error
