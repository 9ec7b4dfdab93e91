"""A quantised checkpoint as if it were dense: every quantised tensor under the name and shape of the dense one.

Who indexes it (ExpertMap, moedge pack) sees ordinary tensors; their bytes are made from the stored ones when they are
read, matrix by matrix and rows by rows. The formats are in scheme_*.py. Knows names and rows; what an expert is, and
what is kept in integers, is elsewhere.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedge.errors import CheckpointError, ModelError
from moedge.models.checkpoint import Checkpoint, TensorInfo
from moedge.models.scheme import Codes, Raw, Scheme
from moedge.models.scheme_fp8 import Fp8
from moedge.models.scheme_integers import Awq, Gptq, auto_round
from moedge.models.scheme_mxfp4 import Mxfp4

AT_ONCE = 1 << 19  # numbers of a matrix that are made at once
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {  # quant_method -> scheme
    "mxfp4": Mxfp4,
    "fp8": Fp8,
    "gptq": Gptq,
    "awq": Awq,
    "auto-round": auto_round,
}
KEY = "quantization_config"


def quantisation(folder: Path) -> Mapping[str, Any] | None:
    """What config.json says of a checkpoint's quantisation; None where it is not quantised. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get(KEY) or (config.get("text_config") or {}).get(KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that can be read ({error}): name the folder of a Hugging Face checkpoint"
        ) from error
    return found if isinstance(found, dict) else None


def scheme_of(folder: Path, given: Mapping[str, Any]) -> Scheme:
    """The format of a quantised checkpoint. Raises ModelError for one that moedge does not read."""
    method = str(given.get("quant_method"))
    if method not in SCHEMES:
        raise ModelError(
            f"{folder} is quantised by {method}, which moedge does not read ({', '.join(SCHEMES)} can be packed): use "
            "the 16-bit original"
        )
    try:
        return SCHEMES[method](given)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is quantised by {method} in a way that is not read ({error}): use the "
                         "16-bit original") from error  # fmt: skip


def without_quantisation(config: bytes, dtype: torch.dtype) -> bytes:
    """The text of a config.json for the same model dequantised to `dtype`."""
    values = json.loads(config)
    parts = [values, values["text_config"]] if isinstance(values.get("text_config"), dict) else [values]
    for part in parts:
        part.pop(KEY, None)
    if not any(key in part for part in parts for key in ("dtype", "torch_dtype")):
        values["dtype"] = str(dtype).removeprefix("torch.")
    return (json.dumps(values, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Coded:
    """How one dense tensor is stored: raw tensors by role, of all experts where `experts` is not None."""

    raw: Mapping[str, TensorInfo]
    rows: int
    columns: int
    experts: int | None

    @property
    def nbytes(self) -> int:
        """Stored bytes of one matrix."""
        return sum(info.nbytes for info in self.raw.values()) // (self.experts or 1)


class QuantisedCheckpoint(Checkpoint):
    """`tensors` are dense, in fp32 (see `presented_as`), `stored` those of the files, `coded` says how they relate.

    Raises CheckpointError, naming the tensor, where one of a matrix's tensors is missing, or of another shape or dtype.
    """

    def __init__(self, folder: Path, scheme: Scheme) -> None:
        self.scheme = scheme
        self.coded: dict[str, Coded] = {}
        super().__init__(folder)

    def _open(self) -> None:
        super()._open()
        first, *others = self.scheme.roles.values()
        used: set[str] = set()
        dense: dict[str, TensorInfo] = {}
        for name, info in self.stored.items():
            if name.endswith(first.suffix) and info.dtype in first.dtypes:
                base = name.removesuffix(first.suffix)
                raw = self._raw_infos(base, info)
                used.update(each.name for each in raw.values())
                dense[base + self.scheme.dense] = self._describe(base + self.scheme.dense, raw)
        ends = tuple(role.suffix for role in (first, *others) if role.suffix)
        for name, info in self.stored.items():
            if name in used or name.endswith(self.scheme.dropped):
                continue
            if name.endswith(ends):
                raise CheckpointError(
                    f"{self.folder} has {name} ({info.dtype}) but not the tensors that it belongs to: it is not a "
                    "whole checkpoint, fetch it again"
                )
            dense[name] = info
        self.tensors = dense

    def _raw_infos(self, base: str, first: TensorInfo) -> dict[str, TensorInfo]:
        found = {}
        for key, role in self.scheme.roles.items():
            name = base + role.suffix
            info = self.stored.get(name)
            if info is None and role.needed:
                raise CheckpointError(
                    f"{self.folder} has {first.name} but no {name}: it is not a whole checkpoint, fetch it again"
                )
            if info is not None and info.dtype not in role.dtypes:
                raise CheckpointError(f"tensor {name} in {info.file} is {info.dtype}, which is not read there")
            if info is not None:
                found[key] = info
        return found

    def _describe(self, name: str, raw: dict[str, TensorInfo]) -> TensorInfo:
        first = next(iter(raw.values()))
        stacked = len(first.shape) == self.scheme.axes + 1
        experts = first.shape[0] if stacked else None
        try:
            if not stacked and len(first.shape) != self.scheme.axes:
                raise ValueError(f"has {len(first.shape)} axes")
            if stacked and any(info.shape[:1] != (experts,) for info in raw.values()):
                raise ValueError(f"are not all of {experts} experts")
            shapes = {key: info.shape[1:] if stacked else info.shape for key, info in raw.items()}
            rows, columns = self.scheme.shape(shapes)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            names = ", ".join(info.name for info in raw.values())
            raise CheckpointError(f"{names} in {first.file}: {error}: fetch the checkpoint again") from error
        self.coded[name] = Coded(raw, rows, columns, experts)
        matrix = (columns, rows) if self.scheme.transposed else (rows, columns)
        shape = matrix if experts is None else (experts, *matrix)
        return TensorInfo(name, first.file, torch.float32, shape, 0, 4 * prod(shape))

    def presented_as(self, dtype: torch.dtype) -> "QuantisedCheckpoint":
        """The same checkpoint with its dense tensors in `dtype`; closing one closes both."""
        other = copy.copy(self)
        other.tensors = {
            name: replace(info, dtype=dtype, nbytes=prod(info.shape) * dtype.itemsize) if name in self.coded else info
            for name, info in self.tensors.items()
        }
        return other

    def raw(self, name: str, expert: int = 0) -> Raw:
        """The stored tensors of one matrix of the dense tensor `name`, by role."""
        coded, found = self.coded[name], {}
        for role, info in coded.raw.items():
            nbytes = info.nbytes // (coded.experts or 1)
            piece = self.shard(info.file).pread(info.offset + expert * nbytes, nbytes, info.name, shift=0)
            shape = info.shape if coded.experts is None else info.shape[1:]
            found[role] = piece.view(info.dtype).view(shape)
        return found

    def blocks(self, name: str, raw: Raw) -> Iterator[tuple[int, Tensor]]:
        """Rows of one matrix, fp32 [n, I], some at a time, each with the number of its first row."""
        coded = self.coded[name]
        step = max(1, AT_ONCE // coded.columns)
        for begin in range(0, coded.rows, step):
            try:
                yield begin, self.scheme.rows(raw, begin, min(begin + step, coded.rows))
            except ValueError as error:
                raise CheckpointError(f"tensor {name} in {self.folder} {error}: fetch the checkpoint again") from error

    def codes(self, name: str, raw: Raw) -> Iterator[tuple[int, Codes | None]]:
        """The same as the format's own integers."""
        coded = self.coded[name]
        step = max(1, AT_ONCE // coded.columns)
        for begin in range(0, coded.rows, step):
            yield begin, self.scheme.codes(raw, begin, min(begin + step, coded.rows))

    def fill(self, info: TensorInfo, expert: int, memory: Tensor) -> None:
        """Write one matrix of a dense tensor into `memory`, uint8, in the dtype that `info` says."""
        coded = self.coded[info.name]
        shape = (coded.columns, coded.rows) if self.scheme.transposed else (coded.rows, coded.columns)
        matrix = memory.view(info.dtype).view(shape)
        target = matrix.mT if self.scheme.transposed else matrix  # [O, I]
        for begin, rows in self.blocks(info.name, self.raw(info.name, expert)):
            target[begin : begin + len(rows)] = rows

    def dense_bytes(self, info: TensorInfo) -> Iterator[Tensor]:
        """A whole dense tensor in the dtype that `info` says, as uint8, piece by piece."""
        coded = self.coded[info.name]
        for expert in range(coded.experts or 1):
            if self.scheme.transposed:
                memory = torch.empty(coded.rows * coded.columns * info.dtype.itemsize, dtype=torch.uint8)
                self.fill(info, expert, memory)
                yield memory
                continue
            for _, rows in self.blocks(info.name, self.raw(info.name, expert)):
                yield rows.to(info.dtype).view(torch.uint8).view(-1)

    def read(self, name: str) -> Tensor:
        if name not in self.coded:
            return super().read(name)
        info = self.tensors[name]
        whole = torch.empty(info.nbytes, dtype=torch.uint8)
        count = self.coded[name].experts or 1
        for expert, memory in enumerate(whole.chunk(count)):
            self.fill(info, expert, memory)
        return whole.view(info.dtype).view(info.shape)
