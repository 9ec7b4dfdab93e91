"""The socket, uvicorn on it, and the end of both. Knows connections and times, no endpoint and no model.

What uvicorn leaves open is closed here: clients that send half a header, or that do not read their answer.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moedge.errors import DataError

HEADER_SECONDS = 10.0  # for the whole header of a request
WRITE_SECONDS = 30.0  # for a client to take what it was sent
MAX_CONNECTIONS = 512


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. DataError when the address is not to be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise DataError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def own_names(listener: socket.socket) -> tuple[str, ...]:
    """How clients on this machine call it, where only they can connect; else empty."""
    return ("localhost", listener.getsockname()[0]) if is_local(listener) and listener.family == socket.AF_INET else ()


class _Timer:
    """Calls `action` in `seconds`, unless it is cancelled before. Starting it again changes nothing."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds, self._action = seconds, action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._action)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Connection(H11Protocol):
    """uvicorn's connection, with a time for headers and for reading answers, and at most MAX_CONNECTIONS of them."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header, self._write = (
            _Timer(HEADER_SECONDS, transport.abort),
            _Timer(WRITE_SECONDS, transport.abort),
        )
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)  # so that anything not taken is noticed
        self._header.start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._header.start()
        else:
            self._header.cancel()

    def on_response_complete(self) -> None:
        self._header.cancel()  # until there are new data, uvicorn's time for idle connections counts
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header.cancel()
        self._write.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write.cancel()


@dataclass(frozen=True)
class Stages:
    """What happens when: `begin` once requests are accepted, `drain` when no more are, `end` `grace` seconds later."""

    begin: Callable[[], None]
    drain: Callable[[], None]
    end: Callable[[], None]
    grace: float


class Server(uvicorn.Server):
    """uvicorn's server, ended in stages: what has begun may finish for a while, then it is told that it is over."""

    def __init__(self, app: Any, stages: Stages) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                backlog=512,
                timeout_graceful_shutdown=int(stages.grace) + 5,
            )
        )
        self._stages = stages

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._stages.begin()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stages.drain()
        timer = asyncio.get_running_loop().call_later(self._stages.grace, self._stages.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._stages.end()
