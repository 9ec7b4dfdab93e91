"""Server-sent events, as OpenAI's streams use them: `data: JSON`, and `data: [DONE]` last. Knows no endpoint."""

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from moedge.api.errors import ApiError, as_event

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not hold events back


def event(data: str) -> str:
    """One event. JSON has no line ends outside its strings, so one line is enough."""
    return f"data: {data}\n\n"


def event_stream(chunks: AsyncIterator[str]) -> StreamingResponse:
    """A stream of `chunks`. One that fails ends with an error object and without [DONE]: it is not complete."""
    return StreamingResponse(_events(chunks), headers=HEADERS, media_type="text/event-stream")


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield event(chunk)
    except ApiError as error:
        yield event(as_event(error))
        return
    yield event("[DONE]")
