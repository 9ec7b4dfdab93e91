"""Streams of token rows with a loss weight per token, and their mixture by shares. Knows tokens, not text.

A row is a pure function of its number, so a run continues with the same data after a stop: only counts are saved.
Legend of shapes: B rows, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moedge.errors import DataError

PAD_SEGMENT = -1


@dataclass(frozen=True)
class Row:
    """`weights[t]` is the loss weight of predicting `ids[t]`; `segments[t]` numbers the documents, -1 is padding."""

    ids: NDArray[np.int64]  # [T]
    weights: NDArray[np.float32]  # [T]
    segments: NDArray[np.int32]  # [T]


class Stream(Protocol):
    def row(self, number: int, length: int) -> Row:
        """Row `number` (0, 1, ...) with `length` tokens."""


class TextStream:
    """One long text, cut into rows: every epoch shifts the cuts and shuffles the rows."""

    def __init__(self, ids: NDArray[Any], seed: int = 0) -> None:
        self.ids = ids
        self.seed = seed
        self._orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}

    def _order(self, epoch: int, length: int) -> tuple[int, NDArray[np.int64]]:
        key = (epoch, length)
        if key not in self._orders:
            rng = np.random.default_rng((self.seed, epoch, length))
            shift = int(rng.integers(min(length, len(self.ids) - length + 1)))
            self._orders[key] = shift, rng.permutation((len(self.ids) - shift) // length)
        return self._orders[key]

    def row(self, number: int, length: int) -> Row:
        if len(self.ids) < 2 * length:
            raise DataError(f"a stream of {len(self.ids)} tokens gives no rows of {length}: add text or shorten rows")
        epoch = 0
        while number >= len(self._order(epoch, length)[1]):
            number -= len(self._order(epoch, length)[1])
            epoch += 1
        shift, order = self._order(epoch, length)
        start = shift + int(order[number]) * length
        ids = self.ids[start : start + length].astype(np.int64)
        weights = np.ones(length, np.float32)
        weights[0] = 0.0  # nothing stands before it
        return Row(ids, weights, np.zeros(length, np.int32))


class ExampleStream:
    """Short documents, several to a row, each on its own; every epoch shuffles them, and cuts those longer than a row.

    ids, weights: all documents end to end; offsets [D + 1]: where each begins.
    """

    def __init__(
        self, ids: NDArray[Any], weights: NDArray[np.float32], offsets: NDArray[np.int64], seed: int = 0
    ) -> None:
        if len(ids) != len(weights) or len(offsets) < 2 or offsets[-1] != len(ids):
            raise DataError(f"{len(ids)} tokens, {len(weights)} weights, offsets to {offsets[-1:]}: they must agree")
        self.ids, self.weights, self.offsets = ids, weights, offsets
        self.seed = seed
        self._packed: dict[tuple[int, int], list[NDArray[np.int64]]] = {}

    def _rows(self, epoch: int, length: int) -> list[NDArray[np.int64]]:
        """The documents of each row of one epoch."""
        key = (epoch, length)
        if key not in self._packed:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.offsets) - 1)
            sizes = np.minimum(np.diff(self.offsets), length)
            starts, used = [0], 0
            for place, size in enumerate(sizes[order].tolist()):
                if used + size > length:
                    starts.append(place)
                    used = 0
                used += size
            self._packed[key] = np.split(order, starts[1:])
        return self._packed[key]

    def row(self, number: int, length: int) -> Row:
        epoch = 0
        while number >= len(self._rows(epoch, length)):
            number -= len(self._rows(epoch, length))
            epoch += 1
        ids = np.zeros(length, np.int64)
        weights = np.zeros(length, np.float32)
        segments = np.full(length, PAD_SEGMENT, np.int32)
        at = 0
        for segment, document in enumerate(self._rows(epoch, length)[number].tolist()):
            start = int(self.offsets[document])
            size = min(int(self.offsets[document + 1]) - start, length)
            ids[at : at + size] = self.ids[start : start + size]
            weights[at : at + size] = self.weights[start : start + size]
            weights[at] = 0.0  # the document before it says nothing about it
            segments[at : at + size] = segment
            at += size
        return Row(ids, weights, segments)


class Mixture:
    """Rows of named streams in proportion to shares: the stream that is furthest behind its share comes next."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = dict(streams)
        self.credit = dict.fromkeys(self.streams, 0.0)
        self.taken: dict[str, dict[int, int]] = {name: {} for name in self.streams}  # rows by their length

    def next(self, shares: Mapping[str, float], length: int) -> tuple[str, Row]:
        """The next row and the stream it is from. `shares` need not sum to 1."""
        unknown = set(shares) - set(self.streams)
        if unknown or not sum(shares.values()) > 0:
            raise DataError(f"shares {dict(shares)} name no stream of {sorted(self.streams)}, or sum to nothing")
        total = sum(shares.values())
        for name, share in shares.items():
            self.credit[name] += share / total
        name = max(shares, key=lambda key: (self.credit[key], key))
        self.credit[name] -= 1.0
        number = self.taken[name].get(length, 0)
        self.taken[name][length] = number + 1
        return name, self.streams[name].row(number, length)

    def batch(self, shares: Mapping[str, float], rows: int, length: int) -> list[Row]:
        return [self.next(shares, length)[1] for _ in range(rows)]

    def state(self) -> dict[str, Any]:
        return {"credit": dict(self.credit), "taken": {name: dict(counts) for name, counts in self.taken.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        if set(state["credit"]) != set(self.streams):
            raise DataError(f"the saved run mixed {sorted(state['credit'])}, this one {sorted(self.streams)}")
        self.credit = dict(state["credit"])
        self.taken = {name: dict(counts) for name, counts in state["taken"].items()}


def stack(rows: Sequence[Row]) -> Row:
    """[B] rows of T tokens as one Row of [B, T] arrays."""
    return Row(
        np.stack([row.ids for row in rows]),
        np.stack([row.weights for row in rows]),
        np.stack([row.segments for row in rows]),
    )
