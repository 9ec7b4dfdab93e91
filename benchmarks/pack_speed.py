"""Does packing run at the disk's speed within a memory limit?

    python benchmarks/make_olmoe.py && python benchmarks/pack_speed.py [--memory 900MiB] [--bits 16,12,8,4] [--pairs 1]

Each run is a fresh `moedge pack` in a fresh memory cgroup, from a dropped page cache. It is paired with what the disk
does with the same bytes: every file of the checkpoint read past the page cache in blocks of 1 MiB, and as many bytes as
the pack has written so, one after the other. `share` is that time over packing's. Needs root and Linux.
"""

import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from memory_cgroup import drop_caches, run_within
from report import default_folder, publish

from moedge.units import format_size, parse_size

BLOCK = 1 << 20
HERE = Path(__file__).resolve().parent


def disk_seconds(source: Path, nbytes: int, target: Path) -> float:
    """Time to read all weights of `source` and to write `nbytes` bytes, past the page cache."""
    buffer = mmap.mmap(-1, BLOCK)
    drop_caches()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        while os.readv(fd, [buffer]) == BLOCK:
            pass
        os.close(fd)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for _ in range(-(-nbytes // BLOCK)):
        os.write(fd, buffer)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def packed(source: Path, out: Path, bits: str, limit: int) -> dict[str, Any]:
    """One run of `moedge pack`: seconds of the whole process, peak memory, bytes written."""
    drop_caches()
    command = [sys.executable, "-m", "moedge", "pack", str(source), str(out), "--bits", bits, "--memory", str(limit)]
    run = run_within(limit, [*command, "--json"], 3000, dict(os.environ, PYTHONPATH=str(HERE.parent)))
    if run.status:
        raise click.ClickException(f"moedge pack --bits {bits} ended with {run.status}: {run.stderr[-500:]}")
    answer = json.loads(run.stdout.strip().splitlines()[-1])
    return {"seconds": run.seconds, "bytes": answer["total_bytes"], "peak": run.vm_hwm, "failcnt": run.failcnt}


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=default_folder)
@click.option("--memory", default="900MiB")
@click.option("--bits", default="16,12,8,4")
@click.option("--pairs", default=1)
@click.option("--save", is_flag=True)
def main(model: Path, memory: str, bits: str, pairs: int, save: bool) -> None:
    limit, rows, shares = parse_size(memory), [], {}
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        for each in bits.split(","):
            found = []
            for _ in range(pairs):
                run = packed(model, Path(scratch) / "pack", each, limit)
                shutil.rmtree(Path(scratch) / "pack")
                disk = disk_seconds(model, run["bytes"], Path(scratch) / "bytes")
                found.append(disk / run["seconds"])
                rows.append(
                    {
                        "bits": each,
                        "pack s": run["seconds"],
                        "disk s": disk,
                        "share": found[-1],
                        "peak": format_size(run["peak"]),
                        "failcnt": run["failcnt"],
                    }
                )
                click.echo(str(rows[-1]))
            shares[each] = statistics.median(found)
    publish("pack_speed", rows, {"limit_bytes": limit, "shares": shares, "runs": rows}, save)


if __name__ == "__main__":
    main()
