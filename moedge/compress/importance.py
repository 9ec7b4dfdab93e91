"""What an expert is worth to a task: sums over the tokens of one pass, and the scores that are made of them.

Pure functions of arrays; no models, no files of samples. A score compares the experts of one layer only. Letters:
L MoE layers, E experts (of the largest layer; others have zeros behind), t tokens, p_e(t) the softmax of the router's
logits, T_e the tokens that chose expert e, g_e(t) the weight with which the model scales the expert's output f_e(t),
g'_e(t) the same with the weights of the token's experts made to sum to 1.
"""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedge.compress.partition import shares
from moedge.errors import DataError

_UNREADABLE = (  # what zipfile and numpy raise for bytes that are not theirs
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError, SyntaxError, TypeError),
)
Floats = NDArray[np.float64]
Score = Callable[["Statistics"], Floats]


@dataclass(eq=False)
class Statistics:
    """Sums over the tokens that counted. Raises DataError when those of another model are added."""

    tokens: Floats  # [L]
    counts: Floats  # [L, E] |T_e|
    mass: Floats  # sum of p_e(t) over all tokens
    gate: Floats  # sum of g_e(t) over T_e
    gate_norm: Floats  # sum of g_e(t) |f_e(t)|_2
    even_gate_norm: Floats  # sum of g'_e(t) |f_e(t)|_2
    energy: Floats  # sum of (g_e(t) |f_e(t)|_2)^2
    norm: Floats  # sum of |f_e(t)|_2
    utility: Floats  # PreMoe's sum over its confident tokens, see `premoe`
    largest: Floats  # the largest |element of f_e(t)|

    @classmethod
    def empty(cls, layers: int, experts: int) -> "Statistics":
        return cls(np.zeros(layers), *(np.zeros((layers, experts)) for _ in fields(cls)[1:]))

    def add(self, other: "Statistics") -> None:
        """Add what was seen on more tokens."""
        if self.counts.shape != other.counts.shape:
            raise DataError(f"statistics of {other.counts.shape} layers and experts do not fit {self.counts.shape}")
        for field in fields(self):
            mine, more = getattr(self, field.name), getattr(other, field.name)
            if field.name == "largest":
                np.maximum(mine, more, out=mine)
            else:
                mine += more

    def unrouted(self, num_experts: Sequence[int]) -> list[tuple[int, int]]:
        """(layer, expert) that no token chose."""
        return [
            (layer, e) for layer, count in enumerate(num_experts) for e in range(count) if not self.counts[layer, e]
        ]

    def save(self, path: Path, **more: Any) -> None:
        """Write an npz file; one that is there is replaced only when the new one is whole."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)} | more
        file, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(file, "wb") as out:
                np.savez_compressed(out, **arrays)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> tuple["Statistics", dict[str, Any]]:
        """What `save` wrote, and the other arrays beside it. Raises DataError that names the file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            own = cls(**{field.name: found.pop(field.name) for field in fields(cls)})
        except _UNREADABLE as error:
            raise DataError(f"{path} does not hold the statistics of a profile ({error}): delete it") from error
        return own, found


def frequency(seen: Statistics) -> Floats:
    """|T_e|: how many tokens chose the expert."""
    return seen.counts.copy()


def mass(seen: Statistics) -> Floats:
    """Sum of p_e(t) over all tokens: LiteMoE, Eq. 2 (SenSys 2024)."""
    return seen.mass.copy()


def reap(seen: Statistics) -> Floats:
    """Mean over T_e of g'_e(t) |f_e(t)|_2: REAP (arXiv 2510.13999), weights renormalised as in its code since 2026-03.

    Where a token takes one expert only, g' is always 1.
    """
    return seen.even_gate_norm / np.maximum(seen.counts, 1)


def reap_sum(seen: Statistics) -> Floats:
    """Sum over T_e of g_e(t) |f_e(t)|_2: as REAP, but an expert that is used more counts for more."""
    return seen.gate_norm.copy()


def reap_mass(seen: Statistics) -> Floats:
    """`reap_sum` and `mass`, each as a share of its layer, added: what an expert gives, and what the router asks of it.

    The second counts experts that were just not chosen: tokens turn to them where others are gone. The default: it
    measured best (docs/compress.md).
    """
    pairs = zip(seen.gate_norm, seen.mass, strict=True)
    return np.stack([shares(given) + shares(asked) for given, asked in pairs])


def energy(seen: Statistics) -> Floats:
    """Sum over T_e of (g_e(t) |f_e(t)|_2)^2: the squared change of the layer's output without the expert's term.

    As REAP it asks how much an expert gives, but summed, so that use counts, and squared, so that the few tokens that
    need it most do.
    """
    return seen.energy.copy()


def ean(seen: Statistics) -> Floats:
    """Mean over T_e of |f_e(t)|_2, without the router: the expert activation norm."""
    return seen.norm / np.maximum(seen.counts, 1)


def premoe(seen: Statistics) -> Floats:
    """Mean over all tokens of an expert's logit on its confident tokens: PreMoe's TCESS (arXiv 2505.17639, v1), mended.

    A token is confident of an expert that it chose when the softmax over its chosen experts is at least 1/k. The
    published form averages the raw logit, so that an expert that is used with a negative one ranks below an expert that
    is never used (0), and adding a constant to all logits changes the order. Here logits are counted from the token's
    smallest.
    """
    return seen.utility / np.maximum(seen.tokens, 1)[:, None]


def random(seen: Statistics) -> Floats:
    """The same order for every task: what any method has to beat."""
    return np.random.default_rng(0).random(seen.counts.shape)


METHODS: dict[str, Score] = {
    "default": reap_mass,
    "litemoe": mass,
    "reap": reap,
    "reap-sum": reap_sum,
    "reap-mass": reap_mass,
    "premoe": premoe,
    "ean": ean,
    "energy": energy,
    "frequency": frequency,
    "random": random,
}


def super_experts(seen: Statistics, num_experts: Sequence[int]) -> list[tuple[int, int]]:
    """(layer, expert) whose outputs have outliers without which the model may break: Super Experts (arXiv 2507.23279).

    Those whose largest output element is above the 99.5th percentile of all experts', and above a tenth of the largest.
    """
    peaks = np.concatenate([seen.largest[layer, :count] for layer, count in enumerate(num_experts)])
    least = max(float(np.percentile(peaks, 99.5)), float(peaks.max()) / 10)
    return [
        (layer, int(expert))
        for layer, count in enumerate(num_experts)
        for expert in np.flatnonzero(seen.largest[layer, :count] > least)
    ]
