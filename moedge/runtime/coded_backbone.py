"""How a model gets the int8 and int4 matrices of a pack's backbone.

Knows modules, and a pack that reads tensors by name; no experts.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from moedge.models.backbone import coded_modules, parts_of
from moedge.models.pack import PackedCheckpoint
from moedge.native import library as native
from moedge.native.threads import calibrated
from moedge.runtime.formats import Format
from moedge.runtime.linear import CodedEmbedding, CodedLinear, CodedMatrix


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
