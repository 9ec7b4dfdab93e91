"""From a name to a folder: local, hub cache, and a hub served on this machine."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
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


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls that a download makes: the model, its list of files, each file. `repos`: name -> folder."""

    repos: dict[str, Path]
    tokens: list[str | None]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].strip("/")
        for name, folder in self.repos.items():
            if path.startswith(f"api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in sorted(folder.iterdir())
                ]
                return self.reply(200, json.dumps(tree).encode(), body)
            if path.startswith((f"api/models/{name}/revision/", f"api/models/{name}")) and "/resolve/" not in path:
                files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                data = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
                return self.reply(200, json.dumps(data).encode(), body)
            if path.startswith(f"{name}/resolve/"):
                content = (folder / path.rpartition("/")[2]).read_bytes()
                return self.reply(200, content, body, hashlib.sha256(content).hexdigest())
        return self.reply(404, b"", body, error="RepoNotFound")

    def reply(self, code: int, content: bytes, body: bool, etag: str = "", error: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Served(Hub):
        repos = {"owner/tiny": tiny("qwen3_moe")}  # noqa: RUF012
        tokens: list[str | None] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        from huggingface_hub import constants

        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield Served
        server.shutdown()


def test_hub_id_is_downloaded_with_the_token_and_loads(hub: type[Hub], tiny: Callable[..., Path]) -> None:
    folder = resolve("owner/tiny")
    original = tiny("qwen3_moe")
    wanted = {f.name for f in original.iterdir()}
    assert {f.name for f in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == (original / name).read_bytes() for name in wanted)
    assert "Bearer hf_secret" in hub.tokens


def test_hub_id_that_the_hub_does_not_have(hub: type[Hub]) -> None:
    with pytest.raises(CheckpointError, match="owner/other"):
        resolve("owner/other")


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nor in the hub cache"):
        resolve("owner/tiny")
