"""An embedding whose rows stay on disk: a token needs one of them, and a large vocabulary's take hundreds of megabytes.

Which embedding that may be is seen on the meta model: one of torch's own, whose matrix nothing else uses and the
checkpoint has as it is. Rows are the same bits. Knows modules and checkpoints; no memory limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedge.models.backbone import coded_modules
from moedge.models.checkpoint import Checkpoint
from moedge.models.expert_map import FLOATS, target_names
from moedge.models.pack import PackedCheckpoint
from moedge.models.quantised import QuantisedCheckpoint

LEAST = 4 << 20  # bytes of a matrix from which reading rows is worth its time


@dataclass(frozen=True)
class DiskRows:
    """The matrix of the module at `path`: tensor `tensor` of the checkpoint, `nbytes` as the model would hold it."""

    path: str
    tensor: str
    nbytes: int


def rows_on_disk(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> DiskRows | None:
    """The input embedding of `model`, a whole one on the meta device, if its rows can be read alone."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    weight, nbytes = embedding.weight, embedding.weight.numel() * dtype.itemsize
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is embedding]
    users = [module for module in model.modules() if module._parameters.get("weight") is weight]
    if nbytes < LEAST or len(paths) != 1 or len(users) != 1 or isinstance(checkpoint, QuantisedCheckpoint):
        return None
    if isinstance(checkpoint, PackedCheckpoint) and any(
        paths[0] in group for group in coded_modules(model, checkpoint.manifest.coded).values()
    ):
        return None
    target_of, shape = target_names(model), tuple(weight.shape)
    alike = [name for name, info in checkpoint.tensors.items() if info.shape == shape and info.dtype in FLOATS]
    sources = [name for name in alike if target_of(name) == (f"{paths[0]}.weight", None)]
    if len(sources) != 1 or sources[0] in checkpoint.rows:
        return None
    return DiskRows(paths[0], sources[0], nbytes)


class DiskEmbedding(nn.Module):
    """As nn.Embedding [V, D], reading the rows that it is asked for. Raises CheckpointError when it cannot."""

    def __init__(self, checkpoint: Checkpoint, tensor: str, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = checkpoint.tensors[tensor].shape
        self.padding_idx = padding_idx
        self._checkpoint, self._tensor, self._dtype = checkpoint, tensor, dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows, place = torch.unique(ids, return_inverse=True)
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.num_embeddings):
            raise IndexError(f"token {rows[0] if rows[0] < 0 else rows[-1]} is outside 0 to {self.num_embeddings - 1}")
        return self._checkpoint.read_each(self._tensor, rows.tolist()).to(self._dtype)[place]

    @property
    def weight(self) -> Tensor:
        """The whole matrix, read anew: for the few models that use it themselves."""
        return self._checkpoint.read(self._tensor).to(self._dtype)


def put_on_disk(model: PreTrainedModel, checkpoint: Checkpoint, rows: DiskRows, dtype: torch.dtype) -> None:
    """Replace the embedding of a meta model before its weights are loaded."""
    old = model.get_submodule(rows.path)
    assert isinstance(old, nn.Embedding)
    model.set_submodule(rows.path, DiskEmbedding(checkpoint, rows.tensor, dtype, old.padding_idx))
