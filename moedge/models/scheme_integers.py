"""Integers with a scale and a zero point per group of inputs, packed in int32 words: GPTQ's and AWQ's layouts.

    W[o, i] = scales[g, o] * (q[i, o] - zeros[g, o])

GPTQ packs `qweight` along the inputs and may give each input a group of its own (`g_idx`, act-order); AWQ ("gemm")
packs along the outputs, in the order 0 2 4 6 1 3 5 7. Both pack `qzeros` along the outputs, GPTQ's version 1 minus one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moedge.models.scheme import FLOATS, Codes, Native, Raw, Role, Scheme, Shapes

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # number _AWQ_ORDER[i] lies in the i-th 4 bits of a word
_ONES = {4: 0x11111111, 8: 0x01010101}
_ROLES = {
    "qweight": Role(".qweight", (torch.int32,)),
    "qzeros": Role(".qzeros", (torch.int32,)),
    "scales": Role(".scales", FLOATS),
}
_INDEX = {"g_idx": Role(".g_idx", (torch.int32, torch.int64), needed=False)}


class _Integers:
    dense, axes, transposed = ".weight", 2, False
    dropped: tuple[str, ...] = ()
    bits: int

    def _read(self, config: Mapping[str, Any], symmetric: bool) -> None:
        self.bits, self._group = int(config["bits"]), int(config["group_size"])
        self.native: Native | None = (
            Native(f"int{self.bits}", self._group, symmetric) if self.bits in (4, 8) else None  # others per tensor
        )

    def _check(self, shapes: Shapes, bits: int, columns: int, outputs: int) -> tuple[int, int]:
        if bits not in (4, 8):
            raise ValueError(f"is in {bits} bits, only 4 and 8 are read")
        groups = shapes["scales"][0]
        if shapes["scales"] != (groups, outputs) or shapes["qzeros"] != (groups, outputs * bits // _WORD):
            raise ValueError(
                f"qweight {list(shapes['qweight'])}, qzeros {list(shapes['qzeros'])} and scales "
                f"{list(shapes['scales'])} do not fit"
            )
        if shapes.get("g_idx", (columns,)) != (columns,):
            raise ValueError(f"g_idx {list(shapes['g_idx'])} does not fit {columns} inputs")
        if "g_idx" not in shapes:
            self._group_of(columns, groups)
        return outputs, columns

    def _group_of(self, columns: int, groups: int) -> int:
        """How many neighbours share a scale: as the config says, or else (overridden for single layers) evenly."""
        said = columns if self._group == -1 else self._group
        if -(-columns // said) == groups:
            return said
        if columns % groups:
            raise ValueError(f"has {groups} groups for {columns} inputs, group_size is {self._group}")
        return columns // groups

    def _values(self, raw: Raw, begin: int, end: int) -> Tensor:
        """[n, I] uint8."""
        raise NotImplementedError

    def _zeros(self, raw: Raw, begin: int, end: int) -> Tensor:
        """[n, G] uint8."""
        raise NotImplementedError

    def rows(self, raw: Raw, begin: int, end: int) -> Tensor:
        q, zeros = self._values(raw, begin, end).float(), self._zeros(raw, begin, end).float()
        scales = raw["scales"][:, begin:end].mT.float()  # [n, G]
        index = self._index(raw, q.shape[1])
        return q.sub_(zeros[:, index]).mul_(scales[:, index])

    def _index(self, raw: Raw, columns: int) -> Tensor:
        """The group of each input, [I]."""
        groups = len(raw["scales"])
        if "g_idx" not in raw:
            return torch.arange(columns) // self._group_of(columns, groups)
        index = raw["g_idx"].long()
        if index.min() < 0 or index.max() >= groups:
            raise ValueError(f"has a g_idx that is not one of its {groups} groups")
        return index

    def codes(self, raw: Raw, begin: int, end: int) -> Codes | None:
        values, zeros = self._values(raw, begin, end), self._zeros(raw, begin, end)
        columns, groups = values.shape[1], len(raw["scales"])
        index = self._index(raw, columns)
        try:
            group = self._group_of(columns, groups)
        except ValueError:  # uneven groups, as only g_idx can say
            return None
        if not torch.equal(index, torch.arange(columns) // group):
            return None
        bits = 4 if raw["qzeros"].shape[1] * 8 == raw["scales"].shape[1] else 8
        return Codes(f"int{bits}", values, raw["scales"][:, begin:end].mT, zeros, group)


class Gptq(_Integers):
    roles: Mapping[str, Role] = _ROLES | _INDEX

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise ValueError(f"GPTQ's checkpoint_format {version!r} is not read, only gptq and gptq_v2")
        self._less_one = version == "gptq"
        self._read(config, bool(config.get("sym", True)))

    def shape(self, shapes: Shapes) -> tuple[int, int]:
        words, outputs = shapes["qweight"]
        bits = _WORD * shapes["qzeros"][1] // outputs
        return self._check(shapes, bits, words * _WORD // max(1, bits), outputs)

    def _values(self, raw: Raw, begin: int, end: int) -> Tensor:
        bits = _WORD * raw["qzeros"].shape[1] // raw["qweight"].shape[1]
        words = raw["qweight"][:, begin:end].mT.contiguous()  # [n, words]
        return _unpack(words, bits).view(end - begin, -1)

    def _zeros(self, raw: Raw, begin: int, end: int) -> Tensor:
        words = raw["qzeros"]
        bits = _WORD * words.shape[1] // raw["qweight"].shape[1]
        each = _WORD // bits
        words = words[:, begin // each : -(-end // each)]
        if self._less_one:  # of the word, as it was subtracted: a zero point of 0 borrows from the next
            words = ((words.long() + _ONES[bits] + (1 << 31)) % (1 << 32) - (1 << 31)).int()
        start = begin - begin // each * each
        return _unpack(words, bits).view(len(words), -1)[:, start : start + end - begin].mT


class Awq(_Integers):
    roles: Mapping[str, Role] = _ROLES

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("version") or config.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise ValueError(f"AWQ's version {version!r} is not read, only gemm")
        self._read({"bits": 4, "group_size": 128} | dict(config), symmetric=not config.get("zero_point", True))
        if self.bits != 4:
            raise ValueError(f"AWQ in {self.bits} bits is not read, only in 4")

    def shape(self, shapes: Shapes) -> tuple[int, int]:
        columns, words = shapes["qweight"]
        return self._check(shapes, 4, columns, words * 8)

    def _values(self, raw: Raw, begin: int, end: int) -> Tensor:
        return _in_order(raw["qweight"], begin, end)

    def _zeros(self, raw: Raw, begin: int, end: int) -> Tensor:
        return _in_order(raw["qzeros"], begin, end)


def auto_round(config: Mapping[str, Any]) -> Scheme:
    """auto-round's checkpoints in GPTQ's or AWQ's layout, as packing_format says."""
    packing = str(config.get("packing_format", "auto_round")).removeprefix("auto_round:").removeprefix("auto_")
    if packing == "gptq":
        return Gptq(config)
    if packing == "awq":
        return Awq({"zero_point": not config.get("sym", True)} | dict(config))
    raise ValueError(
        f"auto-round's packing_format {config.get('packing_format')!r} is not read, only auto_round:auto_gptq and "
        "auto_round:auto_awq"
    )


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Words [...], lowest bits first -> [..., 32 / bits] uint8."""
    as_bytes = words.contiguous().view(torch.uint8).view(*words.shape, 4)  # little-endian
    return as_bytes if bits == 8 else torch.stack((as_bytes & 15, as_bytes >> 4), -1).view(*words.shape, 8)


def _in_order(words: Tensor, begin: int, end: int) -> Tensor:
    """Columns of a matrix in AWQ's order, transposed: [N, O / 8] -> [n, N]."""
    first, last = begin // 8, -(-end // 8)
    place = torch.tensor(_AWQ_ORDER).argsort()  # where each number lies
    numbers = _unpack(words[:, first:last], 4)[..., place].view(len(words), -1)
    return numbers[:, begin - 8 * first : end - 8 * first].mT.contiguous()
