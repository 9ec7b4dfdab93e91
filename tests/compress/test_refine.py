"""Experts are swapped as long as the model gets nearer; a search that was stopped goes on to the same experts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import questions
from packing import contents

from moedge.compress import fit as module
from moedge.compress import refine
from moedge.compress.fit import Settings, fit
from moedge.compress.plan import Shape
from moedge.compress.refine import Search, advance, promising, weigh
from moedge.errors import DataError, ModelError
from moedge.models.kept import Kept

Tiny = Callable[..., Path]
SHAPE = Shape(num_experts=8, layers=2, least=2, groups=1, expert_bytes=1, other_bytes=1)
IN_GROUPS = Shape(num_experts=8, layers=2, least=2, groups=2, expert_bytes=1, other_bytes=1)


class Apart:
    """A model whose KL is what its missing experts are worth; its gains may say something else."""

    def __init__(self, worth: torch.Tensor, gains: torch.Tensor | None = None) -> None:
        self._worth, self._gains = worth, gains
        self.asked = 0

    def of(self, kept: Sequence[Sequence[int]]) -> float:
        self.asked += 1
        return float(self._worth.sum() - sum(self._worth[layer, list(each)].sum() for layer, each in enumerate(kept)))

    def effects(self, kept: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        signed = (self._worth if self._gains is None else self._gains).clone()
        for layer, each in enumerate(kept):
            signed[layer, list(each)] *= -1
        return signed, torch.ones_like(signed)


def search_from(model: Apart, kept: list[list[int]]) -> Search:
    return Search(kept, model.of(kept), model.of(kept), width=4)


def run(model: Apart, search: Search, shape: Shape = SHAPE, protected: Any = ()) -> Search:
    while not search.ended and search.rounds < 50:
        advance(search, model, shape, protected)
    return search


def test_the_best_experts_are_found() -> None:
    model = Apart(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1]]))
    found = run(model, search_from(model, [[0, 1, 2], [5, 6, 7]]))
    assert [sorted(each) for each in found.kept] == [[5, 6, 7], [0, 1, 2]]
    assert found.kl == 15 + 15
    assert found.ended


def test_protected_experts_stay() -> None:
    model = Apart(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1]]))
    found = run(model, search_from(model, [[0, 1, 2], [5, 6, 7]]), protected=[(0, 1), (1, 7)])
    assert [sorted(each) for each in found.kept] == [[1, 6, 7], [0, 1, 7]]


def test_groups_keep_as_many() -> None:
    model = Apart(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]] * 2))
    found = run(model, search_from(model, [[0, 4], [1, 5]]), IN_GROUPS)
    assert [sorted(each) for each in found.kept] == [[3, 7], [3, 7]]


def test_swaps_that_only_promise_are_not_made() -> None:
    """Gains that are all wrong: nothing gets worse, and the search ends."""
    worth = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]] * 2)
    model = Apart(worth, gains=9 - worth)
    found = run(model, search_from(model, [[5, 6, 7], [5, 6, 7]]))
    assert [sorted(each) for each in found.kept] == [[5, 6, 7]] * 2
    assert found.ended
    assert found.rounds == 1
    assert len(found.failed) == 6  # each expert that is there once
    assert len({swap[:2] for swap in found.failed}) == 6
    assert len({swap[:2] for swap in found.failed}) == len(found.failed) == 6  # each expert that is there once
    assert model.asked < 15


def test_promising_swaps_share_no_expert() -> None:
    gains = torch.zeros(2, 8)
    gains[:, 0], gains[:, 5] = 1.0, 2.0
    kept = [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert promising(gains, kept, SHAPE, (), [], 8) == [(0, 0, 5), (1, 0, 5)]
    assert promising(gains, kept, SHAPE, (), [(0, 0, 5)], 1) == [(1, 0, 5)]
    assert promising(-gains, kept, SHAPE, (), [], 8) == []


def test_answers_count_as_much_as_all() -> None:
    class Sample:
        def __init__(self, first: int) -> None:
            self.ids, self.mask = tuple(range(6)), torch.arange(6).ge(first).numpy()

    assert weigh([Sample(2)], None)[0].weights == (0, 0, 1, 1, 1, 1)
    weighed = weigh([Sample(2), Sample(0)], [Sample(4), Sample(4)])
    assert weighed[0].weights == (0, 0, 1, 1, 3.5, 3.5)  # ten that count, four of answers: each 10 / 4 more
    assert weighed[1].weights == (1, 1, 1, 1, 3.5, 3.5)


# --- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "task").mkdir()
    return questions(tmp_path / "task" / "words.jsonl")


def refit(model: Path, task: Path, out: Path, rounds: int = 4, **settings: Any) -> Any:
    return fit(
        str(model), str(task), "50%", out, Settings("random", tokens=60, protect="0:3", refine=rounds, **settings)
    )


def test_a_fit_is_nearer_and_keeps_what_is_protected(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    fit(str(model), str(task), "50%", tmp_path / "plain", Settings("random", tokens=60, protect="0:3"))
    found = refit(model, task, tmp_path / "out")
    plain, kept = (Kept.load(tmp_path / name).experts for name in ("plain", "out"))
    assert plain != kept
    assert 3 in kept[0]
    reason = found.report.reasons[-1]
    assert reason.startswith("refined: ")
    assert " swapped in 4 rounds, KL on the samples " in reason
    before, after = (float(word) for word in reason.split("samples ")[1].replace(" after", "").split(" before and "))
    assert after < before
    assert not list((tmp_path / "out").glob("*refined*"))


def test_it_goes_on_where_it_was_interrupted(
    tiny: Tiny, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    refit(model, task, tmp_path / "whole")
    rounds: list[int] = []
    real = refine.advance

    def advance(search: Search, *args: Any) -> None:
        rounds.append(search.rounds)
        if rounds == [0, 1, 2]:
            raise KeyboardInterrupt
        real(search, *args)

    monkeypatch.setattr(refine, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        refit(model, task, tmp_path / "out")
    assert json.loads((tmp_path / "out.partial" / module.REFINED).read_text())["rounds"] == 2
    refit(model, task, tmp_path / "out")
    assert rounds == [0, 1, 2, 2, 3]
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert {name for name in whole if whole[name] != out[name]} <= {"fit.json", "report.md", "report.html"}


def test_what_cannot_be_refined_is_said_at_once(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    with pytest.raises(DataError, match="refining needs gradients, whose memory is not planned"):
        refit(model, task, tmp_path / "out", memory=2 << 30)
    switch = tiny("switch_transformers", tokenizer=True)
    with pytest.raises(ModelError, match=r"SwitchTransformers.* cannot be refined"):
        refit(switch, task, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
