"""`moedge pack`: a copy of a model that is read faster and may be smaller, and the check of one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moedge.terminal import SIZE, console, json_option, print_json
from moedge.units import format_size

if TYPE_CHECKING:
    from moedge.runtime.pack import Report

EXAMPLES = """\b
Examples:
  moedge pack ./OLMoE-1B-7B ./OLMoE-int8 --bits 8
  moedge pack ./OLMoE-1B-7B ./OLMoE-int4 --bits 4 --group 32 --memory 1GiB
  moedge pack ./gpt-oss-20b ./gpt-oss-packed --bits 4 --backbone 8
  moedge pack --verify ./OLMoE-int4
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", required=False)
@click.option(
    "--bits",
    type=click.Choice(["16", "12", "8", "4"]),
    help="16 (default): the experts as they are. 12: bf16 ones exactly, in a quarter less bytes.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128", "256"]),
    help="Numbers that share a scale. Default: as a quantised MODEL has it, else 32.",
)
@click.option("--asymmetric", is_flag=True, help="A zero point for each group as well.")
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text, or JSON lines with `text`, like what the model will read: --bits 4 is made best for it.",
)
@click.option(
    "--backbone",
    type=click.Choice(["16", "8", "4"]),
    default="16",
    help="Bits of linear layers and embeddings that are no experts, in groups of 32. 16 (default): as they are.",
)
@click.option("--memory", type=SIZE, help="Limit for the whole process, such as 900MiB.")
@click.option("--verify", "verifying", is_flag=True, help="Check every byte of the packed MODEL; write nothing.")
@json_option
def command(
    model: str,
    out: str | None,
    bits: str | None,
    group: str | None,
    asymmetric: bool,
    calibrate: Path | None,
    backbone: str,
    memory: int | None,
    verifying: bool,
    as_json: bool,
) -> None:
    """Write MODEL to the new folder OUT, which every verb takes in its place.

    Each expert is one extent there, read at once and checked at its first use. A run that was interrupted goes on when
    the same command is given again.

    MODEL may be quantised: FP8, MXFP4 (gpt-oss), GPTQ, AWQ or auto-round. It is dequantised; with its own number of
    --bits and no --group its experts stay as they are, of MXFP4 with --bits 4.
    """
    if verifying:
        if out or bits or group or asymmetric or calibrate or backbone != "16":
            raise click.UsageError("--verify takes a packed MODEL and no other settings")
        _verify(model, as_json)
        return
    if out is None:
        raise click.UsageError("name the folder OUT that the packed model goes to")
    if bits in (None, "16", "12") and (group or asymmetric):
        raise click.UsageError("--group and --asymmetric are for --bits 8 and 4")
    if calibrate and bits != "4":
        raise click.UsageError("--calibrate is for --bits 4: clipping does not make 8 bits better (docs/pack.md)")
    from moedge.models.hub import resolve
    from moedge.runtime.pack import pack
    from moedge.runtime.sources import choose_format

    format = choose_format(resolve(model), int(bits or 16), int(group) if group else None, asymmetric)
    start = time.perf_counter()
    with _progress() as bar:
        reading = bar(f"reading {calibrate}", lambda tokens: f"{tokens} tokens")
        sizes = pack(
            model, out, format, memory, bar(f"packing {model}", format_size), calibrate, reading, int(backbone)
        )
    seconds = time.perf_counter() - start
    if as_json:
        about = {"model": model, "out": out, "format": str(format), "backbone_bits": int(backbone), "seconds": seconds}
        print_json(about | sizes)
        return
    speed = f"{format_size(sizes['total_bytes'] / seconds)}/s"
    click.echo(
        f"{out}: {sizes['experts']} experts, {format}, {format_size(sizes['experts_bytes'])}; backbone "
        f"{format_size(sizes['backbone_bytes'])}; {seconds:.1f} s, {speed} written"
    )


def _verify(model: str, as_json: bool) -> None:
    from moedge.models.hub import resolve
    from moedge.runtime.pack import verify

    folder: Path = resolve(model)
    with _progress() as bar:
        counts = verify(folder, bar(f"checking {model}", format_size))
    if as_json:
        print_json({"model": model} | counts)
        return
    click.echo(f"{model}: {counts['experts']} experts, {counts['tensors']} other tensors and {counts['files']} files: "
               "all as they were packed")  # fmt: skip


@contextmanager
def _progress() -> Iterator["Callable[[str, Callable[[int], str]], Report]"]:
    """Makes bars on stderr, where that is a terminal: `bar(title, unit)`. One is shown while it is under way."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:

        def bar(title: str, unit: Callable[[int], str]) -> "Report":
            task = progress.add_task(title, start=False, visible=False, state="")

            def report(done: int, total: int) -> None:
                progress.start_task(task)
                state = f"{unit(done)} of {unit(total)}"
                progress.update(task, completed=done, total=total, visible=done < total, state=state)

            return report

        yield bar
