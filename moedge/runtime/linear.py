"""Linear layers and embeddings whose matrices are int8 or int4 groups.

Few inputs are multiplied by the C kernels where the matrix lies; many, and everything under grad, by torch with rows
that were made dense. Knows modules; no files, no experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moedge.native import library as native
from moedge.native.library import Library, Matrix, Rows
from moedge.native.threads import Speeds, best
from moedge.runtime.formats import Extent, Format, dequantise, layout
from moedge.runtime.kernels import MANY, matrix_of, workspace_of

FEW = 4  # inputs up to which a plain matrix is faster in C: they share one reading of it
AT_ONCE = 1 << 20  # numbers that are made dense at once
WEIGHT = "weight"
CODES = {torch.float32: native.F32, torch.bfloat16: native.BF16}


def plain_matrix(weight: Tensor) -> Matrix:
    """A matrix [O, I] as torch has it. Raises ValueError for what C does not read."""
    if weight.dim() != 2 or not weight.is_contiguous() or weight.dtype not in CODES:
        raise ValueError(f"a matrix of {weight.dtype}, shape {tuple(weight.shape)}, cannot be read where it lies")
    return Matrix(0, -1, -1, -1, -1, CODES[weight.dtype], 0, *weight.shape, 0, 0, 1)


def _times(matrix: Matrix, memory: Tensor, x: Tensor, library: Library, threads: int) -> Tensor:
    """x [N, I], contiguous, fp32 or bf16, by the matrix at the start of `memory` -> [N, O] of x's dtype."""
    count, code = x.shape[0], CODES[x.dtype]
    out = x.new_empty(count, matrix.rows)
    workspace = workspace_of(library.linear_workspace(matrix, count))
    call = Rows(count, code, code, x.data_ptr(), out.data_ptr(), workspace.data_ptr())
    library.linear(matrix, memory.data_ptr(), call, threads)
    return out


class CodedMatrix:
    """A matrix [O, I] in `format`, and the memory that its parts are to be read into (`parts`)."""

    def __init__(self, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.format = shape, dtype, format
        self.extent: Extent = layout({WEIGHT: (shape, dtype)}, format)
        padded = torch.empty(self.extent.nbytes + 63, dtype=torch.uint8)
        self.memory = padded[-padded.data_ptr() % 64 :][: self.extent.nbytes]
        self.parts = self.extent.views(self.memory)[WEIGHT]
        self.described = matrix_of(self.extent.tensors[WEIGHT])

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows in the model's dtype, [N, I]."""
        some = {name: part[index] for name, part in self.parts.items()}
        return dequantise(some, self.format, self.shape[1], self.dtype)

    def times(self, x: Tensor, library: Library, threads: int) -> Tensor:
        """x [N, I], contiguous, fp32 or bf16 -> [N, O] of x's dtype."""
        return _times(self.described, self.memory, x, library, threads)


class _Coded(nn.Module):
    """What both kinds of module are to code that looks at them."""

    def __init__(self, matrix: CodedMatrix) -> None:
        super().__init__()
        object.__setattr__(self, "matrix", matrix)
        self.matrix: CodedMatrix

    @property
    def weight(self) -> Tensor:
        """The dense matrix, made anew: for the few models that multiply by it themselves."""
        return self.matrix.rows(slice(None))


class CodedLinear(_Coded):
    """As nn.Linear. `library` None: with torch alone."""

    bias: nn.Parameter | None

    def __init__(self, matrix: CodedMatrix, bias: nn.Parameter | None, library: Library | None, speeds: Speeds) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", bias)
        self._library, self._threads = library, best(speeds, matrix.extent.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._library is not None and rows.shape[0] < MANY and not torch.is_grad_enabled():
            wide = rows.contiguous() if x.dtype in CODES else rows.float()
            out = self.matrix.times(wide, self._library, self._threads).to(x.dtype)
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


class FastLinear:
    """The forward of a plain nn.Linear for few inputs by the C kernels; everything else goes to the module's own."""

    def __init__(self, module: nn.Linear, library: Library, speeds: Speeds) -> None:
        self._module, self._library, self._forward = module, library, module.forward
        self._threads = best(speeds, module.weight.nbytes)
        self._matrix = plain_matrix(module.weight)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._module.weight
        few = 0 < x.numel() <= FEW * weight.shape[1] and x.is_contiguous()
        if not few or torch.is_grad_enabled() or x.dtype != weight.dtype or CODES.get(x.dtype) != self._matrix.code:
            return self._forward(x)
        rows = _times(self._matrix, weight, x.view(-1, weight.shape[1]), self._library, self._threads)
        out = rows.view(*x.shape[:-1], weight.shape[0])
        return out if self._module.bias is None else out.add_(self._module.bias)
