"""The full model run with some of its experts only, and what one expert more or less would change: to first order.

The model stays whole and offloaded: its routers see -inf for the logits of experts that are not chosen, so it computes
what the smaller model would. Knows the running model, token ids and tensors; which experts to choose is in refine.py.
Letters: N positions of a pass, E experts, k experts a token, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moedge.errors import ModelError
from moedge.models.anatomy import MoeLayer
from moedge.models.routing import choices
from moedge.models.trace import NONE
from moedge.runtime.experts import feed_forward, source_of
from moedge.runtime.forward import head_logits, vocabulary
from moedge.runtime.lm import LM

PIECE = 16 << 20  # bytes of logits at once
_PRODUCTS = (functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_CORRECTION = "e_score_correction_bias"  # added after the sigmoid, to which -inf is 0

Kept = Sequence[Sequence[int]]  # experts of each MoE layer


@dataclass(frozen=True)
class Weighted:
    """A sample as token ids, and how much the prediction after each of them counts; both [T]."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class _Seen:
    """Of one layer in one pass: what its experts got, all logits, the summed weights, dKL by its output."""

    hidden: Tensor  # [N, H]
    logits: Tensor  # [N, E]
    total: Tensor  # [N]
    slope: Tensor | None = None  # [N, H]


class Distance:
    """KL of the model with fewer experts from the full one, over samples in passes; nats a position, weighted.

    For decoders without a module per expert. Raises ModelError where the routers cannot be restricted.
    """

    def __init__(self, lm: LM, groups: Sequence[Sequence[Weighted]]) -> None:
        self._lm, self._groups = lm, groups
        self._layers = lm.anatomy.layers
        self._rows = max(1, PIECE // (4 * vocabulary(lm.model)))
        with torch.no_grad():
            self._full = [self._hidden(group)[1] for group in groups]  # each [N, H]

    def of(self, kept: Kept) -> float:
        """The mean KL with the experts `kept`."""
        with torch.no_grad(), _Routers(self._lm, kept):
            found = [self._kl(number)[:2] for number in range(len(self._groups))]
        return sum(kl for kl, _ in found) / sum(weight for _, weight in found)

    def gains(self, kept: Kept) -> Tensor:
        """By how much the summed KL falls when an expert that is there goes, or one that is not comes: [L, E].

        To first order in the layer's output, each expert by itself. One pass forward and one back.
        """
        found = torch.zeros(len(self._layers), max(layer.num_experts for layer in self._layers))
        with _without_gradients(self._lm.model):
            for number in range(len(self._groups)):
                with _Routers(self._lm, kept, gradients=True) as routers, torch.enable_grad():
                    _, _, (hidden, slope) = self._kl(number, gradients=True)
                    torch.autograd.backward(hidden, slope)
                with torch.no_grad():
                    for layer, seen in zip(self._layers, routers.seen, strict=True):
                        allowed = routers.allowed[layer.index, : layer.num_experts]
                        found[layer.index, : layer.num_experts] += self._layer_gains(layer, seen, allowed)
        return found

    def _layer_gains(self, layer: MoeLayer, seen: _Seen | None, allowed: Tensor) -> Tensor:
        if seen is None or seen.slope is None:
            raise ModelError(f"{layer.experts} was not run, or gives no gradient: such a model cannot be refined")
        wanted = matters(seen.logits, allowed, layer.top_k)  # [N, E]
        module: Any = self._lm.model.get_submodule(layer.experts)
        reach = torch.zeros_like(seen.logits)  # dKL by each expert's weight
        for expert, parameters in source_of(module).fetch(wanted.any(0).nonzero().T, None):
            token = wanted[:, expert].nonzero()[:, 0]
            output = feed_forward(module, parameters, seen.hidden[token]).float()
            reach[token, expert] = (output * seen.slope[token].float()).sum(-1)
        return changes(seen.logits, reach, seen.total, allowed, layer.top_k)

    def _hidden(self, group: Sequence[Weighted]) -> tuple[Any, Tensor]:
        """The class of the body's output, and its last hidden states where a prediction counts: [N, H]."""
        longest = max(len(sample.ids) for sample in group)
        rows = [[*sample.ids, *[sample.ids[-1]] * (longest - len(sample.ids))] for sample in group]  # causal: unseen
        model: Any = self._lm.model
        output = model.base_model(input_ids=torch.tensor(rows), use_cache=False, return_dict=True)
        places = [(row, at) for row, sample in enumerate(group) for at, w in enumerate(sample.weights) if w]
        row, at = torch.tensor(places).T
        return type(output), output.last_hidden_state[row, at]

    def _kl(self, number: int, gradients: bool = False) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Of one pass the KL, its weight, and the hidden states with the KL's gradient by them [N, H]."""
        group, full = self._groups[number], self._full[number]
        weights = torch.tensor([w for sample in group for w in sample.weights if w])  # [N]
        kind, hidden = self._hidden(group)
        slope, total, model = torch.zeros_like(hidden), 0.0, self._lm.model
        for at in range(0, len(hidden), self._rows):
            part = slice(at, at + self._rows)
            with torch.no_grad():
                wanted = head_logits(model, kind, full[part]).float().log_softmax(-1)  # [n, V]
            own = hidden[part].detach().requires_grad_(gradients)
            logs = head_logits(model, kind, own).float().log_softmax(-1)
            kl = ((wanted.exp() * (wanted - logs)).sum(-1) * weights[part]).sum()
            if gradients:
                (slope[part],) = torch.autograd.grad(kl, own)
            total += kl.item()
        return total, float(weights.sum()), (hidden, slope)


def matters(logits: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """Which experts a token would take were one more allowed, or one fewer: [N, E] bool from [N, E] and [E]."""
    ranked = logits.masked_fill(~allowed, -torch.inf)
    reachable = min(top_k + 1, int(allowed.sum()))
    top, experts = ranked.topk(reachable)
    last = top[:, min(top_k, reachable) - 1, None]  # the weakest that is taken
    return ((logits > last) & ~allowed).scatter(1, experts, True)


def changes(logits: Tensor, reach: Tensor, total: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """How much a layer's linearised KL falls with each expert removed (of the allowed) or added (of the others): [E].

    A token takes its `top_k` largest logits [N, E] among the allowed [E], with weights as their exponentials, which
    sum to `total` [N] now: to the same after the change where all tokens have the same total, as a router that
    normalises has; else each is a share of all the allowed. `reach` [N, E]: dKL by an expert's weight.
    """
    ranked = logits.masked_fill(~allowed, -torch.inf)
    top, experts = ranked.topk(min(top_k + 1, int(allowed.sum())))
    mass = (logits - logits.max(-1, keepdim=True).values).exp()  # [N, E]
    taken, given = mass.gather(1, experts), reach.gather(1, experts)  # [N, k + 1]
    whole = (mass * allowed).sum(-1)  # [N]
    chosen = taken[:, :top_k].sum(-1).clamp_min(1e-30)
    same = bool(total.max() - total.min() <= 1e-3 * total.max())

    def weighted(value: Tensor, masses: Tensor, everything: Tensor) -> Tensor:
        """`value` = sum of mass times reach, as weights: by the mass of those taken, or in shares of everything."""
        return total * value / (masses if same else chosen * everything / whole).clamp_min(1e-30)

    now = weighted((taken * given)[:, :top_k].sum(-1), chosen, whole)
    enters = ~allowed & (logits > top[:, min(top_k, top.shape[1]) - 1, None])
    apart = ~enters.scatter(1, experts[:, :top_k], True)  # neither leaves nor enters, but is a share of all the allowed
    everything = whole[:, None] + torch.where(allowed, -mass, mass)
    rescaled = now[:, None] * (1 - whole[:, None] / everything.clamp_min(1e-30))
    found = torch.zeros(logits.shape[1]) if same else (rescaled * apart).sum(0)
    for place in range(min(top_k, top.shape[1])):
        others = [other for other in range(top.shape[1]) if other != place]
        value, masses = (taken * given)[:, others].sum(-1), taken[:, others].sum(-1)
        found.index_add_(0, experts[:, place], now - weighted(value, masses, whole - taken[:, place]))
    stay = taken[:, : top_k - 1]  # a newcomer takes the weakest one's place
    for expert in enters.any(0).nonzero()[:, 0].tolist():
        own = mass[:, expert]
        value = (stay * given[:, : top_k - 1]).sum(-1) + own * reach[:, expert]
        after = weighted(value, stay.sum(-1) + own, whole + own)
        found[expert] += ((now - after) * enters[:, expert]).sum()
    return found


class _Routers(TorchFunctionMode):
    """Restricts every router to the experts `kept`; notes of each layer what passes by."""

    def __init__(self, lm: LM, kept: Kept, gradients: bool = False) -> None:
        super().__init__()
        layers = lm.anatomy.layers
        self.allowed = torch.zeros(len(layers), max(layer.num_experts for layer in layers), dtype=torch.bool)
        for layer, each in enumerate(kept):
            self.allowed[layer, list(each)] = True
        self.seen: list[_Seen | None] = [None] * len(layers)
        self._lm, self._gradients = lm, gradients
        self._running: MoeLayer | None = None
        self._logits: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Routers":
        model = self._lm.model
        for layer in self._lm.anatomy.layers:
            router, experts = model.get_submodule(layer.router), model.get_submodule(layer.experts)
            hooks = [
                router.register_forward_pre_hook(partial(self._begin, layer)),
                router.register_forward_hook(self._end),
                experts.register_forward_pre_hook(partial(self._given, layer), with_kwargs=True),
            ]
            if self._gradients:
                hooks.append(experts.register_forward_hook(partial(self._result, layer)))
            for hook in hooks:
                self._stack.callback(hook.remove)
            for name, bias in (*router.named_parameters(), *router.named_buffers()):
                if name.endswith(_CORRECTION):
                    self._stack.callback(bias.data.copy_, bias.data.clone())
                    bias.data[~self.allowed[layer.index, : layer.num_experts]] = -torch.inf
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        layer = self._running
        if layer is None or self._logits is not None or func not in _PRODUCTS:
            return out
        more = out.shape[-1] - layer.num_experts
        if more not in (0, 1):  # one more row skips the layer, in Zaya
            return out
        self._logits = out.detach()[..., : layer.num_experts].reshape(-1, layer.num_experts).float()
        gone = functional.pad(~self.allowed[layer.index, : layer.num_experts], (0, more))
        return out.masked_fill(gone, -torch.inf)

    def _begin(self, layer: MoeLayer, *_: Any) -> None:
        self._running, self._logits = layer, None

    def _end(self, *_: Any) -> None:
        self._running = None

    def _given(self, layer: MoeLayer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, weights = *args, *kwargs.values()
        experts, weights = choices(layer, index, weights)
        taken = experts[experts != NONE]
        if self._logits is None or not bool(self.allowed[layer.index, taken].all()):
            raise ModelError(
                f"{layer.router} ({type(self._lm.model.get_submodule(layer.router)).__name__}) cannot be kept from "
                "choosing some experts: such a model cannot be refined, leave --refine out"
            )
        if self._gradients:
            self.seen[layer.index] = _Seen(hidden.detach(), self._logits, weights.sum(-1))

    def _result(self, layer: MoeLayer, module: Any, args: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(partial(self._slope, layer.index))  # type: ignore[no-untyped-call]
        return output

    def _slope(self, layer: int, gradient: Tensor) -> None:
        seen = self.seen[layer]
        assert seen is not None
        seen.slope = gradient.reshape(seen.hidden.shape)


@contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """No parameter collects a gradient."""
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
