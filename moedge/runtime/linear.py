"""Linear layers and embeddings whose matrices are int8 or int4 groups: in the place of torch's own modules.

Few inputs are multiplied by the C kernels where the matrix lies; many, and everything under grad, by torch with rows
that were made dense. Knows modules and memory; no files.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moedge.native import library as native
from moedge.native.library import Library, Rows
from moedge.native.threads import Speeds, best
from moedge.runtime.formats import Extent, Format, dequantise, layout
from moedge.runtime.kernels import MANY, matrix_of

AT_ONCE = 1 << 20  # numbers that are made dense at once
WEIGHT = "weight"
_CODES = {torch.float32: native.F32, torch.bfloat16: native.BF16}
_WORKSPACE = threading.local()


class CodedMatrix:
    """A matrix [O, I] in `format`, and the memory that its parts are to be read into (`parts`)."""

    def __init__(self, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.format = shape, dtype, format
        self.extent: Extent = layout({WEIGHT: (shape, dtype)}, format)
        padded = torch.empty(self.extent.nbytes + 63, dtype=torch.uint8)
        self.memory = padded[-padded.data_ptr() % 64 :][: self.extent.nbytes]
        self.parts = self.extent.views(self.memory)[WEIGHT]
        self._matrix = matrix_of(self.extent.tensors[WEIGHT])

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows in the model's dtype, [N, I]."""
        some = {name: part[index] for name, part in self.parts.items()}
        return dequantise(some, self.format, self.shape[1], self.dtype)

    def times(self, x: Tensor, library: Library, threads: int) -> Tensor:
        """x [N, I], contiguous, fp32 or bf16 -> [N, O] of x's dtype."""
        out = x.new_empty(len(x), self.shape[0])
        workspace = _workspace(library.linear_workspace(self._matrix, len(x)))
        code = _CODES[x.dtype]
        call = Rows(len(x), code, code, x.data_ptr(), out.data_ptr(), workspace.data_ptr())
        library.linear(self._matrix, self.memory.data_ptr(), call, threads)
        return out


def _workspace(nbytes: int) -> Tensor:
    """Memory of this thread that lasts from call to call."""
    memory: Tensor | None = getattr(_WORKSPACE, "bytes", None)
    if memory is None or len(memory) < nbytes:
        memory = _WORKSPACE.bytes = torch.empty(nbytes, dtype=torch.uint8)
    return memory


class _Coded(nn.Module):
    """What both kinds of module are to code that looks at them."""

    def __init__(self, matrix: CodedMatrix) -> None:
        super().__init__()
        object.__setattr__(self, "matrix", matrix)
        self.matrix: CodedMatrix

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the dense matrix; it has no numbers."""
        return torch.empty(self.matrix.shape, dtype=self.matrix.dtype, device="meta")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(fn, recurse)


class CodedLinear(_Coded):
    """As nn.Linear. `library` None: with torch alone."""

    def __init__(self, matrix: CodedMatrix, bias: nn.Parameter | None, library: Library | None, speeds: Speeds) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", bias)
        self._library, self._threads = library, best(speeds, matrix.extent.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._library is not None and len(rows) < MANY and x.dtype in _CODES and not torch.is_grad_enabled():
            out = self.matrix.times(rows.contiguous(), self._library, self._threads)
            if self.bias is not None:
                out += self.bias
        elif torch.is_grad_enabled():  # autograd keeps the dense matrix until backward
            out = functional.linear(rows, self.matrix.rows(slice(None)).to(x.dtype), self.bias)
        else:
            step = max(1, AT_ONCE // self.in_features)
            pieces = [slice(at, at + step) for at in range(0, self.out_features, step)]
            out = torch.cat([rows @ self.matrix.rows(piece).to(x.dtype).T for piece in pieces], 1)
            if self.bias is not None:
                out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


class CodedEmbedding(_Coded):
    """As nn.Embedding."""

    def __init__(self, matrix: CodedMatrix, padding_idx: int | None) -> None:
        super().__init__(matrix)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)
