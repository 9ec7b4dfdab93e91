"""`moedge fit`: a smaller model for a task, with a report that shows what it costs; or methods compared."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.markup import escape

from moedge.terminal import SIZE, console, json_option, print_json
from moedge.units import format_size

if TYPE_CHECKING:
    from moedge.compress.fit import Settings
    from moedge.compress.report import Report

BESIDE = "beside the model"
EXAMPLES = """\b
Examples:
  moedge fit ./OLMoE-1B-7B --task sst2=train.jsonl --budget 50% -o ./OLMoE-sst2
  moedge fit ./Qwen3-30B-A3B --task notes.txt --budget 12GiB --memory 8GiB --bits 4 -o ./Qwen3-notes
  moedge fit ./OLMoE-1B-7B --task mail.jsonl --budget experts=16 --task-index -o ./OLMoE-mail
  moedge fit checkpoints/mini --task novel.txt --compare default,reap,random --budgets 25%,50%,75% -o ./compared
  moedge run ./OLMoE-1B-7B --experts ./OLMoE-sst2 --fallback --memory 4GiB -p "..."
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("--task", required=True, metavar="[NAME=]FILE", help="Samples: task records (JSON lines), or a text.")
@click.option("--budget", default="50%", show_default=True, help="50% of the experts, experts=16, or 800MiB on disk.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder that is made.")
@click.option("--method", default="default", help="What an expert is worth; see docs/compress.md.")
@click.option(
    "--scope", type=click.Choice(["text", "answer"]), default="text", help="The tokens of a question that count."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=8192, show_default=True, help="Read for the profile; half as many test."
)
@click.option("--test-share", type=click.FloatRange(0, 1, True, True), default=0.2, help="Samples kept for the test.")
@click.option("--seed", type=int, default=0, help="Divides the samples in another way.")
@click.option("--refine", type=click.IntRange(0), default=0, metavar="ROUNDS",
              help="Swap experts in up to so many rounds, by what the smaller model does.")  # fmt: skip
@click.option("--protect", default="auto", help="Experts that stay: auto, none, or layer:expert,...")
@click.option("--alpha", type=click.FloatRange(0, 1), help="At most this share of a layer's importance is cold.")
@click.option("--beta", type=click.FloatRange(0, 1), help="Keep what has more than this share, whatever the budget.")
@click.option("--task-index", is_flag=False, flag_value=BESIDE, metavar="[FOLDER]",
              help="Look for a known task that is like this one, and remember this one if there is none.")  # fmt: skip
@click.option("--also", multiple=True, metavar="[NAME=]FILE", help="Test the result on other samples as well.")
@click.option("--bits", type=click.Choice(["16", "12", "8", "4"]), help="Pack the result so.")
@click.option("--memory", type=SIZE, help="Limit for the whole process, such as 2GiB.")
@click.option("--force", is_flag=True, help="Fit also to samples that the model cannot read.")
@click.option("--compare", "methods", metavar="METHODS", help="Only compare these, such as default,reap,random.")
@click.option("--budgets", default="25%,50%,75%", show_default=True, help="At which --compare compares.")
@json_option
def command(
    model: str,
    task: str,
    also: tuple[str, ...],
    out: Path,
    methods: str | None,
    budgets: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Shrink MODEL to a task and a budget: keep the experts that its samples need.

    OUT becomes an ordinary Hugging Face folder, with report.md, report.html, and fit.json, by which `moedge run MODEL
    --experts OUT` finds the same experts in the full model. A run that was interrupted goes on when the same command is
    given again.
    """
    budget = options.pop("budget")
    _check_use(methods is not None, budget)
    settings = _settings(model, options)
    if methods is not None:
        _compare(model, [task, *also], methods, budgets, out, settings, as_json)
        return
    from moedge.compress.fit import fit

    with _status(f"fitting {model}") as note:
        fitted = fit(model, task, budget, out, settings, also, shlex.join(["moedge", *sys.argv[1:]]), note)
    if as_json:
        print_json({"out": str(out)} | fitted.report.as_dict())
    else:
        _show(fitted.report, out)


def _check_use(compares: bool, budget: str) -> None:
    """Raises UsageError for options that would have no effect."""
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if not compares and "budgets" in given:
        raise click.UsageError("--budgets is for --compare: give --budget, or the methods to compare")
    if compares and "budget" in given:
        raise click.UsageError(f"--compare measures at several budgets: give --budgets {budget} instead of --budget")
    if compares and (useless := sorted(given & {"beta", "bits", "method", "refine", "task_index"})):
        option = useless[0].replace("_", "-")
        raise click.UsageError(f"--compare writes no model and takes every method by itself: leave --{option} out")


def _compare(
    model: str, specs: Sequence[str], methods: str, budgets: str, out: Path, settings: "Settings", as_json: bool
) -> None:
    from moedge.compress.trial import compare_methods

    with _status(f"comparing on {model}") as note:
        compared = compare_methods(
            model, specs, [each.strip() for each in methods.split(",")], budgets, out, settings, note
        )
    if as_json:
        print_json({"out": str(out)} | compared.as_dict())
    else:
        click.echo(compared.markdown())
        click.echo(f"plots are in {out / 'compare.html'}", err=True)


def _settings(model: str, options: dict[str, Any]) -> "Settings":
    from moedge.compress.fit import Settings
    from moedge.models.hub import resolve

    index, bits = options.pop("task_index"), options.pop("bits")
    if index == BESIDE:
        folder = resolve(model)
        index = folder.with_name(f"{folder.name}.tasks")
    return Settings(**options, index=Path(index) if index else None, bits=int(bits) if bits else None)


@contextmanager
def _status(title: str) -> Iterator[Callable[[str], None]]:
    with console.status(escape(title)) as status:
        yield lambda text: status.update(escape(f"{title}: {text}"))


def _show(report: "Report", out: Path) -> None:
    """The figures as tables on stdout, the reasons and warnings below them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape(report.title), title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    layer = report.layers[0]
    table.add_row("experts a layer", str(len(layer.scores)), str(len(layer.kept)))
    table.add_row("on disk", format_size(report.bytes_before), format_size(report.bytes_after))
    for name, small in report.after.items():
        full = report.before[name]
        table.add_section()
        table.add_row(f"perplexity, {escape(name)}", f"{full.perplexity:.4g}", f"{small.perplexity:.4g}")
        table.add_row("KL from the full model", "0", f"{small.kl:.3g}")
        table.add_row("top-1 agreement", "100%", f"{100 * small.top1_agreement:.1f}%")
        if full.accuracy is not None and small.accuracy is not None:
            table.add_row(f"accuracy of {full.n}", f"{100 * full.accuracy:.1f}%", f"{100 * small.accuracy:.1f}%")
    Console().print(table)
    for line in (*report.reasons, *(f"warning: {text}" for text in report.warnings)):
        click.echo(line, err=True)
    click.echo(f"`moedge run {out}` runs it; {out / 'report.html'} shows what it costs", err=True)
