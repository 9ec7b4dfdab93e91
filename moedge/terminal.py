"""What every verb of the command line shares: the console, the --json flag, sizes as arguments."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

from moedge.units import parse_size

F = TypeVar("F", bound=Callable[..., Any])

console = Console(stderr=True)  # messages and progress; results go to stdout


class SizeType(click.ParamType[int]):
    """`600MiB`, `1.5GB` or bytes, as an integer of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()


def json_option(command: F) -> F:
    """Adds `--json`: one JSON object on stdout and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")(command)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))
