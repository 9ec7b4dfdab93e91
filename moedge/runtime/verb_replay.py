"""`moedge replay`: eviction policies compared on recorded routing, without the model."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedge.terminal import console, json_option, print_json

if TYPE_CHECKING:
    from moedge.runtime.replay import Row

PARALLEL_ACCESSES = 500_000  # below, starting processes takes longer than the replay
EXAMPLES = """\b
Examples:
  moedge replay trace.npz
  moedge replay trace.npz --policy default,lru,oracle --capacity 8,16 --json
  moedge replay trace.npz --sequences 90: --capacity 12
"""


class Names(click.ParamType[list[str]]):
    """Policies separated by commas."""

    name = "policies"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        from moedge.runtime.policy import POLICIES
        from moedge.runtime.replay import ORACLE

        names = list(dict.fromkeys(name.strip() for name in str(value).split(",")))
        for name in names:
            if name not in POLICIES and name != ORACLE:
                self.fail(f"policy {name!r} does not exist: choose {', '.join([*POLICIES, ORACLE])}", param, ctx)
        return names


class Capacities(click.ParamType[list[int]]):
    """Positive numbers separated by commas."""

    name = "capacities"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = list(dict.fromkeys(part.strip() for part in str(value).split(",")))
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of experts per layer: write it like 8,16", param, ctx)
        return [int(part) for part in parts]


class Range(click.ParamType[slice]):
    """`A:B`, either of which may be left out, counted from 0 and B exclusive."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> slice:
        first, colon, last = str(value).partition(":")
        if not colon or not all(end == "" or (end.isascii() and end.isdigit()) for end in (first, last)):
            self.fail(f"{value!r} is not a range of sequences: write it like 0:90 or 90:", param, ctx)
        return slice(int(first or 0), int(last) if last else None)


@click.command(epilog=EXAMPLES)
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", "policies", type=Names(), default="default,lru,oracle", show_default=True,
              help="Names separated by commas; oracle is the offline optimum.")  # fmt: skip
@click.option("--capacity", "capacities", type=Capacities(), default="8,16", show_default=True,
              help="Experts per layer that fit, separated by commas.")  # fmt: skip
@click.option("--sequences", type=Range(), help="Only sequences A:B of the trace.")
@json_option
def command(
    trace: Path, policies: list[str], capacities: list[int], sequences: slice | None, as_json: bool
) -> None:  # fmt: skip
    """Compare eviction policies on a recorded trace: hit rate by policy and cache capacity.

    TRACE is an npz file of moedge trace. One cache per layer, warm from one sequence to the next; an expert that is in
    the cache before its token is a hit.
    """
    from moedge.models.trace import RoutingTrace
    from moedge.runtime.replay import replay

    recorded = RoutingTrace.load(trace)
    if sequences is not None:
        recorded = recorded.part(sequences.start, sequences.stop)
    accesses = recorded.experts.size * len(policies) * len(capacities)
    workers = os.cpu_count() or 1 if accesses > PARALLEL_ACCESSES else 1
    with ExitStack() as stack:
        update = None
        if not as_json and console.is_terminal:
            from rich.progress import Progress

            progress = stack.enter_context(Progress(console=console, transient=True))
            task = progress.add_task("replay", total=1.0)

            def update(share: float) -> None:
                progress.update(task, completed=share)

        rows = replay(recorded, policies, capacities, workers, update)
    if as_json:
        print_json([{"policy": row.policy, "capacity": row.capacity, "hit_rate": row.hit_rate} for row in rows])
    else:
        _print_table(f"{trace}, {len(recorded)} tokens in {recorded.num_sequences} sequences", rows)


def _print_table(title: str, rows: "Sequence[Row]") -> None:
    from rich.console import Console
    from rich.table import Table

    from moedge.runtime.replay import gap_closed

    table = Table(title=title, title_justify="left")
    for name in ("capacity", "policy", "hit rate", "of the way from lru to oracle"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    capacity = None
    for row in sorted(rows, key=lambda row: (row.capacity, row.hit_rate)):
        if capacity not in (None, row.capacity):
            table.add_section()
        capacity, closed = row.capacity, gap_closed(rows, row)
        share = "" if closed is None else f"{closed:.1%}"
        table.add_row(str(row.capacity), row.policy, f"{row.hit_rate:.2%}", share)
    Console().print(table)
