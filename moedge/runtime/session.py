"""One sequence being read or written: its key/value cache and the ids that it holds. Knows no sampling and no text.

The model makes its own cache (so recurrent and sliding layers keep what they need) and gets it back at every call.
Reading goes in chunks of a fixed size, which does not depend on any memory limit: float results depend on it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moedge.errors import ContextError, DataError, ModelError
from moedge.runtime.forward import all_logits, continues, croppable, last_hidden, last_logits, vocabulary

T = TypeVar("T")


class Counters(Protocol):
    """How often experts were found in memory, and what the others cost. They only grow."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...


class Store(Protocol):
    """Where expert bytes live; here only what it counts."""

    @property
    def counters(self) -> Counters: ...


class Model(Protocol):
    """What generating and measuring need of a loaded model (`moedge.load` gives one)."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def store(self) -> Store | None: ...
    @property
    def context(self) -> int | None: ...
    @property
    def prefill_chunk(self) -> int: ...


def context_of(lm: Model) -> int | None:
    """Tokens that one sequence may have: the reserved context, else what the model's positions allow, else no limit."""
    return lm.context if lm.context is not None else _longest(lm)


def _longest(lm: Model) -> int | None:
    """Positions that the model was made for."""
    config = lm.model.config
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if longest is None or config.is_encoder_decoder else int(longest)


def check_length(lm: Model, tokens: int, new: int = 0) -> None:
    """ContextError when `tokens` of text and `new` more do not fit into the context."""
    context, longest, need = context_of(lm), _longest(lm), tokens + new
    if context is not None and need > context:
        more = lm.context is not None and (longest is None or need <= longest)
        remedy = f"reserve more with --context {need}, or use a shorter text" if more else "use a shorter text"
        raise ContextError(
            f"the text has {tokens} tokens, the context holds {context}"
            f"{' including the answer' if new else ''}: {remedy}"
        )


def check_ids(lm: Model, ids: Sequence[int]) -> None:
    """DataError when an id is outside the model's vocabulary, or there is none."""
    if not ids:
        raise DataError("the prompt is empty, and the tokenizer has no token that begins a text: write a word")
    size = vocabulary(lm.model)
    if min(ids) < 0 or max(ids) >= size:
        wrong = next(token for token in ids if not 0 <= token < size)
        raise DataError(f"token {wrong} is outside the model's vocabulary of {size}: is it another model's tokenizer?")


class Session:
    """The cache of one decoder's sequence. Give it to `generate` again and only what is new is computed.

    Not for two threads at once. `ids` are the tokens whose keys and values the cache holds.
    """

    def __init__(self, lm: Model) -> None:
        if lm.model.config.is_encoder_decoder:
            raise ModelError(f"{type(lm.model).__name__} is an encoder-decoder: it has no session over a growing text")
        self.lm = lm
        self.ids: list[int] = []
        self._cache: Any = None

    def reset(self) -> None:
        """Forget everything; the cache's memory is free."""
        self._cache, self.ids = None, []

    def begin(self, ids: Sequence[int]) -> Tensor:
        """Hold exactly `ids`, computing only what the cache lacks; the last position's logits [V]."""
        for start, end in self._spans(self._rewind(ids, len(ids) - 1), len(ids)):
            logits = self._append(ids[start:end], last_logits)
        return logits

    def push(self, token: int) -> Tensor:
        """Append one token; its position's logits [V]."""
        return self._append([token], last_logits)

    def stream(self, ids: Sequence[int], start: int = 0) -> Iterator[Tensor]:
        """Hold exactly `ids`; the logits [t, V] of positions `start` to the end, in chunks of positions in order."""
        for at, end in self._spans(self._rewind(ids, start), len(ids)):
            yield from self._append(ids[at:end], partial(all_logits, first=max(0, start - at)))

    def hidden(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Hold exactly `ids`, read anew; the last hidden states [t, D] of all positions, in chunks in order."""
        self.reset()
        for start, end in self._spans(0, len(ids)):
            yield self._append(ids[start:end], last_hidden)

    def continues(self) -> bool:
        """Whether several tokens can be read at once from here on. The first time, that may have to be tried."""
        return self._cache is None or continues(self.lm.model, self._cache)

    def _spans(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Positions `start` to `end` in chunks, or one by one where the model cannot continue with several."""
        while start < end:
            several = end - start > 1 and self.continues()
            stop = min(start + self.lm.prefill_chunk, end) if several else start + 1
            yield start, stop
            start = stop

    def _rewind(self, ids: Sequence[int], last: int) -> int:
        """Keep the longest common beginning with `ids`, at most up to position `last`; its length.

        A cache that cannot go back (recurrent, or a full sliding window) is dropped.
        """
        most = min(len(self.ids), last)
        common = next((at for at in range(most) if self.ids[at] != ids[at]), most)
        back = len(self.ids) - common
        if not common or (back and not croppable(self._cache)):
            self.reset()
            return 0
        if back:
            self._cache.crop(-back)
            del self.ids[common:]
        return common

    @torch.inference_mode()
    def _append(self, ids: Sequence[int], forward: Callable[[PreTrainedModel, Sequence[int], Any], tuple[Any, T]]) -> T:
        """Append `ids`; the logits that `forward` makes of them."""
        check_length(self.lm, len(self.ids) + len(ids))
        try:
            self._cache, logits = forward(self.lm.model, ids, self._cache)
        except BaseException:  # an interrupted forward leaves layers with caches of different lengths
            self.reset()
            raise
        self.ids.extend(ids)
        return logits


def decoder_start(model: PreTrainedModel) -> int:
    """The token with which the decoder of an encoder-decoder begins. Raises ModelError where the model names none."""
    generation = model.generation_config
    start = getattr(generation, "decoder_start_token_id", None)
    if start is None:
        start = getattr(generation, "bos_token_id", None)
    if start is None:
        raise ModelError("the model names no decoder_start_token_id: add it to its generation_config.json")
    return int(start)


class EncodedSession:
    """The decoder's cache of an encoder-decoder: the prompt is encoded once, the answer grows from the start token."""

    def __init__(self, lm: Model) -> None:
        self.lm = lm
        self.ids: list[int] = []
        self._encoded: Any = None
        self._cache: Any = None

    def begin(self, ids: Sequence[int]) -> Tensor:
        """Encode the prompt `ids` and decode the start token; its logits [V]."""
        start = decoder_start(self.lm.model)
        self._encode(ids)
        return self.push(start)

    @torch.inference_mode()
    def _encode(self, ids: Sequence[int]) -> None:
        model = self.lm.model
        self.ids, self._cache = [], None
        check_length(self.lm, len(ids))
        source = torch.tensor([list(ids)], device=model.device)
        self._encoded = model.get_encoder()(input_ids=source, return_dict=True)

    @torch.inference_mode()
    def push(self, token: int) -> Tensor:
        """Append one token to the answer; its position's logits [V]."""
        model = self.lm.model
        check_length(self.lm, len(self.ids) + 1)
        output = model(
            encoder_outputs=self._encoded,
            decoder_input_ids=torch.tensor([[token]], device=model.device),
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        self._cache = output.past_key_values
        self.ids.append(token)
        logits: Tensor = output.logits[0, -1]
        return logits
