"""From a name to a folder: local, the hub cache, and a download from a hub that is served on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
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


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nor in the hub cache"):
        resolve("owner/tiny")


FILES = {
    "config.json": b'{"model_type": "qwen3_moe"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a format that moedge does not read",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks for: the commit of a revision, its tree of files, each file. Holds owner/tiny only."""

    tokens: list[str | None]
    asked: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.tokens.append(self.headers.get("Authorization"))
        self.asked.append(path)
        if path == "api/models/owner/tiny/revision/main":
            self.reply(200, json.dumps({"id": "owner/tiny", "sha": COMMIT}).encode(), body)
        elif path == f"api/models/owner/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": sha1(c)} for n, c in FILES.items()]
            self.reply(200, json.dumps(tree).encode(), body)
        elif path.startswith(f"owner/tiny/resolve/{COMMIT}/") and path.rpartition("/")[2] in FILES:
            content = FILES[path.rpartition("/")[2]]
            self.reply(200, content, body, {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("api/models/owner/gated"):
            self.reply(403, b"", body, {"X-Error-Code": "GatedRepo"})
        else:
            self.reply(404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def reply(self, code: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Its address, and the class that notes what it was asked."""

    class Served(Hub):
        tokens: list[str | None] = []  # noqa: RUF012
        asked: list[str] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Served
        server.shutdown()


@pytest.fixture
def resolve_with(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """resolve(name) in a process of its own, with `environment`: huggingface_hub reads it when it is imported."""
    code = """import sys
from moedge.errors import CheckpointError
from moedge.models.hub import resolve
try:
    print(resolve(sys.argv[1]))
except CheckpointError as error:
    sys.exit(str(error))
"""

    def run(name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()
        }
        env = {**kept, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        command = [sys.executable, "-c", code, name]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_hub_id_is_downloaded_once_with_the_token(
    hub: tuple[str, type[Hub]], resolve_with: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    address, served = hub
    first = resolve_with("owner/tiny", HF_ENDPOINT=address, HF_TOKEN="hf_secret")
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    wanted = {name: content for name, content in FILES.items() if name != "pytorch_model.bin"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert set(served.tokens) == {"Bearer hf_secret"}
    served.asked.clear()
    offline = resolve_with("owner/tiny", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert served.asked == []


def test_what_the_hub_does_not_give_is_said_with_the_remedy(
    hub: tuple[str, type[Hub]], resolve_with: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    address, _ = hub
    unknown = resolve_with("owner/other", HF_ENDPOINT=address)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith(
        "the hub has no model owner/other, or it is private: check the name, or set HF_TOKEN"
    )
    gated = resolve_with("owner/gated", HF_ENDPOINT=address)
    assert gated.stderr.startswith("hub model owner/gated is gated: accept its terms and set HF_TOKEN")


def test_offline_without_the_model_asks_nobody(
    hub: tuple[str, type[Hub]], resolve_with: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    address, served = hub
    done = resolve_with("owner/tiny", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("owner/tiny is neither a folder here nor in the hub cache")
    assert "HF_HUB_OFFLINE" in done.stderr
    assert served.asked == []
