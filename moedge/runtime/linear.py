"""Linear layers and embeddings whose matrices are int8 or int4 groups, and how a model gets them.

Few inputs are multiplied by the C kernels where the matrix lies; many, and everything under grad, by torch with rows
that were made dense. Knows modules, and a pack that reads tensors by name; no experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moedge.models.backbone import coded_modules, parts_of
from moedge.models.pack import PackedCheckpoint
from moedge.native import library as native
from moedge.native.library import Library, Rows
from moedge.native.threads import Speeds, best, calibrated
from moedge.runtime.formats import Extent, Format, dequantise, layout
from moedge.runtime.kernels import MANY, matrix_of, workspace_of
from moedge.runtime.norm import put_fast_norms

AT_ONCE = 1 << 20  # numbers that are made dense at once
WEIGHT = "weight"
_CODES = {torch.float32: native.F32, torch.bfloat16: native.BF16}


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
        count, code = x.shape[0], _CODES[x.dtype]
        out = x.new_empty(count, self.shape[0])
        workspace = workspace_of(library.linear_workspace(self._matrix, count))
        call = Rows(count, code, code, x.data_ptr(), out.data_ptr(), workspace.data_ptr())
        library.linear(self._matrix, self.memory.data_ptr(), call, threads)
        return out


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
            wide = rows.contiguous() if x.dtype in _CODES else rows.float()
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


class CodedBackbone:
    """The coded matrices of a pack for the modules of `model`, a whole one on the meta device.

    Reads them at once; `tensors` are the names of what need not be read again.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: PackedCheckpoint, dtype: torch.dtype) -> None:
        self._library = native.load()
        self._speeds = calibrated(self._library, torch.get_num_threads())
        self._matrices: dict[str, CodedMatrix] = {}  # module path -> its matrix
        modules = coded_modules(model, checkpoint.manifest.coded)
        for name, paths in modules.items():
            described = checkpoint.manifest.coded[name]
            matrix = CodedMatrix(Format.parse(described.format), described.shape, dtype)
            for part, tensor in parts_of(name).items():
                matrix.parts[part].copy_(checkpoint.read(tensor))
            self._matrices |= dict.fromkeys(paths, matrix)
        self.tensors = frozenset(modules)

    def put_into(self, model: PreTrainedModel) -> None:
        """Replace the modules of a meta model before its weights are loaded."""
        for path, matrix in self._matrices.items():
            parent, _, leaf = path.rpartition(".")
            old = model.get_submodule(path)
            if isinstance(old, nn.Linear):
                new: nn.Module = CodedLinear(matrix, old.bias, self._library, self._speeds)
            else:
                assert isinstance(old, nn.Embedding)
                new = CodedEmbedding(matrix, old.padding_idx)
            setattr(model.get_submodule(parent), leaf, new)
        tied = model.all_tied_weights_keys
        for key in [key for key in tied if key.rpartition(".")[0] in self._matrices]:
            del tied[key]

    def put_norms(self, model: PreTrainedModel) -> None:
        """Once the weights are loaded: as bit-equality is given up anyway, norms take the fast path too."""
        if self._library is not None:
            put_fast_norms(model, self._library)
