"""What an answer over the API costs more than the same answer from `lm.generate`, in pairs, time per token.

Two processes with the same memory limit live through the whole measurement, one of them idle: the server, and one that
calls `lm.generate` as `moedge run` does. Each gives the same greedy answer in turn; all experts are in memory after the
first. The time of an answer is from asking to its last token, reading the prompt included.
"""

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import report
from serve_load import MODEL, server

PROMPT = "The old house stood at"


def worker(memory: str, tokens: int) -> None:
    """For every line on stdin: one answer, and its seconds on stdout."""
    import moedge

    with moedge.load(MODEL, memory=memory) as lm:
        print("ready", flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            text = "".join(step.text for step in lm.generate(PROMPT, tokens))
            print(json.dumps({"seconds": time.perf_counter() - began, "text": text}), flush=True)


@contextmanager
def alone(memory: str, tokens: int) -> Iterator[Any]:
    """A function that has the worker give one answer; its seconds and text."""
    command = [sys.executable, __file__, "--worker", "--memory", memory, "--tokens", str(tokens)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if child.stdout.readline() != "ready\n":
            raise SystemExit(f"the worker did not start: exit code {child.wait()}")

        def answer() -> tuple[float, str]:
            child.stdin.write("\n")
            child.stdin.flush()
            found = json.loads(child.stdout.readline())
            return found["seconds"], found["text"]

        yield answer
    finally:
        child.stdin.close()
        child.wait(30)


def over_http(url: str, tokens: int, stream: bool) -> tuple[float, str]:
    """Seconds and text of one answer of the server."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    ask = {"model": "mini", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": stream}
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(ask), {"content-type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"the server answered {reply.status}: {reply.read()!r}")
    if not stream:
        text = json.loads(reply.read())["choices"][0]["text"]
    else:
        text = ""
        for line in reply:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    seconds = time.perf_counter() - began
    connection.close()
    return seconds, text


@click.command()
@click.option("--pairs", default=9, show_default=True)
@click.option("--tokens", default=128, show_default=True)
@click.option("--memory", default="600MiB", show_default=True, help="Limit of either process.")
@click.option("--worker", "as_worker", is_flag=True, hidden=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/serve-overhead.json.")
def main(pairs: int, tokens: int, memory: str, as_worker: bool, save: bool) -> None:
    """Measure pairs of answers."""
    if as_worker:
        worker(memory, tokens)
        return
    rows: list[dict[str, Any]] = []
    with server(memory) as (url, _), alone(memory, tokens) as answer:
        kinds = {
            "alone": answer,
            "streamed": lambda: over_http(url, tokens, True),
            "whole": lambda: over_http(url, tokens, False),
        }
        for pair in range(-1, pairs):  # the first one warms up
            order = list(kinds) if pair % 2 else list(reversed(kinds))
            found = {name: kinds[name]() for name in order}
            if len({text for _, text in found.values()}) > 1:
                raise SystemExit(f"the answers differ: {found}")
            if pair >= 0:
                rows.append({"pair": pair} | {name: 1000 * found[name][0] / tokens for name in kinds})
    ratios = {name: statistics.median(row[name] / row["alone"] for row in rows) for name in ("streamed", "whole")}
    figures = {"ms_per_token": rows, "median_ratio": ratios, "memory": memory, "tokens": tokens}
    report.publish("serve-overhead", [*rows, {"pair": "median ratio", "alone": 1.0} | ratios], figures, save)


if __name__ == "__main__":
    main()
