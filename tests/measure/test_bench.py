"""What a row measures: on fake models that count their passes, and in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_lm import tiny_lm

from moedge.errors import CheckpointError, ContextError, MemoryLimitError, MoedgeError
from moedge.measure import bench
from moedge.measure.bench import Case, Spec, measure, measure_apart, parse_limit, random_ids, repeat
from moedge.runtime.tally import Tally

SPEAK = [sys.executable, "-c", "import sys; from moedge.measure.bench import speak; sys.exit(speak(sys.argv[1]))"]


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", tokenizer=True)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("25%", 250), ("12.5%", 125), ("200%", 2000), ("600MiB", 600 << 20), ("7", 7), ("none", None)]
)
def test_limits(text: str, nbytes: int | None) -> None:
    assert parse_limit(f" {text} ").nbytes(1000) == nbytes


@pytest.mark.parametrize("text", ["", "%", "-1%", "1e2%", "nan%", "25 percent", "None"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_limit(text)


def test_a_share_is_of_the_weights_that_the_index_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        bench.weight_files(tmp_path)
    for name in ("a", "b", "consolidated"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"1234")
    assert len(bench.weight_files(tmp_path)) == 3
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert [file.stem for file in bench.weight_files(tmp_path)] == ["a", "b"]
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not readable"):
        bench.weight_files(tmp_path)


def test_a_spec_names_its_rows_and_what_they_need() -> None:
    spec = Spec("m", prompts=(16, 512), answers=(600,))
    assert spec.cases == (Case("pp16", 16, 1), Case("pp512", 512, 1), Case("tg600", 1, 600))
    assert [case.tokens for case in spec.cases] == [16, 512, 600]
    assert spec.context == 601
    for wrong in ({"prompts": (), "answers": ()}, {"prompts": (0,)}, {"answers": (-1,)}, {"repetitions": 0}):
        with pytest.raises(ValueError, match="measures nothing"):
            Spec("m", **wrong)  # type: ignore[arg-type]


def test_prompts_have_no_special_tokens() -> None:
    lm = tiny_lm()
    special = set(lm.tokenizer.all_special_ids)
    ids = random_ids(lm, 2000, 7)
    assert special
    assert not special.intersection(ids)
    assert len(set(ids)) > 200
    assert ids == random_ids(lm, 2000, 7)
    assert ids != random_ids(lm, 2000, 8)


def test_reading_is_one_pass_and_writing_is_one_for_each_token() -> None:
    """The fake's counters go up by one hit a pass."""
    lm = tiny_lm()
    reading = repeat(lm, Case("pp40", 40, 1), 1)
    assert (reading.hits, reading.misses, reading.bytes_read, len(reading.tokens)) == (1, 2, 20, 1)
    lm.model.generation_config.eos_token_id = None
    writing = repeat(lm, Case("tg40", 1, 40), 1)
    assert (writing.hits, len(writing.tokens)) == (40, 40)
    assert writing.tokens == repeat(lm, Case("tg40", 1, 40), 1).tokens
    assert writing.tokens != repeat(lm, Case("tg40", 1, 40), 2).tokens


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Tally]]:
    """Every repetition that was run; and the machine's caches are left alone."""
    seen: list[tuple[str, int, Tally]] = []

    def spy(lm: Any, case: Case, number: int) -> Tally:
        seen.append((case.name, number, repeat(lm, case, number)))
        return seen[-1][2]

    monkeypatch.setattr(bench, "repeat", spy)
    monkeypatch.setattr(bench, "drop_page_cache", lambda: True)
    return seen


def rows(spec: Spec) -> list[dict[str, Any]]:
    return [said["row"] for said in measure(spec) if "row" in said]


def test_rows(model: Path, repeated: list[tuple[str, int, Tally]]) -> None:
    reading, writing = rows(Spec(str(model), prompts=(24,), answers=(12,), repetitions=3))
    assert [(name, number) for name, number, _ in repeated] == [
        (name, number) for name in ("pp24", "tg12") for number in (0, 1, 2, 3)
    ]
    assert [len(tally.tokens) for _, _, tally in repeated] == [1] * 4 + [12] * 4
    for row, timed, tokens in ((reading, repeated[1:4], 24), (writing, repeated[5:], 12)):
        speeds = [tokens / tally.seconds for *_, tally in timed]
        assert row["repetitions"] == speeds
        assert row["tokens_per_second"] == sorted(speeds)[1]
        assert row["quartile_1"] == pytest.approx(sum(sorted(speeds)[:2]) / 2)
        assert row["quartile_3"] == pytest.approx(sum(sorted(speeds)[1:]) / 2)
        asked = sum(tally.hits + tally.misses for *_, tally in timed)
        assert row["hit_rate"] == sum(tally.hits for *_, tally in timed) / asked
        assert row["bytes_per_token"] == sum(tally.bytes_read for *_, tally in timed) / (3 * tokens)
        assert row["resident_share"] == 1
        assert row["page_cache_dropped"] is True
    assert writing["test"] == "tg12"


def test_an_answer_does_not_end_before_its_length(
    model: Path, tmp_path: Path, repeated: list[tuple[str, int, Tally]]
) -> None:
    """Every token is one that ends a text."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(4096))}))
    rows(Spec(str(folder), prompts=(), answers=(9,), repetitions=1, warm_up=False))
    assert [len(tally.tokens) for *_, tally in repeated] == [9]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_caches_are_dropped_before_each_repetition_where_allowed(
    model: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, wanted: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(bench, "drop_page_cache", lambda: calls.append(1) or allowed)
    spec = Spec(str(model), prompts=(4,), answers=(), repetitions=3, drop_page_cache=wanted)
    (row,) = rows(spec)
    assert len(calls) == (3 if wanted else 0)
    assert row["page_cache_dropped"] is (allowed and wanted)


def test_too_long_for_the_model(model: Path) -> None:
    with pytest.raises(ContextError, match=r"pp9999999 need 10000000 tokens: context 10000000 is more than"):
        rows(Spec(str(model), prompts=(9999999,), answers=()))


# --- in a process of its own ----------------------------------------------------------------------------------------


def test_a_limit_has_a_process_of_its_own(model: Path) -> None:
    """Its peak is not this process's, which was made to be larger."""
    ballast = bytearray(b"x") * (1 << 30)
    spec = Spec(str(model), 8 << 30, prompts=(8,), answers=(4,), repetitions=1, drop_page_cache=False)
    said = list(measure_apart(spec, SPEAK))
    assert [line["row"]["test"] for line in said if "row" in line] == ["pp8", "tg4"]
    assert all(line["row"]["peak_memory"] < len(ballast) for line in said if "row" in line)
    assert said[0] == {"note": "pp8, warm-up"}


def test_errors_cross_the_process(model: Path) -> None:
    with pytest.raises(MemoryLimitError, match="give at least"):
        list(measure_apart(Spec(str(model), 1 << 20, prompts=(8,)), SPEAK))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('boom')", "ended with exit status 1: boom"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal SIGKILL, .*memory.*: it said nothing"),
    ],
)
def test_a_process_that_dies_is_an_error(code: str, message: str) -> None:
    with pytest.raises(MoedgeError, match=message):
        list(measure_apart(Spec("m"), [sys.executable, "-c", code]))


def test_closing_ends_the_process() -> None:
    code = "import os, time; print('{\"note\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    with closing(measure_apart(Spec("m"), [sys.executable, "-c", code])) as said:
        pid = next(said)["note"]
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_others_print_is_no_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(spec: Spec) -> Any:
        print("a library greets")
        yield {"note": spec.prompts}

    monkeypatch.setattr(bench, "measure", noisy)
    monkeypatch.setattr(bench, "_end_with_parent", lambda: None)
    assert bench.speak('{"model": "m", "prompts": [3], "answers": []}') == 0
    out, err = capsys.readouterr()
    assert out == '{"note": [3]}\n'
    assert "greets" in err


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_the_process_ends_with_its_parent(how: str) -> None:
    """Also when the parent is killed and can do nothing for it."""
    child = (
        "import time; from moedge.measure.bench import _end_with_parent as e; e(); print(1, flush=True); time.sleep(99)"
    )
    if how == "closed":
        with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == b"1\n"
            process.stdin.close()
            assert process.wait(timeout=30) == 1
        return
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE,"
        " start_new_session=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == b"", "the pipe that the child inherited is closed when it is gone"
