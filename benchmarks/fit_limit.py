"""Does a checkpoint that does not fit into memory fit to a task within a limit, and how long does it take?

    python benchmarks/make_olmoe.py
    python benchmarks/fit_limit.py [--task FILE] [--limit 1.2GB] [--budget 25%] [--save]

`moedge fit` with its own settings, a fresh process in a fresh memory cgroup, from a dropped page cache; `--memory` is
what the cgroup has less 4 MiB (the page cache of what is written is reclaimed, which failcnt counts). Then stock
transformers loads the result, and its logits are compared with moedge's. Needs root and Linux.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from memory_cgroup import drop_caches, run_within
from report import default_folder, publish

from moedge.units import format_size, parse_size

HERE = Path(__file__).resolve().parent
COMPARE = """
import sys, torch, moedge
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 67)[None]
stock = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", experts_implementation="eager").eval()
with torch.inference_mode():
    expected = stock(ids).logits
del stock
with moedge.load(sys.argv[1]) as lm, torch.inference_mode():
    print(bool(torch.equal(lm.model(ids).logits, expected)))
"""


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=default_folder)
@click.option("--task", type=click.Path(path_type=Path, exists=True), default=Path("../shared/data/text/biomed.txt"))
@click.option("--limit", default="1.2GB", show_default=True)
@click.option("--budget", default="25%", show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/fit_limit.json.")
def main(model: Path, task: Path, limit: str, budget: str, save: bool) -> None:
    most, env = parse_size(limit), dict(os.environ, PYTHONPATH=str(HERE.parent))
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        out = Path(scratch) / "out"
        drop_caches()
        command = [sys.executable, "-m", "moedge", "fit", str(model), "--task", str(task), "--budget", budget, "--json"]
        run = run_within(most, [*command, "--memory", str(most - (4 << 20)), "-o", str(out)], 3000, env)
        if run.status:
            raise click.ClickException(f"moedge fit ended with {run.status}: {run.stderr[-500:]}")
        report = json.loads(run.stdout.strip().splitlines()[-1])
        compared = subprocess.run(
            [sys.executable, "-c", COMPARE, str(out)], env=env, capture_output=True, text=True, check=True
        )
    row = {
        "seconds": run.seconds,
        "peak": format_size(run.vm_hwm),
        "failcnt": run.failcnt,
        "before": format_size(report["bytes_before"]),
        "after": format_size(report["bytes_after"]),
        "stock logits equal": compared.stdout.strip() == "True",
    }
    steps = report["seconds"]
    publish("fit_limit", [row], {"limit_bytes": most, "budget": budget, **row, "steps": steps}, save)


if __name__ == "__main__":
    main()
