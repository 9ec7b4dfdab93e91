"""Concurrent clients against an OpenAI-compatible server: when tokens arrive, and what was refused.

One thread and, for each request, one new connection per client: what is measured includes connecting. Knows HTTP,
server-sent events and a clock, no model: tokens are counted by the server's `usage`, else as events that carry text.
"""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import count
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from moedge.errors import MoedgeError

WORDS = (
    *("time", "people", "way", "water", "word", "place", "sound", "year", "work", "back", "name", "sentence", "man"),
    *("line", "boy", "farm", "end", "land", "home", "hand", "school", "father", "tree", "city", "earth", "eye", "sea"),
    *("night", "north", "book", "idea", "food", "sun", "face", "wood", "list", "bird", "body", "dog", "song", "door"),
)
DEFAULT_WAIT = 1.0  # seconds, after a 429 that names none
LONGEST_ERROR = 300  # characters of a server's own words


@dataclass(frozen=True)
class Load:
    """What is asked of a server, by how many, and with how much patience.

    `prompt_words`: length of each prompt, whose words differ by request. `retry`: after a 429, wait as long as
    Retry-After says and ask again, until `timeout`; that is also how long a connection may be silent, in seconds.
    """

    url: str
    model: str
    clients: int = 8
    requests: int = 64
    prompt_words: int = 32
    new_tokens: int = 64
    chat: bool = False
    retry: bool = True
    timeout: float = 120.0
    key: str | None = field(default=None, repr=False)

    def body(self, number: int) -> dict[str, Any]:
        """Request `number`, the same in every run."""
        text = " ".join(random.Random(number).choices(WORDS, k=self.prompt_words))
        asked = {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        settings = {"max_tokens": self.new_tokens, "temperature": 1, "seed": number}
        return {"model": self.model, "stream": True, "stream_options": {"include_usage": True}} | settings | asked

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


@dataclass
class Answer:
    """What became of one request. Times in seconds, from sending the attempt that was not refused with 429.

    `fault`: None, an HTTP status, or `timeout`, `connection`, `protocol` (no HTTP, or no SSE), `cut` (a stream that
    ended before it said so), `event` (an error within the stream). `gaps`: between events that carry text.
    """

    fault: str | None = None
    first: float | None = None
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    tokens: int = 0
    counted: bool = False  # by the server's usage
    refused: int = 0
    waited: float = 0.0


class Server:
    """Where requests go: scheme, host and path of a URL, which may end in /v1 as OpenAI clients want it."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise MoedgeError(f"{url} is no URL of a server ({error}): give it like http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MoedgeError(f"{url} is no URL of a server: give it like http://127.0.0.1:8000")
        self.url, self._timeout = url, timeout
        self._host, self._port, self._https = parts.hostname, port, parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Connection": "close"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._https else HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        connection.connect()
        return connection

    def send(self, connection: HTTPConnection, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        """POST `body` as JSON, or GET without one."""
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        connection.request("GET" if body is None else "POST", self._prefix + path, data, headers)
        return connection.getresponse()

    def models(self) -> list[str]:
        """Ids of the server's models. Raises MoedgeError that says why the server cannot be used."""
        try:
            connection = self.connect()
            try:
                response = self.send(connection, "/v1/models")
                status, text = response.status, response.read()
            finally:
                connection.close()
        except (OSError, HTTPException) as error:
            raise MoedgeError(f"no server answers at {self.url} ({error!r}): start it, or check the URL") from error
        if status in (401, 403):
            raise MoedgeError(
                f"{self.url} answers {status}: give its API key with --api-key-file or MOEDGE_API_KEY, or the right one"
            )
        try:
            ids = [str(model["id"]) for model in json.loads(text)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            ids = []
        if not ids:
            said = text[:LONGEST_ERROR].decode(errors="replace").strip()
            raise MoedgeError(f"{self.url} answers {status} and names no models at /v1/models: {said or 'no body'}")
        return ids


class Clients:
    """The clients of one Load. `answers()` yields what became of each request; closing it hangs up on the rest."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._server = Server(load.url, load.key, load.timeout)
        self._numbers = count()
        self._done: SimpleQueue[Answer | BaseException] = SimpleQueue()
        self._stop = threading.Event()
        self._sockets: dict[int, socket.socket] = {}  # by request

    def answers(self) -> Generator[Answer, None, None]:
        """As they come, in no fixed order."""
        for _ in range(min(self._load.clients, self._load.requests)):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            for _ in range(self._load.requests):
                answer = self._done.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            self._stop.set()
            for held in list(self._sockets.values()):
                with suppress(OSError):  # its thread closed it just now
                    held.shutdown(socket.SHUT_RDWR)

    def _work(self) -> None:
        """One client: request after request."""
        while not self._stop.is_set() and (number := next(self._numbers)) < self._load.requests:
            try:
                self._done.put(self.ask(number))
            except Exception as error:  # a bug: raised where the answers are read
                self._done.put(error)

    def ask(self, number: int) -> Answer:
        """One request until it is answered, failed, or refused for good."""
        answer, begun = Answer(), time.perf_counter()
        while True:
            started = time.perf_counter()
            wait = self._attempt(number, answer)
            answer.seconds = time.perf_counter() - started
            if wait is None:
                return answer
            answer.refused += 1
            if not self._load.retry or time.perf_counter() + wait - begun > self._load.timeout or self._stop.wait(wait):
                answer.fault = "429"
                return answer
            answer.waited += wait

    def _attempt(self, number: int, answer: Answer) -> float | None:
        """Fill `answer`; or, on a 429, the seconds after which to ask again."""
        started = time.perf_counter()
        try:
            connection = self._server.connect()
            assert connection.sock is not None
            self._sockets[number] = connection.sock
            try:
                if self._stop.is_set():  # this socket came too late to be hung up on
                    return None
                response = self._server.send(connection, self._load.path, self._load.body(number))
                with response:
                    if response.status == 429:
                        return retry_after(response.headers.get("Retry-After"))
                    if response.status != 200:
                        answer.fault = str(response.status)
                    else:
                        _read(response, answer, started)
            finally:
                del self._sockets[number]
                connection.close()
        except TimeoutError:
            answer.fault = "timeout"
        except (HTTPException, ValueError, KeyError, TypeError, AttributeError):
            answer.fault = "protocol"
        except OSError:
            answer.fault = "connection"
        return None


def _read(response: HTTPResponse, answer: Answer, started: float) -> None:
    """The events of a stream into `answer`."""
    last, answer.fault, texts = started, "cut", 0
    for data in events(response):
        if data == b"[DONE]":
            answer.fault = None
            break
        now, chunk = time.perf_counter(), json.loads(data)
        if "error" in chunk:
            answer.fault = "event"
            break
        if usage := chunk.get("usage"):
            answer.prompt_tokens, answer.tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            answer.counted = True
        if any(_text(choice) for choice in chunk["choices"]):
            if answer.first is None:
                answer.first = now - started
            else:
                answer.gaps.append(now - last)
            last, texts = now, texts + 1
    if not answer.counted:
        answer.tokens = texts


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def events(lines: Iterator[bytes] | HTTPResponse) -> Iterator[bytes]:
    """The data of each server-sent event."""
    data: list[bytes] = []
    for line in lines:
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data = []


def retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header: a number, or a date."""
    if value is None:
        return DEFAULT_WAIT
    try:
        return max(0.0, float(value))
    except ValueError:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())


def figures(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """What `answers`, all had within `seconds`, come to. Latencies in seconds, of requests that were answered in full.

    `errors` counts attempts that were refused with 429 and requests that failed in another way.
    """
    whole = [answer for answer in answers if answer.fault is None]
    errors = Counter(answer.fault for answer in answers if answer.fault not in (None, "429"))
    errors["429"] = sum(answer.refused for answer in answers)
    tokens = sum(answer.tokens for answer in whole)
    found: dict[str, Any] = {"completed": len(whole), "failed": len(answers) - len(whole), "errors": dict(+errors)}
    found |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds if seconds else None}
    found["requests_per_second"] = len(whole) / seconds if seconds else None
    found |= _percentiles("first_token", [answer.first for answer in whole if answer.first is not None])
    found |= _percentiles("inter_token", [gap for answer in whole for gap in answer.gaps])
    found |= _percentiles("request", [answer.seconds for answer in whole])
    prompts = [answer.prompt_tokens for answer in whole if answer.prompt_tokens is not None]
    found["prompt_tokens"] = sum(prompts) / len(prompts) if prompts else None
    found["tokens_counted_by"] = "usage" if all(answer.counted for answer in whole) else "events"
    found["waited_seconds"] = sum(answer.waited for answer in answers)
    return found


def _percentiles(name: str, values: list[float]) -> dict[str, float | None]:
    """`name`_p50 and `name`_p99, interpolated as numpy does; None without values."""
    import numpy as np

    return {f"{name}_p{q}": float(np.percentile(values, q)) if values else None for q in (50, 99)}
