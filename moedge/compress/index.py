"""Statistics of known tasks beside a model, and which of them a new task resembles: PreMoe's retrieval, mended.

A new task's samples run to the first MoE layer only; the task whose first-layer routing is nearest lends its statistics
of all layers (task-adaptive expert retrieval, arXiv 2505.17639). The paper takes whatever is nearest; here a task that
is farther than what the stored task's own samples differ among themselves is not near. Knows arrays and files.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.compress.importance import Statistics
from moedge.errors import DataError

NEAR = 2.0  # times the distance between a stored task's own halves: those have half of its samples each
SUFFIX = ".npz"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """The nearest stored task; `near` says whether its statistics may stand for the new one's."""

    name: str
    distance: float
    limit: float  # the largest distance that is near

    @property
    def near(self) -> bool:
        return self.distance <= self.limit


def distance(one: Floats, other: Floats) -> float:
    """Jensen-Shannon distance of two layers' router mass [E], 0 (alike) to 1 (no expert in common)."""
    p, q = (np.asarray(mass, np.float64) / max(float(np.sum(mass)), 1e-300) for mass in (one, other))
    middle = (p + q) / 2
    terms = [np.where(x > 0, x * np.log2(np.where(x > 0, x, 1) / np.where(x > 0, middle, 1)), 0).sum() for x in (p, q)]
    return float(np.sqrt(max(0.0, sum(terms) / 2)))


def spread(first: Sequence[Floats]) -> float:
    """How far two halves of a task's own passes are apart, from their first-layer masses [E] in turn."""
    if len(first) < 2:
        raise DataError("the samples fill one pass, so how much the task varies is unknown: give more samples to index")
    return distance(np.sum(first[0::2], axis=0), np.sum(first[1::2], axis=0))


def check_name(name: str) -> None:
    """Raises DataError for a task name that an index cannot have."""
    if not re.fullmatch(r"[\w-][\w. -]*", name):
        raise DataError(
            f"task name {name!r} cannot name a file of the index: give another, of letters, digits, dots and dashes, "
            "as in NAME=FILE"
        )


class TaskIndex:
    """The tasks in a folder, one npz file each. `model`: identity of the model; another's index is refused."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self._model = folder, model

    @property
    def names(self) -> list[str]:
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def add(self, name: str, seen: Statistics, spread: float, about: dict[str, Any]) -> None:
        """Store a task under `name`, replacing what stood there. `about`: what to remember of where it came from."""
        check_name(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = json.dumps(about | {"model": self._model})
        seen.save(self.folder / f"{name}{SUFFIX}", spread=np.float64(spread), about=np.array(note))

    def read(self, name: str) -> tuple[Statistics, float, dict[str, Any]]:
        """Statistics, spread and what is remembered of a stored task. Raises DataError."""
        path = self.folder / f"{name}{SUFFIX}"
        if not path.exists():
            raise DataError(f"{self.folder} has no task {name!r}: it has {', '.join(self.names) or 'none'}")
        seen, more = Statistics.load(path)
        try:
            about = json.loads(str(more["about"]))
            own = float(more["spread"])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path} is no entry of a task index ({error}): delete it") from error
        if about.get("model") != self._model:
            raise DataError(f"{path} was made with another model: give another --task-index folder, or delete it")
        return seen, own, about

    def nearest(self, mass: Floats, scope: str) -> Match | None:
        """The task, stored with the same `scope`, whose first-layer router mass is nearest to `mass` [E]; None of none.

        Raises DataError for an entry that is damaged, or another model's.
        """
        found = []
        for name in self.names:
            seen, own, about = self.read(name)
            if about.get("scope") != scope:
                continue
            found.append(Match(name, distance(seen.mass[0], mass), NEAR * own))
        return min(found, key=lambda match: match.distance, default=None)
