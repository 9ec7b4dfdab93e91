"""LiteMoE's three kinds of experts (SenSys 2024, section 3.3): cold, moderate and hot, by two thresholds.

An expert's importance is taken as a share of its layer's. Cold: at most alpha; hot: more than beta; moderate: between.
Cold experts are dropped, hot ones kept; moderate ones are what a smaller model costs. Knows arrays of scores only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moedge.errors import DataError

NEGLIGIBLE = 0.01  # of a layer's importance: what all its cold experts together may carry
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Partition:
    """The experts of one layer by kind, ids ascending, and the thresholds as shares of the layer's importance."""

    cold: tuple[int, ...]
    moderate: tuple[int, ...]
    hot: tuple[int, ...]
    alpha: float
    beta: float


def shares(scores: Floats) -> Floats:
    """Scores [E] of a layer as shares of their sum; equal ones where all are zero. Raises DataError below zero."""
    if scores.min() < 0 or not np.isfinite(scores).all():
        raise DataError(f"importance must be finite and not below 0, not {scores.min()} to {scores.max()}")
    total = scores.sum()
    return scores / total if total > 0 else np.full(len(scores), 1 / len(scores))


def ranking(scores: Floats) -> list[int]:
    """Experts from the most to the least important; of equal ones the first."""
    return [int(expert) for expert in np.argsort(-scores, kind="stable")]


def partition(scores: Floats, alpha: float, beta: float) -> Partition:
    """The kinds by given thresholds, which are shares of the layer's importance [E]."""
    if not 0 <= alpha <= beta:
        raise DataError(f"alpha {alpha:g} and beta {beta:g}: they need 0 <= alpha <= beta")
    share = shares(scores)
    kinds = [tuple(np.flatnonzero(which).tolist()) for which in (share <= alpha, share > beta)]
    moderate = tuple(np.flatnonzero((share > alpha) & (share <= beta)).tolist())
    return Partition(kinds[0], moderate, kinds[1], alpha, beta)


def for_kept(scores: Floats, kept: Sequence[int], alpha: float | None = None) -> Partition:
    """The thresholds of a layer of which `kept` stay: beta is the largest share that goes.

    `alpha` None: the largest with which the cold experts together carry at most NEGLIGIBLE of the importance. A kept
    expert is hot whatever its share (a protected one, or one of its group's best).
    """
    share = shares(scores)
    gone = sorted(set(range(len(scores))) - set(kept), key=lambda expert: (share[expert], expert))
    beta = float(share[gone[-1]]) if gone else 0.0
    if alpha is None:
        going = share[gone]
        below = [float(each) for each in going if going[going <= each].sum() <= NEGLIGIBLE]  # equal ones all together
        alpha = below[-1] if below else 0.0
    cold = tuple(sorted(e for e in gone if share[e] <= alpha))
    return Partition(cold, tuple(sorted(set(gone) - set(cold))), tuple(sorted(kept)), min(alpha, beta), beta)
