"""Record which experts a model's tokens take while it runs.

Knows modules and hooks. Where a batch has several rows, or padding, each row is a sequence without its padding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedge.errors import DataError
from moedge.models.anatomy import MoeLayer, dissect
from moedge.models.routing import choices
from moedge.models.trace import NONE, RoutingTrace

Piece = tuple[NDArray[Any], NDArray[Any]]  # experts and weights of some tokens, [t, L, k] each


class Recorder:
    """Collects router choices while the model runs; `trace()` gives what was collected so far.

    A forward pass without a cache, or with a new one, starts new sequences, one per row of the batch; a pass that goes
    on with the cache of the pass before adds to them. Tokens that the attention mask leaves out are left out. Of an
    encoder-decoder, the encoder's tokens come first; they take no experts of the decoder's layers, nor its tokens of
    the encoder's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = dissect(model).layers
        self._top_k = max(layer.top_k for layer in self._layers)
        self._sequences: list[list[Piece]] = []
        self._open: list[list[Piece]] = []  # those of the batch that runs
        self._cache: Any = None
        self._encoded = False
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> experts, weights of the pass that runs
        self._hooks: list[Any] = []
        self._attach(model)

    def _attach(self, model: Any) -> None:
        decoder: nn.Module = model.get_decoder()
        if model.config.is_encoder_decoder:
            self._attach_stack(model.get_encoder(), encodes=True)
        self._attach_stack(decoder, encodes=False)
        for layer in self._layers:
            module = model.get_submodule(layer.experts)
            self._hooks.append(module.register_forward_pre_hook(self._see(layer), with_kwargs=True))

    def _attach_stack(self, stack: nn.Module, encodes: bool) -> None:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._seen = {}

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            ids = kwargs["inputs_embeds"] if ids is None else ids
            self._finish_pass((int(ids.shape[0]), int(ids.shape[1])), kwargs, output, encodes)

        self._hooks.append(stack.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(stack.register_forward_hook(after, with_kwargs=True))

    def _see(self, layer: MoeLayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, index, weights = *args, *kwargs.values()
            self._seen[layer.index] = choices(layer, index, weights)

        return hook

    def _finish_pass(self, shape: tuple[int, int], kwargs: dict[str, Any], output: Any, encodes: bool) -> None:
        batch, length = shape
        cache = kwargs.get("past_key_values")
        goes_on = self._encoded if not encodes and self._encoded else cache is not None and cache is self._cache
        if encodes or not goes_on:
            self._open = [[] for _ in range(batch)]
            self._sequences.extend(self._open)
        if len(self._open) != batch:
            raise DataError(
                f"routing of {batch} rows follows {len(self._open)} in the same cache: record without beam search"
            )
        self._encoded = encodes
        if not encodes:
            self._cache = getattr(output, "past_key_values", None) or cache
        experts, probs = self._stack(batch, length)
        kept = _kept_tokens(kwargs.get("attention_mask"), batch, length)
        for row, pieces in enumerate(self._open):
            pieces.append((experts[row, kept[row]], probs[row, kept[row]]))

    def _stack(self, batch: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The pass's choices, [B, t, L, k]; layers that did not run (or take fewer experts) are NONE."""
        experts = np.full((batch * length, len(self._layers), self._top_k), NONE, np.int16)
        probs = np.zeros(experts.shape, np.float32)
        for layer, (chosen, weights) in self._seen.items():
            if len(chosen) != batch * length:
                raise DataError(f"layer {layer} routed {len(chosen)} tokens of {batch * length}: not recorded")
            experts[:, layer, : chosen.shape[1]] = chosen.cpu().numpy()
            probs[:, layer, : chosen.shape[1]] = weights.cpu().numpy()
        shape = (batch, length, *experts.shape[1:])
        return experts.reshape(shape), probs.reshape(shape)

    def trace(self) -> RoutingTrace:
        """All sequences so far: experts uint8 where the ids allow, else int16; probs float16."""
        pieces = [piece for sequence in self._sequences for piece in sequence]
        empty = (0, len(self._layers), self._top_k)
        experts = np.concatenate([p[0] for p in pieces] or [np.zeros(empty, np.int16)])
        probs = np.concatenate([p[1] for p in pieces] or [np.zeros(empty, np.float32)]).astype(np.float16)
        if experts.min(initial=0) >= 0 and experts.max(initial=0) < 256:
            experts = experts.astype(np.uint8)
        lengths = [sum(len(e) for e, _ in sequence) for sequence in self._sequences]
        return RoutingTrace(experts, probs, np.cumsum([0, *lengths], dtype=np.int64))

    def close(self) -> None:
        """Stop recording; the trace stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._cache = None


def _kept_tokens(mask: Any, batch: int, length: int) -> NDArray[np.bool_]:
    """Which of the pass's tokens are not padding, [B, t]."""
    if mask is None:
        return np.ones((batch, length), bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != batch:
        raise DataError(
            "routing is recorded for attention masks of shape [batch, tokens] only, which say what is padding: "
            "pass such a mask, or none"
        )
    kept: NDArray[np.bool_] = mask[:, -length:].cpu().numpy().astype(bool)
    return kept


@contextlib.contextmanager
def record(model: PreTrainedModel) -> Iterator[Recorder]:
    """Record router choices of all forward passes inside the `with` block."""
    recorder = Recorder(model)
    try:
        yield recorder
    finally:
        recorder.close()
