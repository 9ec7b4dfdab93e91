"""How far from LRU to the best that could be done (Belady) do eviction policies come, on recorded routing?

    python benchmarks/policies.py [--data ../shared/data] [--capacity 8,16] [--save]

Replays every DATA/*/traces.npz: reads on demand only, one cache per layer, warm from one sequence to the next. The
default's settings were chosen on the even sequences (0, 2, 4, ...); the odd ones are held out, and replayed by
themselves, whole and by the data set of their prompts. `closed` is (rate - lru) / (oracle - lru). Time per event is
that of one process that replays one layer, the cache's own bookkeeping included.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from report import publish

from moedge.models.trace import RoutingTrace
from moedge.runtime.replay import ORACLE, gap_closed, replay, replay_layer
from moedge.runtime.verb_replay import Capacities

POLICIES = ("lru", "lfu", "lfru", "ageing-lfu", "default", ORACLE)
TIMED_TOKENS = 8000


def pick(trace: RoutingTrace, sequences: list[int]) -> RoutingTrace:
    """A trace of these sequences, one after the other."""
    parts = [trace.part(sequence, sequence + 1) for sequence in sequences]
    return RoutingTrace(
        np.concatenate([part.experts for part in parts]),
        np.concatenate([part.probs for part in parts]),
        np.cumsum([0, *map(len, parts)]),
    )


def splits(folder: Path, count: int) -> dict[str, list[int]]:
    """Name -> sequences: both halves, then the held-out ones of each data set where sequences.jsonl tells it."""
    found = {"tuned on": list(range(0, count, 2)), "held out": list(range(1, count, 2))}
    if (folder / "sequences.jsonl").exists():
        lines = (folder / "sequences.jsonl").read_text(encoding="utf-8").splitlines()
        for sequence in found["held out"]:
            found.setdefault(f"held out: {json.loads(lines[sequence])['dataset']}", []).append(sequence)
    return found


def compare(trace: RoutingTrace, name: str, capacities: list[int], policies: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each capacity and policy."""
    rows = replay(trace, policies, capacities, workers=os.cpu_count() or 1)
    return [
        {
            "sequences": name,
            "tokens": len(trace),
            "capacity": row.capacity,
            "policy": row.policy,
            "hit rate": row.hit_rate,
            "closed": gap_closed(rows, row),
        }
        for row in sorted(rows, key=lambda row: row.capacity)
    ]


def microseconds(trace: RoutingTrace, policy: str, capacity: int) -> float:
    """Time of one event, from replaying the middle layer of the first tokens."""
    layer = trace.num_layers // 2
    experts, probs = trace.experts[:TIMED_TOKENS, layer], trace.probs[:TIMED_TOKENS, layer]
    started = time.process_time()
    replay_layer(experts, probs, policy, capacity, trace.num_experts)
    return (time.process_time() - started) / len(experts) * 1e6


def measure(folder: Path, capacities: list[int]) -> list[dict[str, Any]]:
    """All rows of one recorded model."""
    trace = RoutingTrace.load(folder)
    times = {
        (policy, capacity): microseconds(trace, policy, capacity) for policy in POLICIES for capacity in capacities
    }
    rows = []
    for name, sequences in splits(folder, trace.num_sequences).items():
        whole = ":" not in name
        part = pick(trace, sequences)
        found = compare(part, name, capacities, POLICIES if whole else ("lru", "default", ORACLE))
        rows += [row for row in found if whole or row["policy"] == "default"]
        click.echo(f"{folder.name}, {name}: done", err=True)
    return [{"trace": folder.name, **row, "us/event": round(times[row["policy"], row["capacity"]], 1)} for row in rows]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--capacity", "capacities", type=Capacities(), default="8,16", show_default=True)
@click.option("--save", is_flag=True, help="Also write benchmarks/results/policies.json.")
def main(data: Path, capacities: list[int], save: bool) -> None:
    """Compare eviction policies on the traces of DATA."""
    folders = sorted(path.parent for path in data.glob("*/traces.npz"))
    if not folders:
        raise click.ClickException(f"{data} has no */traces.npz: name the data folder with --data")
    rows = [row for folder in folders for row in measure(folder, capacities)]
    publish("policies", rows, {"tuned_on": "even sequences", "rows": rows}, save)


if __name__ == "__main__":
    main()
