"""Better scales for int8 and int4: clip each group of a matrix so far that the expert's output changes least.

The error of a clipped group is weighed by the second moments of its inputs on calibration texts, E[g^2 x x'], g being
the router's weight, with which an expert's output is multiplied: the clipping search of AWQ (Lin et al. 2023, arXiv
2306.00978), with the Hessian of GPTQ (Frantar et al. 2022, arXiv 2210.17323) in blocks of 32 x 32 in place of inputs.
Part of it is taken as if all inputs were alike, which keeps few or foreign texts from doing harm (docs/log.md).
Pure functions of tensors: no model, no text. Legend: T tokens, O x I a matrix, B blocks of 32 inputs, G groups.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from moedge.runtime.formats import BLOCK, Format, dequantise, quantise

RATIOS = tuple(1 - 0.0125 * step for step in range(17))  # 1.0 down to 0.8; lower ones fitted the texts, not the model
ALIKE = 0.6  # the share of the error that counts all inputs as alike
MOMENTS = "moments"  # the file's name in the folder of an unfinished pack
Inputs = Mapping[str, int]  # a matrix of an expert -> its inputs


def second_moments(x: Tensor, gate: Tensor) -> Tensor:
    """Sums over tokens of gate^2 x x' within blocks: [T, I], [T] -> [B, 32, 32]."""
    weighted = x.float() * gate.float()[:, None]
    blocks = pad(weighted, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK).transpose(0, 1)  # [B, T, 32]
    return blocks.mT @ blocks


class Moments:
    """The second moments of the inputs of every matrix of every expert, `inputs[layer]` saying which there are."""

    def __init__(self, num_experts: Sequence[int], inputs: Sequence[Inputs]) -> None:
        self.sums = [  # filled, so that the memory is taken now
            {name: torch.full((count, -(-size // BLOCK), BLOCK, BLOCK), 0.0) for name, size in each.items()}
            for count, each in zip(num_experts, inputs, strict=True)
        ]
        self.tokens = [torch.zeros(count, dtype=torch.int64) for count in num_experts]

    @staticmethod
    def nbytes_of(num_experts: Sequence[int], inputs: Sequence[Inputs]) -> int:
        """Memory that the moments take."""
        blocks = (n * -(-size // BLOCK) for n, each in zip(num_experts, inputs, strict=True) for size in each.values())
        return 4 * BLOCK**2 * sum(blocks)

    def add(self, layer: int, expert: int, inputs: Mapping[str, Tensor], gate: Tensor) -> None:
        """Tokens that an expert saw: the inputs [T, I] of each matrix, and the router's weights [T]."""
        for name, x in inputs.items():
            self.sums[layer][name][expert] += second_moments(x, gate)
        self.tokens[layer][expert] += len(gate)

    @property
    def unseen(self) -> int:
        """Experts that no token reached."""
        return sum(int((tokens == 0).sum()) for tokens in self.tokens)

    def of(self, layer: int, expert: int) -> dict[str, Tensor]:
        """[B, 32, 32] for each matrix; of an expert that saw no token the sum over its layer."""
        seen = bool(self.tokens[layer][expert])
        return {name: sums[expert] if seen else sums.sum(0) for name, sums in self.sums[layer].items()}

    def clear(self) -> None:
        for tensor in self._tensors():
            tensor.zero_()

    @property
    def checksum(self) -> str:
        crc = 0
        for tensor in self._tensors():
            crc = zlib.crc32(tensor.numpy().data, crc)
        return f"{crc:08x}"

    def save(self, path: Path) -> None:
        """The numbers as they lie in memory."""
        with open(path, "wb") as file:
            for tensor in self._tensors():
                file.write(tensor.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """What `save` wrote of moments of the same shapes; what a damaged file holds only `checksum` shows."""
        with open(path, "rb") as file:
            for tensor in self._tensors():
                file.readinto(tensor.numpy().data)

    def _tensors(self) -> Iterator[Tensor]:
        for each in self.sums:
            yield from each.values()
        yield from self.tokens


def best_clip(matrix: Tensor, format: Format, moments: Tensor, name: str = "matrix") -> Tensor:
    """The clipping ratio [O, G] of each group of `matrix` [O, I] that changes its products least: see `quantise`.

    `moments` [B, 32, 32] of its inputs. Where they are zero, and where ratios are equally good, the largest.
    """
    columns = matrix.shape[1]
    size = moments.diagonal(dim1=1, dim2=2).sum() / columns
    weights = (1 - ALIKE) * moments + ALIKE * size * torch.eye(BLOCK)  # [B, 32, 32]
    least = clip = torch.empty(0)
    for ratio in RATIOS:
        difference = dequantise(quantise(matrix, format, ratio, name), format, columns) - matrix.float()
        error = _error(difference, weights, format.group)
        if ratio == RATIOS[0]:
            least, clip = error, torch.full_like(error, ratio)
            continue
        better = error < least
        least, clip = torch.where(better, error, least), torch.where(better, ratio, clip)
    return clip


def _error(difference: Tensor, weights: Tensor, group: int) -> Tensor:
    """What a difference [O, I] of weights changes in the product, by group: [O, G]."""
    rows, columns = difference.shape
    blocks = pad(difference, (0, -columns % BLOCK)).view(rows, -1, BLOCK).transpose(0, 1)  # [B, O, 32]
    error = ((blocks @ weights) * blocks).sum(2).T  # [O, B]
    per = group // BLOCK
    return pad(error, (0, -error.shape[1] % per)).view(rows, -1, per).sum(2)
