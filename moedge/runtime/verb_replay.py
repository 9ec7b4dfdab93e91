"""`moedge replay`: what eviction policies would have hit on a recorded trace."""

from pathlib import Path

import click

from moedge.terminal import console, json_option, print_json

EXAMPLES = """\b
Examples:
  moedge trace checkpoints/mini --text novel.txt -o novel.npz
  moedge replay novel.npz --policy default,lru,oracle --capacity 8,16
  moedge replay traces.npz --policy default --capacity 8 --sequences 90: --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", default="default,lru,oracle", show_default=True, help="Policies, separated by commas.")
@click.option("--capacity", default="8,16", show_default=True, help="Experts per layer, separated by commas.")
@click.option("--sequences", help="Only sequences A to B of the trace, written A:B.")
@json_option
def command(trace: Path, policy: str, capacity: str, sequences: str | None, as_json: bool) -> None:
    """Replay TRACE.npz against caches of some sizes under some policies."""
    from rich.progress import Progress

    from moedge.models.trace import RoutingTrace
    from moedge.runtime.replay import replay

    policies = [name.strip() for name in policy.split(",") if name.strip()]
    capacities = _numbers(capacity)
    first, last = _range(sequences)
    recorded = RoutingTrace.load(trace).part(first, last)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("replaying", total=None)
        rows = replay(recorded, policies, capacities, lambda n, of: progress.update(bar, completed=n, total=of))
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        _print_table({(row.policy, row.capacity): row.hit_rate for row in rows}, policies, capacities)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not numbers separated by commas", param_hint="--capacity") from error


def _range(text: str | None) -> tuple[int, int | None]:
    first, colon, last = (text or ":").partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first or 0), int(last) if last else None
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a range like 0:90", param_hint="--sequences") from error


def _print_table(rates: dict[tuple[str, int], float], policies: list[str], capacities: list[int]) -> None:
    """Hit rates, and beside them the share of the way from LRU to the oracle where both were asked for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="hit rate by experts per layer (in brackets: way from lru to oracle)", title_justify="left")
    table.add_column("policy")
    for capacity in capacities:
        table.add_column(str(capacity), justify="right")
    for policy in policies:
        table.add_row(policy, *(_cell(rates, policy, capacity) for capacity in capacities))
    Console().print(table)


def _cell(rates: dict[tuple[str, int], float], policy: str, capacity: int) -> str:
    rate, low, high = (rates.get((name, capacity)) for name in (policy, "lru", "oracle"))
    way = "" if low is None or high is None or high == low or rate is None else f" ({(rate - low) / (high - low):.0%})"
    return f"{rate:.1%}{way}"
