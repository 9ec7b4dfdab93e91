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
from moedge.runtime.forward import head_logits, padded, vocabulary
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
        self._weights = [torch.tensor([w for sample in group for w in sample.weights if w]) for group in groups]  # [N]
        self._whole = sum(float(weights.sum()) for weights in self._weights)
        self._rows = max(1, PIECE // (4 * vocabulary(lm.model)))
        with torch.no_grad():
            self._full = [self._hidden(group)[1] for group in groups]  # each [N, H]

    def of(self, kept: Kept) -> float:
        """The mean KL with the experts `kept`."""
        with torch.no_grad(), _Routers(self._lm, kept):
            return sum(self._kl(number)[0] for number in range(len(self._groups))) / self._whole

    def effects(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Of each expert's going, or coming: how far the KL falls to first order, and how large a step that is, [L, E].

        The size is the squared change of the layer's output times the mean slope there, to which a second-order term
        is about proportional. Both are sums over tokens by the weights' sum. One pass forward and one back.
        """
        found = torch.zeros(2, len(self._layers), max(layer.num_experts for layer in self._layers))
        with _without_gradients(self._lm.model):
            for number in range(len(self._groups)):
                with _Routers(self._lm, kept, gradients=True) as routers, torch.enable_grad():
                    _, hidden, slope = self._kl(number, gradients=True)
                    torch.autograd.backward(hidden, slope)
                with torch.no_grad():
                    for layer, seen in zip(self._layers, routers.seen, strict=True):
                        allowed = routers.allowed[layer.index, : layer.num_experts]
                        found[:, layer.index, : layer.num_experts] += self._of_layer(layer, seen, allowed)
        falls, sizes = found / self._whole
        return falls, sizes

    def _of_layer(self, layer: MoeLayer, seen: _Seen | None, allowed: Tensor) -> Tensor:
        """Sums over the pass's tokens: [2, E]."""
        if seen is None or seen.slope is None:
            raise ModelError(f"{layer.experts} was not run, or gives no gradient: such a model cannot be refined")
        found, slope = torch.zeros(2, layer.num_experts), seen.slope.float()
        step = max(1, PIECE // (4 * layer.num_experts * slope.shape[1]))
        for at in range(0, len(slope), step):
            part = slice(at, at + step)
            changes = toggled(seen.logits[part], seen.total[part], allowed, layer.top_k)  # [E, n, E]
            outputs = self._outputs(layer, seen.hidden[part], (changes != 0).any(0))  # [n, E, H]
            reach = torch.einsum("neh,nh->ne", outputs, slope[part])
            products = torch.einsum("neh,nfh->nef", outputs, outputs)
            found[0] -= torch.einsum("tne,ne->t", changes, reach)
            found[1] += torch.stack([((change[:, None] @ products)[:, 0] * change).sum() for change in changes])
        found[1] *= slope.norm(dim=-1).mean()
        return found

    def _outputs(self, layer: MoeLayer, hidden: Tensor, wanted: Tensor) -> Tensor:
        """What experts give for the tokens that want them [n, E]; 0 elsewhere: [n, E, H]."""
        module: Any = self._lm.model.get_submodule(layer.experts)
        found = torch.zeros(*wanted.shape, hidden.shape[1])
        for expert, parameters in source_of(module).fetch(wanted.any(0).nonzero().T, None):
            token = wanted[:, expert].nonzero()[:, 0]
            found[token, expert] = feed_forward(module, parameters, hidden[token]).float()
        return found

    def _hidden(self, group: Sequence[Weighted]) -> tuple[Any, Tensor]:
        """The class of the body's output, and its last hidden states where a prediction counts: [N, H]."""
        model: Any = self._lm.model
        ids = padded([sample.ids for sample in group])
        output = model.base_model(input_ids=ids, use_cache=False, return_dict=True)
        places = [(row, at) for row, sample in enumerate(group) for at, w in enumerate(sample.weights) if w]
        row, at = torch.tensor(places).T
        return type(output), output.last_hidden_state[row, at]

    def _kl(self, number: int, gradients: bool = False) -> tuple[float, Tensor, Tensor]:
        """Of one pass the KL, and the hidden states with the KL's gradient by them, [N, H] each."""
        full, weights = self._full[number], self._weights[number]
        kind, hidden = self._hidden(self._groups[number])
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
        return total, hidden, slope


def toggled(logits: Tensor, total: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """How a router's weights change when one expert more is allowed, or one fewer: [E, N, E], for each expert a row.

    From its logits [N, E], the weights' sums `total` [N] and the allowed experts [E]. A token takes its `top_k`
    largest; weights are shares by softmax, of those taken where `total` is the same for all tokens, as with a router
    that normalises, else of all that are allowed.
    """
    now = _shares(logits, allowed, top_k)
    same = bool(total.max() - total.min() <= 1e-3 * total.max())
    found = []
    for expert in range(logits.shape[1]):
        other = allowed.clone()
        other[expert] = ~other[expert]
        after = _shares(logits, other, top_k)
        found.append(after / (after if same else now).sum(-1, keepdim=True) - now / now.sum(-1, keepdim=True))
    return torch.stack(found) * total[:, None]


def _shares(logits: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """The softmax over the allowed, of the largest `top_k` of them; 0 elsewhere."""
    shares = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    top, experts = shares.topk(min(top_k, int(allowed.sum())))
    return torch.zeros_like(shares).scatter(1, experts, top)


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
