"""From a prompt to an answer, one Step at a time; and from a text to its logits, chunk by chunk.

The command line, the server and the benchmarks consume the same Steps. Knows no cache policy and no terminal.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.logits_process import ForcedBOSTokenLogitsProcessor

from moedge.errors import CheckpointError, DataError
from moedge.runtime.detokenise import Detokeniser, StopStrings
from moedge.runtime.sampling import Sampler, Sampling
from moedge.runtime.session import EncodedSession, Model, Session, check_ids, check_length, context_of

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # a text, its token ids, or the messages of a chat


@dataclass(frozen=True)
class Step:
    """One token of an answer, and what it took.

    text: what became showable with this token; empty while a character or a stop string may be in progress.
    hits, misses, bytes_read: experts found in memory, experts read, and their bytes, for this token (the first one
        includes the prompt). seconds: time for this token, the consumer's own time left out.
    logprob, top_logprobs: natural logarithms of the model's own probabilities, where asked for.
    finish: "stop" (the model ended, or a stop string) or "length" on the last step, else None.
    """

    token: int
    text: str
    hits: int
    misses: int
    bytes_read: int
    seconds: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish: str | None = None


def generate(
    lm: Model, prompt: Prompt, max_new_tokens: int = 64, *, session: Session | None = None, **settings: Any
) -> Iterator[Step]:
    """Answer `prompt`; `settings` are those of Sampling. With `session`, its cache is used and left for the next turn.

    The answer ends at the model's end-of-text token, a stop string, `max_new_tokens`, or the end of the context.
    Raises before any work: ContextError (prompt too long), DataError (empty prompt), ValueError (a setting).
    """
    sampling = Sampling(**settings)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    ids = prompt_ids(lm, prompt)
    encoded = lm.model.config.is_encoder_decoder
    check_length(lm, len(ids), 0 if encoded else 1)
    context = context_of(lm)
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - (1 if encoded else len(ids)))
    if session is not None and (encoded or session.lm is not lm):
        raise ValueError(f"session belongs to {'no encoder-decoder' if encoded else 'another model'}: make a new one")
    return _steps(EncodedSession(lm) if encoded else session or Session(lm), ids, max_new_tokens, sampling)


def prompt_ids(lm: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, checked against the model's vocabulary. DataError when it is empty."""
    if len(prompt) and not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]  # ids need no tokenizer
    else:
        ids = encode(lm.tokenizer, prompt)  # type: ignore[arg-type]
    check_ids(lm, ids)
    return ids


def encode(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a text, with the tokenizer's own special tokens, or of a chat by its template."""
    if prompt and not isinstance(prompt, str):
        return _encode_chat(tokenizer, prompt)
    ids = list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    bos = tokenizer.bos_token_id
    return [int(bos)] if not ids and bos is not None else ids


def _encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins. DataError without a chat template."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, so it cannot chat: give the prompt as one text")
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_tokens(lm: Model) -> frozenset[int]:
    """Tokens that end an answer, as the model's generation config says."""
    end = getattr(lm.model.generation_config, "eos_token_id", None)
    return frozenset(() if end is None else [end] if isinstance(end, int) else end)


class _Meter:
    """Differences of the store's counters and of the clock from one reading to the next."""

    def __init__(self, lm: Model) -> None:
        self._store = lm.store
        self._last = self._now()

    def restart(self) -> None:
        self._last = self._now()

    def read(self) -> tuple[int, int, int, float]:
        """Hits, misses, bytes read, seconds since the last restart or reading."""
        before, self._last = self._last, self._now()
        hits, misses, read = (after - start for start, after in zip(before[:3], self._last[:3], strict=True))
        return hits, misses, read, self._last[3] - before[3]

    def _now(self) -> tuple[int, int, int, float]:
        if self._store is None:
            return 0, 0, 0, time.perf_counter()
        counters = self._store.counters
        return counters.hits, counters.misses, counters.bytes_read, time.perf_counter()


@torch.inference_mode()
def _steps(session: Session | EncodedSession, ids: Sequence[int], limit: int, sampling: Sampling) -> Iterator[Step]:
    lm = session.lm
    meter = _Meter(lm)
    encoded = isinstance(session, EncodedSession)
    sampler = Sampler(sampling, _forced(lm) if encoded else ())
    words = Detokeniser(_tokenizer(lm, sampling), () if encoded else ids)
    stops, ends = StopStrings(sampling.stop), end_tokens(lm)
    logits = session.begin(ids)
    for count in range(1, limit + 1):
        choice = sampler(session.ids, logits)
        ended = choice.token in ends
        finish = "stop" if ended else "length" if count == limit else None
        text = "" if ended else words.push(choice.token)
        if finish:
            text += words.flush()
        text, stopped = stops.push(text, last=finish is not None)
        finish = "stop" if stopped else finish
        hits, misses, read, seconds = meter.read()
        yield Step(choice.token, text, hits, misses, read, seconds, choice.logprob, choice.top_logprobs, finish)
        if finish:
            return
        meter.restart()
        logits = session.push(choice.token)


def _tokenizer(lm: Model, sampling: Sampling) -> PreTrainedTokenizerBase | None:
    """A checkpoint without a tokenizer still answers token ids with token ids."""
    try:
        return lm.tokenizer
    except CheckpointError:
        if sampling.stop:
            raise
        return None


def _forced(lm: Model) -> list[LogitsProcessor]:
    """What the model's generation config forces, such as the target language of a translator."""
    first = getattr(lm.model.generation_config, "forced_bos_token_id", None)
    return [] if first is None else [ForcedBOSTokenLogitsProcessor(int(first))]


def logits_in_chunks(lm: Model, ids: Sequence[int], start: int = 0, session: Session | None = None) -> Iterator[Tensor]:
    """The logits [t, V] of positions `start` to the end of `ids`, in order; keys and values are computed once.

    `session` carries what is common with its last text over to this one.
    """
    check_ids(lm, ids)
    check_length(lm, len(ids))
    return (session or Session(lm)).stream(ids, start)
