"""`moedge trace`: one sequence per line or piece, the router's own choices, nothing written when it fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fake_lm import FakeLM, tiny_lm

from moedge.errors import ContextError, DataError
from moedge.models.recorder import record
from moedge.models.trace import RoutingTrace
from moedge.runtime.session import Session
from moedge.runtime.verb_trace import command

LINES = ["The sea was calm.", "Hello world, hello moon", "12 + 7 = 19"]


class Opened(FakeLM):
    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Opened]:
    def use(architecture: str = "qwen3_moe") -> Opened:
        tiny = tiny_lm(architecture)
        lm = Opened(tiny.model, tiny.tokenizer, tiny.store)
        monkeypatch.setattr("moedge.runtime.lm.load", lambda *_, **__: lm)
        return lm

    return use


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts"
    file.write_text("\n".join(LINES) + "\n\n")
    return file


def run(texts: Path, out: Path, *args: str) -> Result:
    return CliRunner().invoke(command, ["model", "--text", str(texts), "-o", str(out), *args])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "jamba"])
def test_lines_are_sequences_with_the_routers_choices(
    opened: Callable[..., Opened], texts: Path, tmp_path: Path, architecture: str
) -> None:
    lm = opened(architecture)
    lm.prefill_chunk = 4
    result = run(texts, tmp_path / "t.npz", "--lines", "--json")
    assert result.exit_code == 0, result.exception
    trace = RoutingTrace.load(tmp_path / "t.npz")
    found = json.loads(result.stdout)
    assert (found["sequences"], found["tokens"]) == (3, len(trace))
    for line, part in zip(LINES, trace.sequences(), strict=True):
        with record(lm.model) as recorder, torch.inference_mode():
            lm.model(torch.tensor([lm.tokenizer(line)["input_ids"]]))
        np.testing.assert_array_equal(part.experts, recorder.trace().experts)


def test_texts_are_cut_into_sequences(opened: Callable[..., Opened], texts: Path, tmp_path: Path) -> None:
    lm = opened()
    result = run(texts, tmp_path / "t.npz", "--tokens", "6", "--limit", "3")
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert np.diff(trace.offsets).tolist() == [6] * 3
    assert "18 tokens in 3 sequences, 2 layers, top 2" in result.stdout
    total = len(lm.tokenizer(texts.read_text())["input_ids"])
    run(texts, tmp_path / "t.npz")
    assert RoutingTrace.load(tmp_path / "t.npz").offsets.tolist() == [0, total]


def test_an_encoder_decoder_is_traced(opened: Callable[..., Opened], texts: Path, tmp_path: Path) -> None:
    opened("switch_transformers")
    assert run(texts, tmp_path / "t.npz", "--lines").exit_code == 0
    assert RoutingTrace.load(tmp_path / "t.npz").num_sequences == 3


def test_nothing_is_written_when_it_fails(
    opened: Callable[..., Opened], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = opened()
    out = tmp_path / "t.npz"
    lm.context = 8
    assert isinstance(run(texts, out, "--tokens", "9").exception, ContextError)
    texts.write_text("\n")
    error = run(texts, out, "--lines").exception
    assert isinstance(error, DataError)
    assert "no tokens" in str(error)
    texts.write_text("sea")
    begin, calls = Session.begin, []

    def interrupted(self: Session, ids: Any) -> Any:
        calls.append(ids)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return begin(self, ids)

    monkeypatch.setattr(Session, "begin", interrupted)
    texts.write_text("\n".join(LINES))
    result = run(texts, out, "--lines")
    assert result.exit_code != 0
    assert "interrupted after 1 sequences, 6 tokens: nothing is written" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("args", [[], ["--text", "nosuch", "-o", "t.npz"]])
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    assert CliRunner().invoke(command, ["model", *args]).exit_code == 2


def test_a_folder_that_is_not_there_is_wrong_usage(texts: Path, tmp_path: Path) -> None:
    assert run(texts, tmp_path / "nosuch" / "t.npz").exit_code == 2
