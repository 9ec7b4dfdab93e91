"""What every committed figure states: device, load, commit, command. Prints a table, and one JSON line last."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def default_folder() -> Path:
    """$MOEDGE_BENCH_DIR/olmoe-3.4gb, or the same under /tmp."""
    return Path(os.environ.get("MOEDGE_BENCH_DIR", "/tmp")) / "olmoe-3.4gb"


def device() -> dict[str, Any]:
    """CPU, cores, memory and how busy the machine was when asked."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """Short hash, with + when the work tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        return "unknown"
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "moedge", "benchmarks"], check=False).returncode
    return done.stdout.strip() + ("+" if dirty else "")


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
        "commit": commit(),
        "command": command(),
        "device": device(),
        **figures,
    }
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result))
