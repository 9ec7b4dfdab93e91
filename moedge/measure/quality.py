"""How well a model predicts a text: perplexity and bits per byte, window by window. Knows no tasks.

A text is read in documents of about 64 KiB that end with a line, a document in windows of at most `size` tokens.
Windows share one token, so that every token but a document's first is predicted exactly once. Where the tokenizer puts
a token of its own (BOS) before a text, every window begins with it, and the first token is predicted too. Bits per byte
divides by the UTF-8 bytes of the predicted tokens, so that models with different tokenizers can be compared.
Legend: t positions of one piece of logits, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moedge.errors import DataError
from moedge.runtime.generate import logits_in_chunks
from moedge.runtime.session import Model, Session, context_of

DEFAULT_WINDOW = 2048  # tokens


@dataclass
class TextScore:
    """Sums over predicted tokens. `nats`: negative natural log-likelihood; `nbytes`: UTF-8 bytes of their text."""

    nats: float = 0.0
    tokens: int = 0
    nbytes: float = 0.0

    @property
    def perplexity(self) -> float | None:
        """Per token; None before the first one."""
        return math.exp(self.nats / self.tokens) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.nbytes if self.nbytes else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bytes": round(self.nbytes),
        }


@dataclass(frozen=True)
class Window:
    """Token ids, of which all but the first are predicted, and the bytes of those (a document's, shared out)."""

    ids: tuple[int, ...]
    nbytes: float


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts before a text, if it does."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def window_size(lm: Model, size: int | None = None) -> int:
    """Tokens per window: `size`, by default the context but at most 2048. DataError when it cannot be."""
    longest = context_of(lm)
    if size is None:
        size = min(longest or DEFAULT_WINDOW, DEFAULT_WINDOW)
    if size < 2 or (longest is not None and size > longest):
        raise DataError(f"a window of {size} tokens: it must be 2 to the context's {longest or 'any number of'} tokens")
    return size


def windows(lm: Model, documents: Iterable[str], size: int, most: int | None = None) -> Iterator[Window]:
    """The windows of all documents in order, until `most` tokens are predicted."""
    start = beginning(lm.tokenizer)
    step = size - 1
    for document in documents:
        ids = start + list(lm.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        nbytes = len(document.encode())
        if most is not None and most < len(ids) - 1:
            ids = ids[: most + 1]
            nbytes = _bytes(lm, ids[len(start) :])
        if len(ids) < 2:
            continue
        nbytes -= 0 if start else _bytes(lm, ids[:1])
        for at in range(1, len(ids), step):
            predicted = ids[at : at + step]
            before = start or ids[at - 1 : at]
            yield Window((*before, *predicted), nbytes * len(predicted) / (len(ids) - 1))
        if most is not None:
            most -= len(ids) - 1
            if most < 1:
                return


def _bytes(lm: Model, ids: Sequence[int]) -> int:
    text = lm.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return len(text.encode())


@torch.inference_mode()
def score_windows(
    lm: Model, some: Iterable[Window], observe: Callable[[Window, Iterator[Tensor]], Iterator[Tensor]] | None = None
) -> Iterator[TextScore]:
    """The sums so far, after each window. `observe` sees a window's logits [t, V] as they pass."""
    score, session = TextScore(), Session(lm)
    for window in some:
        logits = logits_in_chunks(lm, window.ids[:-1], session=session)
        score.nats += window_nats(window, observe(window, logits) if observe else logits)
        score.tokens += len(window.ids) - 1
        score.nbytes += window.nbytes
        yield score


def window_nats(window: Window, logits: Iterable[Tensor]) -> float:
    """Minus the natural log-likelihood of the window's predicted tokens, summed."""
    nats, at = 0.0, 1
    for piece in logits:
        targets = torch.tensor(window.ids[at : at + len(piece)])
        nats -= float(target_logprobs(piece, targets).double().sum())
        at += len(piece)
    return nats


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probabilities [t] of `targets` [t] under `logits` [t, V], in single precision."""
    rows = logits.float()
    chosen = rows.gather(-1, targets.to(rows.device)[:, None]).squeeze(-1)
    return chosen - rows.logsumexp(-1)
