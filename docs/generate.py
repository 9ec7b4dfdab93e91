"""Write docs/cli.md from the commands themselves; `--check` only says whether it is current. Imports no torch."""

import sys
from pathlib import Path

import click

from moedge.cli import VERBS, cli

PAGE = Path(__file__).resolve().parent / "cli.md"
HEAD = """# The command line

Written by `make docs` from the commands' own help; edit those instead.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failure (the message says what to do), 2 wrong usage,
130 Ctrl-C. Sizes are bytes or have a unit: `600MiB`, `1.5GB`. `eval "$(moedge completion bash)"` completes arguments.
"""


def page() -> str:
    """The page as it should be."""
    with click.Context(cli, info_name="moedge", max_content_width=100, terminal_width=100) as root:
        parts = [HEAD, f"```text\n{cli.get_help(root)}\n```\n"]
        for verb in [*VERBS, *sorted(cli.commands)]:
            command = cli.get_command(root, verb)
            assert command is not None
            with click.Context(command, parent=root, info_name=verb, max_content_width=100, terminal_width=100) as ctx:
                parts.append(f"## moedge {verb}\n\n```text\n{command.get_help(ctx)}\n```\n")
    return "\n".join(parts)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the page is out of date.")
def main(check: bool) -> None:
    """Write docs/cli.md."""
    text = page()
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        click.echo("docs/cli.md is out of date: run make docs", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
