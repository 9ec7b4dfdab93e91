"""`moedge eval`: the figures by name, on fake models, and once in a process of its own."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_lm import FakeLM, tiny_lm

from moedge.errors import DataError
from moedge.measure.quality import score_windows, windows
from moedge.measure.tasks import Judge
from moedge.measure.verb_eval import command

TEXTS = ["The sea was calm and the old man slept.\n", "Hello world, hello moon: 12 + 7 = 19.\n"]


class Opened(FakeLM):
    opened = 0

    def __enter__(self) -> "Opened":
        Opened.opened += 1
        assert Opened.opened == 1, "two models in memory at once"
        return self

    def __exit__(self, *_: object) -> None:
        Opened.opened -= 1


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Opened:
    models = {name: tiny_lm(seed=seed) for seed, name in enumerate(("model", "reference"))}
    lms = {name: Opened(tiny.model, tiny.tokenizer, tiny.store) for name, tiny in models.items()}
    monkeypatch.setattr("moedge.runtime.lm.load", lambda name, **_: lms[name])
    return lms["model"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["model", *map(str, args)])


def found(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.exception
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_texts_by_themselves_and_together(lm: Opened, files: list[Path]) -> None:
    *_, alone = score_windows(lm, windows(lm, TEXTS[:1], 512))
    one = found("--text", files[0])
    assert one["bits_per_byte"] == pytest.approx(alone.bits_per_byte)
    assert one["perplexity"] == pytest.approx(alone.perplexity)
    assert (one["tokens"], one["model"], one["reference"]) == (alone.tokens, "model", None)
    assert one["peak_memory"] > 50 << 20
    *_, both = score_windows(lm, windows(lm, TEXTS, 512))
    two = found("--text", files[0], "--text", files[1])
    assert two["bits_per_byte"] == pytest.approx(both.bits_per_byte)
    assert two["texts"][str(files[0])]["bits_per_byte"] == pytest.approx(alone.bits_per_byte)


def test_windows_and_first_tokens(lm: Opened, files: list[Path]) -> None:
    *_, expected = score_windows(lm, windows(lm, TEXTS[:1], 7, 10))
    assert found("--text", files[0], "--window", 7, "--max-tokens", 10)["perplexity"] == pytest.approx(
        expected.perplexity
    )


def test_the_distance_from_a_reference(lm: Opened, files: list[Path]) -> None:
    far = found("--text", files[0], "--text", files[1], "--reference", "reference")
    assert far["kl"] > 0
    assert 0 <= far["top1_agreement"] < 1
    assert far["reference"] == "reference"
    assert far["bits_per_byte"] == pytest.approx(found("--text", files[0], "--text", files[1])["bits_per_byte"])
    near = found("--text", files[0], "--reference", "model")
    assert (near["kl"], near["top1_agreement"]) == (0.0, 1.0)


def test_the_reference_is_whole(lm: Opened, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str | None, bool]] = []

    def load(name: str, *, experts: str | None, fallback: bool, **_: Any) -> Opened:
        loaded.append((name, experts, fallback))
        return lm

    monkeypatch.setattr("moedge.runtime.lm.load", load)
    found("--text", files[0], "--reference", "model", "--experts", "a-fit", "--fallback")
    assert loaded == [("model", None, False), ("model", "a-fit", True)]


def test_tasks(lm: Opened, tmp_path: Path) -> None:
    sst2, mine = tmp_path / "dev.jsonl", tmp_path / "mine.jsonl"
    sst2.write_text("".join(json.dumps({"sentence": f"the sea {n}", "label": n % 2}) + "\n" for n in range(6)))
    mine.write_text(json.dumps({"prompt": "Hello", "answer": "x"}) + "\n")
    tasks = found("--task", f"sst2={sst2}", "--task", f"mine={mine}", "--limit", 4)["tasks"]
    assert tasks["sst2"]["n"] == 4
    assert tasks["sst2"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert tasks["mine"] == {"accuracy": 0.0, "n": 1, "cut": 0}
    squad = tmp_path / "squad.jsonl"
    squad.write_text(json.dumps({"context": "C", "question": "Q", "answers": [{"text": "x"}], "is_impossible": False}))
    assert found("--task", f"squad_v2={squad}")["tasks"]["squad_v2"]["f1"] == 0.0


def test_people_get_a_table(lm: Opened, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "Hello", "choices": ["x", "y"], "answer": "x"}))
    task = f"mine={tmp_path / 'mine.jsonl'}"
    result = run("--text", files[0], "--text", files[1], "--reference", "reference", "--task", task)
    assert result.exit_code == 0, result.exception
    for part in ("bits per byte", "perplexity", "KL from the reference", "top-1 agreement", "of 1 right"):
        assert part in result.stdout


@pytest.mark.parametrize(
    "args", [[], ["--task", "sst2"], ["--task", "sst2=nosuch"], ["--text", "nosuch"], ["--task", "=x"]]
)
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_a_reference_needs_a_text(lm: Opened, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}")
    assert run("--task", f"sst2={tmp_path / 't.jsonl'}", "--reference", "reference").exit_code == 2


def test_an_empty_text_is_an_error(lm: Opened, files: list[Path]) -> None:
    files[0].write_text("")
    error = run("--text", files[0]).exception
    assert isinstance(error, DataError)
    assert "no token to predict" in str(error)


@pytest.mark.parametrize("what", ["text", "task", "reference"])
def test_ctrl_c_leaves_the_partial_result(
    lm: Opened, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    if what == "task":
        (tmp_path / "t.jsonl").write_text('{"prompt": "sea", "choices": ["a", "b"], "answer": "a"}\n' * 5)
        judged = Judge.verdicts
        monkeypatch.setattr(Judge, "verdicts", lambda *args: (verdict for verdict in judged(*args) if stop() is None))
        result = run("--task", f"mine={tmp_path / 't.jsonl'}")
        part = "interrupted; mine until then: 3 of 5 questions, accuracy"
    else:
        files[0].write_text(TEXTS[0] * 6)
        lm.model.model.register_forward_pre_hook(stop)
        more = ["--reference", "model"] if what == "reference" else []
        result = run("--text", files[0], "--window", 8, *more)
        part = "interrupted; reference on a.txt" if more else "interrupted; a.txt until then: 21 tokens, "
    assert result.exit_code != 0
    assert part in result.stderr
    assert result.stdout == ""
    assert Opened.opened == 0


@pytest.mark.timeout(400)
def test_in_a_process_of_its_own(
    tiny: Callable[..., Path],
    moedge_command: Callable[..., "subprocess.CompletedProcess[str]"],
    files: list[Path],
    tmp_path: Path,
) -> None:
    folder = tiny("qwen3_moe", tokenizer=True)
    (tmp_path / "t.jsonl").write_text('{"sentence": "sea", "label": 1}\n')
    args = ["--text", files[0], "--task", f"sst2={tmp_path / 't.jsonl'}", "--reference", folder]
    done = moedge_command("eval", folder, *args, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["kl"] == 0.0
    assert value["top1_agreement"] == 1.0
    assert value["tasks"]["sst2"]["n"] == 1
    assert value["bits_per_byte"] > 0
