"""`experts=` and `fallback=`: what is reachable, what stays in memory, and that results do not depend on the latter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fitting import halves, logits_of

from moedge.errors import DataError, ModelError
from moedge.models.kept import Kept
from moedge.runtime.lm import LM, load
from moedge.runtime.policy import LayerCache, Lfu, Pinned
from moedge.runtime.verb_plan import command as plan_command
from moedge.runtime.verb_run import command as run_command

Tiny = Callable[..., Path]
SCORES = tuple(float(expert) for expert in range(8))  # the last is the most important


def fit_of(folder: Path, architecture: str = "Qwen3MoeForCausalLM") -> Kept:
    kept = Kept(architecture, (8,) * 4, tuple(halves(4)), (SCORES,) * 4)
    kept.save(folder)
    return kept


@pytest.mark.parametrize("policy", ["recall", "lfu", "pinned"])
def test_with_fallback_results_are_the_full_models(policy: str, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny("qwen3_moe")
    with load(folder) as lm:
        whole = logits_of(lm.model)
    for capacity in (0, 5):
        with load_with(capacity, folder, experts=halves(4), fallback=True, policy=policy) as lm:
            for _ in range(2):
                assert torch.equal(logits_of(lm.model), whole)


@pytest.mark.parametrize(("capacity", "pinned"), [(2, {5, 7}), (3, {2, 5, 7}), (6, {0, 2, 5, 7})])
def test_the_most_important_stay(
    capacity: int, pinned: set[int], tiny: Tiny, tmp_path: Path, load_with: Callable[..., LM]
) -> None:
    fit_of(tmp_path)
    with load_with(capacity, tiny("qwen3_moe"), experts=tmp_path, fallback=True) as lm:
        for first in (0, 4):
            for _ in lm.store.fetch(0, range(8)):
                pass
            for _ in range(3):  # others come, these stay
                for _ in lm.store.fetch(0, [first + 1, first + 2]):
                    pass
            assert pinned <= lm.store.resident(0)
            assert len(lm.store.resident(0)) == capacity


def test_what_is_not_pinned_follows_the_policy() -> None:
    pinned = LayerCache(8, 3, Pinned(8, 3, pinned=[7], rest=Lfu(8, 3)))
    lru = LayerCache(8, 3, Pinned(8, 3, pinned=[7]))
    for event in ([7], [1], [1], [2], [3]):  # 1 is used most, 2 more recently
        pinned.access(event)
        lru.access(event)
    assert (pinned.resident, lru.resident) == ({7, 1, 3}, {7, 2, 3})


def test_a_fit_and_its_ids_are_the_same(tiny: Tiny, tmp_path: Path) -> None:
    folder, kept = tiny("qwen3_moe"), fit_of(tmp_path)
    found = []
    for experts in (tmp_path, str(tmp_path / "fit.json"), kept, kept.experts):
        with load(folder, experts=experts) as lm:
            found.append(logits_of(lm.model))
    assert all(torch.equal(each, found[0]) for each in found)


def test_what_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    with pytest.raises(ModelError, match=r"fallback is for a fit.*give --experts as well"):
        load(folder, fallback=True)
    with pytest.raises(ModelError, match=r"layer 1 has experts 0 to 7, not \[8\]"):
        load(folder, experts=[(1,), (8,), (1,), (1,)], fallback=True)
    for one in ((2, 8), (-1, 2)):  # a good one beside it does not help
        with pytest.raises(ModelError, match=r"layer 1 has experts 0 to 7, not \["):
            load(folder, experts=[(1,), one, (1,), (1,)], fallback=True)
    with pytest.raises(ModelError, match="experts of 2 layers are given, the model has 4 MoE layers"):
        load(folder, experts=[(1,), (2,)], fallback=True)
    with pytest.raises(DataError, match=r"nowhere.* does not exist"):
        load(folder, experts=tmp_path / "nowhere")
    fit_of(tmp_path, "MixtralForCausalLM")
    for fallback in (False, True):
        with pytest.raises(DataError, match="the fit is of MixtralForCausalLM"):
            load(folder, experts=tmp_path, fallback=fallback)
    with pytest.raises(TypeError, match="prefil_chunk"):
        load(folder, prefil_chunk=3)


def planned(*args: object) -> dict[str, Any]:
    done = CliRunner().invoke(plan_command, [*map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_the_plan_is_what_is_enforced(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    fit_of(tmp_path)
    full, fewer = planned(folder), planned(folder, "--experts", tmp_path)
    beside = planned(folder, "--experts", tmp_path, "--fallback")
    with load(folder, experts=tmp_path) as lm:
        assert fewer["num_experts"] == list(lm.plan.num_experts) == [4] * 4
        assert fewer["capacities"] == list(lm.plan.capacities)
    assert (full["pinned"], fewer["pinned"], beside["pinned"]) == (None, None, [4] * 4)
    assert beside["num_experts"] == [8] * 4
    text = CliRunner().invoke(plan_command, [str(folder), "--experts", str(tmp_path), "--fallback"]).stdout
    assert "Of the fit's 16 experts 16 have a slot and stay in memory." in text


def test_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", tokenizer=True)
    fit_of(tmp_path)
    asked = [str(folder), "-p", "Hello", "-n", "8", "--json"]
    full, fewer, beside = (
        json.loads(CliRunner().invoke(run_command, [*asked, *more]).stdout)["text"]
        for more in ([], ["--experts", str(tmp_path)], ["--experts", str(tmp_path), "--fallback"])
    )
    assert full == beside != fewer
