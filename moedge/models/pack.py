"""A packed checkpoint, as `moedge pack` writes it, and how it is read.

    config.json, tokenizer, ...   copies
    backbone.safetensors          every tensor that is no expert's, as the original has it or in groups (backbone.py)
    experts.safetensors           for each expert one uint8 tensor `layers.L.experts.E`, its extent: all its tensors,
                                  as they are or, of a layer that is "short", in 12 bits a number (shorten.py)

Each extent starts at a multiple of 4096 bytes and is as long, so one read past the page cache brings one expert. The
header of experts.safetensors says where each tensor lies in its extent, and holds a CRC-32 of every extent, of every
other tensor and file, and of itself. Knows bytes; what the number formats mean is in runtime/formats.py.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moedge.errors import CheckpointError
from moedge.models.backbone import CodedMatrix, dense_tensors, read_matrix
from moedge.models.checkpoint import DTYPES, MAX_HEADER, Checkpoint, ShardFile, TensorInfo
from moedge.models.expert_map import Part
from moedge.models.shorten import short_bytes
from moedge.units import whole_pages

VERSION = 2  # 1 where no layer is short
EXPERTS, BACKBONE = "experts.safetensors", "backbone.safetensors"
PLAIN = "plain"
AT_ONCE = 1 << 20  # bytes of a tensor that are checked at once
REMEDY = "copy the pack again, or pack the model again"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OWN_CHECKSUM = b'"header_crc32":"'  # 8 digits follow, which count as zeros; inside other values quotes are escaped


def checksum(data: Any) -> str:
    """CRC-32 of bytes or of a uint8 tensor: finds every flip of up to 3 bits and of 32 in a row; 5 x as fast as a hash.

    It is against failing disks and copies, not against an attacker.
    """
    return f"{zlib.crc32(data.numpy().data if isinstance(data, torch.Tensor) else data):08x}"


def is_packed(folder: Path) -> bool:
    """Whether `moedge pack` wrote the folder."""
    return (folder / EXPERTS).exists() or (folder / BACKBONE).exists()


def extent_name(layer: int, expert: int) -> str:
    """The name of an expert's tensor in experts.safetensors."""
    return f"layers.{layer}.experts.{expert}"


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of an expert: its number format and, for each of its parts, (dtype, shape, offset in the extent)."""

    format: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a matrix that is not plain [out, in], whatever the model has
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]


@dataclass(frozen=True)
class PackedLayer:
    """The extents of one layer. `shifts[name][expert]`, where there: bytes by which a plain tensor lies further on.

    As in a stock model, whose products depend on the address modulo 64 that a tensor has in its file. `nbytes`, and
    where tensors lie, are those of an extent that is restored where the layer is `short`.
    """

    num_experts: int
    nbytes: int
    tensors: Mapping[str, PackedTensor]
    shifts: Mapping[str, tuple[int, ...]]
    short: bool = False

    @cached_property
    def plain(self) -> bool:
        return all(tensor.format == PLAIN for tensor in self.tensors.values())

    @property
    def is_slot(self) -> bool:
        """Whether an extent is what a slot holds that is filled from the checkpoint."""
        return self.plain and not self.short

    @property
    def stride(self) -> int:
        """Bytes of one extent in the file."""
        return whole_pages(short_bytes(self.nbytes) if self.short else self.nbytes)

    def as_dict(self) -> dict[str, Any]:
        tensors = {
            name: {
                "format": t.format,
                "dtype": _DTYPE_NAMES[t.dtype],
                "shape": t.shape,
                "parts": {part: (_DTYPE_NAMES[d], shape, offset) for part, (d, shape, offset) in t.parts.items()},
            }
            for name, t in self.tensors.items()
        }
        short = {"short": True} if self.short else {}
        return {
            "experts": self.num_experts,
            "nbytes": self.nbytes,
            "tensors": tensors,
            "shifts": dict(self.shifts),
        } | short

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "PackedLayer":
        tensors = {}
        for name, t in given["tensors"].items():
            parts = {part: (DTYPES[d], tuple(shape), offset) for part, (d, shape, offset) in t["parts"].items()}
            tensors[name] = PackedTensor(t["format"], DTYPES[t["dtype"]], tuple(t["shape"]), parts)
        shifts = {name: tuple(each) for name, each in given["shifts"].items()}
        return cls(given["experts"], given["nbytes"], tensors, shifts, given.get("short", False))


@dataclass(frozen=True)
class Manifest:
    """What the header of experts.safetensors says. Checksums have a fixed length, so the header's is known before."""

    source: Mapping[str, str]  # BLAKE2b of the original's config.json and of its tensors' names, dtypes and shapes
    layers: tuple[PackedLayer, ...]
    backbone: Mapping[str, tuple[str, int]]  # tensor -> its checksum, its address modulo 64 in a stock model
    backbone_header: str  # checksum
    files: Mapping[str, str]  # name -> checksum
    extents: tuple[str, ...]  # checksums in the order of `keys`
    coded: Mapping[str, CodedMatrix]  # matrices of the backbone that are stored in groups

    @cached_property
    def keys(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) in the order of the file."""
        return tuple((i, e) for i, layer in enumerate(self.layers) for e in range(layer.num_experts))

    @cached_property
    def index(self) -> Mapping[tuple[int, int], int]:
        """The place of each (layer, expert) among `keys`."""
        return {key: i for i, key in enumerate(self.keys)}

    @cached_property
    def places(self) -> Mapping[tuple[int, int], int]:
        """Offset of each extent in the file."""
        offsets, end = {}, len(self.head())
        for key in self.keys:
            offsets[key] = end
            end += self.layers[key[0]].stride
        return offsets

    @property
    def file_size(self) -> int:
        return len(self.head()) + sum(layer.num_experts * layer.stride for layer in self.layers)

    def head(self) -> bytes:
        """The start of experts.safetensors: length and JSON, padded with spaces to a multiple of 4096 bytes."""
        coded = {"coded": {name: matrix.as_list for name, matrix in self.coded.items()}} if self.coded else {}
        metadata = {
            "moedge_pack": str(VERSION if any(layer.short for layer in self.layers) else 1),
            "header_crc32": "0" * 8,
            "source": self.source,
            "layers": [layer.as_dict() for layer in self.layers],
            "backbone": {"header": self.backbone_header, "tensors": self.backbone} | coded,
            "files": self.files,
            "extents": "".join(self.extents),
        }
        texts = {name: value if isinstance(value, str) else _dump(value) for name, value in metadata.items()}
        entries: dict[str, Any] = {"__metadata__": texts}
        end = 0
        for index, expert in self.keys:
            stride = self.layers[index].stride
            entries[extent_name(index, expert)] = {
                "dtype": "U8",
                "shape": [stride],
                "data_offsets": [end, end + stride],
            }
            end += stride
        text = _dump(entries).encode()
        length = whole_pages(8 + len(text)) - 8
        raw = struct.pack("<Q", length) + text.ljust(length)
        start = raw.index(_OWN_CHECKSUM) + len(_OWN_CHECKSUM)
        return raw[:start] + checksum(raw).encode() + raw[start + 8 :]

    @classmethod
    def read(cls, shard: ShardFile) -> "Manifest":
        """Raises CheckpointError, naming the file, for a header that is damaged or of a newer version."""
        start = shard.pread(0, min(8, shard.size), "the header")
        length = int.from_bytes(bytes(start.numpy()), "little")
        if len(start) < 8 or length > min(MAX_HEADER, shard.size - 8):
            raise CheckpointError(f"{shard.path} is truncated or has a damaged header: {REMEDY}")
        raw = bytes(shard.pread(0, 8 + length, "the header").numpy())
        at = raw.find(_OWN_CHECKSUM) + len(_OWN_CHECKSUM)
        if at < len(_OWN_CHECKSUM) or checksum(raw[:at] + b"0" * 8 + raw[at + 8 :]).encode() != raw[at : at + 8]:
            raise CheckpointError(f"{shard.path} has a damaged header (its checksum differs): {REMEDY}")
        metadata = json.loads(raw[8:])["__metadata__"]
        version = int(metadata["moedge_pack"])
        if version > VERSION:
            raise CheckpointError(
                f"{shard.path} has pack format {version}, this moedge reads up to {VERSION}: install a newer moedge"
            )
        values = {name: json.loads(metadata[name]) for name in ("source", "layers", "backbone", "files")}
        digits = metadata["extents"]
        return cls(
            values["source"],
            tuple(PackedLayer.from_dict(layer) for layer in values["layers"]),
            {name: (crc, shift) for name, (crc, shift) in values["backbone"]["tensors"].items()},
            values["backbone"]["header"],
            values["files"],
            tuple(digits[i : i + 8] for i in range(0, len(digits), 8)),
            {name: CodedMatrix.from_list(each) for name, each in values["backbone"].get("coded", {}).items()},
        )

    def with_checksums(
        self, extents: tuple[str, ...], backbone: Mapping[str, str], backbone_header: str, files: Mapping[str, str]
    ) -> "Manifest":
        """The manifest that is written when all bytes are known; its header is as long."""
        of_tensors = {name: (backbone[name], shift) for name, (_, shift) in self.backbone.items()}
        return replace(self, extents=extents, backbone=of_tensors, backbone_header=backbone_header, files=files)


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class PackedCheckpoint(Checkpoint):
    """The tensors of a packed folder: the backbone's, and each expert as one.

    Opening checks the headers and all small files; a tensor of the backbone is checked whenever it is read, an extent
    by PackedExperts (packed_experts.py). Raises CheckpointError, naming the file, for whatever is missing, damaged, or
    of another model.
    """

    manifest: Manifest

    def _open(self) -> None:
        shard = self._shards[self.folder / EXPERTS] = ShardFile(self.folder / EXPERTS)
        self.manifest = Manifest.read(shard)
        self._check_files()
        self._add_extents(shard)
        self._add(self.folder / BACKBONE)
        self._check_backbone(self._shards[self.folder / BACKBONE])
        self.tensors = dense_tensors(self.stored, self.manifest.coded)

    def _check_files(self) -> None:
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if not path.exists():
                raise CheckpointError(f"{path} is missing, the pack was made with one: {REMEDY}")
            if checksum(path.read_bytes()) != expected:
                raise CheckpointError(
                    f"{path} is not the file that the pack was made with (damaged, edited, or another model's): "
                    f"{REMEDY}"
                )

    def _add_extents(self, shard: ShardFile) -> None:
        for (layer, expert), offset in self.manifest.places.items():
            name, stride = extent_name(layer, expert), self.manifest.layers[layer].stride
            if offset + stride > shard.size:
                raise CheckpointError(
                    f"{shard.path} is truncated: expert {expert} of layer {layer} ends at byte {offset + stride}, "
                    f"the file at {shard.size}: {REMEDY}"
                )
            self.tensors[name] = TensorInfo(name, shard.path, torch.uint8, (stride,), offset, stride)
        _check_end(shard, self.manifest.file_size)

    def _check_backbone(self, shard: ShardFile) -> None:
        (length,) = struct.unpack("<Q", bytes(shard.pread(0, 8, "the header").numpy()))
        found = {name for name, info in self.tensors.items() if info.file == shard.path}
        header = checksum(shard.pread(0, 8 + length, "the header"))
        if header != self.manifest.backbone_header or found != self.manifest.backbone.keys():
            raise CheckpointError(
                f"{shard.path} has a header that is not the pack's (damaged, or another model's): {REMEDY}"
            )
        _check_end(shard, 8 + length + sum(self.tensors[name].nbytes for name in found))

    def read(self, name: str) -> torch.Tensor:
        if name in self.manifest.coded:
            dense, found = read_matrix(self, name, self.manifest.coded[name])
            self._check_tensors(found)
            return dense
        if name not in self.manifest.backbone:
            return super().read(name)
        info = self.stored[name]
        raw = self._shards[info.file].pread(info.offset, info.nbytes, name, self.manifest.backbone[name][1])
        self._check_tensors({name: checksum(raw)})
        return raw.view(info.dtype).view(info.shape)

    def check_tensor(self, name: str) -> None:
        info, crc = self.stored[name], 0
        for start in range(0, info.nbytes, AT_ONCE):
            piece = self._shards[info.file].pread(info.offset + start, min(AT_ONCE, info.nbytes - start), name, shift=0)
            crc = zlib.crc32(piece.numpy().data, crc)
        self._check_tensors({name: f"{crc:08x}"})

    def _check_tensors(self, found: Mapping[str, str]) -> None:
        for name, digits in found.items():
            if digits != self.manifest.backbone[name][0]:
                file = self.stored[name].file
                raise CheckpointError(f"tensor {name} in {file} is damaged (its checksum differs): {REMEDY}")

    def extent(self, layer: int, expert: int) -> Part:
        """All bytes of one expert."""
        info = self.tensors[extent_name(layer, expert)]
        return Part(info, info.name, info.offset, info.nbytes, info.shape)

    def check(self, layer: int, expert: int, extent: torch.Tensor) -> None:
        """Raises CheckpointError when the bytes of an extent are not those that were packed."""
        if checksum(extent) != self.manifest.extents[self.manifest.index[layer, expert]]:
            raise CheckpointError(
                f"expert {expert} of layer {layer} in {self.folder / EXPERTS} is damaged (its checksum differs): "
                f"{REMEDY}"
            )


def _check_end(shard: ShardFile, expected: int) -> None:
    if shard.size != expected:
        raise CheckpointError(f"{shard.path} has {shard.size} bytes instead of {expected}: {REMEDY}")
