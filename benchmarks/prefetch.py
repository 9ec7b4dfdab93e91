"""Is guessing the next layer's experts (runtime/prefetch.py) right, and is it faster?

    python benchmarks/make_olmoe.py && python benchmarks/prefetch.py [FOLDER] [--fraction 0.35] [--pairs 3]

First how often the first, the second, ... guess is right, over all guesses and over those of experts on disk, which
alone are read. Then tokens/s with the prefetcher on and off, in pairs: fresh processes in a memory cgroup, from a cold
page cache, the same tokens. Needs root and Linux.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from memory_cgroup import drop_caches, run_within
from report import default_folder, publish

PROMPT = "The sea was calm and the"
MIB = 1 << 20
COLUMNS = ("", "right", "right, on disk", "tokens/s", "MB per token", "hit rate")
SPEED = ("tokens_per_second", "mb_per_token", "hit_rate")


class Places:
    """Guesses by their place in the order of likelihood: how many, and how many the router then chose."""

    def __init__(self, top_k: int) -> None:
        self.guessed, self.right = [0] * top_k, [0] * top_k

    def add(self, guesses: Sequence[int], used: Sequence[int]) -> None:
        for place, expert in enumerate(guesses):
            self.guessed[place] += 1
            self.right[place] += expert in used

    def shares(self) -> list[float | None]:
        """Of each place, then of all together."""
        counts = [*zip(self.right, self.guessed, strict=True), (sum(self.right), sum(self.guessed))]
        return [right / guessed if guessed else None for right, guessed in counts]


def watch(target: Any, every: Places, on_disk: Places) -> None:
    """Have one layer's guesses counted as they are made. They are made twice, so this is not for timing."""
    guess, learn = target.guess, target.learn
    ordered: list[int] = []

    def guess_and_note(hidden: Any, resident: Sequence[int]) -> Any:
        guess(hidden, ())  # nothing resident: every guess counts
        ordered[:] = target._last
        return guess(hidden, resident)

    def learn_and_note(used: Sequence[int]) -> None:
        every.add(ordered, used)
        on_disk.add(target._last, used)
        ordered.clear()
        learn(used)

    target.guess, target.learn = guess_and_note, learn_and_note


def worker(folder: Path, limit: int, tokens: int, mode: str) -> dict[str, Any]:
    """One greedy answer in this process: `mode` on or off is timed, places counts guesses."""
    from moedge.models.lean import lean_imports

    lean_imports()
    from moedge.runtime.lm import load
    from moedge.runtime.tally import Tally

    with load(folder, memory=limit, context=tokens + 16) as lm:
        if lm.prefetcher is None:
            raise SystemExit(f"every expert fits into {limit // MIB} MiB: give a smaller --fraction or --memory")
        lm.prefetcher.enabled = mode != "off"
        top_k = lm.anatomy.layers[0].top_k
        every, on_disk = Places(top_k), Places(top_k)
        if mode == "places":
            for target in lm.prefetcher._next:
                watch(target, every, on_disk)
        tally = Tally()
        for step in lm.generate(PROMPT, tokens):
            tally.add(step)
        return tally.as_dict() | {"right": every.shares(), "right_on_disk": on_disk.shares()}


def run(folder: Path, limit: int, tokens: int, mode: str) -> dict[str, Any]:
    """`worker` in a fresh process in a cgroup of `limit` bytes, from a cold page cache."""
    drop_caches()
    command = [sys.executable, __file__, str(folder), "--memory", str(limit), "--tokens", str(tokens), "--mode", mode]
    done = run_within(limit, command, 600.0, dict(os.environ, HF_HUB_OFFLINE="1"))
    if done.status:
        raise SystemExit(f"the run with the prefetcher {mode} ended with {done.status}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["mb_per_token"] = found["bytes_read"] / tokens / 1e6
    click.echo(f"{mode}: {found['tokens_per_second']:.3g} tokens/s, {found['mb_per_token']:.3g} MB a token", err=True)
    return found


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--fraction", default=0.35, show_default=True, help="The limit as a part of the checkpoint's size.")
@click.option("--memory", type=int, help="The limit in bytes, in place of --fraction.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--pairs", default=3, show_default=True, help="How often it runs with the prefetcher on, and off.")
@click.option("--mode", type=click.Choice(("on", "off", "places")), hidden=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/prefetch-FOLDER.json.")
def main(
    folder: Path | None, fraction: float, memory: int | None, tokens: int, pairs: int, mode: str | None, save: bool
) -> None:
    """Measure on FOLDER (default: what make_olmoe.py writes)."""
    folder = folder or default_folder()
    limit = memory or int(fraction * sum(shard.stat().st_size for shard in folder.glob("*.safetensors")))
    if mode:
        click.echo(json.dumps(worker(folder, limit, tokens, mode)))
        return
    places = run(folder, limit, tokens, "places")
    runs: dict[str, list[dict[str, Any]]] = {"on": [], "off": []}
    for pair in range(pairs):
        for kind in ("on", "off") if pair % 2 else ("off", "on"):
            runs[kind].append(run(folder, limit, tokens, kind))
    speeds = {
        kind: {name: statistics.median(one[name] for one in each) for name in SPEED} for kind, each in runs.items()
    }
    ratios = [on[SPEED[0]] / off[SPEED[0]] for on, off in zip(runs["on"], runs["off"], strict=True)]
    names = [*(f"guess {place + 1}" for place in range(len(places["right"]) - 1)), "all guesses"]
    rows = [
        dict(zip(COLUMNS, (name, right, on_disk, "", "", ""), strict=True))
        for name, right, on_disk in zip(names, places["right"], places["right_on_disk"], strict=True)
    ]
    rows += [
        dict(zip(COLUMNS, (f"prefetcher {kind}", "", "", *speed.values()), strict=True))
        for kind, speed in speeds.items()
    ]
    figures = {
        "folder": folder.name,
        "limit_bytes": limit,
        "tokens": tokens,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "right": places["right"],
        "right_on_disk": places["right_on_disk"],
        "speeds": speeds,
        "ratios_on_to_off": ratios,
        "median_ratio": statistics.median(ratios),
        "same_tokens": len({tuple(one["token_ids"]) for each in runs.values() for one in each}) == 1,
    }
    publish(f"prefetch-{folder.name}", rows, figures, save)


if __name__ == "__main__":
    main()
