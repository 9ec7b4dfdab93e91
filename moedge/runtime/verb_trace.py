"""`moedge trace`: record which experts a model's router chooses while it reads texts."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from moedge.errors import DataError
from moedge.runtime.opening import load_options, opened
from moedge.terminal import console, json_option, print_json

if TYPE_CHECKING:
    from moedge.models.trace import RoutingTrace
    from moedge.runtime.session import Model

DEFAULT_TOKENS = 512
EXAMPLES = """\b
Examples:
  moedge trace checkpoints/mini --text novel.txt -o trace.npz
  moedge trace ./OLMoE-1B-7B --text questions.txt --lines --limit 200 -o trace.npz --memory 4GiB
  moedge replay trace.npz --policy default,lru,oracle --capacity 8,16
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text to read; may be given several times.",
)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The npz file.")
@click.option("--lines", is_flag=True, help="Each line is a sequence of its own.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens of a sequence, at most (512, or the context if less).")
@click.option("--limit", type=click.IntRange(1), help="Only the first sequences.")
@load_options
@json_option
def command(
    model: str, texts: tuple[Path, ...], output: Path, lines: bool, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Record which experts a model's router chooses, token by token, and with what weight."""
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder of {output} does not exist", param_hint="--output")
    with opened(model, options) as lm:
        sequences = islice(_sequences(lm, texts, lines, options["tokens"]), options["limit"])
        trace = _recorded(lm, sequences, model)
    trace.save(output)
    if as_json:
        sizes = {"tokens": len(trace), "sequences": trace.num_sequences, "layers": trace.num_layers}
        print_json({"trace": str(output), "top_k": trace.top_k, "num_experts": trace.num_experts} | sizes)
    else:
        click.echo(
            f"{output}: {len(trace)} tokens in {trace.num_sequences} sequences, {trace.num_layers} layers, "
            f"top {trace.top_k}"
        )


def _sequences(lm: "Model", texts: tuple[Path, ...], lines: bool, tokens: int | None) -> Iterator[list[int]]:
    """Token ids of the lines, or of the texts in pieces of at most `tokens`."""
    from moedge.runtime.session import check_length, context_of
    from moedge.runtime.texts import read_documents, read_lines

    if tokens is None:
        tokens = min(DEFAULT_TOKENS, context_of(lm) or DEFAULT_TOKENS)
    check_length(lm, tokens)
    for path in texts:
        for text in read_lines(path) if lines else read_documents(path):
            ids = list(lm.tokenizer(text, verbose=False)["input_ids"])
            yield from (ids[at : at + tokens] for at in range(0, len(ids), tokens))


def _recorded(lm: "Model", sequences: Iterator[list[int]], title: str) -> "RoutingTrace":
    """The choices while every sequence is read from a new beginning."""
    from moedge.models.recorder import record
    from moedge.runtime.session import EncodedSession, Session, check_ids

    session = EncodedSession(lm) if lm.model.config.is_encoder_decoder else Session(lm)
    if isinstance(session, Session):  # what must be tried of the model is tried before the recording
        session.begin([0])
        session.continues()
    number, read = 0, 0
    with console.status(f"tracing {escape(title)}") as status, record(lm.model) as recorder:
        try:
            for ids in sequences:
                check_ids(lm, ids)
                if isinstance(session, Session):
                    session.reset()
                session.begin(ids)
                number, read = number + 1, read + len(ids)
                status.update(f"tracing {escape(title)}: {number} sequences, {read} tokens")
        except KeyboardInterrupt:
            click.echo(f"interrupted after {number} sequences, {read} tokens: nothing is written", err=True)
            raise
        if not number:
            raise DataError("the texts have no tokens: there is nothing to trace")
        return recorder.trace()
