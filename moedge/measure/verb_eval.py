"""`moedge eval`: perplexity and bits per byte of texts, accuracy of tasks, distance from a reference model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from moedge.errors import DataError
from moedge.runtime.opening import load_options, opened
from moedge.terminal import console, json_option, print_json

if TYPE_CHECKING:
    from moedge.measure.compare import Recording
    from moedge.measure.quality import Window
    from moedge.runtime.session import Model

EXAMPLES = """\b
Examples:
  moedge eval checkpoints/mini --text novel.txt --memory 600MiB
  moedge eval checkpoints/mini --task sst2=dev.jsonl --task mmlu=mmlu/val --limit 200
  moedge eval ./pruned --text novel.txt --reference ./OLMoE-1B-7B --json
"""


class TaskFile(click.ParamType[tuple[str, Path]]):
    """`NAME=FILE`."""

    name = "NAME=FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, equals, file = str(value).partition("=")
        if not (name and equals and file):
            self.fail(f"{value!r} is not NAME=FILE, such as sst2=dev.jsonl", param, ctx)
        if not Path(file).exists():
            self.fail(f"{file} does not exist", param, ctx)
        return name, Path(file)


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("--text", "texts", multiple=True, type=FILE, help="A text to predict.")
@click.option("--task", "tasks", multiple=True, type=TaskFile(), help="Questions to answer; NAME selects the prompt.")
@click.option("--reference", help="A model to be compared with on the texts: KL divergence, top-1 agreement.")
@click.option("--limit", type=click.IntRange(1), help="Only the first questions of each task.")
@click.option("--max-tokens", type=click.IntRange(1), help="Only the first tokens of each text.")
@click.option("--window", type=click.IntRange(2), help="Tokens read from one beginning (the context, at most 2048).")
@load_options
@json_option
def command(model: str, reference: str | None, as_json: bool, **options: Any) -> None:
    """Measure what a model is worth, chunk by chunk, so that a memory limit holds."""
    if not options["texts"] and not options["tasks"]:
        raise click.UsageError("give --text or --task, or both")
    if reference is not None and not options["texts"]:
        raise click.UsageError("--reference compares on texts: give --text")
    with ExitStack() as stack:
        recording = None
        if reference is not None:
            from moedge.measure.compare import Recording

            recording = stack.enter_context(Recording())
            with opened(reference, options | {"experts": None, "fallback": False}) as lm:  # the fit is the model's
                _record(lm, recording, options)
        lm = stack.enter_context(opened(model, options))
        found: dict[str, Any] = {"model": model}
        if options["texts"]:
            found |= _measure_texts(lm, recording, options)
        if options["tasks"]:
            found["tasks"] = {name: _judge(lm, name, file, options["limit"]) for name, file in options["tasks"]}
        if as_json:
            from moedge.runtime.device import process_memory

            print_json(found | {"reference": reference, "peak_memory": process_memory()[1]})
        else:
            _show(found)


def _windows(lm: "Model", file: Path, options: dict[str, Any]) -> "Iterator[Window]":
    from moedge.measure.quality import window_size, windows
    from moedge.runtime.texts import read_documents

    return windows(lm, read_documents(file), window_size(lm, options["window"]), options["max_tokens"])


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A line that the yielded function rewrites; Ctrl-C leaves it behind as the partial result."""
    last = "nothing yet"
    with console.status(escape(title)) as status:

        def note(text: str) -> None:
            nonlocal last
            last = text
            status.update(escape(f"{title}: {text}"))

        try:
            yield note
        except KeyboardInterrupt:
            click.echo(f"interrupted; {title} until then: {last}", err=True)
            raise


def _record(lm: "Model", recording: "Recording", options: dict[str, Any]) -> None:
    for file in options["texts"]:
        with _progress(f"reference on {file.name}") as note:
            for tokens in recording.record(lm, _windows(lm, file, options)):
                note(f"{tokens} tokens")


def _measure_texts(lm: "Model", recording: "Recording | None", options: dict[str, Any]) -> dict[str, Any]:
    """All texts together, and each by itself where there are several."""
    from moedge.measure.compare import Divergence
    from moedge.measure.quality import TextScore, score_windows

    distance: Divergence | None = None if recording is None else Divergence(recording)
    total, each = TextScore(), {}
    for file in options["texts"]:
        score = TextScore()
        with _progress(file.name) as note:
            for score in score_windows(lm, _windows(lm, file, options), distance.observe if distance else None):
                note(f"{score.tokens} tokens, {score.bits_per_byte or 0:.3f} bits per byte")
        if not score.tokens:
            raise DataError(f"{file} has no token to predict: it needs at least two")
        total.nats, total.tokens = total.nats + score.nats, total.tokens + score.tokens
        total.nbytes += score.nbytes
        each[str(file)] = score.as_dict()
    found = total.as_dict() | ({"texts": each} if len(each) > 1 else {})
    return found | (distance.as_dict() if distance else {})


def _judge(lm: "Model", name: str, file: Path, limit: int | None) -> dict[str, Any]:
    """Accuracy over the questions of one file, as a share; `cut` prompts lost their beginning to the context."""
    from moedge.measure.records import read_records
    from moedge.measure.tasks import Judge, example_of

    examples = [example_of(name, record) for record in read_records(file, limit)]
    verdicts, right = [], 0
    with _progress(name) as note:
        for verdict in Judge(lm, name).verdicts(examples):
            verdicts.append(verdict)
            right += verdict.correct
            note(f"{len(verdicts)} of {len(examples)} questions, accuracy {right / len(verdicts):.3f}")
    found = {"accuracy": right / len(verdicts), "n": len(verdicts), "cut": sum(verdict.cut for verdict in verdicts)}
    overlaps = [verdict.overlap for verdict in verdicts if verdict.overlap is not None]
    return found | ({"f1": sum(overlaps) / len(overlaps)} if overlaps else {})


def _show(found: dict[str, Any]) -> None:
    """The figures as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape(found["model"]), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    if "tokens" in found:
        read = f"{found['tokens']} tokens, {found['bytes']} bytes"
        table.add_row("bits per byte", f"{found['bits_per_byte']:.4f}", read)
        table.add_row("perplexity", f"{found['perplexity']:.4g}", "per token")
    for file, score in found.get("texts", {}).items():
        table.add_row(f"  {escape(file)}", f"{score['bits_per_byte']:.4f}", f"{score['tokens']} tokens")
    if "kl" in found:
        table.add_row("KL from the reference", f"{found['kl']:.4g}", "nats a token")
        table.add_row("top-1 agreement", f"{100 * found['top1_agreement']:.2f}%", "")
    for name, task in found.get("tasks", {}).items():
        cut = f", {task['cut']} prompts cut" if task["cut"] else ""
        overlap = f", F1 {100 * task['f1']:.1f}%" if "f1" in task else ""
        table.add_row(escape(name), f"{100 * task['accuracy']:.1f}%", f"of {task['n']} right{overlap}{cut}")
    Console().print(table)
