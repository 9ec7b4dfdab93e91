"""A decoded token's attention in one C call: projections, norms, rotation, cache and softmax, instead of some thirty
operations of torch.

Which modules compute attention so is found by trying them, not by their names. Results differ from theirs in the last
bits, as sums have another order. Knows modules and caches; no experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from moedge.native.library import Attention, AttentionCall, HeadNorm, Library, Matrix, Projection
from moedge.native.threads import Speeds, best
from moedge.runtime.growing import Growing, let_grow
from moedge.runtime.kernels import GrowingWorkspace
from moedge.runtime.linear import CODES, CodedLinear, plain_matrix
from moedge.runtime.norm import FastNorm

Forward = Callable[..., Any]
_PROJECTIONS, _NORMS, _SINKS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm"), "sinks"
_TRIED = 5  # tokens in the cache with which a module is tried
_TRIALS = ((1.0, _TRIED), (30.0, 10**6))  # size and position of the tokens: the second may pass a limit that it has


class FastAttention:
    """The forward of an attention module for one more token; everything else goes to the module's own.

    `halved`: cosines and sines come once for both halves of a head. Raises ValueError where the module's parts are not
    those of such an attention.
    """

    def __init__(self, module: nn.Module, library: Library, speeds: Speeds, halved: bool = False) -> None:
        children = dict(module.named_children())
        projections = [children.pop(name, None) for name in _PROJECTIONS]
        norms = [children.pop(name, None) for name in _NORMS]
        own = {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        if children or own - {_SINKS} or not all(type(p) in (CodedLinear, nn.Linear) for p in projections):
            raise ValueError("its parts are not four matrices and two norms")
        if not all(norm is None or isinstance(norm, FastNorm) for norm in norms):
            raise ValueError("its norms are not root mean squares")
        self._module, self._library = module, library
        self._forward: Forward = module.forward
        self._projections: list[CodedLinear | nn.Linear] = projections  # type: ignore[assignment]
        self._norms: list[FastNorm | None] = norms  # type: ignore[assignment]
        self._layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._shape()
        self.angles = self.rotated // 2 if halved else self.rotated
        self._describe()
        self.threads = best(speeds, sum(_nbytes(p) for p in self._projections))
        self._workspace = GrowingWorkspace(lambda t: library.attention_workspace(self.described, t, self.threads))

    def _shape(self) -> None:
        q, k, v, o = self._projections
        size = int(self._module.head_dim)  # type: ignore[arg-type]
        heads, kv_heads = q.out_features // size, k.out_features // size
        if size % 8 or q.out_features % size or not kv_heads or heads % kv_heads or v.out_features != k.out_features:
            raise ValueError(f"{q.out_features} queries and {k.out_features} keys are no heads of {size}")
        hidden = q.in_features
        if {k.in_features, v.in_features, o.out_features} != {hidden} or o.in_features != q.out_features:
            raise ValueError("its matrices do not belong together")
        for norm, rows in zip(self._norms, (q.out_features, k.out_features), strict=True):
            if norm is not None and norm.weight.numel() not in (size, rows):
                raise ValueError(f"a norm of {norm.weight.numel()} is neither of a head nor of all")
        self._heads = heads, kv_heads, size
        self.rotated = int(size * _rotated_part(self._module))  # numbers of a head

    def _dtype(self) -> torch.dtype:
        """Of hidden states."""
        first = self._projections[0]
        return first.matrix.dtype if isinstance(first, CodedLinear) else first.weight.dtype

    def _describe(self) -> None:
        """Tell C where everything lies."""
        heads, kv_heads, size = self._heads
        self._tensors: list[Tensor] = [p.bias for p in self._projections if p.bias is not None]
        self._tensors += [p.weight for p in self._projections if isinstance(p, nn.Linear)]
        self._tensors += [norm.weight for norm in self._norms if norm is not None]
        sinks = self._module._parameters.get(_SINKS)
        if sinks is not None:
            self._tensors.append(sinks)
            if sinks.shape != self._heads[:1]:
                raise ValueError(f"its sinks are {tuple(sinks.shape)}, not one of each head")
        q, *others = [_projection(p) for p in self._projections]
        self.dtype = self._dtype()
        if {tensor.dtype for tensor in self._tensors} - {self.dtype} or self.dtype not in CODES:
            raise ValueError("it mixes dtypes")
        if any(_kind(p.matrix) != _kind(q.matrix) for p in others[:2]):
            raise ValueError("queries, keys and values are stored in different formats")
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        scale = float(self._module.scaling)  # type: ignore[arg-type]
        self.described = Attention(
            *(q, *others),
            *(_head_norm(norm, size) for norm in self._norms),
            None if sinks is None else sinks.data_ptr(),
            *(heads, kv_heads, size, self.rotated, self.angles, CODES[self.dtype], scale),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module: (output [1, 1, H], no weights)."""
        cache = None if args else self.cache(kwargs.get("hidden_states"), kwargs)
        if cache is None:
            return self._forward(*args, **kwargs)
        x: Tensor = kwargs["hidden_states"]
        out = torch.empty_like(x)
        call = self.call(cache, x, kwargs["position_embeddings"], out)
        call.workspace = self._workspace.address(call.past + 1)
        self._library.attend(self.described, call, self.threads)
        return out, None

    def cache(self, x: Any, kwargs: dict[str, Any]) -> Growing | None:
        """The cache to which the token `x` is to be appended, if that is all there is to do."""
        rotation, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
        if torch.is_grad_enabled() or not isinstance(cache, DynamicCache) or _masks(kwargs.get("attention_mask")):
            return None
        if not isinstance(x, Tensor) or x.shape[:-1] != (1, 1) or x.dtype != self.dtype or not x.is_contiguous():
            return None
        if len(cache.layers) <= self._layer or not isinstance(rotation, tuple):
            return None
        for part in rotation:
            if part.dtype != x.dtype or part.numel() != self.angles or not part.is_contiguous():
                return None
        layer, parts = cache.layers[self._layer], self._module._modules
        if [parts[name] for name in _PROJECTIONS] != self._projections:  # PEFT put its own around one
            return None
        if not isinstance(layer, Growing) or layer.keys is None or len(layer.keys) != 1:
            return None
        if layer.dtype != x.dtype or getattr(layer, "record_past", False):
            return None
        return layer

    def call(self, cache: Growing, x: Tensor, rotation: tuple[Tensor, Tensor], out: Tensor) -> AttentionCall:
        """Make room for one token, x [1, 1, H] with cosines and sines [1, 1, angles]; what C is to do, but for its
        workspace."""
        if self._places != [tensor.data_ptr() for tensor in self._tensors]:  # the model was moved
            self._describe()
        keys, values = cache.extend(1)
        assert keys.stride() == values.stride(), "keys and values grow alike"
        cos, sin = rotation
        return AttentionCall(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(keys.stride(1), keys.shape[2] - 1, out.data_ptr()),
        )


def _masks(mask: Any) -> bool:
    """Whether it hides anything of what is in the cache."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.is_floating_point() and not mask.any())


def _rotated_part(module: nn.Module) -> float:
    """Of each head, as the model's config says it in one of two places."""
    config = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return float(part or 1)


def _projection(linear: CodedLinear | nn.Linear) -> Projection:
    bias = None if linear.bias is None else linear.bias.data_ptr()
    if isinstance(linear, CodedLinear):
        return Projection(linear.matrix.described, linear.matrix.memory.data_ptr(), bias)
    return Projection(plain_matrix(linear.weight), linear.weight.data_ptr(), bias)


def _kind(matrix: Matrix) -> tuple[int, bool]:
    """What a product asks of its input."""
    return matrix.code, matrix.zeros >= 0


def _nbytes(linear: CodedLinear | nn.Linear) -> int:
    return linear.matrix.extent.nbytes if isinstance(linear, CodedLinear) else linear.weight.nbytes


def _head_norm(norm: FastNorm | None, size: int) -> HeadNorm:
    if norm is None:
        return HeadNorm()
    return HeadNorm(norm.weight.data_ptr(), norm.weight.numel(), norm.epsilon, norm.offset)


def put_fast_attention(model: nn.Module, library: Library, speeds: Speeds) -> int:
    """Give the attention modules of a loaded model that FastAttention can stand in for its forward; how many."""
    count = 0
    for module in model.modules():
        if not set(_PROJECTIONS) <= module._modules.keys():
            continue
        for halved in (False, True):
            try:
                fast = FastAttention(module, library, speeds, halved)
            except (ValueError, AttributeError, TypeError):  # another kind of attention
                break
            if holds(partial(_same, module, fast), fast):
                module.forward = fast
                count += 1
                break
    return count


@torch.inference_mode()
def holds(same: Callable[["Token"], bool], fast: FastAttention) -> bool:
    """Whether `same` is true of a small token, and of a large one that finds limits on what a module computes."""
    try:
        return all(same(Token(fast, size, position)) for size, position in _TRIALS)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):  # it is called otherwise
        return False


def _same(module: nn.Module, fast: FastAttention, token: "Token") -> bool:
    """Whether both give the same, and leave the same in their caches."""
    expected, theirs = module(hidden_states=token.x, **token.arguments())[0], token.cache(0)
    found, own = fast(hidden_states=token.x, **token.arguments())[0], token.cache(1)
    return close(found, expected) and close(own.keys, theirs.keys) and close(own.values, theirs.values)


class Token:
    """A token to try a module with: `x` [1, 1, H] and as often as it is asked for the arguments beside it.

    `arguments` have a cache of some tokens, each time a new one with the same content.
    """

    def __init__(self, fast: FastAttention, size: float, position: int) -> None:
        self._random, self._dtype, self._layer = torch.Generator().manual_seed(0), fast.dtype, fast._layer
        _, kv_heads, head_size = fast._heads
        self.x = size * self.some(1, 1, fast._projections[0].in_features)
        self._rotation = self.some(1, 1, fast.angles), self.some(1, 1, fast.angles)
        self._held = self.some(1, kv_heads, _TRIED, head_size), self.some(1, kv_heads, _TRIED, head_size)
        self._position = position
        self._caches: list[DynamicCache] = []

    def some(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self._dtype)

    def arguments(self) -> dict[str, Any]:
        cache = DynamicCache()
        cache.update(*self._held, self._layer)
        let_grow(cache)
        self._caches.append(cache)
        where = {"position_embeddings": self._rotation, "position_ids": torch.tensor([[self._position]])}
        return where | {"attention_mask": None, "past_key_values": cache, "use_cache": True}

    def cache(self, use: int) -> Any:
        """The cache that went with the `use`-th arguments."""
        return self._caches[use].layers[self._layer]


def close(a: Any, b: Any) -> bool:
    """To what roundings on the way may change, in proportion to the largest number."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    most = 2**-5 if a.dtype == torch.bfloat16 else 3e-3
    return bool((a - b).abs().max() <= most * b.abs().max())
