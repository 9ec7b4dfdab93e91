"""Which error should `moedge pack --calibrate` minimise? Ways of weighing a group's error, on texts that were not read.

    python benchmarks/clipping.py [--data ../shared/data] [--format int4-g32] [--save]

The model (checkpoints/mini) reads training text of all its domains; every eighth expert of three layers is quantised
with the clipping that each way finds best, and judged by the relative root mean square error of its output, times the
router's weight, on text that mini was not trained on. Ways: nothing clipped; all inputs alike; the inputs' squares
("diagonal") or their second moments in blocks of 32 ("blocks"), of which a share counts all inputs as alike. With all
tokens, with one in 64, and with novels only. The beginnings of the held-out texts are read, which
benchmarks/pack_quality.py leaves out.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from report import ROOT, publish
from torch import Tensor
from torch.nn.functional import linear, silu

sys.path.insert(0, str(ROOT))

from pack_quality import SKIP, WINDOW, expert_inputs

import moedge
from moedge.measure.quality import windows
from moedge.runtime import calibrate
from moedge.runtime.calibrate import second_moments
from moedge.runtime.formats import Format, dequantise, quantise
from recipes.mini import sources

LAYERS, EVERY = (0, 3, 5), 8
GRIDS = {"0.8": tuple(1 - 0.0125 * i for i in range(17)), "0.5": tuple(1 - 0.025 * i for i in range(21))}
Rows = tuple[Tensor, Tensor]  # inputs of an expert [N, H], the router's weights [N]


def inputs_of(lm: moedge.LM, documents: Sequence[str], tokens: int) -> dict[tuple[int, int], Rows]:
    """What each expert looked at sees of the documents."""
    some = list(windows(lm, documents, WINDOW, tokens))
    found = {}
    for layer, passes in enumerate(expert_inputs(lm, some)):
        hidden, index, weights = (torch.cat(parts) for parts in list(zip(*passes, strict=True))[:3])
        for expert in range(0, lm.anatomy.layers[layer].num_experts, EVERY) if layer in LAYERS else ():
            token, position = torch.where(index == expert)
            found[layer, expert] = hidden[token].clone(), weights[token, position].clone()
    return found


def up(weight: Tensor, x: Tensor) -> Tensor:
    gate, value = linear(x, weight).chunk(2, -1)
    return silu(gate) * value


def clipped(matrix: Tensor, format: Format, rows: Rows, way: str) -> Tensor:
    """The matrix as it is after clipping and rounding."""
    clip: Tensor | float = 1.0
    if way != "no clipping":
        moments = second_moments(*rows)
        if way == "all alike":
            moments = torch.eye(calibrate.BLOCK).expand_as(moments)
        elif way == "diagonal":
            moments = moments * torch.eye(calibrate.BLOCK)
        clip = calibrate.best_clip(matrix, format, moments)
    return dequantise(quantise(matrix, format, clip), format, matrix.shape[1])


def error(experts: dict[Any, dict[str, Tensor]], format: Format, seen: dict[Any, Rows], held: Any, way: str) -> float:
    """Relative error of the outputs on `held`, in percent."""
    wrong = whole = 0.0
    for key, parameters in experts.items():
        first, second = parameters["gate_up_proj"], parameters["down_proj"]
        x, gate = seen[key]
        quantised = clipped(first, format, (x, gate), way), clipped(second, format, (up(first, x), gate), way)
        x, gate = held[key]
        expected = linear(up(first, x), second) * gate[:, None]
        difference = linear(up(quantised[0], x), quantised[1]) * gate[:, None] - expected
        wrong, whole = wrong + float(difference.square().sum()), whole + float(expected.square().sum())
    return 100 * (wrong / whole) ** 0.5


def some_of(rows: Rows, one_in: int) -> Rows:
    chosen = torch.randperm(len(rows[1]), generator=torch.Generator().manual_seed(0))[: -(-len(rows[1]) // one_in)]
    return rows[0][chosen], rows[1][chosen]


def compare(experts: Any, format: Format, texts: dict[str, dict[Any, Rows]], held: Any) -> Iterator[dict[str, Any]]:
    """A row for each way, share and grid, with a column for each kind of texts."""
    whole = texts["all domains"]
    texts = texts | {"one token in 64": {key: some_of(rows, 64) for key, rows in whole.items()}}
    ways = [("no clipping", 0.0, "0.8"), ("all alike", 0.0, "0.8"), ("blocks", 0.0, "0.5")]
    ways += [(way, share, "0.8") for way in ("diagonal", "blocks") for share in (0.0, 0.3, 0.6, 0.8)]
    for way, share, grid in ways:
        calibrate.ALIKE, calibrate.RATIOS = share, GRIDS[grid]
        errors = {name: error(experts, format, seen, held, way) for name, seen in texts.items()}
        yield {"way": way, "alike": share, "down to": grid, **errors}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--format", "name", default="int4-g32", show_default=True)
@click.option("--save", is_flag=True, help="Also write benchmarks/results/clipping.json.")
@torch.inference_mode()
def main(data: Path, name: str, save: bool) -> None:
    """Compare ways of finding the clipping."""
    domains = sources.texts(data)
    kinds = {
        "all domains": ["\n".join(split.train)[:SKIP] for split in domains.values()],
        "novels only": [domains["novel"].train[0][: 3 * SKIP]],
    }
    with moedge.load(ROOT / "checkpoints" / "mini", dtype="fp32") as lm:
        texts = {kind: inputs_of(lm, documents, 20_000) for kind, documents in kinds.items()}
        held = inputs_of(lm, ["\n".join(split.held_out)[: SKIP // 4] for split in domains.values()], 10_000)
        chosen = {layer: [key[1] for key in held if key[0] == layer] for layer in LAYERS}
        experts = {
            (layer, expert): {part: value.clone() for part, value in parameters.items()}
            for layer, some in chosen.items()
            for expert, parameters in lm.store.fetch(layer, some)
        }
    rows = list(compare(experts, Format.parse(name), texts, held))
    tokens = {kind: sum(len(gate) for _, gate in seen.values()) for kind, seen in texts.items()}
    publish("clipping", rows, {"format": name, "rows of experts": tokens, "rows": rows}, save)


if __name__ == "__main__":
    main()
