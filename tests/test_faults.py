"""What goes wrong around a run: killed, interrupted, damaged files, too little memory, no prompt or too long a one.

Each ends by itself with the right exit code and one line that says what to do. No answer is wrong, no file is left.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The sea was calm"
LONG = 420  # tokens of a run that is meant to be disturbed


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    """4 layers of 8 experts of 1 MiB: large enough that a limit leaves some of them on disk."""
    return tiny("qwen3_moe", tokenizer=True, hidden_size=256, moe_intermediate_size=340)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def half_memory(plan: dict[str, Any]) -> int:
    """The limit that leaves slots for half of the experts, from a roomy plan."""
    fixed = sum(row["nbytes"] for row in plan["rows"] if row["name"] != "expert slots")
    return int(fixed + (sum(plan["num_experts"]) // 2 + plan["spare"]) * plan["slot_bytes"])


def half_memory_here(model: Path) -> int:
    """As this process sees it, which is larger than a fresh one."""
    from moedge.models.load import draw
    from moedge.runtime.budget import make_plan

    blueprint = draw(model)
    plan = make_plan(blueprint, limit=1 << 40, context=512)
    blueprint.checkpoint.close()
    return half_memory(plan.as_dict())


@pytest.fixture(scope="module")
def half_memory_there(model: Path, moedge_command: Callable[..., Any]) -> int:
    """As a process of its own sees it."""
    done = moedge_command("plan", model, "--memory", "1TiB", "--context", 512, "--json")
    assert done.returncode == 0, done.stderr
    return half_memory(json.loads(done.stdout))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`start("run", ...)`: the command in a process of its own, with a home and a temporary folder to look into."""
    children: list[subprocess.Popen[str]] = []

    def begin(*args: object) -> "subprocess.Popen[str]":
        folders = {name: str(tmp_path / "left" / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
        for folder in folders.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "moedge", *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=dict(os.environ, PYTHONUNBUFFERED="1", **folders),
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Files below a folder with size and time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def run_args(model: Path, tokens: int = 12, **more: object) -> list[object]:
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    return ["run", model, "-p", PROMPT, "-n", tokens, *options]


@pytest.fixture(scope="module")
def right_answer(model: Path) -> Callable[[int], str]:
    """The text of an undisturbed run without a limit."""
    import moedge

    with moedge.load(model) as lm:
        steps = list(lm.generate(PROMPT, max_new_tokens=LONG))
    return lambda count: "".join(step.text for step in steps[:count])


# --- disturbed while running ---------------------------------------------------------------------------------------


def test_killed_while_running_leaves_nothing_and_the_next_run_is_right(
    model: Path,
    tmp_path: Path,
    start: Callable[..., Any],
    moedge_here: Callable[..., Any],
    right_answer: Callable[[int], str],
) -> None:
    before = listing(model)
    child = start(*run_args(model, LONG))
    assert child.stdout.read(1)
    child.kill()
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert listing(model) == before
    assert listing(tmp_path / "left") == {}
    again = moedge_here(*run_args(model, 40, memory=half_memory_here(model)), "--json")
    assert again.status == 0, again.err
    assert json.loads(again.out)["text"] == right_answer(40)


def test_interrupted_while_answering(model: Path, start: Callable[..., Any]) -> None:
    child = start(*run_args(model, LONG))
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc for how far the start has come")
@pytest.mark.parametrize("library", ["libtorch_cpu", "tokenizers"])
def test_interrupted_while_starting(library: str, model: Path, start: Callable[..., Any]) -> None:
    """While torch, or transformers, is being imported."""
    child = start(*run_args(model, LONG))
    while library not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # a shell says 130 of both: where an extension's import swallows the interrupt, Python ends by the signal itself
    assert child.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["replaced", "shortened", "removed"])
def test_a_shard_that_changes_while_running(
    how: str,
    broken: Path,
    half_memory_there: int,
    start: Callable[..., Any],
    right_answer: Callable[[int], str],
) -> None:
    """Either it is said, with the file's name, or nothing more was read from it and the answer is right."""
    child = start(*run_args(broken, LONG, memory=half_memory_there, context=512))
    text = child.stdout.read(1)
    assert text, child.communicate(timeout=30)
    for shard in broken.glob("*.safetensors"):
        if how == "replaced":
            other = shard.with_suffix(".new")
            other.write_bytes(bytes(shard.stat().st_size))
            os.replace(other, shard)
        elif how == "shortened":
            os.truncate(shard, shard.stat().st_size // 2)
        else:
            shard.unlink()
    out, err = child.communicate(timeout=90)
    assert "Traceback" not in err
    text += out.removesuffix("\n")
    assert right_answer(LONG).startswith(text)
    if child.returncode:
        assert child.returncode == 1
        assert ".safetensors" in err
    else:
        assert text == right_answer(LONG)


def test_a_reader_that_goes_away(model: Path) -> None:
    command = f"{sys.executable} -m moedge run {model} -p '{PROMPT}' -n {LONG} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=90, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# --- damaged before running ----------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> str:
    """Break a checkpoint; returns the name of the file that the message has to name."""
    shards = sorted(folder.glob("*.safetensors"))
    shard, index = shards[-1], folder / "model.safetensors.index.json"
    if how == "cut in half":
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == "one byte short":
        os.truncate(shard, shard.stat().st_size - 1)
    elif how == "empty":
        os.truncate(shard, 0)
    elif how == "cut in its header":
        os.truncate(shard, 20)
    elif how == "missing":
        shard.unlink()
    elif how == "not safetensors":
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    elif how == "the index lies":
        table = json.loads(index.read_text())
        moved = next(name for name, file in table["weight_map"].items() if file == shard.name)
        table["weight_map"][moved] = shards[0].name
        index.write_text(json.dumps(table))
        return index.name
    elif how == "the index is no JSON":
        index.write_text("{")
        return index.name
    elif how == "no config":
        (folder / "config.json").unlink()
        return "config.json"
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
        return "config.json"
    return shard.name


@pytest.mark.parametrize(
    "how",
    [
        *("cut in half", "one byte short", "empty", "cut in its header", "missing", "not safetensors"),
        *("the index lies", "the index is no JSON", "no config", "config is no JSON"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_damaged_checkpoint_is_named(how: str, verb: str, broken: Path, moedge_here: Callable[..., Any]) -> None:
    name = damage(broken, how)
    done = moedge_here(*(run_args(broken) if verb == "run" else ["plan", broken]))
    assert (done.status, done.out) == (1, "")
    assert done.err.strip().splitlines()[-1].startswith("moedge: ")
    assert name in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("where", ["nowhere", "a file", "an empty folder"])
def test_what_is_no_checkpoint(where: str, tmp_path: Path, moedge_here: Callable[..., Any]) -> None:
    path = tmp_path / "x"
    if where == "a file":
        path.write_text("x")
    elif where == "an empty folder":
        path.mkdir()
    done = moedge_here("run", path, "-p", PROMPT)
    assert done.status == 1
    assert str(path) in done.err.replace("\n", "")


# --- too little or too much ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_limit_below_the_minimum_says_what_it_takes(verb: str, model: Path, moedge_here: Callable[..., Any]) -> None:
    extra = ["-p", PROMPT] if verb == "run" else []
    done = moedge_here(verb, model, *extra, "--memory", "5MiB")
    assert (done.status, done.out) == (1, "")
    assert "5 MiB" in done.err
    assert "give at least" in done.err


@pytest.mark.parametrize("size", ["lots", "-5MiB", "600MiX"])
def test_a_size_that_is_none_is_a_usage_error(size: str, model: Path, moedge_here: Callable[..., Any]) -> None:
    done = moedge_here("plan", model, f"--memory={size}")
    assert done.status == 2
    assert size in done.err


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_prompt(prompt: str, model: Path, moedge_here: Callable[..., Any]) -> None:
    """It continues from the token that begins a text, or it is refused; it does not hang."""
    done = moedge_here("run", model, "-p", prompt, "-n", 3, "--json")
    assert "Traceback" not in done.err
    if done.status:
        assert "prompt is empty" in done.err
    else:
        assert json.loads(done.out)["tokens"] <= 3


def test_a_prompt_that_is_no_text(model: Path, tmp_path: Path, moedge_here: Callable[..., Any]) -> None:
    path = tmp_path / "prompt"
    path.write_bytes(b"\xff\xfe\x00")
    done = moedge_here("run", model, "-f", path)
    assert done.status == 1
    assert "not UTF-8" in done.err


@pytest.mark.parametrize("memory", [True, False])
def test_a_prompt_longer_than_the_context(memory: bool, model: Path, moedge_here: Callable[..., Any]) -> None:
    limit = ["--memory", half_memory_here(model)] if memory else []
    done = moedge_here("run", model, "-p", "word " * 100, "-n", 4, "--context", 64, *limit)
    assert (done.status, done.out) == (1, "")
    assert "64" in done.err
    assert "context" in done.err


def test_a_prompt_longer_than_the_model_can_read(model: Path, moedge_here: Callable[..., Any]) -> None:
    done = moedge_here("run", model, "-p", "word " * 600, "-n", 4)
    assert "Traceback" not in done.err
    assert done.status in (0, 1)


def test_an_answer_that_reaches_the_end_of_the_context(model: Path, moedge_here: Callable[..., Any]) -> None:
    done = moedge_here("run", model, "-p", PROMPT, "-n", 400, "--context", 40, "--json")
    assert "Traceback" not in done.err
    if done.status == 0:
        assert 0 < json.loads(done.out)["tokens"] < 40
    else:
        assert "context" in done.err
