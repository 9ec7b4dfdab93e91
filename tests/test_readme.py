"""What the README shows works: its commands, Python and links. The mini model is put in its place by a tiny one."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from moedge import cli
from moedge.units import parse_size

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
MINI = "checkpoints/mini"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language ("" for commands)."""
    return [
        body for mark, body in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL) if mark == language
    ]


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("moedge ")]
TARGETS = [line.split()[1] for block in blocks("") for line in block.splitlines() if line.startswith("make ")]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", tokenizer=True)


def roomy(command: str) -> list[str]:
    """The words of a command with a limit that this test's own process, larger than a user's, fits in."""
    words = shlex.split(command.split("#")[0])[1:]
    return [str(parse_size("8GiB")) if re.fullmatch(r"\d+[MG]i?B", word) else word for word in words]


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 2
    assert TARGETS == ["demo", "test"]
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # what a command makes
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(model) if word == MINI else word for word in roomy(command)])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 0, err
    assert out.strip()


def test_the_python_runs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[0]
    assert MINI in code
    code = re.sub(r'memory="\w+"', 'memory="8GiB"', code.replace(MINI, str(model)))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_python_is_five_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])  # fmt: skip # noqa: E501
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith(("http:", "https:")):
            assert (path.parent / link).exists(), f"{page} links to {link}"


def test_every_figure_was_measured() -> None:
    assert "TODO" not in TEXT
