"""`moedge serve` as a process of its own: it says where it is, serves, and ends as it is told."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = {"model": "mine", "prompt": "The sea was", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., Any]]:
    """`start("--memory", "1GiB")`: the process, when it is ready, and what it said."""
    children: list[subprocess.Popen[str]] = []

    def begin(*args: object) -> tuple["subprocess.Popen[str]", Any]:
        command = [sys.executable, "-m", "moedge", "serve", model, "--port", 0, "--name", "mine", "--json", *args]
        child = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        children.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, child.communicate()
        return child, json.loads(line)

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def test_it_serves_until_ctrl_c(start: Callable[..., Any]) -> None:
    child, said = start("--memory", "1GiB", "--context", 64)
    assert said["model"] == "mine"
    assert (said["plan"]["parallel"], said["plan"]["context"]) == (4, 64)
    found = httpx.post(f"{said['url']}/v1/completions", json=ASK, timeout=30).json()
    assert found["usage"]["completion_tokens"] == 8
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.strip()) == (130, "", "")


def test_api_keys_are_asked_for_and_an_open_stream_is_finished_before_the_end(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "moedge.api.keys", "laptop"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    (tmp_path / "keys").write_text(made.stdout)
    key = {"authorization": f"Bearer {made.stderr.split()[-1]}"}
    # on a busy machine 200 tokens may take longer than the usual ten seconds
    child, said = start("--grace", 100, "--api-keys", tmp_path / "keys", "--parallel", 1)
    assert httpx.get(f"{said['url']}/v1/models").status_code == 401
    card = httpx.get(f"{said['url']}/v1/models", headers=key).json()["data"][0]
    assert card["moedge"] == {"chat": True, "context": 512, "parallel": 1}
    ask = ASK | {"stream": True, "max_tokens": 200, "logprobs": 0}
    with httpx.stream("POST", f"{said['url']}/v1/completions", json=ask, headers=key, timeout=60) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        child.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.strip()) == (0, "", "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--memory", "5MiB"], "give at least"),
        (["--api-keys", "nosuch"], "nosuch"),
        (["--host", "nosuch.invalid"], "nosuch.invalid"),
    ],
)
def test_what_cannot_be_is_said_at_once(args: list[str], words: str, model: Path, moedge_here: Any) -> None:
    done = moedge_here("serve", model, "--port", 0, *args)
    assert done.status == 1
    assert words in done.err.replace("\n", "")
    assert "Traceback" not in done.err


def test_a_port_that_is_taken(model: Path, moedge_here: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = moedge_here("serve", model, "--port", port)
    assert done.status == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.err


def test_without_fastapi_the_extra_is_named(model: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom moedge.cli import main\nmain(['serve', sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 1
    assert "pip install 'moedge[serve]'" in done.stderr
    assert "Traceback" not in done.stderr
