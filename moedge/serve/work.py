"""What a request makes the model do, as iterators for the engine: answers, embeddings, token ids. Knows no HTTP.

The first item says that the request is sound; what is not raises before it. Everything here runs on the model thread,
which alone uses the model and its tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import torch

from moedge.api.responses import Finish
from moedge.errors import CheckpointError, ContextError, DataError, ModelError
from moedge.runtime.generate import Prompt, Step, end_tokens, prompt_ids
from moedge.runtime.lm import LM
from moedge.runtime.session import Session, check_length, context_of


@dataclass(frozen=True)
class Accepted:
    """The prompt is sound and has `tokens` tokens."""

    tokens: int


@dataclass(frozen=True)
class Likely:
    """A token as text, the logarithm of its probability, and the most likely ones in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer. `text` may be empty; `likely` is None for a token that is not part of it."""

    text: str
    likely: Likely | None
    finish: Finish | None

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing that a client could see."""
        return not self.text and self.likely is None and self.finish is None


def can_chat(lm: LM) -> bool:
    """Whether there is a chat template."""
    try:
        return bool(lm.tokenizer.chat_template)
    except CheckpointError:
        return False


def new_session(lm: LM) -> Session | None:
    """None for an encoder-decoder, which has none."""
    return None if lm.model.config.is_encoder_decoder else Session(lm)


def answering(
    lm: LM, session: Session | None, prompt: Prompt, max_tokens: int | None, settings: Mapping[str, Any]
) -> Iterator[Accepted | Piece | None]:
    """Accepted, then None for every chunk of the prompt but the last, then a Piece per token."""
    ids = _ids(lm, prompt)
    context = context_of(lm)
    check_length(lm, len(ids), 0 if session is None else 1)
    if context is not None:
        room = context - (1 if session is None else len(ids))
        if max_tokens is not None and max_tokens > room:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}, the context holds {context}: "
                f"ask for at most {room}, or use a shorter prompt"
            )
        max_tokens = max_tokens or room
    more = {} if session is None else {"session": session}
    steps = lm.generate(ids, max_tokens or 1024, **settings, **more)
    yield Accepted(len(ids))
    try:
        if session is not None:
            yield from _read(session, ids)
        for step in steps:
            yield Piece(step.text, _likely(lm, step), cast(Finish | None, step.finish))
    finally:
        if session is not None:
            session.reset()  # its place is given away now, whoever still holds the session


def _read(session: Session, ids: Sequence[int]) -> Iterator[None]:
    """Read all chunks but the last, which `generate` reads: the same chunks as it would read alone."""
    at = 0
    while True:
        at += session.lm.prefill_chunk if session.continues() else 1
        if at >= len(ids):
            return
        session.begin(ids[:at])
        yield None


def _ids(lm: LM, prompt: Prompt) -> list[int]:
    try:
        return prompt_ids(lm, prompt)
    except jinja2.TemplateError as error:
        raise DataError(f"the model's chat template refuses these messages: {error}") from error


def _likely(lm: LM, step: Step) -> Likely | None:
    ended = step.token in end_tokens(lm)
    if step.logprob is None or ended:
        return None
    top = tuple((_word(lm, token), _finite(logprob)) for token, logprob in step.top_logprobs or ())
    return Likely(_word(lm, step.token), _finite(step.logprob), top)


def _word(lm: LM, token: int) -> str:
    text = lm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI's stands for it."""
    return max(logprob, -9999.0)


def embedding(lm: LM, session: Session | None, inputs: Sequence[str | list[int]]) -> Iterator[Any]:
    """Accepted with the tokens of all inputs, None per chunk, then of each input the mean of its last hidden states."""
    if session is None:
        raise ModelError("an encoder-decoder has no embeddings here: use a decoder")
    rows = [_ids(lm, text) for text in inputs]
    for ids in rows:
        check_length(lm, len(ids))
    yield Accepted(sum(map(len, rows)))
    means: list[list[float]] = []
    try:
        for ids in rows:
            total: Any = 0
            for hidden in session.hidden(ids):  # [t, D]
                total = total + hidden.sum(0, dtype=torch.float32)
                yield None
            means.append((total / len(ids)).tolist())
    finally:
        session.reset()
    yield means


def tokenising(lm: LM, prompt: Prompt) -> Iterator[list[int]]:
    """The token ids."""
    yield _ids(lm, prompt)
