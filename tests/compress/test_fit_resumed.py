"""A fit that is killed, interrupted, or runs out of disk: nothing under the final name, and the next run goes on."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fitting import questions
from packing import contents, take_all

from moedge.compress import fit as module
from moedge.compress.fit import Settings, fit
from moedge.errors import CheckpointError, MemoryLimitError
from moedge.runtime.journal import Unfinished

Tiny = Callable[..., Path]
TIMED = ("fit.json", "report.md", "report.html")  # which say how long it took
KILLED = """
import gc, os, signal, sys
from pathlib import Path
from moedge.compress import fit as module
from moedge.models.load import draw, load_tokenizer

model, task, out, *kills = sys.argv[1:]
draw(Path(model)).checkpoint.close()  # imports what every child needs
load_tokenizer(Path(model))
gc.freeze()
module.PASS = 40  # tokens: several passes
settings = module.Settings(tokens=150)

def run(kill):
    left = [kill]
    def dying(real):  # a child ends right before a file or a folder gets its name
        def call(*args, **more):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)
        return call
    os.replace, os.rename = dying(os.replace), dying(os.rename)
    module.fit(model, task, "50%", Path(out), settings, note=lambda text: print(text, flush=True))

for kill in [*map(int, kills), 0]:
    if not (child := os.fork()):
        run(kill)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("ended", os.WTERMSIG(status), sorted(os.listdir(Path(out).parent)), flush=True)
    assert kill or not status
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "task").mkdir()
    return questions(tmp_path / "task" / "words.jsonl")


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a fit that nothing happens to writes."""
    folder = tmp_path_factory.mktemp("whole")
    fitted(tiny, questions(folder / "words.jsonl"), folder / "out")
    return model_of(folder / "out")


@pytest.fixture(autouse=True)
def _several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PASS", 40)


def fitted(tiny: Tiny, task: Path, out: Path, **settings: Any) -> Any:
    model = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    return fit(str(model), str(task), "50%", out, Settings(**{"tokens": 150} | settings))


def model_of(out: Path) -> dict[str, bytes]:
    found = contents(out)
    assert {*TIMED} < found.keys()
    return {name: data for name, data in found.items() if name not in TIMED}


def test_killed_at_any_moment(tiny: Tiny, task: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """While the profile is saved, while the model is moved: no pass is read twice, no bytes are others."""
    out, model = tmp_path / "made" / "out", tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)
    kills = [2, 9]
    command = [sys.executable, "-c", KILLED, str(model), str(task), str(out), *map(str, kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == ["ended 9 ['out.partial']"] * len(kills) + ["ended 0 ['out']"]
    passes = [line for line in done.stdout.splitlines() if line.startswith("profile")]
    assert passes == [f"profile: {number} of 5 passes" for number in (1, 2, 3, 4, 5)]
    assert model_of(out) == whole


@pytest.mark.parametrize("step", ["profile", "model_card"])
def test_interrupted(
    step: str, tiny: Tiny, task: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a step; the index does not know a task whose fit did not end, so that it goes on alike."""
    out, index = tmp_path / "out", tmp_path / "index"
    begun: list[int] = []
    real = module.profile

    def profile(lm: Any, groups: Any, done: int = 0) -> Iterator[Any]:
        begun.append(done)
        for count, seen in enumerate(real(lm, groups, done)):
            if step == "profile" and len(begun) == 1 and count == 2:
                raise KeyboardInterrupt
            yield seen

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "profile", profile)
    with monkeypatch.context() as patch:
        if step != "profile":
            patch.setattr(module, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fitted(tiny, task, out, index=index)
    assert not out.exists()
    assert not index.exists()
    found = fitted(tiny, task, out, index=index)
    assert begun == [0, 2 if step == "profile" else 5]
    assert found.match is None
    assert model_of(out) == whole


def test_going_on_with_another_limit_but_not_with_other_settings(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise MemoryLimitError("raise it")

        patch.setattr(module, "export", fail)
        with pytest.raises(MemoryLimitError):
            fitted(tiny, task, out, memory=2 << 30)
    for settings in ({"method": "reap"}, {"tokens": 140}, {"seed": 1}):
        with pytest.raises(CheckpointError, match="was begun from another model or with other settings: delete it"):
            fitted(tiny, task, out, memory=2 << 30, **settings)
    fitted(tiny, task, out, memory=3 << 30)
    assert out.exists()


def test_profile_of_other_samples_is_not_gone_on_with(tiny: Tiny, tmp_path: Path, task: Path) -> None:
    """As a comparison that is begun again with another file."""
    model, keep = tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2), tmp_path / "profile.npz"
    with module.opened(model) as lm:
        texts = [module.read_task(each) for each in (task, questions(tmp_path / "other.jsonl", mark="!"))]
        one, other = (module.as_read(lm, text, "text") for text in texts)
        module.profiled(lm, one, keep)
        found, first = module.profiled(lm, other, keep)
        expected, _ = module.profiled(lm, other)
    assert (found.energy == expected.energy).all()
    assert found.tokens[0] == sum(int(window.mask.sum()) for window in other)
    assert len(first) > 1


def test_output_folder_that_exists(tiny: Tiny, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    for name in (out, Path(".")):
        with pytest.raises(CheckpointError, match="exists already: choose another name, or delete it"):
            fitted(tiny, task, name)
    assert not list(out.iterdir())
    out.rmdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match=r"out\.partial is in the way, and nothing that moedge began: delete it"):
        fitted(tiny, task, out)
    assert contents(tmp_path / "out.partial") == {"mine": b"keep"}


def test_two_at_once(tiny: Tiny, task: Path, tmp_path: Path) -> None:
    first = Unfinished(tmp_path / "out", {})
    with pytest.raises(CheckpointError, match=r"out\.partial is being written by another moedge process: wait for it"):
        fitted(tiny, task, tmp_path / "out")
    first.close()
    assert (tmp_path / "out.partial").exists()  # it is the other's


@pytest.mark.parametrize("step", ["profile", "report"])
def test_disk_that_becomes_full(
    step: str, tiny: Tiny, task: Path, disk: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, nothing under the final name; with some space, the same command goes on to the same bytes."""
    out = disk / "out"

    def other_program(text: str) -> None:
        late = step == "report" and text.startswith("smaller model")  # while the report is written
        if (late or text.startswith(step)) and not (disk / "ballast").exists():
            take_all(disk / "ballast")

    model, settings = str(tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)), Settings(tokens=150)
    with pytest.raises(CheckpointError, match=r"out\.partial.* (is full: free some space|has .* for it: free)"):
        fit(model, str(task), "50%", out, settings, note=other_program)
    assert sorted(os.listdir(disk)) == ["ballast", "out.partial"]
    (disk / "ballast").unlink()
    fit(model, str(task), "50%", out, settings)
    assert os.listdir(disk) == ["out"]
    assert model_of(out) == whole
