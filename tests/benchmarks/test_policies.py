"""The benchmark of policies: which sequences are compared, and that its figures are those of replay."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from policies import main, pick, splits

from moedge.models.trace import RoutingTrace
from moedge.runtime.replay import gap_closed, replay


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five sequences of 40 tokens with 2 of 8 experts, their prompts from two data sets."""
    chance = np.random.default_rng(0)
    experts = np.argsort(chance.random((200, 1, 8)) * np.arange(1, 9), axis=-1)[..., :2].astype(np.uint8)
    folder = tmp_path / "model"
    folder.mkdir()
    RoutingTrace(experts, np.ones(experts.shape, np.float16), np.arange(0, 201, 40)).save(folder / "traces.npz")
    names = ["ask", "ask", "ask", "tell", "tell"]
    (folder / "sequences.jsonl").write_text("\n".join(json.dumps({"dataset": name}) for name in names))
    return tmp_path


def test_odd_sequences_are_held_out(data: Path) -> None:
    trace = RoutingTrace.load(data / "model")
    found = splits(data / "model", 5)
    assert found == {"tuned on": [0, 2, 4], "held out": [1, 3], "held out: ask": [1], "held out: tell": [3]}
    part = pick(trace, found["held out"])
    assert part.offsets.tolist() == [0, 40, 80]
    assert (part.experts == np.concatenate([trace.experts[40:80], trace.experts[120:160]])).all()


def test_figures_are_those_of_replay(data: Path) -> None:
    done = CliRunner().invoke(main, ["--data", str(data), "--capacity", "3"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    expected = replay(pick(RoutingTrace.load(data / "model"), [1, 3]), ["lru", "default", "oracle"], [3])
    (row,) = [row for row in rows if row["sequences"] == "held out" and row["policy"] == "default"]
    assert row["tokens"] == 80
    assert row["hit rate"] == expected[1].hit_rate
    assert row["closed"] == gap_closed(expected, expected[1])


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--data", str(tmp_path)])
    assert done.exit_code == 1
    assert "has no */traces.npz" in done.output
