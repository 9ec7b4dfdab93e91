"""MXFP4 (OCP Microscaling 1.0, as gpt-oss is stored): E2M1 numbers, 32 of which share a power of two.

Blocks are [O, G, 16] bytes, two neighbours each, the first in the low half; scales are exponents biased by 127. The
model's parameters are [in, out], so what is stored is their transpose.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moedge.models.scheme import Codes, Native, Raw, Role, Shapes

GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array((*_POSITIVE, *(-value for value in _POSITIVE)), dtype=np.float32)


_ROLES = {"blocks": Role("_blocks", (torch.uint8,)), "scales": Role("_scales", (torch.uint8,))}


class Mxfp4:
    roles: Mapping[str, Role] = _ROLES
    dense, axes, transposed = "", 3, True
    native: Native | None = Native("mxfp4", GROUP, symmetric=True)
    dropped: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        pass

    def shape(self, shapes: Shapes) -> tuple[int, int]:
        rows, groups, width = shapes["blocks"]
        if width != GROUP // 2 or shapes["scales"] != (rows, groups):
            raise ValueError(f"blocks {list(shapes['blocks'])} and scales {list(shapes['scales'])} do not fit")
        return rows, groups * GROUP

    def rows(self, raw: Raw, begin: int, end: int) -> Tensor:
        codes = self.codes(raw, begin, end)
        if (codes.scales == 255).any():
            raise ValueError("holds NaN scales")
        values = torch.from_numpy(np.take(_VALUES, codes.values.numpy())).view(end - begin, -1, GROUP)
        return torch.ldexp(values, codes.scales.int()[:, :, None] - 127).view(end - begin, -1)

    def codes(self, raw: Raw, begin: int, end: int) -> Codes:
        blocks = raw["blocks"][begin:end]
        values = torch.stack((blocks & 15, blocks >> 4), -1).view(end - begin, -1)
        return Codes("mxfp4", values, raw["scales"][begin:end], None, GROUP)
