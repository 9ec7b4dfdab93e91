"""A fit from end to end: its result runs everywhere alike, the dials do what they say, bad input leaves nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import logits_of, questions, stock
from quantising import quantised

from moedge.compress import fit as module
from moedge.compress.fit import Fitted, Settings, fit
from moedge.compress.plan import Shape, parse_budget
from moedge.compress.report import Report
from moedge.compress.shape import drawn, shape_of
from moedge.errors import CheckpointError, DataError, MemoryLimitError, ModelError, MoedgeError
from moedge.models.kept import Kept
from moedge.models.tiny import make_tiny
from moedge.runtime.lm import load
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]
SWITCH = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
FAMILIES = {  # of two MoE layers each
    "switch_transformers": SWITCH,
    "gpt_oss": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 3},
    "mixtral": {"num_hidden_layers": 2},
    "granitemoe": {"num_hidden_layers": 2},
    "qwen2_moe": {"num_hidden_layers": 2},
}
QUICK: dict[str, Any] = {"tokens": 40}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions(tmp_path_factory.mktemp("task") / "words.jsonl")


def fitted(model: Path, task: Path | str, out: Path, budget: str = "50%", also: Any = (), **settings: Any) -> Fitted:
    return fit(str(model), str(task), budget, out, Settings(**QUICK | settings), also)


@pytest.fixture(scope="module")
def example(tiny: Tiny, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Fitted]:
    """The full model, the folder of a fit of it, and what the fit gave."""
    model, out = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), tmp_path_factory.mktemp("example") / "out"
    return model, out, fitted(model, task, out, also=[f"again={task}"])


def shape(model: Path, bits: int | None = None) -> Shape:
    blueprint = drawn(str(model))
    blueprint.checkpoint.close()
    return shape_of(blueprint, bits)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type: str, tiny: Tiny, task: Path, tmp_path: Path) -> None:
    """Stock transformers, moedge on the folder, and moedge on the full model with --experts give the same logits.

    The budget is given in bytes, and held.
    """
    model, out = tiny(model_type, tokenizer=True, **FAMILIES[model_type]), tmp_path / "out"
    budget = shape(model).bytes_with(4)
    found = fitted(model, task, out, str(budget))
    assert {len(experts) for experts in found.kept.experts} == {4}
    assert 0.96 * budget < found.report.bytes_after <= budget
    expected = logits_of(stock(out))
    with load(out) as lm:
        assert torch.equal(logits_of(lm.model), expected)
    with load(model, experts=out) as lm:
        assert torch.equal(logits_of(lm.model), expected)


def test_what_is_written(example: tuple[Path, Path, Fitted]) -> None:
    model, out, found = example
    assert {"config.json", "fit.json", "report.md", "report.html", "README.md", "tokenizer.json"} <= {*left_over(out)}
    assert not {"journal", "profile.npz", "model"} & {*left_over(out)}
    assert left_over(out.parent) == ["out"]
    assert Kept.load(out) == found.kept
    saved = json.loads((out / "fit.json").read_text())
    assert Report.from_dict(saved["report"]) == found.report
    assert json.loads((out / "config.json").read_text())["num_experts"] == 4
    size = sum(path.stat().st_size for path in out.iterdir() if path.name not in ("fit.json", "report.md"))
    assert found.report.bytes_after <= size
    assert found.report.bytes_before > 1.5 * found.report.bytes_after
    full = sum(path.stat().st_size for path in model.iterdir())
    assert found.report.bytes_before == pytest.approx(full, rel=0.01)


def test_report_is_of_samples_that_were_not_profiled(example: tuple[Path, Path, Fitted]) -> None:
    """The task's own test part; of the same file given again with --also, that part as well."""
    report = example[2].report
    assert list(report.before) == list(report.after) == ["words", "again"]
    assert [quality.n for quality in report.after.values()] == [2, 2]
    assert report.after["words"].kl == report.after["again"].kl > 0
    assert any("10 of the 12 samples of again=" in warning for warning in report.warnings)
    assert report.after["words"].accuracy is not None
    assert report.after["words"].chance == 0.5


def test_tests_of_one_name_get_names_of_their_own(example: tuple[Path, Path, Fitted], task: Path) -> None:
    parts = module.divide(str(task), Settings())
    tests, warnings = module.tests_of(*parts, [str(task), f"words={task}"])
    assert [test.name for test in tests] == ["words", "words 2", "words 3"]
    assert len(warnings) == 2
    fitted_on = {sample.key for sample in parts[0].samples}
    assert not any(sample.key in fitted_on for test in tests for sample in test.samples)


def test_all_experts_are_the_full_model_and_one_pass_is_not_remembered(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    model, index = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), tmp_path / "index"
    report = fitted(model, task, tmp_path / "out", "100%", index=index).report
    assert (report.after["words"].kl, report.after["words"].top1_agreement) == (0, 1)
    assert not index.exists()
    assert "is not remembered: its samples fill one pass" in report.reasons[-1]


def test_packed(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    """The budget is of the pack, and what is measured is the pack: all experts in 8 bits are not the full model."""
    model, out = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), tmp_path / "out"
    whole = shape(model, 8).nbytes
    assert whole < 0.6 * shape(model).nbytes
    assert parse_budget(str(whole - 1), shape(model, 8)).kept == 7
    report = fitted(model, task, out, str(whole), bits=8).report
    assert 0 < report.after["words"].kl < 0.1
    assert 0.97 * whole < report.bytes_after <= whole
    assert (report.bytes_before, len(report.layers[0].kept)) == (shape(model).nbytes, 8)
    assert "experts.safetensors" in left_over(out)
    with load(out) as lm:
        assert torch.isfinite(logits_of(lm.model)).all()


def test_beta_replaces_the_budget(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    found = fitted(model, task, tmp_path / "out", "1%", method="frequency", beta=0.11)
    report, counts = found.report, [np.array(scores) for scores in found.kept.scores]
    expected = max(int((row / row.sum() > 0.11).sum()) for row in counts)
    assert {len(experts) for experts in found.kept.experts} == {expected}
    assert report.budget == "beta=0.11"
    with pytest.raises(DataError, match=r"alpha 0\.5 is above beta 0\.1"):
        Settings(alpha=0.5, beta=0.1)


def test_protected_experts_stay(example: tuple[Path, Path, Fitted], task: Path, tmp_path: Path) -> None:
    model, _, before = example
    gone = [min(set(range(8)) - set(kept)) for kept in before.kept.experts]
    text = ",".join(f"{layer}:{expert}" for layer, expert in enumerate(gone))
    found = fitted(model, task, tmp_path / "out", protect=text)
    assert all(expert in kept for expert, kept in zip(gone, found.kept.experts, strict=True))
    assert any("2 experts protected, 2 only by that" in reason for reason in found.report.reasons)
    assert len(found.kept.experts[0]) == len(before.kept.experts[0])


def test_super_experts_are_protected_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = module.Statistics.empty(1, 8)
    seen.largest[0] = [1, 2, 3, 0, 0, 0, 0, 0]
    seen.gate_norm[0] = range(8)
    monkeypatch.setattr(module, "super_experts", lambda *_: [(0, 0), (0, 1), (0, 2)])
    plan = module.choose(seen, Shape(8, 1, 2, 1, 1, 1), "experts=2", Settings())
    assert plan.kept == ((1, 2),)
    assert "1 of 3 super experts are not protected: a layer keeps too few" in plan.reasons


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each profile that begins, how many passes were done before; passes are small, so that there are several."""
    begun: list[int] = []
    real = module.profile

    def profile(lm: Any, groups: Any, done: int = 0) -> Any:
        begun.append(done)
        return real(lm, groups, done)

    monkeypatch.setattr(module, "profile", profile)
    monkeypatch.setattr(module, "PASS", 40)
    return begun


def test_task_index(tiny: Tiny, task: Path, tmp_path: Path, profiles: list[int]) -> None:
    """A near task lends its statistics, a far one is profiled; both are known afterwards."""
    model, index = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), tmp_path / "index"
    first = fitted(model, task, tmp_path / "first", index=index, tokens=150)
    assert (len(profiles), first.match, left_over(index)) == (1, None, ["words.npz"])
    assert first.report.reasons[-1] == "no task was known: this one was profiled, and is known now"
    like = questions(tmp_path / "like.jsonl", 30, "!")
    near = fitted(model, like, tmp_path / "near", index=index, tokens=150)
    assert near.match is not None
    assert (len(profiles), near.match.name, left_over(index)) == (1, "words", ["words.npz"])
    assert near.kept.experts == first.kept.experts
    assert near.report.reasons[-1].startswith("statistics lent by the known task words: routing of ")
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n * n % 97}{n * 31 % 89}#%&\n" for n in range(400)))
    far = fitted(model, other, tmp_path / "far", index=index, tokens=300)
    assert far.match is not None
    assert (len(profiles), far.match.near, left_over(index)) == (2, False, ["other.npz", "words.npz"])
    assert far.report.reasons[-1].startswith("no known task is near, routing of the first layer is ")


def test_a_limit_changes_nothing_but_memory(example: tuple[Path, Path, Fitted], task: Path, tmp_path: Path) -> None:
    model = example[0]
    with pytest.raises(MemoryLimitError, match=r"raise it|--memory"):
        fitted(model, task, tmp_path / "out", memory=1 << 20)
    assert left_over(tmp_path) == []
    free, limited = example[2], fitted(model, task, tmp_path / "out", memory=3 << 30)
    assert free.kept == limited.kept
    assert free.report.after["words"] == limited.report.after["words"]


def _text(folder: Path) -> str:
    (folder / "text.txt").write_text("The sea is calm. " * 30 + "\n\n" + "The moon is up. " * 30)
    return str(folder / "text.txt")


BAD: dict[str, tuple[dict[str, Any], str, type[MoedgeError]]] = {
    "budget": ({"budget": "experts=1"}, "leaves 1 experts a layer, the model's router needs 2", DataError),
    "size": ({"budget": "1GiB"}, r"budget 1GiB is above the whole model, which takes .*: give less", DataError),
    "protect": ({"protect": "0-3"}, "protect '0-3': give auto, none, or layer:expert pairs", DataError),
    "layer": ({"protect": "9:0"}, "protect 9:0: the model has layers 0 to 1, experts 0 to 7", DataError),
    "many": ({"protect": "0:0,0:1,0:2", "budget": "experts=2"}, "layer 0 has 3 protected experts", DataError),
    "name": (
        {"task": "a(b)={words}", "index": Path("nowhere")},
        r"'a\(b\)' cannot name a file of the index",
        DataError,
    ),
    "scope": ({"task": "{text}", "scope": "answer"}, "is a text without answers: leave --scope answer out", DataError),
    "also": ({"also": ["nowhere.txt"]}, r"nowhere\.txt does not exist", DataError),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing(case: str, tiny: Tiny, task: Path, tmp_path: Path) -> None:
    settings, message, kind = BAD[case]
    settings = dict(settings)
    given = str(settings.pop("task", "{words}")).format(words=task, text=_text(tmp_path))
    before = left_over(tmp_path)
    with pytest.raises(kind, match=message):
        fitted(tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), given, tmp_path / "made" / "out", **settings)
    if (tmp_path / "made").exists():
        assert left_over(tmp_path / "made") == []
        (tmp_path / "made").rmdir()
    assert left_over(tmp_path) == before


def test_models_that_cannot_be_fitted(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"NllbMoeForConditionalGeneration, .*experts 0 and 1 .*; fit another model"):
        fitted(tiny("nllb-moe", tokenizer=True), task, tmp_path / "out")
    pack(tiny("mixtral", tokenizer=True, num_hidden_layers=2), tmp_path / "packed")
    with pytest.raises(ModelError, match=r"packed is packed: fit the original, with --bits to pack the result"):
        fitted(tmp_path / "packed", task, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        fitted(tiny("mixtral"), task, tmp_path / "out")
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    values = {".weight": torch.zeros(1, 1).to(torch.float8_e4m3fn)}
    quantised(tiny("mixtral"), tmp_path / "fp8", lambda name: False, lambda *_: (values, torch.zeros(1)), config)
    with pytest.raises(ModelError, match=r"fp8 is quantised: fit the 16-bit original, with --bits to pack"):
        fitted(tmp_path / "fp8", task, tmp_path / "out")
    assert left_over(tmp_path) == ["fp8", "packed"]


def test_encoder_decoder_answers_questions_of_some_length(tmp_path: Path, task: Path) -> None:
    model = make_tiny("switch_transformers", tmp_path / "model", tokenizer=True)
    with pytest.raises(DataError, match=r"task 'text' is a text, but .* answers questions: give those"):
        fitted(model, _text(tmp_path), tmp_path / "out")
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    long = [row | {"prompt": f"{'sea ' * 300}{row['prompt']}"} for row in rows]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    with pytest.raises(
        DataError, match=r"'long' has a sample of 12\d\d tokens .*up to 1024 .*shorten it, or leave it out"
    ):
        fitted(model, tmp_path / "long.jsonl", tmp_path / "out")
    assert left_over(tmp_path) == ["long.jsonl", "model", "text.txt"]


def test_questions_longer_than_the_context_lose_their_beginning_and_that_is_said(
    tiny: Tiny, task: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    rows[0]["prompt"] = rows[1]["prompt"] = "sea " * 300 + "moon"
    rows[1]["prompt"] += "?"
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = fitted(
        tiny("mixtral", tokenizer=True, num_hidden_layers=2), tmp_path / "long.jsonl", tmp_path / "out", tokens=4000
    ).report
    said = [warning for warning in report.warnings if "longer than" in warning]
    assert said, report.warnings
    assert sum(int(warning.split(": ")[1].split()[0]) for warning in said) == 2
