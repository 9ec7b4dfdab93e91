"""Clients that vanish, dawdle, send too much or nonsense: each gets a clear 4xx or is cut off; the next is served."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

import moedge
from moedge.api.limits import BodyLimits
from moedge.serve import listen
from moedge.serve.app import Access

ASK = {"model": "tiny", "prompt": "The sea was", "max_tokens": 8, "temperature": 0}
MOST = 64 << 10


@pytest.fixture(scope="module")
def target(serve: Any, model: Any) -> Iterator[Any]:
    """Small limits and short times."""
    patch = pytest.MonkeyPatch()
    patch.setattr(listen, "HEADER_SECONDS", 0.5)
    patch.setattr(listen, "WRITE_SECONDS", 0.5)
    limits = BodyLimits(one=MOST, together=2 * MOST, seconds=0.5)
    yield serve(lambda: moedge.load(model), parallel=2, queue=4, access=Access(bodies=limits))
    patch.undo()


@pytest.fixture(autouse=True)
def _serves_afterwards(target: Any) -> Iterator[None]:
    """Whatever was done, nothing is left of it and the next request is answered."""
    yield
    engine = target.service.engine
    target.wait(lambda: engine.running == engine.waiting == engine._known == 0)
    reply = httpx.post(f"{target.url}/v1/completions", json=ASK, timeout=30)
    assert reply.status_code == 200
    target.wait(lambda: not target.server.server_state.connections)


def connect(target: Any) -> socket.socket:
    host, port = target.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(content: bytes, target: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return httpx.post(target.url + path, content=content, headers=headers, timeout=30)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": 1e400}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 20000,
        b'{"model": "tiny", "prompt": "x", "stop": [1]}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": "8"}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": true}',
        b'{"model": "tiny", "prompt": {"a": 1}}',
        b'{"model": "tiny", "prompt": ["x", 1]}',
        b'{"model": "tiny", "prompt": "x", "n": 0}',
    ],
    ids=lambda content: content[:40].decode("latin-1") or "empty",
)
def test_nonsense_is_refused(content: bytes, target: Any) -> None:
    reply = post(content, target)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_wrong_content_type(target: Any) -> None:
    """A web page elsewhere can send text/plain without asking; it must not run the model."""
    reply = post(json.dumps(ASK).encode(), target, content_type="text/plain")
    assert reply.status_code == 400


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb(declared: bool, target: Any) -> None:
    piece, count = b"x" * (1 << 20), 100
    content: Any = piece * count if declared else (piece for _ in range(count))
    reply = httpx.post(f"{target.url}/v1/completions", content=content, timeout=60)
    assert reply.status_code in (408, 413)  # 408: this machine does not take 100 MB in the time for a body
    assert reply.json()["error"]["message"]


def test_a_large_body_that_waits_is_answered_at_once(target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 100000000\r\n\r\n"
        )
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_too_many_large_bodies_at_once(target: Any) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {MOST}\r\n\r\n".encode()
    connections = [connect(target) for _ in range(3)]
    for connection in connections:
        connection.sendall(head + b"x" * (MOST - 1))
    answers = sorted(everything(connection).split(b" ", 2)[1] for connection in connections)
    for connection in connections:
        connection.close()
    assert answers == [b"408", b"408", b"429"]


def test_a_slow_body(target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"model": ')
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le"])
def test_half_a_header(sent: bytes, target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(sent)
        assert everything(connection) == b""  # cut off


def test_half_a_second_header(target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        found = b""
        while not found.endswith(b'"ok"}'):
            found += connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert everything(connection) == b""  # cut off


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"GET /" + b"x" * 100_000, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"]
)
def test_what_is_no_http(sent: bytes, target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(sent)
        assert everything(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("length", [b"-1", b"x", b"1" * 5000])
def test_a_length_that_is_none(length: bytes, target: Any) -> None:
    with connect(target) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n\r\n")
        assert everything(connection)[9:12] in (b"400", b"413", b"408")


def stream_request(tokens: int = 400) -> bytes:
    body = json.dumps(ASK | {"stream": True, "max_tokens": tokens, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("rude", [True, False])
def test_clients_that_vanish(rude: bool, target: Any) -> None:
    aborted = target.service.metrics.finished["abort"]
    for _ in range(4):
        connection = connect(target)
        connection.sendall(stream_request())
        assert connection.recv(1)
        if rude:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    target.wait(lambda: target.service.metrics.finished["abort"] > aborted)


def test_a_client_that_vanishes_before_its_body(target: Any) -> None:
    connection = connect(target)
    connection.sendall(stream_request()[:-10])
    connection.close()


def test_a_client_that_does_not_read(target: Any) -> None:
    """It is cut off, although it is there."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(20)
    host, port = target.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 400)  # answers larger than the buffers
    target.wait(lambda: target.server.server_state.connections)
    target.wait(lambda: not target.server.server_state.connections)
    connection.close()


def test_the_crowd(target: Any) -> None:
    """More at once than there is room for: each is answered, or told when to come again."""
    found: list[httpx.Response] = []

    def ask(index: int) -> None:
        content = json.dumps(ASK | {"prompt": f"{index % 3}", "max_tokens": 40}).encode()
        found.append(post(content, target))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {reply.status_code for reply in found} <= {200, 429}
    assert len(found) == 15
    answers = {reply.json()["choices"][0]["text"] for reply in found if reply.status_code == 200}
    assert 1 <= len(answers) <= 3
    assert all(int(reply.headers["retry-after"]) > 0 for reply in found if reply.status_code == 429)
