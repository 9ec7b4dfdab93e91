"""How fast is generation in a memory cgroup smaller than the checkpoint: moedge against stock disk offload?

    python benchmarks/make_olmoe.py && python benchmarks/offload.py [--fraction 0.35] [--pairs 3] [--tokens 64]

Each run is a fresh process in a fresh cgroup (swap off), with the machine's page cache dropped and readahead at 128
KiB. moedge gets `--memory` equal to the cgroup's limit, and runs the checkpoint as it is and, exact too, a pack of it
made with `--bits 12`. The other side is transformers with accelerate's disk offload of every expert, for which it
writes a copy of the checkpoint too; where the kernel kills it, the smallest limit at which it lives is searched and
used. Runs are paired: moedge, pack, stock, moedge, pack, stock. Needs root and Linux. Set OMP_NUM_THREADS for all.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from memory_cgroup import Run, drop_caches, readahead, run_within, version
from report import default_folder, publish

HERE = Path(__file__).resolve().parent
PROMPT = "The sea was calm and the"
MIB = 1 << 20


@dataclass(frozen=True)
class Bench:
    """What is the same in every run."""

    folder: Path
    scratch: Path
    tokens: int
    timeout: float

    def run(self, command: list[str], limit: int | None) -> tuple[Run, dict[str, Any]]:
        """One fresh process from cold; its last line of output as JSON, empty where it failed."""
        drop_caches()
        env = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=str(HERE.parent))
        run = run_within(limit, [sys.executable, *command], self.timeout, env)
        lines = run.stdout.strip().splitlines()
        return run, json.loads(lines[-1]) if run.status == 0 and lines else {}

    def pack(self) -> Path:
        """The checkpoint in 12 bits a number."""
        out = self.scratch / "pack"
        self.run(["-m", "moedge", "pack", str(self.folder), str(out), "--bits", "12", "--json"], None)
        return out

    def moedge(
        self, limit: int | None, tokens: int | None = None, folder: Path | None = None
    ) -> tuple[Run, dict[str, Any]]:
        command = ["-m", "moedge", "run", str(folder or self.folder), "-p", PROMPT, "-n", str(tokens or self.tokens)]
        command += ["--temperature", "0", "--json"] + (["--memory", str(limit)] if limit else [])
        return self.run(command, limit)

    def stock(self, limit: int, tokens: int | None = None) -> tuple[Run, dict[str, Any]]:
        offload = self.scratch / "offload"
        shutil.rmtree(offload, ignore_errors=True)
        command = [str(HERE / "stock_disk.py"), str(self.folder), "--offload-folder", str(offload)]
        return self.run([*command, "--prompt", PROMPT, "--tokens", str(tokens or self.tokens)], limit)


def row(name: str, limit: int | None, run: Run, answer: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, and of the JSON; also said at once, because a run takes minutes."""
    found = {
        "run": name,
        "limit MiB": round(limit / MIB) if limit else "none",
        "status": "killed" if run.killed else run.status,
        "tokens/s": answer.get("tokens_per_second"),
        "first token s": answer.get("first_token_seconds"),
        "wall s": round(run.seconds, 1),
        "VmHWM MiB": round(run.vm_hwm / MIB),
        "cgroup peak MiB": round(run.cgroup_peak / MIB),
        "failcnt": run.failcnt,
        "hit rate": answer.get("hit_rate"),
        "bytes read": answer.get("bytes_read"),
    }
    click.echo(json.dumps(found), err=True)
    return found


def smallest_limit(bench: Bench, low: int, high: int, steps: int = 4) -> int:
    """The least limit, to (high - low) / 2**steps, at which stock generates 3 tokens; at `low` it is killed."""
    for _ in range(steps):
        middle = (low + high) // 2
        run, _ = bench.stock(middle, tokens=3)
        click.echo(f"stock at {middle // MIB} MiB: {'lives' if run.status == 0 else 'dies'}", err=True)
        low, high = (low, middle) if run.status == 0 else (middle, high)
    return high


def measure(bench: Bench, limit: int, pairs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All runs as rows, and the figures that follow from them."""
    run, reference = bench.moedge(None)
    rows = [row("moedge, no limit", None, run, reference)]
    cold, _ = bench.moedge(limit, tokens=1)
    rows.append(row("moedge, 1 token", limit, cold, {}))
    packed = bench.pack()
    stock_limit, ratios, pack_ratios, whole, same, stock_same = limit, [], [], [], [], []
    for number in range(pairs):
        run, ours = bench.moedge(limit)
        if run.status:
            click.echo(run.stderr[-2000:], err=True)
        rows.append(row("moedge", limit, run, ours))
        seconds = run.seconds
        run, from_pack = bench.moedge(limit, folder=packed)
        rows.append(row("moedge, pack", limit, run, from_pack))
        run, theirs = bench.stock(stock_limit)
        if run.status and number == 0:
            rows.append(row("stock", stock_limit, run, theirs))
            stock_limit = smallest_limit(bench, stock_limit, 2 * sum(f.stat().st_size for f in shards(bench.folder)))
            run, theirs = bench.stock(stock_limit)
        rows.append(row("stock", stock_limit, run, theirs))
        same += [bool(each) and each["token_ids"] == reference.get("token_ids") for each in (ours, from_pack)]
        stock_same.append(bool(ours) and ours["token_ids"] == theirs.get("token_ids"))
        if ours and from_pack and theirs:
            ratios.append(ours["tokens_per_second"] / theirs["tokens_per_second"])
            pack_ratios.append(from_pack["tokens_per_second"] / theirs["tokens_per_second"])
            whole.append(run.seconds / seconds)
    return rows, {
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "pack_ratio": statistics.median(pack_ratios) if pack_ratios else None,
        "pack_ratios": pack_ratios,
        "whole_run_ratio": statistics.median(whole) if whole else None,  # from start to end, so with loading
        "same_tokens_as_without_limit": all(same),
        "same_tokens_as_stock": all(stock_same),
        "first_token_wall_seconds_from_cold": cold.seconds,
        "stock_limit_bytes": stock_limit,
    }


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--fraction", default=0.35, help="The limit as a part of the checkpoint's size.")
@click.option("--tokens", default=64)
@click.option("--pairs", default=3, help="How often both sides run.")
@click.option("--readahead-kib", default=128)
@click.option("--timeout", default=1200.0, help="Seconds for one run.")
@click.option("--save", is_flag=True, help="Also write benchmarks/results/offload.json.")
def main(
    folder: Path | None, fraction: float, tokens: int, pairs: int, readahead_kib: int, timeout: float, save: bool
) -> None:
    """Compare both on FOLDER (default: what make_olmoe.py writes)."""
    folder = folder or default_folder()
    size = sum(shard.stat().st_size for shard in shards(folder))
    limit = int(size * fraction)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, readahead(folder, readahead_kib) as kib:
        bench = Bench(folder, Path(scratch), tokens, timeout)
        rows, figures = measure(bench, limit, pairs)
    setup = {
        "checkpoint_bytes": size,
        "limit_bytes": limit,
        "tokens": tokens,
        "readahead_kib": kib,
        "cgroup_version": version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
    publish("offload", rows, {**setup, **figures, "rows": rows}, save)


if __name__ == "__main__":
    main()
