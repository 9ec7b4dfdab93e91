"""The loop: learns, stops, continues bit for bit, ends by its deadline."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moedge.errors import CheckpointError, DataError
from moedge.train import loop
from moedge.train.data import Mixture
from moedge.train.loop import Settings, checkpoints, end_of_plan, schedule, train
from moedge.train.loss import RouterLoss
from moedge.train.muon import orthogonalise

ROUTER = RouterLoss(balance=0.05, focus=0.05, floor=0.05, steps=8)
SETTINGS = Settings(tokens=128 * 30, batch_tokens=128, warmup_tokens=256, workers=2, router=ROUTER)


def curriculum(step: int, decay: float) -> tuple[Mapping[str, float], int]:
    return {"text": 0.6, "copy": 0.4}, 16 if decay > 0.5 and step % 3 == 0 else 32


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_result_loads_in_stock_transformers(
    make_model: Callable[[], Any], make_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    model = make_model()
    settings = Settings(tokens=128 * 80, batch_tokens=128, warmup_tokens=256)
    result = train(model, make_mixture(), curriculum, settings, tmp_path)
    assert result.finished
    assert result.tokens == settings.tokens
    log = losses(tmp_path)
    assert log[-1]["text"] < log[0]["text"] / 2
    loaded = AutoModelForCausalLM.from_pretrained(checkpoints(tmp_path)[-1], dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_a_stopped_run_continues_bit_for_bit(
    make_model: Callable[[], Any],
    make_mixture: Callable[[], Mixture],
    tmp_path: Path,
) -> None:
    whole = make_model()
    train(whole, make_mixture(), curriculum, SETTINGS, tmp_path / "whole")

    def interrupting(step: int, decay: float) -> tuple[Mapping[str, float], int]:
        if step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return curriculum(step, decay)

    stopped = train(make_model(), make_mixture(), interrupting, SETTINGS, tmp_path / "parts")
    assert not stopped.finished
    assert stopped.step == 14
    AutoModelForCausalLM.from_pretrained(checkpoints(tmp_path / "parts")[-1])
    continued = make_model()
    train(continued, make_mixture(), curriculum, SETTINGS, tmp_path / "parts")
    for (name, one), two in zip(whole.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_second_interrupt_ends_at_once_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with loop._interrupts() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_whole_or_not_there(
    make_model: Callable[[], Any],
    make_mixture: Callable[[], Mixture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = train(make_model(), make_mixture(), curriculum, Settings(tokens=256, batch_tokens=128), tmp_path)

    def full(*_args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        train(make_model(), make_mixture(), curriculum, Settings(tokens=512, batch_tokens=128), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{first.step:06d}"]


def test_only_the_newest_two_checkpoints_stay(
    make_model: Callable[[], Any], make_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    settings = Settings(tokens=128 * 4, batch_tokens=128, checkpoint_seconds=0.0)
    train(make_model(), make_mixture(), curriculum, settings, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_a_checkpoint_of_another_model_is_refused(
    make_model: Callable[[], Any], make_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    settings = Settings(tokens=128, batch_tokens=128)
    train(make_model(), make_mixture(), curriculum, settings, tmp_path)
    other = make_model()
    other.resize_token_embeddings(50)
    with pytest.raises(CheckpointError, match="another model"):
        train(other, make_mixture(), curriculum, settings, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(
    make_model: Callable[[], Any], make_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="lower the learning rate"):
        train(model, make_mixture(), curriculum, SETTINGS, tmp_path)
    shutil.rmtree(tmp_path)


def test_the_rate_warms_up_stays_and_falls_to_nothing() -> None:
    settings = Settings(tokens=1000, batch_tokens=10, warmup_tokens=100, decay=0.3)
    scales = [schedule(settings, tokens, 1000)[0] for tokens in (0, 50, 100, 690, 850, 1000)]
    assert scales == pytest.approx([0.1, 0.6, 1.0, 1.0, 0.5, 0.0])
    assert schedule(settings, 850, 1000)[1] == pytest.approx(0.5)


def test_a_deadline_shortens_the_plan_and_never_lengthens_it() -> None:
    settings = Settings(tokens=1000, deadline=100.0)
    assert end_of_plan(settings, 200, None, 50.0) == 1000
    assert end_of_plan(settings, 200, 4.0, 50.0) == 400
    assert end_of_plan(settings, 200, 400.0, 50.0) == 1000
    assert end_of_plan(settings, 200, 4.0, 150.0) == 200


def test_a_run_ends_by_its_deadline(
    make_model: Callable[[], Any], make_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    settings = Settings(tokens=10**9, batch_tokens=128, deadline=time.time() + 3)
    began = time.time()
    assert train(make_model(), make_mixture(), curriculum, settings, tmp_path).finished
    assert time.time() - began < 30


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens": 1, "batch_tokens": 0}, {"tokens": 1, "decay": 2.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="must be positive"):
        Settings(**wrong)


@pytest.mark.parametrize("shape", [(8, 20), (3, 20, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * orthogonalise(matrices)).sum() > 0.8 * values.numel()
