"""Read single tensors, or byte ranges of them, from a safetensors checkpoint without loading the rest.

A checkpoint is a folder, a hub cache folder, or a hub id. Headers are parsed and checked once; bytes are read with
`pread`, never mapped, so that they do not count as the process's memory. Knows names, shapes and bytes of tensors;
does not know what an expert is (see expert_map.py) nor when to read (see runtime/store.py).
"""

import copy
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moedge.errors import CheckpointError

ALIGNMENT = 64  # bytes; the BLAS rounds differently for matrices of another alignment
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READ_BLOCK = 4 << 20  # bytes per read, so that the page cache never holds much of a large tensor
MAX_HEADER = 100 << 20  # the limit of the format's reference implementation
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `offset` from the start of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardFile:
    """An open shard that notices when the file behind its name is no longer the one that was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"shard {path} cannot be opened ({error.strerror}): restore the file") from error
        self.size, self._stamp = self._look()

    def _look(self) -> tuple[int, tuple[int, int, int, int]]:
        status = os.stat(self.path)
        return status.st_size, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check_unchanged(self, tensor: str) -> None:
        """Raises CheckpointError when the file was replaced, rewritten or removed since it was opened."""
        try:
            unchanged = self._look()[1] == self._stamp
        except OSError as error:
            raise CheckpointError(
                f"shard {self.path} was removed while {tensor} was being read: restore it and load the model again"
            ) from error
        if not unchanged:
            raise CheckpointError(
                f"shard {self.path} changed while {tensor} was being read: load the model again from a finished copy"
            )

    def pread(self, offset: int, nbytes: int, tensor: str, shift: int | None = None) -> torch.Tensor:
        """`nbytes` bytes from `offset` as uint8; the page cache is told to forget them.

        Their address modulo 64 is `shift`, by default that of `offset`, as when the file is mapped: products depend on
        alignment.
        """
        shift = offset % ALIGNMENT if shift is None else shift
        buffer = torch.empty(shift + nbytes, dtype=torch.uint8)[shift:]  # torch's own memory is aligned
        view, done = memoryview(buffer.numpy().data), 0
        while done < nbytes:
            count = os.preadv(self.fd, [view[done : done + READ_BLOCK]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"shard {self.path} ends {nbytes - done} bytes before {tensor} does: fetch it again"
                )
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fd, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
        self.check_unchanged(tensor)
        return buffer

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LazyTensor:
    """A tensor of a state dict given to transformers: reads its bytes when indexed, as a safetensors slice does."""

    def __init__(self, checkpoint: "Checkpoint", info: TensorInfo) -> None:
        self._checkpoint, self._info = checkpoint, info
        self.shape, self.dtype = torch.Size(checkpoint.shape(info.name)), info.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.read_rows(self._info.name)[index]


@dataclass(frozen=True)
class Rows:
    """What is kept of a tensor: the entries `ids` of one of its axes."""

    axis: int
    ids: tuple[int, ...]


class Checkpoint:
    """The tensors of a safetensors checkpoint by name, checked against the files that hold them.

    Raises CheckpointError, naming file and tensor, for a missing or truncated shard, a header that disagrees with its
    file, an index that disagrees with the shards, and (on reading) a shard that changed since it was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.stored = self.tensors  # as the files have them
        self.rows: Mapping[str, Rows] = {}  # of tensors that a state dict has a part of only
        self._shards: dict[Path, ShardFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        index = self.folder / INDEX
        if index.exists():
            self._open_sharded(index)
        elif (self.folder / SINGLE).exists():
            self._add(self.folder / SINGLE)
        else:
            raise CheckpointError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}: convert the checkpoint to safetensors"
            )

    def _open_sharded(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
        for name in sorted(set(weight_map.values())):
            path = self.folder / name
            if not path.exists():
                tensor = next(t for t, shard in weight_map.items() if shard == name)
                raise CheckpointError(
                    f"shard {path} is missing; {index.name} puts {tensor} in it: fetch the shard again"
                )
            self._add(path)
        for tensor, name in weight_map.items():
            info = self.tensors.get(tensor)
            if info is None or info.file != self.folder / name:
                where = "no shard holds it" if info is None else f"it lies in {info.file.name}"
                raise CheckpointError(
                    f"{index} puts tensor {tensor} in {name}, but {where}: fetch the checkpoint again"
                )

    def _add(self, path: Path) -> None:
        self._shards[path] = shard = ShardFile(path)
        for info in _read_header(shard):
            self.tensors.setdefault(info.name, info)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._shards)

    def shard(self, path: Path) -> ShardFile:
        return self._shards[path]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, in the checkpoint's dtype, in memory of its own."""
        info = self.tensors[name]
        return self._shards[info.file].pread(info.offset, info.nbytes, name).view(info.dtype).view(info.shape)

    def read_each(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of the tensor `name`, in the checkpoint's dtype; they are not checked against a pack's checksum."""
        info = self.tensors[name]
        shard, nbytes = self._shards[info.file], info.nbytes // info.shape[0]
        raw = [shard.pread(info.offset + row * nbytes, nbytes, name, shift=0) for row in rows]
        joined = torch.cat(raw) if raw else torch.empty(0, dtype=torch.uint8)
        return joined.view(info.dtype).view(len(rows), *info.shape[1:])

    def check_tensor(self, name: str) -> None:
        """Raises CheckpointError where the bytes of the tensor `name` are not what a checksum says: a pack has one."""

    def narrowed(self, rows: Mapping[str, Rows]) -> "Checkpoint":
        """The same checkpoint with only these rows of some tensors in its state dict; closing one closes both."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor in the state dict."""
        shape, rows = self.tensors[name].shape, self.rows.get(name)
        return shape if rows is None else (*shape[: rows.axis], len(rows.ids), *shape[rows.axis + 1 :])

    def read_rows(self, name: str) -> torch.Tensor:
        """The tensor as the state dict has it; a part has the address modulo 64 that the whole would have."""
        whole, rows = self.read(name), self.rows.get(name)
        if rows is None:
            return whole
        shape, shift = self.shape(name), whole.data_ptr() % ALIGNMENT
        memory = torch.empty(shift + math.prod(shape) * whole.element_size(), dtype=torch.uint8)[shift:]
        part = memory.view(whole.dtype).view(shape)
        return torch.index_select(whole, rows.axis, torch.tensor(rows.ids), out=part)

    def lazy_state_dict(self, without: set[str] | frozenset[str] = frozenset()) -> dict[str, LazyTensor]:
        """A state dict for `from_pretrained` that reads each tensor only when it is used."""
        return {name: LazyTensor(self, info) for name, info in self.tensors.items() if name not in without}

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def _read_weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"index {index} is not readable ({error}): fetch it again") from error
    outside = next((shard for shard in weight_map.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise CheckpointError(f"index {index} names {outside!r}, which is not a file of its own folder: fetch it again")
    return weight_map


def _read_header(shard: ShardFile) -> Iterator[TensorInfo]:
    """The tensors of one safetensors file: u64 header length, JSON header, data; offsets count from the data."""
    if shard.size < 8:
        raise CheckpointError(
            f"shard {shard.path} has {shard.size} bytes, too few for a safetensors file: fetch it again"
        )
    (length,) = struct.unpack("<Q", bytes(shard.pread(0, 8, "the header").numpy()))
    if length > min(MAX_HEADER, shard.size - 8):
        raise CheckpointError(
            f"shard {shard.path} is not safetensors, or is truncated: its header would have {length} bytes"
        )
    try:
        header = json.loads(bytes(shard.pread(8, length, "the header").numpy()))
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"shard {shard.path} has a damaged header ({error}): fetch it again") from error
    data = 8 + length
    for name, dtype_name, shape, begin, end in entries:
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise CheckpointError(f"tensor {name} in {shard.path} has dtype {dtype_name}, which moedge does not read")
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes or begin < 0:
            raise CheckpointError(
                f"tensor {name} in {shard.path} has shape {list(shape)} of {dtype_name} "
                f"but {end - begin} bytes: fetch it again"
            )
        if data + end > shard.size:
            raise CheckpointError(
                f"shard {shard.path} is truncated: tensor {name} ends at byte {data + end}, "
                f"the file at {shard.size}: fetch it again"
            )
        yield TensorInfo(name, shard.path, dtype, shape, data + begin, nbytes)
