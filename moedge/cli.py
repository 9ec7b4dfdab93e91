"""The command line: one table from verb to module, imported only when the verb is used.

Turns errors into messages and exit codes: 1 for failure, 2 for usage, 130 for Ctrl-C. Knows no verb's arguments.
"""

import atexit
import errno
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from moedge.errors import MoedgeError
from moedge.models.lean import lean_imports

VERBS: dict[str, tuple[str, str]] = {
    "run": ("moedge.runtime.verb_run", "Answer a prompt, or chat, within a memory limit."),
    "plan": ("moedge.runtime.verb_plan", "Show what a memory limit leaves for experts, before loading anything."),
    "info": ("moedge.models.verb_info", "Describe a checkpoint: layers, experts, router, sizes."),
    "pack": ("moedge.runtime.verb_pack", "Pack a model: one aligned extent per expert, in 16, 8 or 4 bits."),
    "trace": ("moedge.runtime.verb_trace", "Record which experts a model's router chooses."),
    "replay": ("moedge.runtime.verb_replay", "Compare eviction policies on a recorded trace."),
    "fit": ("moedge.compress.verb_fit", "Shrink a model to a task: keep the experts that its samples need."),
    "eval": ("moedge.measure.verb_eval", "Measure perplexity, task accuracy and distance from a reference model."),
    "bench": ("moedge.serve.verb_bench", "Measure speed at memory limits, or a running server under load."),
    "serve": ("moedge.serve.verb_serve", "Serve a model over HTTP, as OpenAI's API and with a page to chat in."),
}
SHELLS = ("bash", "zsh", "fish")
COMPLETE_VARIABLE = "_MOEDGE_COMPLETE"


class Verbs(click.Group):
    """A group whose commands are modules of VERBS, each holding `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(VERBS[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{VERBS[cmd_name][0]}.command is {command!r}, not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table's own summaries, so that the help imports no verb."""
        own = [(name, command.get_short_help_str(limit=80)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()] + own)


atexit.register(gc.freeze)  # else the interpreter looks at all of torch's objects once more to end: half a second


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="moedge", prog_name="moedge")
def cli() -> None:
    """Run Mixture-of-Experts language models on devices they do not fit on.

    \b
    moedge plan checkpoints/mini --memory 600MiB
    moedge run checkpoints/mini -p "The sea was" -n 64 --memory 600MiB
    """


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes moedge's arguments in a shell.

    \b
    eval "$(moedge completion bash)"     # in ~/.bashrc; the same with zsh in ~/.zshrc
    moedge completion fish > ~/.config/fish/completions/moedge.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise MoedgeError(f"no completion for {shell}: use one of {', '.join(SHELLS)}")
    click.echo(kind(cli, {}, "moedge", COMPLETE_VARIABLE).source())


def _quiet_exit(code: int) -> NoReturn:
    """Exit without the interpreter's complaint that stdout's reader is gone."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit the process. `args` defaults to sys.argv's."""
    gc.set_threshold(50_000, 20, 20)  # a tenth of the start went on cycles among the libraries' objects, which stay
    try:
        lean_imports()
        code = cli.main(args, prog_name="moedge", complete_var=COMPLETE_VARIABLE, standalone_mode=False)
        _quiet_exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        _quiet_exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _quiet_exit(130)
    except MoedgeError as error:
        click.echo(f"moedge: {error}", err=True)
    except OSError as error:
        if error.errno != errno.EPIPE:
            click.echo(f"moedge: {error}", err=True)
    except MemoryError as error:
        click.echo(f"moedge: out of memory: {error}", err=True)
    _quiet_exit(1)
