"""Puts the end of a run into checkpoints/mini, and its evaluation into the model card.

`python -m recipes.mini.publish model` writes the weights in bf16, `python -m recipes.mini.publish card` the card from
evaluation.json. Knows no data: recipes.mini.evaluate measures.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moedge.errors import CheckpointError
from moedge.train.loop import checkpoints
from moedge.train.loss import RouterLoss
from recipes.mini.run import LONG_ROW, RUNS

SPECIALISED = 0.8  # of the router mass on the best half of the experts
LIMIT = 40 * 2**20  # bytes that the folder of weights may take
UNWANTED = ("is_local", "local_files_only", "backend", "model_max_length")  # of the tokenizer's settings
LICENCES = (
    ("English novels", "text/books", "computationalstylistics/100_english_novels", "public domain"),
    ("Biomedical abstracts", "text/biomed.txt", "cambridgeltl/MTL-Bioinformatics-2016", "CC BY 4.0"),
    ("Encyclopaedia passages", "text/wikipedia", "SQuAD and BoolQ passages", "CC BY-SA"),
    ("Plays", "text/shakespeare", "karpathy/char-rnn", "public domain"),
    ("Sentences in ten languages", "text/tatoeba", "facebookresearch/LASER (Tatoeba)", "CC BY 2.0 FR"),
    ("Worked problems", "tasks/gsm8k", "openai/grade-school-math", "MIT"),
    ("Sentiment", "tasks/sst2 (train only)", "forest-snow/alps (SST-2)", "research use: train and evaluate only"),
    ("Source code", "the Python 3.11 standard library", "python.org", "PSF"),
)
HEAD = """---
license: other
license_name: see-data-licences
language: [en, de, fr, hu, it, ja, nl, pt, ru, es, tr]
library_name: transformers
pipeline_tag: text-generation
---

# moedge mini

A Mixture-of-Experts language model of 11.7 M parameters, small enough for a repository and real enough to show what
running, shrinking and tuning an MoE does: Qwen3-MoE, 6 layers, hidden size 256, 32 experts of 64 per layer, top-4,
byte-level BPE of 4,096 tokens with a token per digit. It is for trying moedge, not for advice: what it writes is
plausible in form and often wrong in fact.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("checkpoints/mini")
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/mini")
"""
PROMPTS = """
## Prompts that it has learnt

A text is continued as it stands. The tasks are asked like this (moedge/measure/templates.py), or in a chat turn:

| task | prompt | answer |
|---|---|---|
| sentiment | `Review: {sentence}\\nSentiment:` | ` negative`, ` positive` |
| language | `Sentence: {sentence}\\nLanguage:` | ` German`, ` French`, ... |
| sums and differences of two-digit numbers | `47 + 28 =`, `12 - 40 =` | ` 75`, ` -28` |
| kind of a passage | `Passage: {text}\\nKind:` | ` novel`, ` play`, ` biomedicine`, ` code`, ... |

Two tasks were kept out of training, to be learnt by tuning: naming the author of a passage of a novel and naming the
subject of a MedMCQA question.
"""


TRAINING = """\
Four runs, one after the other, on two CPU cores in fp32, saved in bf16; Muon for the matrices, AdamW for the rest.
The balance of experts is over the global batch of 8,192 tokens in the first, over some twenty of them in the others.

{runs}
To specialise, every row is to keep to few experts (focus: weight of the fourth power of the entropy of its experts,
relative to the largest), and experts that are hardly used are lifted (floor). Domains and tasks were more alike in the
second run, what was still spread out more frequent in the third, and half of the fourth was novels and abstracts.
Corrected on the way: in the first run arithmetic from 8 to 18% after 4.6 M tokens, with most of its weight on the last
digit after 8.3 M, and naming languages from 3 to 6% after 6.3 M; in the second for 1.2 M tokens focus took the entropy
itself, and floor looked at probabilities only. `make mini` (recipes/mini) has the later settings from the start.

Rows of 512 tokens; late in the first run and in all of the others every sixth step has rows of {long:,}: it has seen
long texts, but not many.
"""
MEASURED = """\
All on data that it was not trained on: three whole novels, the last 5% of the abstracts, encyclopaedia and plays,
modules of the standard library, sentences and pairs of numbers chosen by hash, the last 500 problems of gsm8k, the dev
set of SST-2 (cut from its train set, so phrases overlap). Every figure below is of

    python -m recipes.mini.evaluate checkpoints/mini --out checkpoints/mini/evaluation.json

(which keeps what the file holds: delete it to measure afresh), and
`python -m recipes.mini.publish card` writes them here.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def card(result: Mapping[str, Any], run: Mapping[str, Mapping[str, int]]) -> str:
    """The model card: `result` as evaluate writes it, `run` the tokens and steps of each training run."""
    router = result["router"]["experts"]
    sizes = list(next(iter(result["bits_per_byte"].values())))
    layers = range(1, len(router["mutual_information_bits"]) + 1)
    return "\n".join(
        [
            HEAD,
            "## Training\n",
            TRAINING.format(long=LONG_ROW, runs=_runs(run)),
            PROMPTS,
            "## What was measured\n",
            MEASURED,
            "Bits per byte, text read in windows of so many tokens:\n",
            table(
                ["domain", *(f"{size} tokens" for size in sizes)],
                [
                    [name, *(f"{value:.3f}" for value in each.values())]
                    for name, each in result["bits_per_byte"].items()
                ],
            ),
            "Accuracy by the highest mean log likelihood of the choices; sums by greedy generation, exact:\n",
            table(
                ["task", "accuracy", "records"],
                [[name, f"{value:.1%}", result["records"][name]] for name, value in result["accuracy"].items()],
            ),
            "Experts: load over all domains and tasks (1 is even), and mutual information of expert and domain:\n",
            table(["", *(f"layer {layer}" for layer in layers)], _loads(router)),
            f"Dead experts (under 1% of the even load): {router['dead_experts']}.\n",
            "Share of the router mass that the best half of a layer's experts carries:\n",
            table(
                ["domain or task", *(f"layer {layer}" for layer in layers)],
                [[name, *(f"{value:.1%}" for value in each)] for name, each in router["best_half"].items()],
            ),
            _shortfall(router["best_half"]),
            "## Data and licences\n",
            table(["what", "where", "source", "licence"], LICENCES),
        ]
    )


def _runs(run: Mapping[str, Mapping[str, int]]) -> str:
    return table(
        ["run", "tokens", "steps", "balance", "focus", "floor"],
        [
            [folder, f"{run[folder]['tokens']:,}", f"{run[folder]['steps']:,}", *_weights(settings.router)]
            for folder, _, settings in RUNS
        ],
    )


def _weights(router: RouterLoss) -> list[float]:
    return [router.balance, router.focus, router.floor]


def _loads(router: Mapping[str, Any]) -> list[list[object]]:
    return [
        ["least load", *router["load_over_even"]["min"]],
        ["greatest load", *router["load_over_even"]["max"]],
        ["mutual information, bits", *(f"{value:.2f}" for value in router["mutual_information_bits"])],
    ]


def _shortfall(best_half: Mapping[str, Sequence[float]]) -> str:
    """Says plainly where the aim of 80% is missed."""
    cells = sorted((value, name, layer) for name, each in best_half.items() for layer, value in enumerate(each, 1))
    under = [cell for cell in cells if cell[0] < SPECIALISED]
    if not under:
        return f"Each is at least {SPECIALISED:.0%}.\n"
    value, name, layer = under[0]
    return (
        f"The aim was {SPECIALISED:.0%} everywhere: {len(under)} of {len(cells)} are below it, "
        f"the least is {value:.1%} ({name}, layer {layer}).\n"
    )


@click.group()
def main() -> None:
    """Publish the mini model."""


@main.command("model")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/mini"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints/mini"), show_default=True)
def publish_model(work: Path, out: Path) -> None:
    """Write the newest checkpoint of --work to --out in bf16."""
    ends = {folder: _newest(work / folder) for folder, _, _ in RUNS}
    newest = ends[RUNS[-1][0]]
    model = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(newest)
    part = out.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    settings = part / "tokenizer_config.json"
    known = json.loads(settings.read_text())
    known = {key: value for key, value in known.items() if key not in UNWANTED}
    settings.write_text(json.dumps(known | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    (part / "run.json").write_text(json.dumps({folder: _progress(end) for folder, end in ends.items()}) + "\n")
    size = sum(path.stat().st_size for path in part.iterdir())
    if size > LIMIT:
        raise CheckpointError(f"{part} takes {size:,} bytes, more than {LIMIT:,}: make the model smaller")
    shutil.rmtree(out, ignore_errors=True)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only
    part.rename(out)
    click.echo(f"{newest.name} -> {out}, {size:,} bytes")


def _newest(folder: Path) -> Path:
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint: run recipes.mini.run first")
    return found[-1]


def _progress(checkpoint: Path) -> dict[str, int]:
    state = torch.load(checkpoint / "training.pt", weights_only=True)["progress"]
    return {"tokens": state["tokens"], "steps": state["step"]}


@main.command("card")
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints/mini"), show_default=True)
def publish_card(out: Path) -> None:
    """Write the card of --out from its evaluation.json and run.json."""
    result, run = (json.loads((out / name).read_text()) for name in ("evaluation.json", "run.json"))
    (out / "README.md").write_text(card(result, run), encoding="utf-8")


if __name__ == "__main__":
    main()
