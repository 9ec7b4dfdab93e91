"""One model on several threads: each takes some rows of a step with one core. Knows no data and no optimiser.

Cores that are shared with other work lose less this way than with threads inside every matrix product, which all wait
for the slowest: on two cores with five other processes 20% more tokens a second.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from moedge.train.data import Row
from moedge.train.loss import Losses, RouterLoss, combine, forward

A = TypeVar("A")
B = TypeVar("B")


class Replicas:
    """`model` and copies that share its parameters and have their own gradients."""

    def __init__(self, model: Any, workers: int) -> None:
        self.models = [model] + [copy.deepcopy(model) for _ in range(workers - 1)]
        for other in self.models[1:]:
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                theirs.data = mine.data
        self._threads = ThreadPoolExecutor(workers) if workers > 1 else None

    def map(self, work: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """`work` of every item, in order; exceptions of the work come through."""
        if self._threads is None:
            return [work(item) for item in items]
        return list(self._threads.map(work, items))

    def gradients(self, rows: Row, router: RouterLoss, used: Tensor | None = None) -> tuple[Losses, list[float]]:
        """Forward and backward of rows [B, T]; the gradients' sum lands in `model`. Also the mean loss of each row.

        `used` is the experts' mean usage in the steps before.
        """
        pieces = [_slice(rows, index, len(self.models)) for index in range(len(self.models))]
        work = [(model, piece) for model, piece in zip(self.models, pieces, strict=True) if len(piece.ids)]
        parts = self.map(lambda item: forward(item[0], item[1], router.balance > 0), work)
        result = combine(parts, router, used)
        self.map(lambda loss: torch.autograd.backward([loss]), result.parts)
        for other in self.models[1:]:
            for mine, theirs in zip(self.models[0].parameters(), other.parameters(), strict=True):
                if theirs.grad is not None:
                    mine.grad = theirs.grad if mine.grad is None else mine.grad.add_(theirs.grad)
                    theirs.grad = None
        return result, [value for part in parts for value in part.rows]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()


def _slice(rows: Row, index: int, count: int) -> Row:
    size = len(rows.ids)
    piece = slice(size * index // count, size * (index + 1) // count)
    return Row(rows.ids[piece], rows.weights[piece], rows.segments[piece])
