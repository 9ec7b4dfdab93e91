"""The number formats of an expert's matrices and where their bytes lie in its extent. Tensors only: no files.

A matrix W is [O, I], out times in, as `linear` takes it. Stored as it is ("plain"), or in groups of `group` numbers
along I, the last one padded:

    W[o, i] = factors[o] * scales[o, g] * (values[o, i] - zeros[o, g])        g = i // group

`values` are integers of 8 or 4 bits, or 4-bit floats (MXFP4: twice their value is an integer, so the scales are
halved). `scales` are fp16; `factors` are one power of two per row that puts the row's largest scale near 2^14, so no
scale overflows, and one loses digits only when it is 2^27 times smaller than its row's largest. `zeros` are whole
numbers and only there in asymmetric formats (symmetric: 0 for 8 bits, 8 for 4 bits). All of this is exact in fp32
(numbers below 1e-38 aside): whoever dequantises gets the same numbers.

Two 4-bit numbers share a byte: of each 32, byte j holds number j in its low and number j + 16 in its high half, so that
a shift and a mask unpack 32 in order. Each part of each matrix starts at a multiple of 64 bytes: planar, so that a
product streams through the values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from moedge.errors import CheckpointError
from moedge.native import library as native

ALIGNMENT = 64
BLOCK = 32  # numbers that are unpacked together
GROUPS = (32, 64, 128, 256)
_TOP = 15  # the largest scale of a row is at most about 2^_TOP; fp16 ends at 2^16
FLOATS = {torch.float32: native.F32, torch.bfloat16: native.BF16, torch.float16: native.F16}  # their codes in C
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value of each code

Parts = dict[str, Tensor]  # "values", and for quantised matrices "scales", "factors" and perhaps "zeros"


@dataclass(frozen=True)
class Format:
    """How the numbers of a matrix are stored. As text: "plain", "bf16-12", "int8-g32", "int4-g64-asym", "mxfp4-g32".

    "bf16-12" is of whole extents: bf16 exactly, in 12 bits a number (models/shorten.py).
    """

    code: str  # plain, bf16-12, int8, int4 or mxfp4
    group: int = BLOCK
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.code not in ("plain", "bf16-12", "int8", "int4", "mxfp4"):
            raise ValueError(f"number format {self.code!r} is not known: use plain, int8, int4 or mxfp4")
        if self.group not in GROUPS:
            raise ValueError(f"group {self.group} is not one of {', '.join(map(str, GROUPS))}")
        if self.code == "mxfp4" and not (self.symmetric and self.group == BLOCK):
            raise ValueError(f"mxfp4 is symmetric and has groups of {BLOCK}")

    @property
    def bits(self) -> int | None:
        """Bits of one value; None for plain, whose dtype says it."""
        return {"plain": None, "bf16-12": 12, "int8": 8}.get(self.code, 4)

    def __str__(self) -> str:
        if self.code in ("plain", "bf16-12"):
            return self.code
        return f"{self.code}-g{self.group}{'' if self.symmetric else '-asym'}"

    @classmethod
    def parse(cls, text: str) -> "Format":
        """The format that `str` gave. Raises ValueError."""
        match = re.fullmatch(r"(plain|bf16-12|int8|int4|mxfp4)(?:-g(\d+)(-asym)?)?", text)
        if match is None:
            raise ValueError(f"number format {text!r} is not known: write it like plain, int8-g32 or int4-g64-asym")
        return cls(match[1], int(match[2] or BLOCK), symmetric=match[3] is None)


PLAIN, SHORT = Format("plain"), Format("bf16-12")


@dataclass(frozen=True)
class Plane:
    """One part of one tensor: `shape` of `dtype` at `offset` of the extent."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """One tensor of an expert: `shape` ([out, in] for a matrix) and `dtype` are those of the model."""

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    planes: Mapping[str, Plane] = field(hash=False)


@dataclass(frozen=True)
class Extent:
    """The tensors of one expert, by name, one after the other in `nbytes` bytes."""

    tensors: Mapping[str, Stored] = field(hash=False)
    nbytes: int

    def views(self, memory: Tensor) -> dict[str, Parts]:
        """The parts of every tensor as views of `memory`, uint8 that starts at a multiple of 64 bytes."""
        return {
            name: {part: _view(memory, plane) for part, plane in stored.planes.items()}
            for name, stored in self.tensors.items()
        }


def layout(parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]], format: Format) -> Extent:
    """Where each tensor of an expert lies: matrices (2-D, [out, in]) in `format`, everything else plain."""
    tensors: dict[str, Stored] = {}
    end = 0
    for name, (shape, dtype) in parameters.items():
        own = format if len(shape) == 2 else PLAIN
        planes = {}
        for part, (part_shape, part_dtype) in part_shapes(shape, dtype, own).items():
            planes[part] = Plane(end, part_shape, part_dtype)
            end = -(-(end + planes[part].nbytes) // ALIGNMENT) * ALIGNMENT
        tensors[name] = Stored(own, shape, dtype, planes)
    return Extent(tensors, end)


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, format: Format
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of a tensor, in the order in which they are stored."""
    if format.code == "plain":
        return {"values": (shape, dtype)}
    rows, columns = shape
    groups = -(-columns // format.group)
    numbers = groups * format.group
    values = ((rows, numbers), torch.int8) if format.bits == 8 else ((rows, numbers // 2), torch.uint8)
    parts = {"values": values, "scales": ((rows, groups), torch.float16), "factors": ((rows,), torch.float32)}
    return parts if format.symmetric else parts | {"zeros": ((rows, groups), torch.int8)}


def quantise(matrix: Tensor, format: Format, clip: Tensor | float = 1.0, name: str = "matrix") -> Parts:
    """The parts of `matrix` [O, I], rounded to nearest. Pure: the same numbers always give the same bytes.

    `clip` scales each group's range, as a number or [O, G]: below 1, the largest numbers are cut and the others get
    finer steps. Raises CheckpointError with `name` for a matrix that holds NaN or infinity.
    """
    if format.code == "plain":
        return {"values": matrix.contiguous()}
    if format.code == "mxfp4":
        raise ValueError("mxfp4 is only kept where a checkpoint has it (from_mxfp4): quantise to int4")
    parts = _with_library(matrix, format) if isinstance(clip, float) and clip == 1 else None
    return _with_torch(matrix, format, clip, name) if parts is None else parts


def _with_library(matrix: Tensor, format: Format) -> Parts | None:
    """As _with_torch does it, byte for byte; None without the C kernels, and where a number is not finite."""
    library = native.load()
    if library is None or matrix.device.type != "cpu":
        return None
    x = matrix if matrix.dtype in FLOATS else matrix.float()
    shapes = part_shapes((x.shape[0], x.shape[1]), x.dtype, format)
    parts = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    code = native.INT8 if format.bits == 8 else native.INT4
    call = native.Rounding(*x.shape, code, FLOATS[x.dtype], format.group, *x.stride(), x.data_ptr())
    for name, part in parts.items():
        setattr(call, name, part.data_ptr())
    return None if library.quantise(call) else parts


def _with_torch(matrix: Tensor, format: Format, clip: Tensor | float, name: str) -> Parts:
    rows, columns = matrix.shape
    w = torch.nn.functional.pad(matrix.float(), (0, -columns % format.group)).view(rows, -1, format.group)  # [O, G, n]
    if not torch.isfinite(w).all():
        raise CheckpointError(f"{name} holds NaN or infinity: it cannot be quantised, fetch the checkpoint again")
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)  # [O, G]
    levels = 255 if format.bits == 8 else 15
    exponent = _exponent(torch.maximum(-low, high).amax(1), levels)  # [O]
    down = torch.exp2(-exponent)[:, None]
    w, low, high = w * down[:, :, None], low * down * clip, high * down * clip
    zeros: Tensor | int
    if format.symmetric:
        # 8 bits: -127 to 127. 4 bits: the scale has the sign that puts the largest number on -8, as one side has 7.
        largest = torch.where(-low > high, low, high)
        scales = _round_away(largest.abs() / 127 if format.bits == 8 else largest / -8 + 0.0)  # no negative zero
        zeros = 0 if format.bits == 8 else 8
        bottom, top = (-127, 127) if format.bits == 8 else (0, 15)
    else:
        scales = _round_away((high - low) / levels)
        bottom, top = (-128, 127) if format.bits == 8 else (0, 15)
        zeros = ((-low * _inverse(scales)).round() + bottom).clamp(bottom, top)
    shift = zeros[:, :, None] if isinstance(zeros, Tensor) else zeros
    q = ((w * _inverse(scales)[:, :, None]).round() + shift).clamp(bottom, top).view(rows, -1)
    parts = {
        "values": q.to(torch.int8) if format.bits == 8 else pack_nibbles(q.to(torch.uint8)),
        "scales": scales,
        "factors": torch.exp2(exponent),
    }
    return parts | {"zeros": zeros.to(torch.int8)} if isinstance(zeros, Tensor) else parts


def dequantise(parts: Parts, format: Format, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [O, columns] of `parts`: exact in fp32, then rounded to `dtype`."""
    values = parts["values"]
    if format.code == "plain":
        return values.to(dtype)
    if format.bits == 4:
        values = unpack_nibbles(values)
    if format.code == "mxfp4":
        values = torch.tensor(_MXFP4, dtype=torch.int8)[values.int()]
    scales = parts["scales"].float() * parts["factors"][:, None]  # [O, G]
    q = values.view(len(values), -1, format.group).float()
    if not format.symmetric:
        q -= parts["zeros"].float()[:, :, None]
    elif format.code == "int4":
        q -= 8
    return (q * scales[:, :, None]).view(len(values), -1)[:, :columns].to(dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """[O, N] numbers 0 to 15, N a multiple of 32 -> [O, N / 2] bytes."""
    low, high = codes.view(len(codes), -1, 2, BLOCK // 2).unbind(2)
    return (low | high << 4).view(len(codes), -1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of pack_nibbles."""
    blocks = packed.view(len(packed), -1, BLOCK // 2)
    return torch.stack((blocks & 15, blocks >> 4), 2).view(len(packed), -1)


def from_mxfp4(codes: Tensor, exponents: Tensor, name: str = "matrix") -> Parts:
    """The parts of an MXFP4 matrix: codes [O, I] of 4 bits, I a multiple of 32; exponents [O, I / 32], biased by 127.

    Raises CheckpointError where a row's exponents are more than 2^38 apart or an exponent is NaN (255).
    """
    if (exponents == 255).any():
        raise CheckpointError(f"{name} holds NaN scales: fetch the checkpoint again")
    power = exponents.int() - 128  # of the scale of twice the value
    used = (codes.view(len(codes), -1, BLOCK) & 7).amax(2) > 0  # codes 0 and 8 are zero
    top = torch.where(used, power, torch.full_like(power, -1000)).amax(1)
    factor = torch.where(used.any(1), top - (_TOP - 1), 0).clamp(-126, 127)  # [O]
    relative = torch.where(used, power - factor[:, None], 0)
    if (relative < -24).any():
        raise CheckpointError(f"{name} has MXFP4 scales more than 2^38 apart in a row: pack it with --bits 8")
    scales = torch.where(used, torch.exp2(relative.float()), torch.zeros(()))
    return {"values": pack_nibbles(codes), "scales": scales.half(), "factors": torch.exp2(factor.float())}


def from_integers(
    values: Tensor, scales: Tensor, zeros: Tensor, group: int, format: Format, name: str = "matrix"
) -> Parts | None:
    """The parts of a matrix that is in integers of `format.bits` bits already: exactly the same numbers.

    `values` [O, I] and `zeros` [O, G] are uint8, `scales` [O, G], each for `group` numbers. Scales in fp16 or bf16 stay
    as they are. None where the format cannot hold the matrix: its groups span several scales, or it is symmetric and
    the zero points are not. Raises CheckpointError for scales that are no numbers.
    """
    middle = 8 if format.bits == 4 else 128
    columns = values.shape[1]
    starts = torch.arange(0, columns, format.group)
    if (group % format.group and group < columns) or (format.symmetric and not (zeros == middle).all()):
        return None
    scales, zeros = scales.float()[:, starts // group], zeros[:, starts // group]  # [O, G] in groups of the format
    if not torch.isfinite(scales).all():
        raise CheckpointError(f"{name} has scales that are NaN or infinity: fetch the checkpoint again")
    values = torch.nn.functional.pad(values, (0, -columns % format.group), value=middle)
    largest = scales.abs().amax(1)
    power = torch.where(largest > 0, torch.frexp(largest)[1] - _TOP, 0).clamp(-126, 127).float()
    parts = {
        "values": pack_nibbles(values) if format.bits == 4 else (values ^ 128).view(torch.int8),  # less 128
        "scales": (scales * torch.exp2(-power)[:, None]).half(),
        "factors": torch.exp2(power),
    }
    if format.symmetric:
        return parts
    return parts | {"zeros": zeros.to(torch.int8) if format.bits == 4 else (zeros ^ 128).view(torch.int8)}


def _exponent(largest: Tensor, levels: int) -> Tensor:
    """[O]: the power of two that brings scales of rows whose largest numbers are `largest` near 2^14."""
    _, exponent = torch.frexp(largest)  # largest < 2^exponent
    bits = 3 if levels == 15 else 6  # a scale is at most largest / 2^bits
    powers = (exponent - bits - _TOP).clamp(-126, 127).float()
    return torch.where(largest > 0, powers, torch.zeros(()))


def _round_away(scales: Tensor) -> Tensor:
    """To fp16, never towards zero: the largest number of a group must not be cut, however coarse fp16 is there."""
    rounded = scales.half()
    short = rounded.float().abs() < scales.abs()
    return (rounded.view(torch.int16) + short).view(torch.float16)


def _inverse(scales: Tensor) -> Tensor:
    # 1 / scale, 0 for a group of zeros
    wide = scales.float()
    return torch.where(wide == 0, wide, 1 / wide)


def _view(memory: Tensor, plane: Plane) -> Tensor:
    return memory[plane.offset : plane.offset + plane.nbytes].view(plane.dtype).view(plane.shape)
