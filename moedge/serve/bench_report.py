"""What `moedge bench` prints: rows as a table, Markdown, CSV or JSON, and what they have to be read with.

Knows the names of the figures that measure/bench.py and serve/load.py give; measures nothing.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moedge.terminal import console, print_json
from moedge.units import format_size

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def _number(name: str, form: Callable[[Any], str]) -> Callable[[Row], str]:
    """A column that shows `row[name]` where there is one."""
    return lambda row: "" if row.get(name) is None else form(row[name])


def _latency(name: str) -> Callable[[Row], str]:
    return _number(name, lambda seconds: f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms")


def listed(errors: dict[str, int], before: str = "") -> str:
    """`3 x 429, 1 x cut`, nothing where there are none."""
    return before + ", ".join(f"{count} x {name}" for name, count in sorted(errors.items())) if errors else ""


def _speed(tokens: float) -> str:
    """Three significant digits, none of them after an e."""
    return f"{tokens:.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _limit(row: Row) -> str:
    """`25% = 809 MiB`; a size that was asked for stands as it is."""
    return f"{row['memory']} = {format_size(row['limit'])}" if row["memory"].endswith("%") else str(row["memory"])


LOCAL: Columns = {
    "memory": _limit,
    "experts\nheld": _number("resident_share", "{:.0%}".format),
    "test": lambda row: row.get("test", "refused"),
    "tokens/s": _number("tokens_per_second", _speed),
    "quartiles": lambda row: f"{_speed(row['quartile_1'])}-{_speed(row['quartile_3'])}" if "test" in row else "",
    "hit rate": _number("hit_rate", "{:.1%}".format),
    "read\nper token": _number("bytes_per_token", format_size),
    "peak\nmemory": _number("peak_memory", format_size),
}
REMOTE: Columns = {
    "clients": lambda row: str(row["clients"]),
    "answered": lambda row: f"{row['completed']} of {row['requests']}",
    "tokens/s": _number("tokens_per_second", _speed),
    "first\ntoken p50": _latency("first_token_p50"),
    "first\ntoken p99": _latency("first_token_p99"),
    "next\ntoken p50": _latency("inter_token_p50"),
    "next\ntoken p99": _latency("inter_token_p99"),
    "errors": lambda row: listed(row["errors"]) or "none",
}


def local_notes(setting: Row, rows: Sequence[Row]) -> list[str]:
    """What the rows of a model have to be read with, refused limits first."""
    notes = [_refusal(row) for row in rows if "refused" in row]
    ran = [row for row in rows if "test" in row]
    return notes + (_conditions(setting, ran) if ran else []) + [_machine(setting)]


def _refusal(row: Row) -> str:
    return f"{row['memory']}, that is {format_size(row['limit'])}, was refused: {row['refused']}"


def _conditions(setting: Row, ran: Sequence[Row]) -> list[str]:
    row, known = ran[0], setting["readahead_kib"] is not None
    drop = "dropped" if all(row["page_cache_dropped"] for row in ran) else "not dropped (needs root and --drop-caches)"
    path = "go past" if setting["reads_past_page_cache"] else "go through"
    warm = "warm, from a repetition on another text" if row["warm_up"] else "cold before the first row of each limit"
    return [
        f"median and quartiles of {len(row['repetitions'])}; {row['dtype']}, threads: {row['threads']}",
        f"expert cache {warm}; policy {setting['policy']}; peak memory is the process's until then, loading included",
        f"expert reads {path} the page cache; it was {drop} before each repetition",
        f"readahead {setting['readahead_kib']} KiB" if known else "readahead unknown",
        f"checkpoint {format_size(setting['checkpoint_bytes'])}; prompts: {setting['prompts']}",
    ]


def server_notes(setting: Row, row: Row) -> list[str]:
    """What the row of a server has to be read with."""
    prompt = "not told" if row["prompt_tokens"] is None else f"{row['prompt_tokens']:.3g} on average"
    patience = f"waits for Retry-After and asks again, {row['waited_seconds']:.3g} s in all, which is in no latency"
    total = f"{row['seconds']:.3g} s, {row['requests_per_second']:.3g} requests/s"
    return [
        f"{setting['path']} of {setting['model']} at {setting['url']}",
        f"{total}, {row['tokens']} tokens (counted by {row['tokens_counted_by']})",
        f"prompts of {setting['prompt_words']} words (tokens: {prompt}), answers of at most {setting['new_tokens']}",
        "times are the client's, connecting included, of the requests that were answered in full",
        f"after a 429 a client {patience if setting['retry'] else 'gives up'}",
        f"the client: {_machine(setting)}",
    ]


def _machine(setting: Row) -> str:
    device, (load, *_) = setting["device"], setting["load_average"]
    return (
        f"{device['cpu']}, {device['cores']} cores, {format_size(device['memory_bytes'])}, load average {load:.2f} at "
        f"the start; moedge {setting['version']}, commit {setting['commit'] or 'unknown'}, {setting['date']}"
    )


def publish(output: str, setting: Row, rows: Sequence[Row], columns: Columns, notes: Sequence[str]) -> None:
    """Everything on stdout, as `output` says: table, md, csv or json."""
    if output == "json":
        print_json(setting | {"rows": rows})
    elif output == "csv":
        click.echo(_csv(setting, rows), nl=False)
    elif output == "md":
        lines = [
            [name.replace("\n", " ") for name in columns],
            ["---"] * len(columns),
            *([show(row) for show in columns.values()] for row in rows),
        ]
        click.echo("\n".join("| " + " | ".join(line) + " |" for line in lines))
        click.echo("\n".join(["", *(f"- {note}" for note in notes)]))
    else:
        _table(Console(), rows, columns)
        click.echo("\n".join(notes))


def show_partial(rows: Sequence[Row], columns: Columns) -> None:
    """On stderr: what was measured until the rest could not be."""
    if rows:
        console.print("until then:")
        _table(console, rows, columns)


def _table(where: Console, rows: Sequence[Row], columns: Columns) -> None:
    table = Table(box=SIMPLE_HEAD, padding=0)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(show(row)) for show in columns.values()))
    where.print(table)


def _csv(setting: Row, rows: Sequence[Row]) -> str:
    """A line for each row, with the setting in each, so that lines of several runs can be put together."""
    flat = {name: value for name, value in setting.items() if name != "device"} | setting["device"]
    lines = [flat | row for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for line in lines:
        cells = (line.get(name) for name in names)
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return text.getvalue()
