"""The backbone's matrices in int8 or int4 groups, as `moedge pack --backbone` stores them, and dense again on loading.

Which tensors they are: weights of the model's own linear layers and embeddings; no norm, no router, no gate, no bias.
A matrix NAME [O, I] lies in the file as three tensors, whose rows are its rows, so that one row can be read alone:

    NAME.values   [O, I] int8, or [O, I / 2] uint8: of each 32, byte j has number j in its low, j + 16 in its high half
    NAME.scales   [O, G] fp16
    NAME.factors  [O] fp32
    W[o, i] = factors[o] * scales[o, i // 32] * (values[o, i] - zero)        zero is 0 for int8, 8 for int4

That is int8-g32 and int4-g32 of runtime/formats.py, I padded to a multiple of 32. Knows names and bytes; no products.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from moedge.models.anatomy import Anatomy
from moedge.models.checkpoint import DTYPES, Checkpoint, TensorInfo
from moedge.models.expert_map import FLOATS, target_names

PARTS = ("values", "scales", "factors")
AT_ONCE = 1 << 19  # numbers that are made dense at once
_GROUP = 32


@dataclass(frozen=True)
class CodedMatrix:
    """What the pack's header says of one matrix: its number format, and the dtype and shape of the dense one."""

    format: str  # int8-g32 or int4-g32
    dtype: torch.dtype
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.format not in ("int8-g32", "int4-g32"):
            raise ValueError(f"number format {self.format!r}: a backbone has int8-g32 or int4-g32")

    @property
    def as_list(self) -> list[Any]:
        return [self.format, next(name for name, dtype in DTYPES.items() if dtype == self.dtype), self.shape]

    @classmethod
    def from_list(cls, given: Sequence[Any]) -> "CodedMatrix":
        return cls(given[0], DTYPES[given[1]], (given[2][0], given[2][1]))

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Some rows of the matrix from the same rows of its parts: exact in fp32, then rounded to `dtype`."""
        values = parts["values"]
        if self.format == "int4-g32":
            halves = values.view(len(values), -1, _GROUP // 2)
            values = torch.stack((halves & 15, halves >> 4), 2).to(torch.int8) - 8
        scales = parts["scales"].float() * parts["factors"][:, None]  # [n, G]
        dense = values.view(len(values), -1, _GROUP).float() * scales[:, :, None]
        return dense.view(len(values), -1)[:, : self.shape[1]].to(self.dtype)


def parts_of(name: str) -> dict[str, str]:
    """Part -> the name of its tensor."""
    return {part: f"{name}.{part}" for part in PARTS}


def dense_tensors(stored: Mapping[str, TensorInfo], coded: Mapping[str, CodedMatrix]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint with each matrix in the place of its parts."""
    hidden = {part for name in coded for part in parts_of(name).values()}
    made = {
        name: TensorInfo(name, stored[f"{name}.values"].file, m.dtype, m.shape, 0, prod(m.shape) * m.dtype.itemsize)
        for name, m in coded.items()
    }
    return {name: info for name, info in stored.items() if name not in hidden} | made


def read_matrix(checkpoint: Checkpoint, name: str, matrix: CodedMatrix) -> tuple[Tensor, dict[str, str]]:
    """The dense matrix, and the CRC-32 of the tensor of each of its parts; reads some rows at a time."""
    rows, columns = matrix.shape
    infos = {part: checkpoint.stored[tensor] for part, tensor in parts_of(name).items()}
    dense = torch.empty(rows, columns, dtype=matrix.dtype)
    crcs = dict.fromkeys(PARTS, 0)
    step = max(1, AT_ONCE // columns)
    for begin in range(0, rows, step):
        end, parts = min(begin + step, rows), {}
        for part, info in infos.items():
            each = info.nbytes // rows
            shard = checkpoint.shard(info.file)
            raw = shard.pread(info.offset + begin * each, (end - begin) * each, info.name, shift=0)
            crcs[part] = zlib.crc32(raw.numpy().data, crcs[part])
            parts[part] = raw.view(info.dtype).view(end - begin, *info.shape[1:])
        dense[begin:end] = matrix.dense(parts)
    return dense, {infos[part].name: f"{crc:08x}" for part, crc in crcs.items()}


def coded_modules(model: PreTrainedModel, coded: Iterable[str]) -> dict[str, list[str]]:
    """The coded matrices that a model's modules can hold as they are, each with the paths of these modules.

    `model`: a whole one on the meta device. Several modules where weights are tied. Only torch's own Linear and
    Embedding: a matrix that one of another class has too (a scaled embedding) is made dense on loading.
    """
    owners: dict[int, list[str]] = {}
    others: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if type(module) in (nn.Linear, nn.Embedding):
            owners.setdefault(id(weight), []).append(path)
        else:
            others.add(id(weight))
    target_of, found = target_names(model), {}
    for name in coded:
        module = model.get_submodule(target_of(name)[0].rpartition(".")[0])
        paths = owners.get(id(module.weight))
        if paths and id(module.weight) not in others:
            found[name] = paths
    return found


def matrices(model: PreTrainedModel, anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Those of a checkpoint's tensors that are, as they are, the weight of a linear layer or an embedding.

    Where an expert is a module of its own, the weights of its linear layers as well.
    """
    routers = tuple(layer.router for layer in anatomy.layers)
    target_of, state = target_names(model), model.state_dict()
    found = set()
    for info in (tensors[name] for name in sorted(tensors, key=dot_natural_key)):
        target, pattern = target_of(info.name)
        path, _, leaf = target.rpartition(".")
        if pattern is not None or leaf != "weight" or target not in state or info.dtype not in FLOATS:
            continue
        module: Any = model.get_submodule(path)
        routes = any(path == router or path.startswith(f"{router}.") for router in routers)
        if not isinstance(module, (nn.Linear, nn.Embedding)) or routes or info.shape[0] == 1:  # one row is a gate
            continue
        if tuple(module.weight.shape) == info.shape:
            found.add(info.name)
    return found
