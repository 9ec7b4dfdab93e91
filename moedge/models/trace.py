"""Routing traces: which experts every token took at every MoE layer, with the router's weights; saved and loaded.

Letters: N tokens of all sequences, L MoE layers, k experts per token, S sequences. Knows arrays and npz files, no
models: recorder.py makes traces of a running model, runtime/replay.py replays them against a cache.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.errors import DataError

NONE = -1  # in place of an expert: the router chose fewer for this token, or the layer saw no such token


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Router choices of S sequences, one after the other. Raises DataError when the arrays do not fit together."""

    experts: NDArray[np.integer[Any]]  # [N, L, k]; -1: fewer experts for this token, or no part of this layer
    probs: NDArray[np.floating[Any]]  # [N, L, k], the weight of each
    offsets: NDArray[np.int64]  # [S + 1], sequence s is tokens offsets[s] to offsets[s + 1]

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or not np.issubdtype(self.experts.dtype, np.integer):
            raise DataError(f"experts must be integers [N, L, k], not {self.experts.dtype} {list(self.experts.shape)}")
        if self.probs.shape != self.experts.shape or not np.issubdtype(self.probs.dtype, np.floating):
            raise DataError(
                f"probs must be floats {list(self.experts.shape)} like experts, not {self.probs.dtype} "
                f"{list(self.probs.shape)}"
            )
        ends = self.offsets
        if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer) or len(ends) == 0:
            raise DataError(f"offsets must be integers [S + 1], not {ends.dtype} {list(ends.shape)}")
        if ends[0] != 0 or ends[-1] != len(self.experts) or (np.diff(ends) < 0).any():
            raise DataError(f"offsets must rise from 0 to the {len(self.experts)} tokens, not {ends[0]} to {ends[-1]}")
        if self.experts.size and self.experts.min() < NONE:
            raise DataError(f"experts has the id {self.experts.min()}: ids count from 0, and -1 means none")

    def __len__(self) -> int:
        """Tokens."""
        return len(self.experts)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def num_experts(self) -> int:
        """At least this many experts per layer: one more than the largest id seen."""
        return int(self.experts.max()) + 1 if self.experts.size else 0

    def sequences(self) -> Iterator["RoutingTrace"]:
        """Each sequence as a trace of its own, as views."""
        return (self.part(s, s + 1) for s in range(self.num_sequences))

    def part(self, start: int, stop: int | None = None) -> "RoutingTrace":
        """Sequences `start` to `stop`, as views."""
        start, stop, _ = slice(start, stop).indices(self.num_sequences)
        offsets = self.offsets[start : max(start, stop) + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return RoutingTrace(self.experts[tokens], self.probs[tokens], offsets - offsets[0])

    def save(self, path: str | Path) -> None:
        """Write an npz file; a file that is there is replaced only when the new one is whole."""
        path = Path(path)
        file, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(file, "wb") as out:
                np.savez_compressed(out, experts=self.experts, probs=self.probs, offsets=self.offsets)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read an npz file, or `traces.npz` of a folder. Raises DataError that names the file and what is wrong."""
        path = Path(path)
        path = path / "traces.npz" if path.is_dir() else path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in ("experts", "probs", "offsets")}
        except FileNotFoundError as error:
            raise DataError(f"trace {path} does not exist: record one with moedge trace") from error
        except KeyError as error:
            raise DataError(f"trace {path} has no array {error}: it needs experts, probs and offsets") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            raise DataError(f"trace {path} is not an npz file that can be read: {error}") from error
        try:
            return cls(found["experts"], found["probs"], found["offsets"])
        except DataError as error:
            raise DataError(f"trace {path}: {error}") from error
