"""Which method says best what experts are worth to a task? Every method of `moedge fit` at four budgets, on six sets.

    python benchmarks/fit_methods.py [MODEL] [--data ../shared/data] [--rows FILE] [--sets sst2,novel] [--save]

Four tasks and two text domains of the mini model's recipe. Samples to fit on come from what it was trained on, in three
disjoint draws; the tests from what was held out of training. Each candidate is the model that `moedge run --experts`
loads, computed in fp32. `kept` is (accuracy - chance) / (full accuracy - chance). `off` is bits per byte of a text of
another domain (novels; biomedicine for the novels). Rows that are done are kept in --rows: run again to continue.
"""

import json
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import click
from report import ROOT, publish

sys.path.insert(0, str(ROOT))  # the recipe says what mini was not trained on

from moedge.compress.division import up_to
from moedge.compress.evaluate import Quality, Reference, measure
from moedge.compress.fit import Settings, choose, profiled
from moedge.compress.importance import METHODS, Statistics
from moedge.compress.opening import PASS, opened
from moedge.compress.plan import FitPlan, Shape
from moedge.compress.samples import Sample, Task, windows
from moedge.compress.shape import shape_of
from moedge.measure.templates import TEMPLATES
from moedge.models.load import draw
from moedge.terminal import console
from recipes.mini import sources, tasks

BUDGETS = ("75%", "50%", "25%", "12.5%")
DRAWS = 3
FIT_TOKENS, TEST_TOKENS, QUESTIONS = 8192, 2048, 150
RIVALS = ("frequency", "reap", "ean")
DOMAINS = ("novel", "biomedicine")
TASKS = ("sst2", "language", "arithmetic", "kind")


def questions(name: str, records: Sequence[Any], count: int, seed: int) -> Task:
    """`count` distinct questions of a task, as training or evaluation sees them."""
    found = {}
    for record in random.Random(seed).sample(list(records), len(records)):
        example = TEMPLATES[name](record)
        found.setdefault(example.prompt, Sample(example.prompt, example.answer, example.choices, example.also))
        if len(found) == count:
            break
    return Task(name, tuple(found.values()), "questions", name)


def passages(name: str, documents: Sequence[str], count: int, seed: int) -> Task:
    """`count` passages of 1,500 characters from different places of the documents."""
    pieces = [text[at : at + 1500] for text in documents for at in range(0, len(text) - 1500, 1500)]
    return Task(name, tuple(map(Sample, random.Random(seed).sample(pieces, min(count, len(pieces))))), "text")


def pools(name: str, data: Path, texts: Any) -> tuple[Task, Task]:
    """(a large pool to draw fits from, the test)."""
    if name in DOMAINS:
        return passages(name, texts[name].train, 300, 0), passages(name, texts[name].held_out, 40, 1)
    trained, held = tasks.training(data, texts)[name].records, tasks.held_out(data, texts)[name]
    test = questions(name, held, QUESTIONS, 1)
    choices = max(len(sample.choices or ()) for sample in test.samples) or 12  # without, it writes
    return questions(name, trained, 6000, 0), test.take(0, QUESTIONS * 4 // max(4, choices))  # each choice is read


def draws(pool: Task, tokenizer: Any) -> list[Task]:
    """Disjoint parts of the pool with as many tokens each."""
    found, first = [], 0
    for _ in range(DRAWS):
        found.append(up_to(pool.take(first), tokenizer, FIT_TOKENS))
        first += len(found[-1])
    return found


class Trial:
    """One set: its references and profiles; `row` measures a candidate, the same experts only once."""

    def __init__(self, stack: ExitStack, model: Path, shape: Shape, name: str, data: Path, texts: Any) -> None:
        self.model, self.shape, self.name = model, shape, name
        pool, test = pools(name, data, texts)
        other = "biomedicine" if name == "novel" else "novel"
        off = pools(other, data, texts)[1]
        self.seen: list[Statistics] = []
        self.parts: list[Task] = []
        self.overlap = 0
        with opened(model, dtype="fp32") as lm:
            self.test = stack.enter_context(Reference.of(lm, up_to(test, lm.tokenizer, TEST_TOKENS)))
            self.off = stack.enter_context(Reference.of(lm, up_to(off, lm.tokenizer, TEST_TOKENS // 2)))
            tested = {sample.key for sample in test.samples}
            for part in draws(pool, lm.tokenizer):
                self.overlap += sum(sample.key in tested for sample in part.samples)
                self.parts.append(part)
                self.seen.append(profiled(lm, windows(part, lm.tokenizer, PASS, "text"))[0])
        self._known: dict[Any, tuple[Quality, Quality]] = {}

    def row(self, draw: int, method: str, budget: str) -> dict[str, Any]:
        return self.measured(self.plan(draw, method, budget), draw, method, budget)

    def plan(self, draw: int, method: str, budget: str) -> FitPlan:
        return choose(self.seen[draw], self.shape, budget, Settings(method=method))

    def measured(self, plan: FitPlan, draw: int, method: str, budget: str) -> dict[str, Any]:
        if plan.kept not in self._known:
            with opened(self.model, dtype="fp32", experts=plan.kept) as lm:
                qualities = measure(lm, self.test.task, self.test), measure(lm, self.off.task, self.off)
            self._known[plan.kept] = qualities
        (quality, off), full = self._known[plan.kept], self.test.quality
        return {
            "set": self.name,
            "draw": draw,
            "method": method,
            "budget": budget,
            "kl": quality.kl,
            "perplexity": quality.perplexity,
            "full perplexity": full.perplexity,
            "bits": quality.bits_per_byte,
            "full bits": full.bits_per_byte,
            "accuracy": quality.accuracy,
            "full accuracy": full.accuracy,
            "kept": quality.retained(full),
            "off bits": off.bits_per_byte,
            "full off bits": self.off.quality.bits_per_byte,
            "off kl": off.kl,
        }


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the draws: a line for each set, budget and method, the best KL of a budget first."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["budget"], row["method"]), []).append(row)
    found = []
    for (name, budget, method), some in groups.items():
        kept = [row["kept"] for row in some if row["kept"] is not None]
        line = {
            "set": name,
            "budget": budget,
            "method": method,
            "KL": mean(row["kl"] for row in some),
            "kept": mean(kept) if kept else "",
            "perplexity": mean(row["perplexity"] for row in some),
            "bits per byte": f"{100 * (mean(row['bits'] / row['full bits'] for row in some) - 1):+.1f}%",
            "off KL": mean(row["off kl"] for row in some),
            "off bits per byte": f"{100 * (mean(row['off bits'] / row['full off bits'] for row in some) - 1):+.1f}%",
        }
        found.append(line)
    order = {budget: number for number, budget in enumerate(BUDGETS)}
    return sorted(found, key=lambda line: (line["set"], order[line["budget"]], line["KL"]))


def small_kl(rows: Sequence[dict[str, Any]], method: str, name: str) -> float:
    """Mean KL at the two smallest budgets of one set."""
    return mean(
        row["kl"] for row in rows if (row["method"], row["set"]) == (method, name) and row["budget"] in BUDGETS[2:]
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is asked of the default."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [row for row in rows if row["method"] == "default"]

    def average(column: str, budget: str) -> float | None:
        values = [row[column] for row in own if row["budget"] == budget and row[column] is not None]
        return mean(values) if values else None

    def rise(budget: str) -> float | None:
        values = [
            row["bits"] / row["full bits"] - 1 for row in own if row["budget"] == budget and row["set"] in DOMAINS
        ]
        return mean(values) if values else None

    return {
        "mean_kl_at_25_and_12.5": {method: mean(small_kl(rows, method, name) for name in names) for method in methods},
        "default_ahead_on_sets": {
            rival: [name for name in names if small_kl(rows, "default", name) < small_kl(rows, rival, name)]
            for rival in RIVALS
            if rival in methods
        },
        "default_kept": {budget: average("kept", budget) for budget in BUDGETS},
        "default_bits_rise": {budget: rise(budget) for budget in BUDGETS},
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for docs, figures in three digits."""
    head = list(lines[0])
    text = [" | ".join(head), " | ".join("---" for _ in head)]
    text += [" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()) for line in lines]
    return "".join(f"| {line} |\n" for line in text)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=Path("checkpoints/mini"))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--rows", "journal", type=click.Path(path_type=Path), help="Where rows go as they come, and come from.")
@click.option("--sets", default=",".join([*TASKS, *DOMAINS]), show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/fit_methods*.json and .md.")
def main(model: Path, data: Path, journal: Path | None, sets: str, methods: str, save: bool) -> None:
    texts = sources.texts(data)
    blueprint = draw(model)
    blueprint.checkpoint.close()
    shape, rows = shape_of(blueprint), list[dict[str, Any]]()
    if journal is not None and journal.exists():
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
    done = {(row["set"], row["draw"], row["method"], row["budget"]) for row in rows}
    for name in sets.split(","):
        wanted = [(name, d, m, b) for d in range(DRAWS) for b in BUDGETS for m in methods.split(",")]
        if not set(wanted) - done:
            continue
        with ExitStack() as stack:
            trial = Trial(stack, model, shape, name, data, texts)
            console.print(f"{name}: {trial.overlap} samples are in the test as well; full {trial.test.quality}")
            for key in [key for key in wanted if key not in done]:
                rows.append(trial.row(*key[1:]))
                if journal is not None:
                    with open(journal, "a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
            console.print(f"{name}: done")
    chosen = [row for row in rows if row["set"] in sets.split(",") and row["method"] in methods.split(",")]
    lines = means(chosen)
    title = "fit_methods" if model.name == "mini" else f"fit_methods_{model.parent.name}"
    publish(title, lines, {"rows": chosen, **summary(chosen)}, save)
    if save:
        (Path(__file__).parent / "results" / f"{title}.md").write_text(markdown(lines))


if __name__ == "__main__":
    main()
