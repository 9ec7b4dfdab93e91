"""What does it cost to drop the experts that `moedge fit` protects (Super Experts, arXiv 2507.23279)?

    python benchmarks/fit_protect.py [MODEL] [--data ../shared/data] [--save]

On each of six sets one expert of every layer is dropped: the least important one by the default method, or in the
layers that have a protected expert that one instead; and, for comparison, the most important one that is not protected.
KL from the full model on held-out samples. A protected expert that is not among the kept anyway at 25% is counted.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from fit_methods import DOMAINS, FIT_TOKENS, TASKS, TEST_TOKENS, pools
from report import ROOT, publish

from moedge.compress.division import up_to
from moedge.compress.evaluate import Reference, measure
from moedge.compress.fit import profiled
from moedge.compress.importance import METHODS, super_experts
from moedge.compress.opening import PASS, opened
from moedge.compress.partition import ranking
from moedge.compress.samples import windows

sys.path.insert(0, str(ROOT))
from recipes.mini import sources


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=Path("checkpoints/mini"))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/fit_protect.json.")
def main(model: Path, data: Path, save: bool) -> None:
    texts = sources.texts(data)
    rows = [row for name in (*TASKS, *DOMAINS) for row in [measured(model, name, data, texts)]]
    publish("fit_protect", rows, {"rows": rows}, save)


def measured(model: Path, name: str, data: Path, texts: Any) -> dict[str, Any]:
    pool, test = pools(name, data, texts)
    with ExitStack() as stack:
        with opened(model, dtype="fp32") as lm:
            reference = stack.enter_context(Reference.of(lm, up_to(test, lm.tokenizer, TEST_TOKENS).take(0, 40)))
            some = windows(up_to(pool, lm.tokenizer, FIT_TOKENS), lm.tokenizer, PASS, "text")
            seen, counts = profiled(lm, some)[0], [layer.num_experts for layer in lm.anatomy.layers]
        order = [ranking(row[:count]) for row, count in zip(METHODS["default"](seen), counts, strict=True)]
        super_of = dict(super_experts(seen, counts))  # layer -> expert
        least = [ranks[-1] for ranks in order]
        most = [next(e for e in order[layer] if e != super_of.get(layer)) for layer in range(len(counts))]
        dropped = {
            "least": least,
            "protected": [super_of.get(layer, expert) for layer, expert in enumerate(least)],
            "most important": [most[layer] if layer in super_of else e for layer, e in enumerate(least)],
        }
        found: dict[str, Any] = {"set": name, "protected": " ".join(f"{a}:{b}" for a, b in super_of.items())}
        outside = [expert not in order[layer][: counts[layer] // 4] for layer, expert in super_of.items()]
        found["not kept at 25% by score"] = sum(outside)
        for title, gone in dropped.items():
            kept = [[e for e in range(count) if e != drop] for count, drop in zip(counts, gone, strict=True)]
            with opened(model, dtype="fp32", experts=kept) as lm:
                found[f"KL, {title} dropped"] = measure(lm, reference.task, reference).kl
    return found


if __name__ == "__main__":
    main()
