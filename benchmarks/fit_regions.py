"""Do experts fall into three regions, cold, moderate and hot, as LiteMoE's Fig. 4 and 11 show for Switch Transformers?

    python benchmarks/fit_regions.py [MODEL] [--data ../shared/data] [--save]

The share of its layer's router mass (LiteMoE, Eq. 2) that each expert gets on each of six sets, sorted, and how many
experts are needed for most of it. Three regions would show as two bends; `evenness` is the entropy of the shares over
the largest possible. --save also writes benchmarks/results/fit_regions.svg.
"""

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from fit_methods import DOMAINS, FIT_TOKENS, TASKS, pools
from report import RESULTS, ROOT, publish

from moedge.compress.division import up_to
from moedge.compress.fit import profiled
from moedge.compress.opening import PASS, opened
from moedge.compress.partition import shares
from moedge.compress.samples import windows
from moedge.measure.plots import Axis, lines

sys.path.insert(0, str(ROOT))
from recipes.mini import sources


def line(name: str, mass: Any) -> dict[str, Any]:
    """Means over the layers of one set's router mass [L, E]."""
    sorted_shares = np.sort([shares(row) for row in mass])[:, ::-1]  # [L, E], the largest first
    sums, count = sorted_shares.cumsum(1), sorted_shares.shape[1]
    entropy = -(sorted_shares * np.log(np.maximum(sorted_shares, 1e-300))).sum(1) / np.log(count)
    return {
        "set": name,
        "evenness": float(entropy.mean()),
        "largest share": float(sorted_shares[:, 0].mean()),
        "experts for 50%": float((sums < 0.5).sum(1).mean() + 1),
        "experts for 90%": float((sums < 0.9).sum(1).mean() + 1),
        "below a tenth of even": float((sorted_shares < 0.1 / count).sum(1).mean()),
        "above twice even": float((sorted_shares > 2 / count).sum(1).mean()),
    }


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=Path("checkpoints/mini"))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/fit_regions.json and .svg.")
def main(model: Path, data: Path, save: bool) -> None:
    texts = sources.texts(data)
    found: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    with opened(model, dtype="fp32") as lm:
        for name in (*TASKS, *DOMAINS):
            task = up_to(pools(name, data, texts)[0], lm.tokenizer, FIT_TOKENS)
            mass = profiled(lm, windows(task, lm.tokenizer, PASS, "text"))[0].mass
            found.append(line(name, mass))
            middle = np.sort(shares(mass[len(mass) // 2]))[::-1]
            curves[name] = [(float(rank), float(share)) for rank, share in enumerate(middle, start=1)]
    publish("fit_regions", found, {"rows": found}, save)
    if save:
        title = f"Share of the router mass by expert, layer {len(mass) // 2} of {model.name}"
        plot = lines(curves, title, Axis("experts, the most used first"), Axis("share of the layer", log=True))
        (RESULTS / "fit_regions.svg").write_text(plot + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
