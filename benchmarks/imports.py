"""What imports cost a process before it has a model: memory and time, with lean imports (models/lean.py) and without.

Every run is a fresh process that imports what `moedge run` does, and looks at its resident memory after each stage.
Pages of libraries that other processes map too count in full, as a memory limit counts them. Linux.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

import click
import report

MODEL = report.ROOT / "checkpoints" / "mini"
STAGES = {
    "python": "",
    "import moedge": "import moedge",
    "import torch": "import torch",
    "import moedge.runtime.lm": "import moedge.runtime.lm",
    "the meta model of mini": "from moedge.models.load import draw; draw(MODEL, None).checkpoint.close()",
}
LEAN = "from moedge.models.lean import lean_imports; lean_imports()"
CHILD = """
import json, sys, time
from pathlib import Path

began, found = time.perf_counter(), []
MODEL, stages = Path(sys.argv[1]), json.loads(sys.argv[2])
for stage in stages:
    exec(stage)
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    resident, anonymous = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
    found.append({"MiB": resident, "anonymous MiB": anonymous, "s": time.perf_counter() - began})
print(json.dumps(found))
"""


def fresh(stages: list[str]) -> list[dict[str, float]]:
    """What a new process finds after each of `stages`."""
    command = [sys.executable, "-c", CHILD, str(MODEL), json.dumps(stages)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=report.ROOT)
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


@click.command()
@click.option("--runs", default=3, show_default=True, help="Processes of each kind, in turn.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/imports.json.")
def main(runs: int, save: bool) -> None:
    """Measure fresh processes; the medians."""
    everything, lean = list(STAGES.values()), list(STAGES.values())
    lean[1] += f"; {LEAN}"
    kinds = {"all": everything, "lean": lean}
    found: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, stages in kinds.items():
            found[kind].append(fresh(stages))
    rows: list[dict[str, Any]] = [
        {"after": stage}
        | {
            f"{kind}: {figure}": round(statistics.median(run[index][figure] for run in processes), 1)
            for kind, processes in found.items()
            for figure in processes[0][index]
        }
        for index, stage in enumerate(STAGES)
    ]
    report.publish("imports", rows, {"runs": runs, "rows": rows}, save)


if __name__ == "__main__":
    main()
