"""A decoded token's whole layer in two C calls, one before the experts are known and one with them, where its attention
is of a kind that goes in one call (attention.py) and a kernel computes its experts.

Which decoder layers compute so (norm, attention, sum, norm, router by softmax, experts, sum) is found by trying them.
Whoever watches a part of the layer with a hook gets the layer's own forward. Knows modules and caches.
"""

from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_float, c_int32
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moedge.models.anatomy import Anatomy, MoeLayer, decoder_layer
from moedge.native.library import DecoderCall, DecoderLayer, HeadNorm, Library, Projection
from moedge.runtime.attention import FastAttention, Token, close, holds
from moedge.runtime.experts import ExpertSource
from moedge.runtime.growing import Growing
from moedge.runtime.kernels import GrowingWorkspace
from moedge.runtime.linear import plain_matrix
from moedge.runtime.norm import FastNorm

Forward = Callable[..., Any]


class _Routed(NamedTuple):
    """A layer's token on its way to the experts: with attention added [1, 1, H], normed [1, H], and the choice."""

    hidden: Tensor
    normed: Tensor
    experts: list[int]
    weights: list[float]


class FastDecoderLayer:
    """The forward of a decoder layer for one more token; everything else goes to the layer's own.

    Raises ValueError where the module's parts are not those of such a layer.
    """

    def __init__(self, module: nn.Module, moe: MoeLayer, source: ExpertSource, library: Library) -> None:
        parts = dict(module.named_modules())
        block, router, experts = (_inside(parts, path) for path in (moe.block, moe.router, moe.experts))
        norms = [child for child in module.children() if isinstance(child, FastNorm)]
        others = [child for child in module.children() if child is not block and child not in norms]
        if len(norms) != 2 or len(others) != 1 or list(module.parameters(recurse=False)):
            raise ValueError("its parts are not two norms, attention and experts")
        if set(block.children()) != {router, experts} or [*router.children(), *router.buffers()]:
            raise ValueError("beside its router it has other parts")
        attention = others[0].forward
        if not isinstance(attention, FastAttention):
            raise ValueError("its attention is of another kind")
        self.attention, self.router, self.experts = attention, router, experts
        self._module, self._source, self._library = module, source, library
        self._forward: Forward = module.forward
        self._norms, self._top_k = norms, moe.top_k
        self._watched = [part for part in parts.values() if part is not module]
        self._normalised = False
        self._tensors = [norm.weight for norm in norms] + list(router.parameters())
        self._describe()
        threads = attention.threads
        self._workspace = GrowingWorkspace(lambda tokens: library.route_workspace(self._described, tokens, threads))

    def _describe(self) -> None:
        """Tell C where everything lies."""
        named, dtype = dict(self.router.named_parameters()), self.attention.dtype
        if not named.keys() <= {"weight", "bias"} or {tensor.dtype for tensor in self._tensors} != {dtype}:
            raise ValueError("its router is no matrix of the model's dtype")
        weight, bias = named["weight"], named.get("bias")
        matrix = plain_matrix(weight)
        if matrix.columns != self._norms[0].weight.numel():
            raise ValueError("its router is no matrix over the hidden state")
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._attention = self.attention.described
        self._described = DecoderLayer(
            self._attention,
            *(HeadNorm(n.weight.data_ptr(), n.weight.numel(), n.epsilon, n.offset) for n in self._norms),
            Projection(matrix, weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(self._top_k, self._normalised),
        )

    def normalise(self, normalised: bool) -> None:
        """Whether the weights of a token's experts are scaled to a sum of 1."""
        self._normalised = normalised
        self._describe()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module: [1, 1, H] -> [1, 1, H]."""
        cache = self.attention.cache(args[0], kwargs) if len(args) == 1 else None
        if cache is None or self._is_watched():
            return self._forward(*args, **kwargs)
        routed = self.route(cache, args[0], kwargs["position_embeddings"])
        mixed = self._source.mix_token(routed.normed, routed.experts, routed.weights)
        return routed.hidden.add_(mixed)

    def _is_watched(self) -> bool:
        hooks = [part._forward_hooks or part._forward_pre_hooks for part in self._watched]
        return any(hooks) or self._source.observer is not None

    def route(self, cache: Growing, x: Tensor, rotation: tuple[Tensor, Tensor]) -> _Routed:
        """Append a token x [1, 1, H] to the cache, and choose its experts."""
        hidden, normed = torch.empty_like(x), x.new_empty(1, x.shape[-1], dtype=torch.float32)
        attention = self.attention.call(cache, x, rotation, hidden)
        moved = self._places != [tensor.data_ptr() for tensor in self._tensors]
        if moved or self._attention is not self.attention.described:
            self._describe()
        attention.workspace = self._workspace.address(attention.past + 1)
        experts, weights = (c_int32 * self._top_k)(), (c_float * self._top_k)()
        call = DecoderCall(attention, normed.data_ptr(), addressof(experts), addressof(weights))
        self._library.attend_and_route(self._described, call, self.attention.threads)
        chosen = sorted(zip(experts, weights, strict=True))
        return _Routed(hidden, normed, [e for e, _ in chosen], [w for _, w in chosen])


def _inside(parts: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The part whose path in the model ends so; ValueError where there is none."""
    for name, part in parts.items():
        if name and path.endswith(f".{name}"):
            return part
    raise ValueError(f"{path} is not in it")


def put_fast_layers(model: nn.Module, anatomy: Anatomy, sources: Sequence[ExpertSource], library: Library) -> int:
    """Give the decoder layers that FastDecoderLayer can stand in for its forward; how many."""
    count, modules = 0, dict(model.named_modules())
    for moe, source in zip(anatomy.layers, sources, strict=True):
        module = modules[decoder_layer(modules, moe)]
        if source.coded is None or source.coded.kernel is None:
            continue
        try:
            fast = FastDecoderLayer(module, moe, source, library)
        except ValueError:  # another kind of layer
            continue
        if _agrees(module, fast):
            module.forward = fast
            count += 1
    return count


def _agrees(module: nn.Module, fast: FastDecoderLayer) -> bool:
    """Whether both give the same around the experts, with one of the two forms that the weights may have."""
    for normalised in (False, True):
        fast.normalise(normalised)
        if holds(partial(_same, module, fast), fast.attention):
            return True
    return False


def _same(module: nn.Module, fast: FastDecoderLayer, token: Token) -> bool:
    """Whether both give the same, where a fixed vector stands for what the experts give."""
    given: list[Tensor] = []
    experts: Any = fast.experts
    answer = token.some(1, token.x.shape[-1])

    def stand_in(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        given.extend((hidden, index, weights))
        return answer

    experts.forward = stand_in
    try:
        expected = module(token.x, **token.arguments())
    finally:
        del experts.forward
    hidden, index, weights = given
    arguments = token.arguments()
    routed = fast.route(token.cache(1), token.x, arguments["position_embeddings"])
    same = len(set(routed.experts).intersection(index[0].tolist()))
    order = sorted(routed.weights, reverse=True)
    return (
        same >= fast._top_k - 1  # the last two may be nearly alike
        and close(routed.normed, hidden.float())
        and close(torch.tensor([order]).to(weights.dtype), weights.sort(descending=True).values)
        and close(routed.hidden + answer, expected)
    )
