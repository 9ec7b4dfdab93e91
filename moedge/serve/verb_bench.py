"""`moedge bench`: a model's speed at memory limits, or a running server's under load.

Needs nothing of the `serve` extra. How it is measured is in measure/bench.py and serve/load.py.
"""

import os
import shlex
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedge.errors import DataError, MemoryLimitError
from moedge.measure.bench import PROMPTS, Limit, Spec, measure_apart, parse_limit, speak, weight_files
from moedge.measure.machine import readahead_kib, reads_past_page_cache, surroundings
from moedge.runtime.policy import POLICIES
from moedge.serve.bench_report import LOCAL, REMOTE, Row, listed, local_notes, publish, server_notes, show_partial
from moedge.serve.load import Answer, Clients, Load, Server, figures
from moedge.terminal import console, json_option

if TYPE_CHECKING:
    from rich.status import Status

EXAMPLES = """\b
Examples:
  moedge bench ./OLMoE-1B-7B --memory 25%,50%,100%
  moedge bench checkpoints/mini --memory 480MiB,600MiB,none -p 0 -n 64,256 -o md
  moedge bench --url http://127.0.0.1:8000 --clients 8 --requests 64
"""
KEY_VARIABLE = "MOEDGE_API_KEY"
LOCAL_ONLY = ("memory", "repetitions", "warm_up", "drop_caches", "dtype", "policy", "prefill_chunk")
URL_ONLY = ("clients", "requests", "chat", "retry", "timeout", "api_key_file")


class Limits(click.ParamType[tuple[Limit, ...]]):
    """`25%,600MiB,none`."""

    name = "LIMIT,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Limit, ...]:
        try:
            return tuple(parse_limit(text) for text in str(value).split(","))
        except ValueError as error:
            self.fail(f"{error}; or a share of the checkpoint's size like 25%, or none", param, ctx)


class Lengths(click.ParamType[tuple[int, ...]]):
    """`128,512`; 0 is left out."""

    name = "N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        texts = str(value).split(",")
        if not all(text.strip().isdecimal() for text in texts):
            self.fail(f"{value!r} is not a list of lengths like 128,512", param, ctx)
        return tuple(dict.fromkeys(int(text) for text in texts if int(text)))


@click.command(epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option("--memory", type=Limits(), help="Limits: shares of the checkpoint's size (25%), sizes, none.")
@click.option(
    "-p", "--prompt", "prompts", type=Lengths(), help="Tokens to read (512); with --url, words (32). 0: none."
)
@click.option("-n", "--new", "answers", type=Lengths(), help="Tokens to write (128); with --url 64. 0: none.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Of each row.")
@click.option("--warm-up/--no-warm-up", default=True, help="One repetition before, not counted.")
@click.option("--drop-caches/--keep-caches", default=True, help="Drop the machine's page cache each time (root).")
@click.option("--dtype", help="fp32, bf16 or fp16; by default the checkpoint's own.")
@click.option("--policy", type=click.Choice(list(POLICIES)), default="default", help="What the cache keeps.")
@click.option("--prefill-chunk", type=click.IntRange(1), default=512, show_default=True, help="Read at once.")
@click.option("--url", help="Measure this server instead; MODEL is then its id there (default: the first).")
@click.option("--clients", type=click.IntRange(1), default=8, show_default=True, help="With --url: at the same time.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="With --url: in all.")
@click.option("--chat", is_flag=True, help="With --url: chat completions instead of completions.")
@click.option("--retry/--no-retry", default=True, help="With --url: after a 429 wait for Retry-After and ask again.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="Seconds.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Or MOEDGE_API_KEY.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "md", "csv"]), default="table", show_default=True)
@click.option("--here", hidden=True, help="Be the process that measures this one spec.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, /, model: str | None, output: str, as_json: bool, here: str | None, **options: Any
) -> int:
    """Measure how fast MODEL reads and writes within memory limits, or a server with --url."""
    if here is not None:
        return speak(here)
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if wrong := given.intersection(URL_ONLY if options["url"] is None else LOCAL_ONLY):
        flag = "--" + min(wrong).replace("_", "-")
        raise click.UsageError(f"{flag} is for {'a server: give --url' if options['url'] is None else 'a local MODEL'}")
    if as_json and "output" in given and output != "json":
        raise click.UsageError(f"--json and -o {output} disagree: give one")
    output = "json" if as_json else output
    if options["url"] is not None:
        _bench_server(model, options, output)
    elif model is None:
        raise click.UsageError("give MODEL, or --url")
    else:
        _bench_model(model, options, output)
    return 0


# --- a model on this machine ---------------------------------------------------------------------------------------


def _bench_model(model: str, options: dict[str, Any], output: str) -> None:
    from moedge.models.hub import resolve

    prompts = (512,) if options["prompts"] is None else options["prompts"]
    answers = (128,) if options["answers"] is None else options["answers"]
    if not prompts and not answers:
        raise click.UsageError("-p 0 and -n 0 leave nothing to measure: give one of them a length")
    folder = resolve(model)
    files = weight_files(folder)
    size = sum(file.stat().st_size for file in files)
    spec = Spec(
        model=str(folder),
        prompts=prompts,
        answers=answers,
        repetitions=options["repetitions"],
        warm_up=options["warm_up"],
        drop_page_cache=options["drop_caches"],
        dtype=options["dtype"],
        policy=options["policy"],
        prefill_chunk=options["prefill_chunk"],
    )
    setting = _setting(model) | {
        "checkpoint_bytes": size,
        "readahead_kib": readahead_kib(files[0]),
        "reads_past_page_cache": all(map(reads_past_page_cache, files)),
        "prompts": PROMPTS,
        "policy": spec.policy,
    }
    rows: list[Row] = []
    try:
        with console.status("") as status:
            for limit in options["memory"] or (Limit("none"),):
                _measure_limit(spec, limit, size, rows, status)
    except BaseException:
        show_partial(rows, LOCAL)
        raise
    publish(output, setting, rows, LOCAL, local_notes(setting, rows))
    if all("refused" in row for row in rows):
        raise MemoryLimitError("no --memory was enough for this model: give what the refusals say")


def _setting(model: str) -> Row:
    return {"model": model, **surroundings(), "command": shlex.join(["moedge", *sys.argv[1:]])}


def _measure_limit(spec: Spec, limit: Limit, size: int, rows: list[Row], status: "Status") -> None:
    """Append the rows of one limit; a limit that is too small is a row that says so."""
    nbytes = limit.nbytes(size)
    about = {"memory": limit.text, "limit": nbytes}
    status.update(f"{limit.text}: loading")
    try:
        process = measure_apart(replace(spec, memory=nbytes), [sys.executable, "-m", "moedge", "bench", "--here"])
        with closing(process) as said:
            for line in said:
                if "row" in line:
                    rows.append(about | line["row"])
                else:
                    status.update(f"{limit.text}: {line['note']}")
    except MemoryLimitError as error:
        rows.append(about | {"refused": str(error)})


# --- a server --------------------------------------------------------------------------------------------------------


def _bench_server(model: str | None, options: dict[str, Any], output: str) -> None:
    prompts, answers = options["prompts"] or (32,), options["answers"] or (64,)
    if len(prompts) > 1 or len(answers) > 1:
        raise click.UsageError("--url takes one length for -p and one for -n")
    key = _key(options["api_key_file"])
    known = Server(options["url"], key, options["timeout"]).models()
    load = Load(
        url=options["url"],
        model=model or known[0],
        prompt_words=prompts[0],
        new_tokens=answers[0],
        key=key,
        **{name: options[name] for name in ("clients", "requests", "chat", "retry", "timeout")},
    )
    setting = _setting(load.model) | {"url": load.url, "path": load.path, "retry": load.retry}
    setting |= {"prompt_words": load.prompt_words, "new_tokens": load.new_tokens}
    done: list[Answer] = []
    started = time.perf_counter()

    def row() -> Row:
        return {"clients": load.clients, "requests": load.requests} | figures(done, time.perf_counter() - started)

    try:
        with console.status("") as status, closing(Clients(load).answers()) as answered:
            for answer in answered:
                done.append(answer)
                faults = Counter(answer.fault for answer in done if answer.fault)
                status.update(f"{len(done)} of {load.requests} requests{listed(dict(faults), ', failed: ')}")
    except BaseException:
        show_partial([row()] if done else [], REMOTE)
        raise
    found = row()
    publish(output, setting, [found], REMOTE, server_notes(setting, found))
    if not found["completed"]:
        raise DataError(f"{load.url} answered none of {load.requests} requests{listed(found['errors'], ': ')}")


def _key(file: Path | None) -> str | None:
    """The API key from its file, else from the environment; never from the command line, which others can list."""
    if file is None:
        return os.environ.get(KEY_VARIABLE)
    key = file.read_text(encoding="utf-8").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise DataError(f"{file} does not hold an API key: write the key, and nothing else, into it")
    return key
