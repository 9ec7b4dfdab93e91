"""Which experts of a model a fit keeps, and what each was worth: the part of fit.json that running a model needs.

Knows integers and scores, and the file; how they were chosen is in compress/, what is made of them in narrow.py.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from moedge.errors import DataError
from moedge.models.anatomy import Anatomy

FILE = "fit.json"
FORMAT, VERSION = "moedge-fit", 1


@dataclass(frozen=True)
class Kept:
    """Which experts of a model a fit keeps. Raises DataError when the parts do not fit together."""

    architecture: str
    num_experts: tuple[int, ...]  # of the full model, per MoE layer
    experts: tuple[tuple[int, ...], ...]  # per MoE layer: the full model's ids, ascending
    scores: tuple[tuple[float, ...], ...]  # per MoE layer: what each expert of the full model is worth

    def __post_init__(self) -> None:
        layers = len(self.num_experts)
        if not layers or len(self.experts) != layers or len(self.scores) != layers:
            raise DataError(
                f"num_experts is of {layers} layers, experts of {len(self.experts)}, scores of {len(self.scores)}: "
                "all must be of the same"
            )
        for layer, (count, kept, scores) in enumerate(zip(self.num_experts, self.experts, self.scores, strict=True)):
            if any(a >= b for a, b in pairwise(kept)) or not all(0 <= e < count for e in kept):
                raise DataError(f"experts of layer {layer} must be ascending ids below {count}, not {list(kept)}")
            if len(scores) != count or not all(math.isfinite(score) for score in scores):
                raise DataError(f"scores of layer {layer} must be {count} finite numbers, not {list(scores)}")

    def order(self, layer: int) -> tuple[int, ...]:
        """The kept experts of a layer, the most important first."""
        scores = self.scores[layer]
        return tuple(sorted(self.experts[layer], key=lambda expert: (-scores[expert], expert)))

    def check(self, anatomy: Anatomy) -> None:
        """Raises DataError when it was made for another model than the one with this (full) anatomy."""
        counts = tuple(layer.num_experts for layer in anatomy.layers)
        if self.architecture != anatomy.architecture or self.num_experts != counts:
            raise DataError(
                f"the fit is of {_describe(self.architecture, self.num_experts)}, the model is "
                f"{_describe(anatomy.architecture, counts)}: give the model that was fitted, or fit this one"
            )
        for layer, kept in zip(anatomy.layers, self.experts, strict=True):
            if len(kept) < layer.top_k:
                raise DataError(
                    f"the fit keeps {len(kept)} experts of layer {layer.index}, a token takes {layer.top_k}: "
                    "fit the model again with a larger budget"
                )

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Into `fit.json` of the folder `path`, or into the file `path`, `more` beside it; what else it says stays."""
        path = _file(path)
        found = _read(path) if path.exists() else {"format": FORMAT, "version": VERSION}
        kept = {
            "architecture": self.architecture,
            "num_experts": [int(count) for count in self.num_experts],  # numpy's integers are none to json
            "experts": [[int(expert) for expert in each] for each in self.experts],
            "scores": [[float(score) for score in each] for each in self.scores],
        }
        file, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(file, "w", encoding="utf-8") as out:
                out.write(json.dumps(found | more | {"kept": kept}) + "\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Kept":
        """Read `fit.json`, or that of the folder `path`. Raises DataError that names the file and what is wrong."""
        path = _file(path)
        if not path.exists():
            raise DataError(f"{path} does not exist: name what `moedge fit` wrote, a folder with {FILE} in it")
        kept = _read(path).get("kept")
        try:
            return _parse(kept)
        except (TypeError, KeyError, DataError) as error:
            raise DataError(f"{path} does not say which experts are kept ({error}): fit the model again") from error


def _describe(architecture: str, counts: Sequence[int]) -> str:
    each = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{architecture} with {len(counts)} MoE layers of {each} experts"


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    return path / FILE if path.is_dir() else path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): fit the model again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path} is not a fit (its format is not {FORMAT!r}): name what `moedge fit` wrote")
    version = found.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataError(f"{path} has version {version}, this moedge reads up to {VERSION}: install a newer moedge")
    return found


def _parse(given: Any) -> Kept:
    if not isinstance(given, Mapping):
        raise TypeError("it has no table `kept`")
    if unknown := given.keys() - {field.name for field in fields(Kept)}:
        raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
    architecture, counts = given["architecture"], _integers(given["num_experts"])
    if not isinstance(architecture, str):
        raise TypeError(f"architecture {architecture!r} is not a name")
    experts = tuple(_integers(each) for each in given["experts"])
    scores = tuple(tuple(float(score) for score in each) for each in given["scores"])
    return Kept(architecture, counts, experts, scores)


def _integers(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(value) is int for value in given):
        raise TypeError(f"{given!r} is not a list of integers")
    return tuple(given)
