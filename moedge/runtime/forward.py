"""One forward pass of a stock causal model, in pieces: after a cache, and with its logits a few rows at a time.

Knows how transformers' models are called; no sampling, no text, no memory limit.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from moedge.errors import ModelError
from moedge.runtime.growing import let_grow

LOGITS_BYTES = 4 << 20  # one piece of `all_logits`, as float32; whoever reads it needs room for a few copies

_CONTINUES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def vocabulary(model: PreTrainedModel) -> int:
    """Ids that the model's embedding has."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    return int(size) if size is not None else int(model.config.get_text_config().vocab_size)


def last_logits(model: PreTrainedModel, ids: Sequence[int], cache: Any) -> tuple[Any, Tensor]:
    """Append `ids` to `cache` (None: a new one); the cache, and the last position's logits [V]."""
    kind: Any = type(model)
    sparing = {"logits_to_keep": 1} if _can_spare(kind) else {}
    output = model(input_ids=_row(model, ids), past_key_values=cache, use_cache=True, return_dict=True, **sparing)
    cache, logits = _cache_of(model, output), output.logits[0, -1]
    return cache, logits if sparing else logits.clone()


@cache
def _can_spare(kind: Any) -> bool:
    """Whether models of the class `kind` make logits of the last position only when asked to."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def last_hidden(model: PreTrainedModel, ids: Sequence[int], cache: Any) -> tuple[Any, Tensor]:
    """Append `ids` to `cache` (None: a new one); the cache, and what the head would read: hidden states [t, D]."""
    output = model.base_model(input_ids=_row(model, ids), past_key_values=cache, use_cache=True, return_dict=True)
    hidden: Tensor = output.last_hidden_state[0]
    return _cache_of(model, output), hidden


def all_logits(model: PreTrainedModel, ids: Sequence[int], cache: Any, first: int = 0) -> tuple[Any, Iterator[Tensor]]:
    """Append `ids` to `cache` (None: a new one); the cache, and the logits [t, V] of `ids[first:]` in pieces.

    The layers run once. The model's own forward makes the logits (scaled, capped, as it does) from a few of the last
    hidden states at a time.
    """
    base = model.base_model
    if base is model:
        raise ModelError(f"{type(model).__name__} has no body apart from its head: its logits cannot be had in pieces")
    output = base(input_ids=_row(model, ids), past_key_values=cache, use_cache=True, return_dict=True)
    return _cache_of(model, output), _head(model, type(output), output.last_hidden_state[:, first:])


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [B, T]: shorter rows repeat their last behind their end, where a causal model does not look."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])


@torch.inference_mode()
def logits_at(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """Of several sequences in one pass, without a cache: the logits [t, V] at `places` (row, position), in pieces."""
    output = model.base_model(input_ids=padded(rows).to(model.device), use_cache=False, return_dict=True)
    row, position = torch.tensor(places, device=model.device).T
    yield from _head(model, type(output), output.last_hidden_state[row, position][None])


def _head(model: PreTrainedModel, kind: Any, hidden: Tensor) -> Iterator[Tensor]:
    """What the model makes of its body's last hidden states [1, T, D]: logits [t, V], a few rows at a time."""
    rows = max(1, LOGITS_BYTES // (4 * vocabulary(model)))
    for at in range(0, hidden.shape[1], rows):
        with torch.inference_mode():
            logits = head_logits(model, kind, hidden[0, at : at + rows])
        yield logits


def head_logits(model: PreTrainedModel, kind: Any, hidden: Tensor) -> Tensor:
    """Logits [t, V] of last hidden states [t, D]. `kind`: the class of the output of the model's body."""
    with _standing_in(model, kind(last_hidden_state=hidden[None])):
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)  # not looked at
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
    return logits


class _Finished(nn.Module):
    """Stands in for a model's body: gives its output at once, runs no hooks, and is the body in all else."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(_body=body, _output=output)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["_output"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_body"], name)


@contextmanager
def _standing_in(model: PreTrainedModel, output: Any) -> Iterator[None]:
    """For a while, the model's body gives `output`."""
    name, body = model.base_model_prefix, model.base_model
    model._modules[name] = _Finished(body, output)
    try:
        yield
    finally:
        model._modules[name] = body


def _row(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)  # [1, T]


def _cache_of(model: PreTrainedModel, output: Any) -> Any:
    if output.past_key_values is None:
        raise ModelError(f"{type(model).__name__} returned no key/value cache: it cannot be run token by token")
    let_grow(output.past_key_values)
    return output.past_key_values


def continues(model: PreTrainedModel, cache: Any) -> bool:
    """Whether the model can append several tokens at once to a cache that holds some already.

    Some recurrent models (Jamba among them) silently start from an empty state then. So it is tried, once for each
    model: if several tokens give the same logits after a changed state, the state was not looked at.
    """
    if not any(_recurrent_states(layer) for layer in getattr(cache, "layers", ())):
        return True
    if model not in _CONTINUES:
        middle = vocabulary(model) // 2  # ordinary tokens: padding may have an embedding of zeros
        some = [middle, middle + 1, middle + 2]
        logits = []
        with torch.inference_mode():
            for change in (0, 1):
                probe, _ = last_logits(model, some, None)
                for layer in probe.layers:
                    for state in _recurrent_states(layer):
                        state.add_(change)
                logits.append(last_logits(model, some, probe)[1])
        _CONTINUES[model] = not torch.equal(logits[0], logits[1])
    return _CONTINUES[model]


def _recurrent_states(layer: Any) -> list[Tensor]:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [state for state in layer.recurrent_states.values() if state is not None]


def croppable(cache: Any) -> bool:
    """Whether the end of the sequence can be taken off the cache again."""
    return isinstance(cache, Cache) and cache.is_croppable and not any(_one_way(layer) for layer in cache.layers)


def _one_way(layer: Any) -> bool:
    """Recurrent states and full sliding windows have forgotten what came before.

    A layer that inherits `crop` may keep more than its parent takes off (DeepSeek V4's compressed entries).
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin) or "crop" not in vars(type(layer)):
        return True
    return bool(getattr(layer, "is_sliding", False)) and layer.get_seq_length() >= layer.sliding_window
