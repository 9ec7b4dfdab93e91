"""`moedge fit` as it is typed: what goes to stdout and stderr, exit codes, and bad input, which leaves nothing."""

import json
import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fitting import questions

from moedge.cli import main
from moedge.compress.importance import METHODS
from moedge.compress.report import Report

Tiny = Callable[..., Path]
Moedge = Callable[..., tuple[int, str, str]]
SIZES = re.compile(r"[\d.]+ [KMG]iB")  # those of the process differ from one call to the next
MINI = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"


@pytest.fixture
def moedge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Moedge:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        words = [str(arg) for arg in args]
        monkeypatch.setattr("sys.argv", ["moedge", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def model(tiny: Tiny) -> Path:
    return tiny("qwen3_moe", tokenizer=True, num_hidden_layers=2)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "my task").mkdir()
    return questions(tmp_path / "my task" / "words.jsonl")


def sums(path: Path, count: int) -> Path:
    """A task that the mini model has learnt."""
    chance, rows = random.Random(0), dict[str, str]()
    while len(rows) < count:
        one, other = chance.randrange(10, 100), chance.randrange(10, 100)
        rows[f"{one} + {other} ="] = f" {one + other}"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows.items()))
    return path


def test_table(model: Path, task: Path, tmp_path: Path, moedge: Moedge) -> None:
    """Figures go to stdout, reasons and what to do next to stderr; the report quotes the command for a shell."""
    out = tmp_path / "out"
    code, stdout, stderr = moedge("fit", model, "--task", f"w={task}", "--tokens", 40, "-o", out, "--also", task)
    assert code == 0, stderr
    for text in ("fitted to w", "experts a layer", "perplexity, w", "KL from the full model", "perplexity, words"):
        assert text in stdout
    assert "4 experts a layer: 50% of 8 experts" in stderr
    assert "warning: 10 of the 12 samples of" in stderr
    assert f"`moedge run {out}` runs it; {out / 'report.html'} shows what it costs" in stderr
    assert f"--task 'w={task}' --tokens 40" in (out / "report.md").read_text()


def test_json_and_what_runs_with_it(model: Path, task: Path, tmp_path: Path, moedge: Moedge) -> None:
    out = tmp_path / "out"
    command = ("fit", model, "--task", task, "--tokens", 40, "--budget", "experts=4", "-o", out, "--json")
    code, stdout, stderr = moedge(*command)
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    assert found.pop("out") == str(out)
    assert [len(layer.kept) for layer in Report.from_dict(found).layers] == [4, 4]
    texts = {}
    for name, more in {
        "full": (model,),
        "fit": (model, "--experts", out),
        "folder": (out,),
        "fallback": (model, "--experts", out, "--fallback"),
    }.items():
        code, stdout, stderr = moedge("run", *more, "-p", "sea moon", "-n", 8, "--json")
        assert code == 0, stderr
        texts[name] = json.loads(stdout)["text"]
    assert texts["fit"] == texts["folder"] != texts["full"] == texts["fallback"]


NOT_USED: dict[str, tuple[tuple[str, ...], str]] = {
    "no task": (("-o", "OUT"), "Missing option '--task'"),
    "no out": (("--task", "TASK"), "Missing option '-o'"),
    "bits": (("--task", "TASK", "-o", "OUT", "--bits", "3"), "'3' is not one of"),
    "beta": (("--task", "TASK", "-o", "OUT", "--beta", "2"), "2.0 is not in the range"),
    "tokens": (("--task", "TASK", "-o", "OUT", "--tokens", "1"), "1 is not in the range"),
    "memory": (("--task", "TASK", "-o", "OUT", "--memory", "much"), "'much' is not a number with a unit"),
    "budgets": (("--task", "TASK", "-o", "OUT", "--budgets", "25%"), "--budgets is for --compare"),
    "budget": (("--task", "TASK", "-o", "OUT", "--compare", "ean", "--budget", "25%"), "give --budgets 25% instead"),
    "bits of a comparison": (("--task", "TASK", "-o", "OUT", "--compare", "ean", "--bits", "8"), "writes no model"),
}


@pytest.mark.parametrize("case", NOT_USED)
def test_wrong_use_exits_with_2(case: str, model: Path, task: Path, tmp_path: Path, moedge: Moedge) -> None:
    words, message = NOT_USED[case]
    places = {"TASK": str(task), "OUT": str(tmp_path / "out")}
    code, stdout, stderr = moedge("fit", model, *(places.get(word, word) for word in words))
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert sorted(os.listdir(tmp_path)) == ["my task"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"--task": "{empty}"}, "empty.jsonl is empty: write samples of the task into it"),
    "blank": ({"--task": "{blank}"}, "blank.txt has no usable samples, only blanks: write samples of the task"),
    "missing": ({"--task": "nowhere.txt"}, "nowhere.txt does not exist: give a file of task records or a text"),
    "small": ({"--budget": "10%"}, "leaves 0 experts a layer, the model's router needs 2: give experts=2 or at least"),
    "above": ({"--budget": "9GiB"}, "budget 9GiB is above the whole model, which takes"),
    "more": ({"--budget": "experts=9"}, "the model has 8 experts a layer, 9 are more than that"),
    "budget": ({"--budget": "half"}, "budget 'half' is not a share (50%), a size (800MiB) or experts=16"),
    "method": ({"--method": "magic"}, "method 'magic' does not exist: choose default, litemoe, reap"),
    "protect": ({"--protect": "all"}, "protect 'all': give auto, none, or layer:expert pairs such as 0:3,5:17"),
    "expert": ({"--protect": "0:8"}, "protect 0:8: the model has layers 0 to 1, experts 0 to 7"),
    "out": ({"--out": "{here}"}, "exists already: choose another name, or delete it"),
    "answer": ({"--task": "{long}"}, "alone is longer than the context of 512 tokens: shorten it, or leave it out"),
    "limit": ({"--memory": "10MiB"}, "--memory 10 MiB leaves 0 B after process"),
    "one": ({"--task": "{one}"}, "has 1 different sample: one to fit on and one to test on are needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_1_and_writes_nothing(
    case: str, model: Path, task: Path, tmp_path: Path, moedge: Moedge
) -> None:
    files = task.parent
    (files / "empty.jsonl").touch()
    (files / "blank.txt").write_text(" \n" * 40)
    rows = [json.loads(line) | {"choices": None} for line in task.read_text().splitlines()]
    (files / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    long = [row | {"answer": f" {number} {'sea ' * 400}"} for number, row in enumerate(rows)]
    (files / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    places = {path.stem: path for path in files.iterdir()} | {"here": files}
    given, message = BAD[case]
    options = {"--task": "{words}", "--out": str(tmp_path / "out"), "--tokens": 40} | given
    words = [str(word).format(**places) for pair in options.items() for word in pair]
    code, stdout, stderr = moedge("fit", model, *words)
    assert (code, stdout) == (1, "")
    assert stderr.startswith("moedge: ")
    assert message in stderr
    assert sorted(os.listdir(tmp_path)) == ["my task"]
    code, _, again = moedge("fit", model, *words, "--json")
    assert (code, SIZES.sub("", again)) == (1, SIZES.sub("", stderr))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("البحر هادئ والقمر فوق البيت والرجل العجوز نائم. ", "the model was not made for this writing"),
        ("wkh vhd zdv fdop dqg wkh rog pdq vohsw xqghu wkh wuhhv, ", "the full model cannot read the samples of task"),
    ],
    ids=["writing", "cipher"],
)
def test_samples_that_the_model_cannot_read(text: str, message: str, tmp_path: Path, moedge: Moedge) -> None:
    """Another writing, and a language that is none."""
    words = text.split()
    chance = random.Random(0)
    lines = (" ".join(chance.choices(words, k=12)) for _ in range(120))
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    code, _, stderr = moedge("fit", MINI, "--task", tmp_path / "text.txt", "--tokens", 1500, "-o", tmp_path / "out")
    assert (code, message in stderr) == (1, True), stderr
    assert os.listdir(tmp_path) == ["text.txt"]


def test_compare(model: Path, task: Path, tmp_path: Path, moedge: Moedge) -> None:
    """A table, a page, and when the same is asked again, with a budget more, only that is measured."""
    out = tmp_path / "out"
    common = ("fit", model, "--task", task, "--tokens", 60, "-o", out, "--compare")
    code, stdout, stderr = moedge(*common, "default, random", "--budgets", "50%")
    assert code == 0, stderr
    assert [line.split(" | ")[1] for line in stdout.splitlines()[2:3]] == ["(full model)"]
    assert {line.split(" | ")[1] for line in stdout.splitlines()[3:]} == {"default", "random"}
    assert f"plots are in {out / 'compare.html'}" in stderr
    assert sorted(os.listdir(out)) == ["compare.html", "compare.json", "compare.md", "profile.npz", "rows.jsonl"]
    before = (out / "rows.jsonl").read_text()
    code, stdout, stderr = moedge(*common, "default,random", "--budgets", "50%,100%", "--json")
    assert code == 0, stderr
    rows = json.loads(stdout)["rows"]
    assert [(row["method"], row["share"]) for row in rows] == [
        *(("default", 1.0), ("random", 1.0)),
        *(("default", 0.5), ("random", 0.5)),
    ]
    assert [row["quality"]["words"]["kl"] for row in rows[:2]] == [0, 0]
    after = (out / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4
    for more, differs in ((("--scope", "answer"), "scope 'text', now it is 'answer'"), (("--seed", 1), "profiled")):
        code, _, stderr = moedge(*common, "default", "--budgets", "50%", *more)
        assert (code, f"was measured with {differs}" in stderr) == (1, True), stderr
    assert (out / "rows.jsonl").read_text() == after


@pytest.mark.parametrize(
    ("methods", "budgets", "message"),
    [
        ("default,magic", "50%", f"method 'magic' does not exist: choose {', '.join(METHODS)}"),
        ("default", "50", "budget '50' is not a share above 0% and up to 100%: write them like 25%,50%"),
        ("default", "10%,50%", "budget 10% leaves 0 experts a layer"),
    ],
)
def test_bad_comparison(
    methods: str, budgets: str, message: str, model: Path, task: Path, tmp_path: Path, moedge: Moedge
) -> None:
    words = ("fit", model, "--task", task, "-o", tmp_path / "out", "--compare", methods, "--budgets", budgets)
    code, stdout, stderr = moedge(*words)
    assert (code, stdout) == (1, "")
    assert message in stderr
    assert sorted(os.listdir(tmp_path)) == ["my task"]
    code, _, stderr = moedge("fit", model, "--task", task, "-o", task.parent, "--compare", "ean")
    assert (code, "exists already, and is no comparison that was begun" in stderr) == (1, True)
    assert os.listdir(task.parent) == [task.name]


def test_mini_in_a_process_of_its_own(
    tmp_path: Path, moedge_command: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    """Half of the experts still add; the fit is far nearer to the full model than chance would have it."""
    task, out = sums(tmp_path / "sums.jsonl", 80), tmp_path / "out"
    done = moedge_command("fit", MINI, "--task", task, "--tokens", 300, "-o", out, "--json", "--memory", "2GiB")
    assert done.returncode == 0, done.stderr
    report = Report.from_dict({k: v for k, v in json.loads(done.stdout).items() if k != "out"})
    full, small = report.before["sums"], report.after["sums"]
    assert full.accuracy is not None
    assert small.accuracy is not None
    assert small.accuracy >= full.accuracy - 0.2 > 0.6
    assert 0 < small.kl < 0.3
    assert small.chance == 0
