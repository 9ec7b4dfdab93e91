"""`moedge plan`: who gets how much of a memory limit, before anything is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedge.terminal import SIZE, json_option, print_json
from moedge.units import format_size

if TYPE_CHECKING:
    from moedge.models.load import Blueprint
    from moedge.runtime.budget import Plan

EXAMPLES = """\b
Examples:
  moedge plan ./OLMoE-1B-7B --memory 4GiB
  moedge plan ./Qwen3-30B-A3B --memory 8GiB --context 8192 --parallel 2
  moedge plan ./OLMoE-1B-7B --memory 4GiB --json
  moedge plan ./OLMoE-1B-7B --memory 2GiB --experts ./OLMoE-fit --fallback
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("--memory", type=SIZE, help="Limit for the whole process, such as 600MiB. Without it nothing is limited.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens reserved for each sequence (with a limit: at most 2048)."
)
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--prefill-chunk", type=click.IntRange(1), default=512, show_default=True, help="Tokens read at once.")
@click.option("--dtype", help="fp32, bf16 or fp16; by default the checkpoint's own.")
@click.option("--experts", metavar="FIT", help="Only the experts that `moedge fit` kept, in the folder FIT.")
@click.option("--fallback", is_flag=True, help="With --experts: all experts, those of FIT stay in memory.")
@json_option
def command(
    model: str,
    memory: int | None,
    context: int | None,
    parallel: int,
    prefill_chunk: int,
    dtype: str | None,
    experts: str | None,
    fallback: bool,
    as_json: bool,
) -> None:
    """Print how the memory limit would be spent. Loads no weights."""
    from moedge.models.hub import resolve
    from moedge.models.load import draw
    from moedge.runtime.budget import make_plan
    from moedge.runtime.fitted import fit

    whole = draw(resolve(model), dtype)
    try:
        blueprint, pins = fit(whole, experts, fallback)
        plan = make_plan(blueprint, memory, context, parallel, prefill_chunk)
        worst = _worst_token(blueprint, plan)
    finally:
        whole.checkpoint.close()
    pinned = None if pins is None else [len(each) for each in pins.within(plan.capacities)]
    if as_json:
        print_json(plan.as_dict() | {"model": str(blueprint.folder), "pinned": pinned, "worst_token": worst})
    else:
        print_plan(plan, title=f"{model}, {blueprint.anatomy.architecture}")
        if pins is not None and pinned is not None:
            click.echo(
                f"Of the fit's {sum(map(len, pins.order))} experts {sum(pinned)} have a slot and stay in memory."
            )
        click.echo(_worst_line(worst))


def print_plan(plan: "Plan", title: str) -> None:
    """The plan as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    limit = "no limit" if plan.limit is None else f"limit {format_size(plan.limit)}"
    table = Table(title=f"{title}, {limit}", title_justify="left")
    table.add_column("for")
    table.add_column("bytes", justify="right")
    table.add_column("basis")
    for row in plan.rows:
        table.add_row(row.name, format_size(row.nbytes), row.basis)
    table.add_section()
    capacities = f"{min(plan.capacities)} to {max(plan.capacities)}"
    share = f"{100 * plan.resident_share:.0f}% of the experts stay, {capacities} of a layer's {max(plan.num_experts)}"
    table.add_row("total", format_size(plan.total), share)
    Console().print(table)


def _worst_token(blueprint: "Blueprint", plan: "Plan") -> dict[str, Any]:
    """What a token costs when none of its experts is in memory, at the disk's measured speed."""
    from moedge.runtime.device import read_speed

    layers = blueprint.anatomy.layers
    read = sum(layer.top_k * blueprint.experts.nbytes(layer.index, 0) for layer in layers)
    largest: Path = max(blueprint.checkpoint.files, key=lambda file: file.stat().st_size)
    speed = read_speed(largest)
    seconds = None if speed is None else read / speed
    return {"bytes": read, "disk_bytes_per_second": speed, "seconds": seconds}


def _worst_line(worst: dict[str, Any]) -> str:
    line = f"A token whose experts are all on disk reads {format_size(worst['bytes'])}"
    if worst["seconds"] is None:
        return f"{line}."
    return f"{line}: {worst['seconds']:.2g} s at the {format_size(worst['disk_bytes_per_second'])}/s measured here."
