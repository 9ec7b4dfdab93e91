"""What does refining a choice of experts give? The default method with and without `--refine`, on the same six sets.

    python benchmarks/fit_refine.py [MODEL] --rows FILE [--data ../shared/data] [--sets sst2,novel] [--draws 3] [--save]

Samples, tests and columns are those of fit_methods.py, and so are the rows of the default. Rows that are done are kept
in --rows: run again to continue, or several at once for different sets. `--oracle` refines on the test itself: no
choice of experts that was made without it can be expected to do better.
"""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import click
from fit_methods import BUDGETS, DOMAINS, TASKS, Trial, markdown, means
from report import publish

from moedge.compress.opening import PASS, opened
from moedge.compress.plan import FitPlan
from moedge.compress.refine import refined, weigh
from moedge.compress.samples import windows
from moedge.compress.shape import shape_of
from moedge.models.load import draw
from moedge.terminal import console
from recipes.mini import sources

COMPARED = ("default", "refined", "oracle")


def refine(trial: Trial, number: int, budget: str, rounds: int, oracle: bool) -> tuple[FitPlan, float]:
    """The refined plan of a draw, and the seconds that refining took."""
    plan, part = trial.plan(number, "default", budget), trial.test.task if oracle else trial.parts[number]
    start = time.perf_counter()
    with opened(trial.model, dtype="fp32") as lm, TemporaryDirectory() as folder:
        some = windows(part, lm.tokenizer, PASS, "text")
        answers = windows(part, lm.tokenizer, PASS, "answer") if part.kind == "questions" else None
        keep = Path(folder) / "refined.json"
        better = refined(lm, weigh(some, answers), plan, trial.shape, rounds, keep, lambda _: None)
    return better, time.perf_counter() - start


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sets and draws, of each budget and of both."""

    def average(method: str, budget: str, what: str) -> float | None:
        some = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        if what == "rise":
            values = [row["bits"] / row["full bits"] - 1 for row in some if row["set"] in DOMAINS]
        else:
            values = [row[what] for row in some if row[what] is not None]
        return mean(values) if values else None

    have = {(row["method"], row["budget"]) for row in rows}
    return {
        what: {m: {b: average(m, b, what) for b in BUDGETS if (m, b) in have} for m in COMPARED}
        for what in ("kl", "kept", "rise")
    }


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=Path("checkpoints/mini"))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--rows", "journal", type=click.Path(path_type=Path), required=True, help="Where rows go and come from.")
@click.option("--sets", default=",".join([*TASKS, *DOMAINS]), show_default=True)
@click.option("--budgets", default=",".join(BUDGETS[1:]), show_default=True)
@click.option("--draws", default=3, show_default=True)
@click.option("--rounds", default=12, show_default=True)
@click.option("--oracle", is_flag=True, help="Refine on the test.")
@click.option("--save", is_flag=True, help="Write benchmarks/results/fit_refine.json and .md from all rows.")
def main(
    model: Path, data: Path, journal: Path, sets: str, budgets: str, draws: int, rounds: int, **flags: bool
) -> None:
    texts = sources.texts(data)
    blueprint = draw(model)
    blueprint.checkpoint.close()
    shape = shape_of(blueprint)

    def done() -> list[dict[str, Any]]:
        return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    for name in sets.split(","):
        wanted = [(name, number, budget) for number in range(draws) for budget in budgets.split(",")]
        method = "oracle" if flags["oracle"] else "refined"
        have = {(row["set"], row["draw"], row["budget"]) for row in done() if row["method"] == method}
        missing = [key for key in wanted if key not in have]
        if not missing:
            continue
        with ExitStack() as stack:
            trial = Trial(stack, model, shape, name, data, texts)
            for _, number, budget in missing:
                plan, seconds = refine(trial, number, budget, rounds, flags["oracle"])
                rows = [] if flags["oracle"] else [trial.row(number, "default", budget)]
                rows += [
                    trial.measured(plan, number, method, budget) | {"seconds": seconds, "why": plan.reasons[-1]},
                ]
                with open(journal, "a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
                console.print(f"{name}, draw {number}, {budget}, {method}: {rows[-1]['why']}")
    rows = done()
    lines = means(rows)
    publish("fit_refine", lines, {"rounds": rounds, "rows": rows, **summary(rows)}, flags["save"])
    if flags["save"]:
        (Path(__file__).parent / "results" / "fit_refine.md").write_text(markdown(lines))


if __name__ == "__main__":
    main()
