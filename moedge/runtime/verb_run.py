"""`moedge run`: answer one prompt, or chat in a terminal. Knows no more of the model than its Steps."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from moedge.errors import DataError, MoedgeError
from moedge.runtime.opening import NAMES, load_options, opened
from moedge.terminal import console, json_option, print_json

if TYPE_CHECKING:
    from moedge.runtime.chat import Chat
    from moedge.runtime.lm import LM

EXAMPLES = """\b
Examples:
  moedge run checkpoints/mini -p "The sea was" -n 64 --memory 600MiB
  moedge run ./OLMoE-1B-7B --memory 4GiB --temperature 0.7     # chat in a terminal
  moedge run ./OLMoE-1B-7B -f question.txt --chat --stop END --json
  echo "12 + 7 =" | moedge run checkpoints/mini
"""
HELP = "/reset forgets the conversation, /help shows this, /quit (or Ctrl-D) leaves. Ctrl-C stops an answer."


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("-p", "--prompt", help="The prompt. Without it and -f: standard input, or a chat in a terminal.")
@click.option("-f", "--file", type=click.Path(path_type=Path, dir_okay=False), help="Read the prompt from a file.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", help="What the model is told before a chat.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Most likely tokens up to p.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="The k most likely tokens; 0 is all.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="At least p of the most likely token's share.")
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, help="1 is none.")
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, help="A string that ends the answer; may be given several times.")
@load_options
@json_option
def command(model: str, prompt: str | None, file: Path | None, chat: bool, as_json: bool, **options: Any) -> None:
    """Answer a prompt, or chat, within a memory limit."""
    if prompt is not None and file is not None:
        raise click.UsageError("give -p or -f, not both")
    if "" in options["stop"]:
        raise click.UsageError("--stop is empty: give the string that ends the answer")
    system = options.pop("system")
    settings = {name: value for name, value in options.items() if name not in NAMES}
    terminal = prompt is None and file is None and sys.stdin.isatty()
    if terminal and as_json:
        raise click.UsageError("--json needs a prompt: give -p, -f or standard input")
    message: Any = "" if terminal else _prompt(prompt, file)
    if chat or system:
        told = [{"role": "system", "content": system}] if system else []
        message = [*told, {"role": "user", "content": message}]
    if options["memory"] is not None and options["context"] is None and not terminal:
        options["context"] = _needed_context(model, message, options["max_new_tokens"])
    with opened(model, options) as lm:
        if terminal:
            from moedge.runtime.chat import Chat

            converse(Chat(lm, system, **settings))
        else:
            answer(lm, message, settings, as_json)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The text of -p, of -f or of standard input, without the line end that files end with."""
    if prompt is not None:
        return prompt
    try:
        return (file.read_text(encoding="utf-8") if file is not None else sys.stdin.read()).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file or 'standard input'} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _needed_context(model: str, message: Any, new: int) -> int | None:
    """Tokens of the prompt and its longest answer: what one answer needs to reserve. None leaves it to `load`."""
    from moedge.models.hub import resolve
    from moedge.models.load import load_tokenizer, read_config
    from moedge.runtime.generate import encode

    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    needed = len(encode(tokenizer, message)) + new
    longest = getattr(read_config(folder).get_text_config(decoder=True), "max_position_embeddings", None)
    return needed if longest is None else min(needed, longest)


def answer(lm: "LM", prompt: Any, settings: dict[str, Any], as_json: bool) -> None:
    """Print the answer as it comes and what it took at the end, or one JSON object."""
    from moedge.runtime.tally import Tally

    tally = Tally()
    try:
        for step in lm.generate(prompt, **settings):
            tally.add(step)
            if not as_json:
                click.echo(step.text, nl=False)
    except KeyboardInterrupt:
        if not as_json:
            click.echo()
        click.echo(f"interrupted; until then {tally.line()}", err=True)
        raise
    if as_json:
        print_json(tally.as_dict())
    else:
        click.echo()
        click.echo(tally.line(), err=True)


def converse(chat: "Chat", read: Callable[[str], str] = input) -> None:
    """Ask and answer until the user leaves. The first Ctrl-C stops an answer, a second one leaves."""
    console.print(HELP if chat.remembers else f"This model has no chat template: it continues each line.\n{HELP}")
    stopped = False
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            if stopped:
                return
            stopped = True
            console.print("Ctrl-C again leaves.")
            continue
        stopped = False
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            chat.reset()
            console.print("Forgotten.")
        elif line.startswith("/"):
            console.print(HELP)
        elif line:
            stopped = _turn(chat, line)


def _turn(chat: "Chat", line: str) -> bool:
    """Print one answer; whether Ctrl-C stopped it. What goes wrong is said, and the conversation goes on."""
    from moedge.runtime.tally import Tally

    tally = Tally()
    with _interruptible() as interrupted:
        try:
            with closing(chat.ask(line)) as steps:
                for step in steps:
                    tally.add(step)
                    click.echo(step.text, nl=False)
                    if interrupted():
                        break
        except MoedgeError as error:
            console.print(f"[red]{escape(str(error))}[/red] (/reset begins anew)")
        click.echo()
        console.print(f"[dim]{'stopped; ' if interrupted() else ''}{tally.line()}[/dim]", highlight=False)
        return interrupted()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only sets what the yielded function tells; the second is a KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
