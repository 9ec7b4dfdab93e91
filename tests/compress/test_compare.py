"""Comparing methods: rows as they come, a journal that is gone on with, a table and plots; once on the mini model."""

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from fake_lm import FakeLM, tiny_lm

from moedge.compress.compare import (
    Journal,
    Row,
    compare,
    html,
    markdown_table,
    parse_shares,
    plots,
    settings_of,
)
from moedge.compress.evaluate import Quality, Reference, check_reads
from moedge.compress.samples import Sample, Task, read_task, windows
from moedge.errors import DataError

TEXT = Task("words", (Sample("The sea was calm and the old man slept."), Sample("Hello moon: 12 + 7 = 19.")), "text")
FULL = {"sst2": Quality(3.0, 1.2, 0.0, 1.0, 900, 40, 1.5, 0.0, 1.0, 0.9, 0.5)}


def row(method: str, share: float, kl: float, accuracy: float = 0.8) -> Row:
    return Row(method, share, {"sst2": Quality(3.3, 1.26, kl, 0.9, 900, 40, 1.6, kl / 2, 0.97, accuracy, 0.5)}, 1.5)


class Candidates:
    """Random models in place of narrowed ones; remembers what was asked and what is open."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, float]] = []
        self.open = 0
        self._fail_at = fail_at

    def __call__(self, method: str, share: float) -> AbstractContextManager[FakeLM]:
        return self._opened(method, share)

    @contextmanager
    def _opened(self, method: str, share: float) -> Iterator[FakeLM]:
        if self._fail_at == len(self.asked):
            raise RuntimeError("killed")
        self.asked.append((method, share))
        self.open += 1
        yield tiny_lm(seed=len(self.asked))
        self.open -= 1


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, notes = tmp_path / "rows.jsonl", list[str]()
    with Reference.of(tiny_lm(), TEXT) as reference:
        tests, methods, shares = {"words": reference}, ["a", "b"], (0.5, 0.25)
        settings = settings_of([TEXT], seed=1)
        killed = Candidates(fail_at=3)
        with pytest.raises(RuntimeError, match="killed"):
            list(compare(methods, shares, tests, killed, Journal(path, settings), notes.append))
        assert killed.asked == [("a", 0.5), ("b", 0.5), ("a", 0.25)]
        assert killed.open == 0
        assert "a at 25%" in notes
        with open(path, "a") as file:
            file.write('{"settings": {"tests"')  # a kill cut this line
        again = Candidates()
        rows = list(compare(methods, shares, tests, again, Journal(path, settings)))
        assert again.asked == [("b", 0.25)]
        assert [(r.method, r.share) for r in rows] == [("a", 0.5), ("b", 0.5), ("a", 0.25), ("b", 0.25)]
        assert all(r.quality["words"].kl > 0 for r in rows)
        assert list(Journal(path, settings).rows.values()) == rows
        assert [Row.from_dict(json.loads(json.dumps(r.as_dict()))) for r in rows] == rows
        with pytest.raises(DataError, match="1 was measured with seed 1, now it is 2: use that again, or delete"):
            Journal(path, settings_of([TEXT], seed=2))
        with pytest.raises(DataError, match="measured with tests"):
            Journal(path, settings_of([TEXT.take(0, 1)], seed=1))


def test_a_journal_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1 is no row of a comparison"):
        Journal(tmp_path / "rows.jsonl", {})


def test_the_table_has_the_best_first_at_each_budget() -> None:
    rows = [row("frequency", 0.25, 0.5, 0.6), row("litemoe", 0.25, 0.25), row("litemoe", 0.5, 0.01)]
    lines = markdown_table(rows, FULL).splitlines()
    head, full, *found = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    assert full[:2] == ["100%", "(full model)"]
    assert [line[:2] for line in found] == [["50%", "litemoe"], ["25%", "litemoe"], ["25%", "frequency"]]
    last = dict(zip(head, found[-1], strict=True))
    assert (last["KL"], last["KL of answers"], last["accuracy"]) == ("0.5", "0.25", "60.0%")
    assert (last["kept above chance"], last["bits per byte"]) == ("0.250", "1.260 (+5.0%)")
    with pytest.raises(ValueError, match="nothing to show"):
        markdown_table([], FULL)


def test_plots_have_a_line_for_each_method() -> None:
    rows = [row(method, share, kl) for method in ("a<b", "c") for share, kl in ((0.25, 0.5), (0.5, 0.1), (1.0, 0.0))]
    kl, kept = (ElementTree.fromstring(svg) for svg in plots(rows, FULL))
    for root in (kl, kept):
        drawn = list(root.iter("{http://www.w3.org/2000/svg}title"))
        assert [e.text for e in drawn][1:] == ["a<b", "c"]
    assert "<script" not in html("t", rows, FULL)
    assert html("t", rows, FULL).count("<svg") == 2
    same = plots([row("a", 1.0, 0.0)], {"sst2": FULL["sst2"]})  # no distance at all has no logarithm
    assert ElementTree.fromstring(same[0]) is not None


def test_shares_are_read_descending() -> None:
    assert parse_shares("25%, 12.5%,75%,25%") == (0.75, 0.25, 0.125)
    for bad in ("", "0%", "101%", "half", "nan%", "0.5", "-5%"):
        with pytest.raises(ValueError, match="not a share above 0%"):
            parse_shares(bad)


def pruned(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A stock Qwen3-MoE with only these experts, its tensors sliced by hand."""
    for layer, ids in zip(model.model.layers, kept, strict=True):
        for module, name in (
            (layer.mlp.gate, "weight"),
            (layer.mlp.experts, "gate_up_proj"),
            (layer.mlp.experts, "down_proj"),
        ):
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[list(ids)], requires_grad=False))
        layer.mlp.gate.num_experts = layer.mlp.experts.num_experts = len(ids)
    return model


def router_mass(lm: FakeLM, task: Task) -> torch.Tensor:
    """Sum of router probabilities [L, E] over the windows of a task."""
    sums: dict[int, torch.Tensor] = {}
    handles = []
    for number, layer in enumerate(lm.model.model.layers):

        def add(gate: Any, args: Any, output: Any, number: int = number) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            mass = (hidden @ gate.weight.T).softmax(-1).sum(0)
            sums[number] = sums.get(number, torch.zeros_like(mass)) + mass

        handles.append(layer.mlp.gate.register_forward_hook(add))
    with torch.inference_mode():
        for window in windows(task, lm.tokenizer, 512):
            lm.model(torch.tensor([window.ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([sums[number] for number in range(len(sums))])


def test_on_the_mini_model_router_mass_beats_chance_and_all_experts_lose_nothing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
    dice = random.Random(0)
    records = [{"a": dice.randint(10, 99), "b": dice.randint(10, 99), "op": dice.choice("+-")} for _ in range(56)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    fit, test = read_task(f"arithmetic={tmp_path / 'sums.jsonl'}").split(test_share=0.25)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    full = FakeLM(model.eval(), AutoTokenizer.from_pretrained(folder))
    mass = router_mass(full, fit)
    scores = {"mass": mass, "random": torch.rand(mass.shape, generator=torch.Generator().manual_seed(0))}

    @contextmanager
    def candidate(method: str, share: float) -> Iterator[FakeLM]:
        kept = scores[method].topk(math.ceil(share * mass.shape[1]), -1).indices.sort(-1).values.tolist()
        yield FakeLM(pruned(copy.deepcopy(full.model), kept), full.tokenizer)

    with Reference.of(full, test) as reference:
        check_reads(reference)
        assert (reference.quality.accuracy or 0) > 0.85
        tests = {"arithmetic": reference}
        rows = {
            (r.method, r.share): r.quality["arithmetic"] for r in compare(["mass", "random"], [0.25], tests, candidate)
        }
        (all_kept,) = compare(["mass"], [1.0], tests, candidate)
    by_mass, by_chance = rows["mass", 0.25], rows["random", 0.25]
    assert by_mass.kl < by_chance.kl / 2
    assert (by_mass.kl_answer or 9) < (by_chance.kl_answer or 0) / 2
    assert (by_mass.retained(reference.quality) or 0) > (by_chance.retained(reference.quality) or 0) + 0.2
    assert all_kept.quality["arithmetic"].kl == pytest.approx(0, abs=1e-6)
    assert all_kept.quality["arithmetic"].retained(reference.quality) == 1
