"""What every committed figure states: device, load, commit, command. Prints a table, and one JSON line last."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from moedge.measure.machine import commit, device, load_average

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def default_folder() -> Path:
    """$MOEDGE_BENCH_DIR/olmoe-3.4gb, or the same under /tmp."""
    return Path(os.environ.get("MOEDGE_BENCH_DIR", "/tmp")) / "olmoe-3.4gb"


def command() -> str:
    """The command line as a user would type it at the root of the repository."""
    arguments = [argument.replace(f"{ROOT}/", "") for argument in sys.argv]
    return " ".join(["python", *arguments])


def publish(name: str, rows: Sequence[dict[str, Any]], figures: dict[str, Any], save: bool) -> None:
    """Print `rows` as a table, then everything as one JSON line; with `save` also to benchmarks/results/NAME.json."""
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()])
    Console(width=120).print(table)
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(ROOT / "moedge", ROOT / "benchmarks"),
        "command": command(),
        "device": device() | {"load_average": load_average()},
        **figures,
    }
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result))
