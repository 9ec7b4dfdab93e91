"""A server on a real socket that streams as OpenAI's does, and misbehaves as it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """`behave(exchange)` answers a POST; `asked` are their bodies, `headers` those of the last request."""

    behave: Callable[["Exchange"], None]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    models: tuple[int, bytes] = (200, b'{"object": "list", "data": [{"id": "mini"}, {"id": "other"}]}')


class Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer
    body: dict[str, Any]

    def do_GET(self) -> None:
        self._note()
        self.reply(*self.fake.models)

    def do_POST(self) -> None:
        self._note()
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.asked.append(self.body)
        self.fake.behave(self)

    def _note(self) -> None:
        self.fake.headers = dict(self.headers)
        self.fake.paths.append(self.path)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        """A stream's headers."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def raw(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, value: Any) -> None:
        self.raw(b"data: " + json.dumps(value).encode() + b"\n\n")

    def text(self, text: str) -> None:
        chat = "messages" in self.body
        self.event({"choices": [{"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}]})

    def done(self, usage: dict[str, int] | None = None) -> None:
        if usage:
            self.event({"choices": [], "usage": usage})
        self.raw(b"data: [DONE]\n\n")
        self.raw(b"")

    def log_message(self, *_: Any) -> None:
        pass


def stream(exchange: Exchange) -> None:
    """As many tokens as were asked for, and what they come to."""
    exchange.begin()
    for number in range(exchange.body["max_tokens"]):
        exchange.text(f" {number}")
    exchange.done({"prompt_tokens": 40, "completion_tokens": exchange.body["max_tokens"]})


@contextmanager
def fake_server(behave: Callable[[Exchange], None] = stream) -> Iterator[FakeServer]:
    fake = FakeServer(behave)
    handler = type("Handler", (Exchange,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up here
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
