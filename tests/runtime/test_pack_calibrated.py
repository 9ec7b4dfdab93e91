"""Calibrated packs: nearer to the model on texts like those given; the same bytes however often stopped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moedge.errors import CheckpointError
from moedge.runtime import journal, profiling
from moedge.runtime.calibrate import MOMENTS
from moedge.runtime.formats import Format
from moedge.runtime.lm import load
from moedge.runtime.pack import pack, verify

Tiny = Callable[..., Path]
INT4 = Format("int4")
TEXT = "".join(
    f"The house of {name} stood at the end of lane {n}.\n" for n in range(12) for name in ("Ann", "Bo", "Cy")
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text(TEXT)
    return tmp_path / "texts.txt"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing stops writes."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "texts.txt").write_text(TEXT)
    pack(model, folder / "whole", INT4, calibrate=folder / "texts.txt")
    return contents(folder / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_nearer_to_the_model(tiny: Tiny, tmp_path: Path, texts: Path) -> None:
    model = tiny("qwen3_moe", tokenizer=True, hidden_size=128, dtype=torch.float32)
    pack(model, tmp_path / "plain", INT4)
    pack(model, tmp_path / "calibrated", INT4, calibrate=texts)
    assert contents(tmp_path / "calibrated").keys() == contents(tmp_path / "plain").keys()
    assert (verify(tmp_path / "calibrated"))["experts"] == 32
    hidden = []
    for folder in (model, tmp_path / "plain", tmp_path / "calibrated"):
        with load(folder) as lm, torch.inference_mode():
            ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"][:300]])
            hidden.append(lm.model(ids).logits)
    plain, calibrated = ((each - hidden[0]).norm() for each in hidden[1:])
    assert calibrated < 0.97 * plain


@pytest.mark.parametrize("fail_at", ["experts", "moments"])
def test_it_goes_on_with_what_was_measured(
    fail_at: str, model: Path, whole: dict[str, bytes], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    real = profiling.measure
    monkeypatch.setattr(profiling, "measure", lambda *args: measured.append(1) or real(*args))

    def broken(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "pwrite", broken) if fail_at == "experts" else (os, "fsync", broken)))
        with pytest.raises(CheckpointError, match="is full"):
            pack(model, tmp_path / "out", INT4, calibrate=texts)
    assert (tmp_path / "out.partial" / MOMENTS).exists()
    pack(model, tmp_path / "out", INT4, calibrate=texts)
    assert len(measured) == (1 if fail_at == "experts" else 2)
    assert contents(tmp_path / "out") == whole


def stopped(model: Path, out: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that was stopped after two experts."""
    real, calls = os.pwrite, []

    def pwrite(*args: Any) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(CheckpointError, match="is full"):
            pack(model, out, INT4, calibrate=texts)
    return out.with_name("out.partial")


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_damaged_moments_are_measured_again(
    damage: str, model: Path, whole: dict[str, bytes], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = stopped(model, tmp_path / "out", texts, monkeypatch) / MOMENTS
    data = moments.read_bytes()
    if damage == "gone":
        moments.unlink()
    else:
        moments.write_bytes(data[:-900] if damage == "short" else data[:500] + bytes([data[500] ^ 1]) + data[501:])
    pack(model, tmp_path / "out", INT4, calibrate=texts)
    assert contents(tmp_path / "out") == whole


def test_moments_that_cannot_be_had_again_are_refused(
    model: Path, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine, whose last bits differ."""
    (stopped(model, tmp_path / "out", texts, monkeypatch) / MOMENTS).unlink()
    real = profiling.measure

    def other(lm: Any, windows: Any, moments: Any, report: Any) -> None:
        real(lm, windows, moments, report)
        moments.sums[0]["down_proj"][0, 0, 0, 0] += 1

    monkeypatch.setattr(profiling, "measure", other)
    with pytest.raises(CheckpointError, match=r"moments is damaged.* delete .*out\.partial and give"):
        pack(model, tmp_path / "out", INT4, calibrate=texts)


def test_other_texts_are_refused(model: Path, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(model, tmp_path / "out", texts, monkeypatch)
    texts.write_text(TEXT.replace("house", "horse"))
    for given in (texts, None):
        with pytest.raises(CheckpointError, match="begun from another model or with other settings"):
            pack(model, tmp_path / "out", INT4, calibrate=given)


@pytest.mark.parametrize("moment", ["fsync", "rename", "unlink"])
def test_stopped_at_the_very_end(
    moment: str, model: Path, whole: dict[str, bytes], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the run can go on, or the folder is whole under its name."""
    out = tmp_path / "out"
    module, name = (journal, "sync") if moment == "fsync" else (os, moment)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            pack(model, out, INT4, calibrate=texts)
    if moment != "unlink":
        assert not out.exists()
        pack(model, out, INT4, calibrate=texts)
        assert contents(out) == whole
    else:
        assert contents(out).items() >= whole.items()
        verify(out)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from moedge.runtime import pack as module, profiling
from moedge.runtime.formats import Format

model, out, texts = map(Path, sys.argv[1:])
chance, kills = random.Random(1), 0
module.pack(model, out.with_name("first"), Format("int4"), calibrate=texts)  # imports all, so that kills hit the work

def slowly(real):
    def call(*args):
        time.sleep(0.1)
        real(*args)
        time.sleep(0.1)
    return call

module.Unfinished.record = slowly(module.Unfinished.record)
profiling.Moments.save = slowly(profiling.Moments.save)
while not out.exists():
    child = os.fork()
    if child == 0:
        module.pack(model, out, Format("int4"), calibrate=texts)
        os._exit(0)
    if kills < 6:
        time.sleep(chance.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
        kills += 1
    os.waitpid(child, 0)
print(kills)
"""


def test_killed_at_random(model: Path, whole: dict[str, bytes], tmp_path: Path, texts: Path) -> None:
    """SIGKILL while it profiles and packs."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model), str(out), str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 6, "it was done before"
    assert contents(out) == whole


def test_the_command(
    model: Path, whole: dict[str, bytes], tmp_path: Path, texts: Path, moedge_command: Any, moedge_here: Any
) -> None:
    done = moedge_command("pack", model, tmp_path / "out", "--bits", 4, "--calibrate", texts, "--memory", "500MiB")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
    refused = moedge_here("pack", model, tmp_path / "other", "--calibrate", texts)
    assert refused.status == 2
    assert "--calibrate is for --bits 4" in refused.err
