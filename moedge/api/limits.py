"""ASGI middleware: bodies bounded in bytes and time, and work that ends when its client goes. Knows no endpoint."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from moedge.api.errors import ApiError
from moedge.units import format_size

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
AT_END = "moedge.at_end"  # the scope's ExitStack, closed however the request ends


@dataclass(frozen=True)
class BodyLimits:
    """Bytes of one body, bytes of all bodies that are being received, and seconds that one may take."""

    one: int = 1 << 20
    together: int = 16 << 20
    seconds: float = 20.0


class Limits:
    """Receives the whole body before the application starts, and cancels the application when the client goes.

    A body that is too large is read to its end and thrown away, so that the client sees the answer and no broken pipe;
    one that waits for "100 Continue" is answered at once.
    """

    def __init__(self, app: App, limits: BodyLimits) -> None:
        self._app, self._limits = app, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0
        try:
            chunks, size = await self._body(scope, receive)
        except _GoneError:
            return
        except ApiError as error:
            error.headers["connection"] = "close"
            await error.response()(scope, receive, send)
            return
        try:
            with contextlib.ExitStack() as stack:
                scope[AT_END] = stack
                await _while_connected(self._app, scope, b"".join(chunks), receive, send)
        finally:
            self._held -= size

    async def _body(self, scope: Scope, receive: Receive) -> tuple[list[bytes], int]:
        """The body's chunks and the bytes that they count for in `_held`."""
        headers = dict(scope["headers"])
        declared = int(headers.get(b"content-length", b"0"))
        if declared > self._limits.one and b"expect" in headers:
            raise self._too_large()
        chunks: list[bytes] = []
        size = total = 0
        try:
            async with asyncio.timeout(self._limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    more = message.get("more_body", False)
                    chunk = message.get("body", b"")
                    total += len(chunk)
                    if total > self._limits.one:
                        chunks.clear()
                        continue
                    if self._held + len(chunk) > self._limits.together:
                        raise ApiError(429, "too many large bodies at once: try again", headers={"retry-after": "1"})
                    self._held += len(chunk)
                    size += len(chunk)
                    chunks.append(chunk)
            if total > self._limits.one:
                raise self._too_large()
        except BaseException as error:
            self._held -= size
            if isinstance(error, TimeoutError):
                message = f"the body did not arrive within {self._limits.seconds:g} s: send it at once"
                raise ApiError(408, message) from error
            raise
        return chunks, size

    def _too_large(self) -> ApiError:
        most = format_size(self._limits.one)
        return ApiError(413, f"the body is larger than {most}: send a shorter prompt", code="body_too_large")


class _GoneError(Exception):
    """The client left before its request was complete."""


async def _while_connected(app: App, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run `app` on a body that is there; when the client disconnects, it is cancelled wherever it is."""
    given: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        if given:
            return given.pop()
        await asyncio.Event().wait()  # until cancelled: whether the client is there is looked after here

    work = asyncio.ensure_future(app(scope, replay, send))
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
