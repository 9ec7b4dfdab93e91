"""The profile pass: a model reads a task's samples, and what its experts do on them is added up.

The model stays offloaded: it runs within the memory limit that it was loaded with, each pass over at most its prefill
chunk's tokens of several samples at once, so that each expert is read from the disk at most once a pass. Knows the
running model and token ids; what is made of the sums is in importance.py. Letters: B samples, T tokens of the longest,
N tokens of a pass, E experts, k experts a token, H hidden size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moedge.compress.importance import Statistics
from moedge.errors import ModelError
from moedge.models.anatomy import MoeLayer
from moedge.models.routing import choices
from moedge.models.trace import NONE
from moedge.runtime.experts import ExpertSource, source_of
from moedge.runtime.forward import padded
from moedge.runtime.lm import LM
from moedge.runtime.session import check_ids, check_length, decoder_start

Passes = list[list["Counted"]]


class Read(Protocol):
    """A sample as token ids [T]."""

    @property
    def ids(self) -> Sequence[int]: ...


class Counted(Read, Protocol):
    """A sample, `mask` [T] saying of which of its tokens the experts are counted."""

    @property
    def mask(self) -> NDArray[np.bool_]: ...


S = TypeVar("S", bound=Read)


@dataclass(frozen=True)
class Question:
    """A sample of an encoder-decoder: token ids that are encoded, and those that are decoded then. All count.

    Encoder and decoder have experts of their own: with the answer alone counted, the encoder's would have no scores.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *self.answer)

    @property
    def mask(self) -> NDArray[np.bool_]:
        return np.ones(len(self.ids), bool)


def passes(samples: Sequence[S], most: int, alone: bool) -> list[list[S]]:
    """The samples in groups of like length that fill at most `most` tokens; with `alone` one by one."""
    found: list[list[S]] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if alone or not found or len(sample.ids) * (len(found[-1]) + 1) > most:
            found.append([])
        found[-1].append(sample)
    return found


def identity_of(groups: Passes) -> str:
    """Changes with any token of the groups, and with which of them count."""
    content = repr([[(tuple(sample.ids), sample.mask.tobytes()) for sample in group] for group in groups])
    return hashlib.sha256(content.encode()).hexdigest()


def profile(lm: LM, groups: Passes, done: int = 0) -> Iterator[Statistics]:
    """Run the model over `groups[done:]`; the statistics of each group by itself."""
    for group in groups[done:]:
        yield _one_pass(lm, group)


def first_layer(lm: LM, groups: Passes) -> Iterator[Statistics]:
    """As `profile`, but no further than the first layer's router, whose `mass` and `counts` are filled."""
    for group in groups:
        watch = _Watch(nothing_seen(lm))
        with suppress(_Reached), watch.over(lm.model, lm.anatomy.layers[:1], stop=True):
            _read(lm, group, watch)
        yield watch.seen


def _one_pass(lm: LM, group: Sequence[Counted]) -> Statistics:
    watch = _Watch(nothing_seen(lm))
    with watch.over(lm.model, lm.anatomy.layers):
        _read(lm, group, watch)
    return watch.seen


def nothing_seen(lm: LM) -> Statistics:
    """The statistics of a model on no token."""
    layers = lm.anatomy.layers
    return Statistics.empty(len(layers), max(layer.num_experts for layer in layers))


@torch.inference_mode()
def _read(lm: LM, group: Sequence[Counted], watch: "_Watch") -> None:
    """One forward pass over the samples of a group."""
    model: Any = lm.model
    for sample in group:
        check_ids(lm, sample.ids)
    if lm.anatomy.encoder_decoder:
        (sample,) = group
        if not isinstance(sample, Question):
            raise TypeError(f"an encoder-decoder is profiled on Questions, not on {type(sample).__name__}")
        for part in (sample.prompt, sample.answer):
            check_length(lm, len(part))
        _encode_decode(model, sample, watch)
        return
    ids = padded([sample.ids for sample in group])  # [B, T]
    counted = np.zeros(ids.shape, bool)
    for row, sample in enumerate(group):
        counted[row, : len(sample.ids)] = sample.mask
    watch.counted = torch.from_numpy(counted).reshape(-1)
    model.base_model(input_ids=ids, use_cache=False, return_dict=True)


def _encode_decode(model: Any, sample: Question, watch: "_Watch") -> None:
    """As an answer is measured: all of the prompt is encoded, the answer decoded from the start token on."""
    encoded = torch.tensor([sample.prompt])
    decoded = torch.tensor([[decoder_start(model), *sample.answer[:-1]]])
    watch.counted = torch.ones(encoded.shape[1], dtype=torch.bool)
    hidden = model.get_encoder()(input_ids=encoded, return_dict=True).last_hidden_state
    watch.counted = torch.ones(decoded.shape[1], dtype=torch.bool)
    model.get_decoder()(input_ids=decoded, encoder_hidden_states=hidden, use_cache=False, return_dict=True)


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass that need not go on
    pass


class _Watch:
    """Adds up what passes by in one pass. `counted` [N] says which tokens count."""

    def __init__(self, seen: Statistics) -> None:
        self.seen = seen
        self.counted = torch.empty(0, dtype=torch.bool)
        self._chosen: tuple[Tensor, Tensor] | None = None  # of the layer that runs: experts and weights, [N, k]
        self._stop = False
        self._even = torch.empty(0)  # the weights made to sum to 1, [N, k]

    @contextmanager
    def over(self, model: Any, layers: Sequence[MoeLayer], stop: bool = False) -> Iterator[None]:
        """Watch `layers`; with `stop` raise _Reached when the experts of one of them are about to run."""
        self._stop = stop
        hooks: list[Any] = []
        sources: list[ExpertSource] = []
        for layer in layers:
            experts: Any = model.get_submodule(layer.experts)
            sources.append(source_of(experts))
            sources[-1].observer = partial(self._expert, layer.index)
            hooks.append(experts.register_forward_pre_hook(partial(self._choices, layer), with_kwargs=True))
            hooks.append(model.get_submodule(layer.router).register_forward_hook(partial(self._router, layer)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for source in sources:
                source.observer = None

    def _router(self, layer: MoeLayer, module: Any, args: Any, output: Any) -> None:
        logits = _logits(output, layer)
        if logits is None:
            raise ModelError(
                f"{layer.router} ({type(module).__name__}) gives no logits of its {layer.num_experts} experts: "
                "such a router cannot be profiled"
            )
        logits = logits.reshape(-1, layer.num_experts).float()[self.counted]  # [n, E]
        at, count = layer.index, layer.num_experts
        self.seen.tokens[at] += len(logits)
        self.seen.mass[at, :count] += logits.softmax(-1).double().sum(0).numpy()
        top, experts = logits.topk(layer.top_k)  # [n, k]
        confident = top.softmax(-1) >= 1 / layer.top_k - 1e-6
        above = (top - logits.min(-1, keepdim=True).values) * confident
        self._add(self.seen.utility, at, experts, above)

    def _choices(self, layer: MoeLayer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights = *args, *kwargs.values()
        experts, weights = choices(layer, index, weights)
        if len(experts) != len(self.counted):
            raise ModelError(f"{layer.experts} got {len(experts)} tokens of {len(self.counted)}: it cannot be profiled")
        self._chosen = experts, weights
        self._even = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        counts = (experts != NONE) & self.counted[:, None]
        self._add(self.seen.counts, layer.index, experts[counts], torch.ones(int(counts.sum())))
        self._add(self.seen.gate, layer.index, experts[counts], weights[counts])
        if self._stop:
            raise _Reached

    def _expert(self, layer: int, expert: int, output: Tensor, rows: tuple[Tensor, Tensor] | None) -> None:
        assert self._chosen is not None
        experts, weights = self._chosen
        token, position = torch.where(experts == expert) if rows is None else rows  # [n], [n]
        if len(token) != len(output):
            raise ModelError(
                f"expert {expert} of layer {layer} ran on {len(output)} tokens, its router chose it for {len(token)}: "
                "this model's routing cannot be profiled"
            )
        kept = self.counted[token]
        token, position, output = token[kept], position[kept], output[kept].float()
        if not len(token):
            return
        norm = output.norm(dim=-1).double()  # [n]
        scaled = weights[token, position].double() * norm
        seen = self.seen
        seen.norm[layer, expert] += float(norm.sum())
        seen.gate_norm[layer, expert] += float(scaled.sum())
        seen.even_gate_norm[layer, expert] += float((self._even[token, position].double() * norm).sum())
        seen.energy[layer, expert] += float(scaled.square().sum())
        seen.largest[layer, expert] = max(seen.largest[layer, expert], float(output.abs().max()))

    @staticmethod
    def _add(sums: Any, layer: int, experts: Tensor, values: Tensor) -> None:
        more = torch.zeros(sums.shape[1], dtype=torch.float64)
        more.index_add_(0, experts.reshape(-1), values.reshape(-1).double())
        sums[layer] += more.numpy()


def _logits(output: Any, layer: MoeLayer) -> Tensor | None:
    """Among what a router returns, its logits: a column per expert; sparse weights of the same shape are never below 0.

    Where it returns probabilities instead, their logarithm is as good: softmax gives them back.
    """
    tensors = output if isinstance(output, (tuple, list)) else (output,)
    wide = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == layer.num_experts]
    signed = next((t for t in wide if bool((t < 0).any())), None)
    if signed is not None or not wide:
        return signed
    return wide[0].clamp_min(1e-30).log() if bool((wide[0] <= 1).all()) else wide[0]
