"""From pieces of answers to OpenAI's completions and chats, whole or chunk by chunk. Knows no model and no network."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from moedge.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from moedge.serve.work import Likely, Piece


class Format(Protocol):
    """How one request is answered. `include_usage` gives every chunk a usage, null but in the last."""

    def opening(self, index: int) -> str | None:
        """The chunk before an answer's first piece."""

    def chunk(self, index: int, piece: Piece) -> str | None:
        """What a piece adds; None when it is nothing."""

    def closing(self, usage: Usage) -> str:
        """The chunk after all answers that says the usage."""

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> str:
        """The response that is not streamed."""


def _head(kind: str, model: str) -> dict[str, Any]:
    """What a response and all its chunks begin with."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class CompletionFormat:
    """/v1/completions."""

    def __init__(self, model: str, include_usage: bool) -> None:
        self._head = _head("cmpl", model)
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> str | None:
        return None

    def chunk(self, index: int, piece: Piece) -> str | None:
        if piece.is_empty:
            return None
        choice = CompletionChoice(
            index=index, text=piece.text, logprobs=self._logprobs(index, [piece]), finish_reason=piece.finish
        )
        return self._dump([choice])

    def closing(self, usage: Usage) -> str:
        return Completion(**self._head, choices=[], usage=usage).model_dump_json()

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> str:
        choices = [
            CompletionChoice(
                index=index,
                text="".join(piece.text for piece in pieces),
                logprobs=self._logprobs(index, pieces),
                finish_reason=pieces[-1].finish,
            )
            for index, pieces in enumerate(answers)
        ]
        return Completion(**self._head, choices=choices, usage=usage).model_dump_json()

    def _dump(self, choices: list[CompletionChoice]) -> str:
        chunk = Completion(object="text_completion", **self._head, **self._more, choices=choices)
        return chunk.model_dump_json(exclude_unset=True)

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> CompletionLogprobs | None:
        found = [piece.likely for piece in pieces if piece.likely is not None]
        if not found:
            return None
        offsets, at = [], self._offsets.get(index, 0)
        for likely in found:
            offsets.append(at)
            at += len(likely.text)
        self._offsets[index] = at
        return CompletionLogprobs(
            tokens=[likely.text for likely in found],
            token_logprobs=[likely.logprob for likely in found],
            top_logprobs=[_most_likely(likely) for likely in found],
            text_offset=offsets,
        )


def _most_likely(likely: Likely) -> dict[str, float]:
    """By text. Tokens that are parts of characters may look alike: the first, most likely one counts."""
    return dict(reversed(likely.top))


class ChatFormat:
    """/v1/chat/completions."""

    def __init__(self, model: str, include_usage: bool) -> None:
        self._head = _head("chatcmpl", model)
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}

    def opening(self, index: int) -> str | None:
        return self._dump(index, ChatDelta(role="assistant", content=""))

    def chunk(self, index: int, piece: Piece) -> str | None:
        if piece.is_empty:
            return None
        delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
        return self._dump(index, delta, piece)

    def closing(self, usage: Usage) -> str:
        return ChatChunk(**self._head, choices=[], usage=usage).model_dump_json()

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> str:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(piece.text for piece in pieces)),
                logprobs=_chat_logprobs(pieces),
                finish_reason=pieces[-1].finish,
            )
            for index, pieces in enumerate(answers)
        ]
        return ChatCompletion(**self._head, choices=choices, usage=usage).model_dump_json()

    def _dump(self, index: int, delta: ChatDelta, piece: Piece | None = None) -> str:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=None if piece is None else _chat_logprobs([piece]),
            finish_reason=None if piece is None else piece.finish,
        )
        chunk = ChatChunk(object="chat.completion.chunk", **self._head, **self._more, choices=[choice])
        return chunk.model_dump_json(exclude_unset=True)


def _chat_logprobs(pieces: Sequence[Piece]) -> ChatLogprobs | None:
    found = [piece.likely for piece in pieces if piece.likely is not None]
    return ChatLogprobs(content=[_token(likely) for likely in found]) if found else None


def _token(likely: Likely) -> TokenLogprob:
    top = [TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in likely.top]
    return TokenLogprob(token=likely.text, logprob=likely.logprob, bytes=_bytes(likely.text), top_logprobs=top)


def _bytes(text: str) -> list[int] | None:
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
