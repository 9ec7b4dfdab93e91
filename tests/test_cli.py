"""The command line as a user meets it: help without torch, exit codes, messages, completion."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from moedge import cli
from moedge.errors import CheckpointError

Done = subprocess.CompletedProcess[str]
USAGE = "Usage: moedge fail [OPTIONS]\nTry 'moedge fail --help' for help.\n\n"


def look(*args: str) -> Done:
    """Run the command; the last line of stdout says whether torch was imported."""
    code = "import sys; from moedge.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=True)


def test_help_names_every_verb_and_imports_no_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = look("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in [*cli.VERBS, "completion"])
    assert done.stdout.splitlines()[-1] == "False"
    assert after.ru_utime - before.ru_utime < 0.5


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_json_and_help_with_an_example(verb: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), verb)
    assert command is not None
    assert "--json" in [name for parameter in command.params for name in parameter.opts]
    with click.Context(command, info_name=f"moedge {verb}") as ctx:
        text = command.get_help(ctx)
    assert f"moedge {verb} " in text.split("\n", 2)[2], "the help shows no example"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_imports_no_torch(verb: str) -> None:
    done = look(verb, "--help")
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("args", "status"),
    [(["--version"], 0), (["nosuch"], 2), (["run"], 2), (["run", "--nosuch"], 2), (["completion", "tcsh"], 2), ([], 2)],
)
def test_usage_is_exit_code_2(args: list[str], status: int, moedge_command: Callable[..., Done]) -> None:
    done = moedge_command(*args)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert (done.stderr == "") == (status == 0)


def failing(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CheckpointError("shard 3 is cut off: fetch it again"), 1, "moedge: shard 3 is cut off: fetch it again\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "moedge: [Errno 2] No such file: 'x.txt'\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, "\n"),
        (MemoryError("12 GiB"), 1, "moedge: out of memory: 12 GiB\n"),
        (click.UsageError("give one"), 2, f"{USAGE}Error: give one\n"),
    ],
)  # fmt: skip
def test_errors_become_messages(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(cli.cli.commands, "fail", failing(error))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["fail"])
    out, err = capsys.readouterr()
    assert (exit_info.value.code, out, err) == (status, "", message)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.cli.commands, "fail", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m moedge --help | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_prints_a_script(shell: str, moedge_command: Callable[..., Done]) -> None:
    done = moedge_command("completion", shell)
    assert done.returncode == 0
    assert cli.COMPLETE_VARIABLE in done.stdout


def test_completion_knows_the_verbs(moedge_command: Callable[..., Done]) -> None:
    env = dict(os.environ, COMP_WORDS="moedge re", COMP_CWORD="1", _MOEDGE_COMPLETE="bash_complete")
    done = moedge_command(env=env)
    assert done.stdout.split() == ["plain,replay"]
