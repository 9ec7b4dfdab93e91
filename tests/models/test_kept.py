"""Which experts a fit keeps: written into fit.json, read back, and refused for other models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge.errors import DataError
from moedge.models.anatomy import Anatomy, dissect
from moedge.models.architecture import meta_model
from moedge.models.kept import Kept
from moedge.models.tiny import tiny_config

SCORES = ((0.1, 3.0, 0.5, 0.2, 0.0, 2.0, 0.1, 0.3),) * 4
KEPT = Kept("MixtralForCausalLM", (8,) * 4, ((1, 2, 5),) * 4, SCORES)


def anatomy(model_type: str, **sizes: Any) -> Anatomy:
    return dissect(meta_model(tiny_config(model_type, **sizes), torch.float32))


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    KEPT.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]
    assert Kept.load(tmp_path) == Kept.load(tmp_path / "fit.json") == KEPT
    assert KEPT.order(0) == (1, 5, 2)


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    ids, scores = np.array([1, 2, 5]), np.array(SCORES)
    Kept("MixtralForCausalLM", tuple(np.array([8] * 4)), (tuple(ids),) * 4, tuple(map(tuple, scores))).save(tmp_path)
    assert Kept.load(tmp_path) == KEPT


def test_what_else_the_file_says_stays(tmp_path: Path) -> None:
    text = {"format": "moedge-fit", "version": 1, "method": "random", "kept": "older"}
    (tmp_path / "fit.json").write_text(json.dumps(text))
    KEPT.save(tmp_path)
    found = json.loads((tmp_path / "fit.json").read_text())
    assert (found["method"], found["kept"]["architecture"]) == ("random", "MixtralForCausalLM")


def test_only_its_own_model() -> None:
    KEPT.check(anatomy("mixtral"))
    with pytest.raises(DataError, match=r"of Mixtral\w+ with 4 MoE layers of 8 experts, the model is Olmoe"):
        KEPT.check(anatomy("olmoe"))
    with pytest.raises(DataError, match=r"the model is Mixtral\w+ with 4 MoE layers of 3 experts: give the model that"):
        KEPT.check(anatomy("mixtral", num_local_experts=3))
    with pytest.raises(DataError, match="keeps 3 experts of layer 0, a token takes 4"):
        KEPT.check(anatomy("mixtral", num_experts_per_tok=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": ((2, 1, 5),) * 4}, r"layer 0 must be ascending ids below 8, not \[2, 1, 5\]"),
        ({"experts": ((1, 1, 5),) * 4}, "ascending"),
        ({"experts": ((1, 2, 5),) * 3 + ((1, 2, 8),)}, "layer 3 must be ascending ids below 8"),
        ({"experts": ((1, 2, 5),) * 3}, "num_experts is of 4 layers, experts of 3, scores of 4"),
        ({"scores": ((1.0,) * 7,) * 4}, "scores of layer 0 must be 8 finite numbers"),
        ({"scores": ((1.0,) * 7 + (float("nan"),),) * 4}, "finite"),
    ],
)
def test_parts_that_do_not_fit_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(KEPT, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a fit"),
        ('{"format": "other"}', "is not a fit"),
        ('{"format": "moedge-fit", "version": 2}', "has version 2, this moedge reads up to 1"),
        ('{"format": "moedge-fit", "version": 1}', "does not say which experts are kept"),
        ('{"format": "moedge-fit", "version": 1, "kept": {"architecture": "A"}}', "num_experts"),
        ('{"format": "moedge-fit", "version": 1, "kept": {"more": 1}}', "unknown: more"),
        (
            '{"format": "moedge-fit", "version": 1, "kept": {"architecture": "A", "num_experts": [0.5]}}',
            r"\[0.5\] is not a list of integers",
        ),
    ],
)
def test_a_file_that_is_something_else(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(DataError, match=f"fit.json .*{message}"):
        Kept.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fit.json does not exist: name what `moedge fit` wrote"):
        Kept.load(tmp_path)
