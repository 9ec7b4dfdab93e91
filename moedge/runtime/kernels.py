"""One layer's chosen experts on their tokens, straight from their extents: with the C kernels where they are and tokens
are few, otherwise dequantised and multiplied by torch.

Computes in fp32 whatever the model's dtype. Outputs are added in the order of the experts. An expert's rows take the
path that their number says, so equal inputs give equal results, whatever the threads. Knows extents and tokens; no
store, no model.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_float, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moedge.native import library as native
from moedge.native.library import Call, Expert, Library, Matrix
from moedge.runtime.formats import FLOATS, Extent, Parts, Stored, dequantise

MANY = 96  # rows of one expert from which dequantising it and multiplying with torch is about as fast
SCRATCH = 4 << 20  # bytes of weights dequantised at once
_Ends = tuple[int | None, int | None]
_WORKSPACE = threading.local()
_CODES = {"int8": native.INT8, "int4": native.INT4, "mxfp4": native.MXFP4}

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True)
class Recipe:
    """How an expert computes: down(act(gate) * up), or down(act(up)).

    `activation`: a key of ACTIVATIONS, or clamped_swiglu, gpt-oss's own gate with its alpha and limit. Tensors of the
    extent are called gate_up_proj (gate rows first, or alternating with up rows) or up_proj, down_proj, and these
    names with _bias.
    """

    gated: bool
    activation: str
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def up(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def act(self, x: Tensor) -> Tensor:
        """The middle of an expert from its first product, [N, 2F] or [N, F] -> [N, F]."""
        if not self.gated:
            return ACTIVATIONS[self.activation](x)
        gate, up = (x[:, ::2], x[:, 1::2]) if self.interleaved else x.chunk(2, 1)
        if self.activation != "clamped_swiglu":
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def recognise(module: Any) -> Recipe | None:
    """The recipe of a transformers experts module, found by trying its activation; None for one that is not known."""
    if module.has_post_expert_norm:
        return None
    gate, up = torch.linspace(-12, 12, 97), torch.linspace(9, -9, 97)
    interleaved = module.has_gate and not module.is_concatenated
    if module.has_gate:
        x = torch.stack((gate, up), 1).view(1, -1) if interleaved else torch.cat((gate, up))[None]
        found = module._apply_gate(x)
    else:
        x = gate[None]
        found = module.act_fn(x)
    recipes = [Recipe(module.has_gate, name, interleaved) for name in ACTIVATIONS]
    if module.has_gate and hasattr(module, "alpha") and hasattr(module, "limit"):
        recipes.append(Recipe(True, "clamped_swiglu", interleaved, float(module.alpha), float(module.limit)))
    fits = (recipe for recipe in recipes if torch.allclose(found, recipe.act(x), rtol=1e-5, atol=1e-6))
    return next(fits, None)


@dataclass(frozen=True)
class Routing:
    """Which rows each expert takes: expert e's are starts[e] to starts[e + 1] of `tokens` and `weights`."""

    starts: list[int]
    tokens: Tensor  # [R], int32
    weights: Tensor  # [R], fp32


def route_token(weights: Sequence[float]) -> Routing:
    """The routing of one token through as many experts as `weights`; without a tensor operation for each."""
    count = len(weights)
    return Routing([*range(count + 1)], _one_token(count), torch.tensor(weights, dtype=torch.float32))


@cache
def _one_token(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@cache
def _each_once(count: int) -> Any:
    """As starts of a Routing: each expert has one row."""
    return (c_int32 * (count + 1))(*range(count + 1))


def route(index: Tensor, weights: Tensor, experts: Sequence[int]) -> Routing:
    """The routing of the chosen `experts` from a router's output, [T, k] and [T, k]."""
    rows = [torch.where((index == expert).T) for expert in experts]  # (position, token), in eager's order
    starts = [0]
    for _, token in rows:
        starts.append(starts[-1] + len(token))
    token_of = torch.cat([token for _, token in rows])
    of_row = torch.cat([weights[token, position] for position, token in rows])
    return Routing(starts, token_of.int(), of_row.float().contiguous())


class LayerKernel:
    """Computes experts of one kind. `library` None: with torch alone."""

    def __init__(self, extent: Extent, recipe: Recipe, library: Library | None, threads: int = 1) -> None:
        self._extent, self._recipe, self._threads = extent, recipe, threads
        self._width = extent.tensors["down_proj"].shape[1]
        self._hidden = extent.tensors["down_proj"].shape[0]
        self._library = library if _is_known(extent) else None
        self._expert = _describe(extent, recipe) if self._library else None
        self._workspaces: dict[tuple[int, int], int] = {}  # bytes for so many tokens and routed rows

    def mix(self, hidden: Tensor, extents: Sequence[Tensor], routing: Routing) -> Tensor:
        """Weighted outputs of the experts added up, [T, H] of any dtype -> [T, H] in fp32.

        `extents`: the memory of each expert, uint8, in the order of `routing`.
        """
        x = hidden.float().contiguous()
        out = torch.zeros_like(x)
        if self._library and self._most_rows(routing) < MANY:
            self._call(x, extents, routing, out=out)
            return out
        terms = self.terms(hidden, extents, routing)
        for start, end in pairwise(routing.starts):
            out.index_add_(0, routing.tokens[start:end], terms[start:end])
        return out

    def mix_token(self, hidden: Tensor, extents: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The same for one token, [1, H] -> [1, H], and the weight of each expert."""
        if self._library is None:
            return self.mix(hidden, extents, route_token(weights))
        x, count = hidden.float().contiguous(), len(extents)
        out = torch.zeros_like(x)
        tokens, factors = _one_token(count), (c_float * count)(*weights)
        rows = _each_once(count), tokens.data_ptr(), addressof(factors)
        self._run(x, extents, count, rows, (out.data_ptr(), None))
        return out

    def terms(self, hidden: Tensor, extents: Sequence[Tensor], routing: Routing) -> Tensor:
        """Each routed row's weighted output, [R, H] in fp32: for who has not all experts at once. mix adds the same."""
        x = hidden.float().contiguous()
        terms = x.new_empty(len(routing.tokens), self._hidden)
        if self._library and self._most_rows(routing) < MANY:
            self._call(x, extents, routing, terms=terms)
            return terms
        for memory, (start, end) in zip(extents, pairwise(routing.starts), strict=True):
            tokens, weights = routing.tokens[start:end], routing.weights[start:end]
            if self._library and end - start < MANY:
                self._call(x, [memory], Routing([0, end - start], tokens, weights), terms=terms[start:end])
            elif end > start:
                terms[start:end] = self._with_torch(x[tokens], memory) * weights[:, None]
        return terms

    @staticmethod
    def _most_rows(routing: Routing) -> int:
        starts = routing.starts
        return max([end - start for start, end in pairwise(starts)], default=0)

    def _call(
        self,
        x: Tensor,
        extents: Sequence[Tensor],
        routing: Routing,
        out: Tensor | None = None,
        terms: Tensor | None = None,
    ) -> None:
        assert len(routing.starts) == len(extents) + 1
        starts = (c_int32 * len(routing.starts))(*routing.starts)
        ends = None if out is None else out.data_ptr(), None if terms is None else terms.data_ptr()
        rows = starts, routing.tokens.data_ptr(), routing.weights.data_ptr()
        self._run(x, extents, routing.starts[-1], rows, ends)

    def _run(self, x: Tensor, extents: Sequence[Tensor], routed: int, rows: tuple[Any, int, int], ends: _Ends) -> None:
        """`rows`: starts, and addresses of tokens and weights; `ends`: where the sum, or the terms, are to go."""
        assert self._library is not None
        assert self._expert is not None
        assert x.shape[1] == self._hidden, f"hidden states are {x.shape[1]} wide, experts {self._hidden}"
        assert min([memory.numel() for memory in extents]) >= self._extent.nbytes, "an extent is too short"
        size = x.shape[0], routed
        if size not in self._workspaces:
            self._workspaces[size] = self._library.workspace(self._expert, *size)
        workspace = workspace_of(self._workspaces[size])
        addresses = (c_void_p * len(extents))(*[memory.data_ptr() for memory in extents])
        call = Call(len(extents), x.shape[0], addresses, *rows, x.data_ptr(), *ends, workspace.data_ptr())
        self._library.layer(self._expert, call, self._threads)

    def _with_torch(self, x: Tensor, memory: Tensor) -> Tensor:
        """One expert on its rows, [N, H] -> [N, H], as experts.feed_forward does it."""
        views = self._extent.views(memory)
        middle = self._recipe.act(self._product(x, self._recipe.up, memory, views))
        return self._product(middle, "down_proj", memory, views)

    def _product(self, x: Tensor, name: str, memory: Tensor, views: Mapping[str, Parts]) -> Tensor:
        stored = self._extent.tensors[name]
        rows, columns = stored.shape
        out = x.new_empty(len(x), rows)
        step = max(1, SCRATCH // (4 * columns))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            w = self._rows(stored, memory, views[name], begin, end)
            out[:, begin:end] = x @ w.T
        bias = views.get(f"{name}_bias")
        return out if bias is None else out + bias["values"].float()

    def _rows(self, stored: Stored, memory: Tensor, parts: Parts, begin: int, end: int) -> Tensor:
        """Rows of a matrix in fp32, [end - begin, columns]."""
        columns = stored.shape[1]
        if self._library is None or stored.format.code == "plain":
            some = {name: part[begin:end] for name, part in parts.items()}
            return dequantise(some, stored.format, columns)
        w = torch.empty(end - begin, columns)
        whole = _matrix(stored, None, stored.shape[0])
        self._library.dequantise(whole, memory.data_ptr(), (begin, end), False, w.data_ptr())
        return w


def _is_known(extent: Extent) -> bool:
    return all(s.format.code in _CODES or s.dtype in FLOATS for s in extent.tensors.values())


def workspace_of(nbytes: int) -> Tensor:
    """Memory of this thread that lasts from call to call, whatever it calls."""
    memory: Tensor | None = getattr(_WORKSPACE, "bytes", None)
    if memory is None or memory.numel() < nbytes:
        memory = _WORKSPACE.bytes = torch.empty(nbytes, dtype=torch.uint8)
    return memory


class GrowingWorkspace:
    """Memory of this thread for calls over ever more tokens; what so many need, `nbytes` is rarely asked."""

    def __init__(self, nbytes: Callable[[int], int]) -> None:
        self._nbytes, self._tokens, self._size = nbytes, 0, 0

    def address(self, tokens: int) -> int:
        if tokens > self._tokens:
            self._tokens = 2 * tokens
            self._size = self._nbytes(self._tokens)
        return workspace_of(self._size).data_ptr()


def matrix_of(stored: Stored) -> Matrix:
    """The description of a whole matrix that begins its memory."""
    return _matrix(stored, None, stored.shape[0])


def _matrix(stored: Stored, bias: Stored | None, rows: int, first: int = 0, step: int = 1) -> Matrix:
    offsets = [stored.planes[part].offset if part in stored.planes else -1 for part in native.PARTS]
    code = _CODES.get(stored.format.code)
    return Matrix(
        *offsets,
        -1 if bias is None else bias.planes["values"].offset,
        FLOATS[stored.dtype] if code is None else code,
        0 if bias is None else FLOATS[bias.dtype],
        *(rows, stored.shape[1], stored.format.group, first, step),
    )


def _describe(extent: Extent, recipe: Recipe) -> Expert:
    up, down = extent.tensors[recipe.up], extent.tensors["down_proj"]
    up_bias, down_bias = (extent.tensors.get(f"{name}_bias") for name in (recipe.up, "down_proj"))
    width = down.shape[1]
    if recipe.gated and recipe.interleaved:
        gate, above = _matrix(up, up_bias, width, 0, 2), _matrix(up, up_bias, width, 1, 2)
    elif recipe.gated:
        gate, above = _matrix(up, up_bias, width), _matrix(up, up_bias, width, first=width)
    else:
        gate, above = Matrix(), _matrix(up, up_bias, width)
    if up.shape[0] != (2 if recipe.gated else 1) * width or up.shape[1] != down.shape[0]:
        raise ValueError(f"{recipe.up} {up.shape} and down_proj {down.shape} do not belong together")
    activation = native.ACTIVATIONS[recipe.activation]
    return Expert(gate, above, _matrix(down, down_bias, down.shape[0]), activation, recipe.alpha, recipe.limit)
