"""How a quantised checkpoint stores one matrix: what every format in scheme_*.py answers. No files, no models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Raw = Mapping[str, Tensor]  # role -> tensor of one matrix, as the checkpoint has it
Shapes = Mapping[str, tuple[int, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Role:
    """One of the tensors that a matrix is stored in, by what its name ends in."""

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True


@dataclass(frozen=True)
class Native:
    """The number format that a scheme stores, as runtime/formats.py calls it; group -1 is a whole row."""

    code: str  # int4, int8 or mxfp4
    group: int
    symmetric: bool


@dataclass(frozen=True)
class Codes:
    """Rows of a matrix as the scheme's own numbers: number i has the scale and the zero point of group i // group."""

    code: str
    values: Tensor  # [n, I] uint8
    scales: Tensor  # [n, G]: factors, or of mxfp4 exponents biased by 127
    zeros: Tensor | None  # [n, G] integers of the same range as the values; None for mxfp4
    group: int


class Scheme(Protocol):
    """One format, made from a checkpoint's quantization_config. Matrices are [O, I], out times in.

    The first role is the one whose presence says that there is such a matrix; its tensor has `axes` axes, or one more
    where the experts of a layer are stacked.
    """

    roles: Mapping[str, Role]
    dense: str  # what the name of the dense tensor ends in, in place of the first role's suffix
    axes: int
    transposed: bool  # the dense tensor is [I, O]
    native: Native | None
    dropped: tuple[str, ...]  # ends of names of tensors that only computing in this format needs

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for a variant that is not read."""

    def shape(self, shapes: Shapes) -> tuple[int, int]:
        """(O, I) of the matrix that tensors of these shapes hold. Raises ValueError where they do not fit."""

    def rows(self, raw: Raw, begin: int, end: int) -> Tensor:
        """Rows of the matrix by the format's definition, fp32 [n, I]. Raises ValueError for numbers that are none."""

    def codes(self, raw: Raw, begin: int, end: int) -> Codes | None:
        """The same rows as integers; None where a row is not in groups of neighbours."""
