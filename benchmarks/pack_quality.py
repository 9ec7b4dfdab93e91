"""What does packing cost in quality? Packs checkpoints/mini in each number format and measures what is left of it.

    python benchmarks/pack_quality.py [FORMAT ...] [--data ../shared/data] [--tokens 4096] [--records 200] [--save]

For each format: bytes of the experts; perplexity on a novel and on abstracts that mini was not trained on, its change,
mean KL divergence and top-1 agreement, all against the unpacked model; the error of the experts' outputs (root mean
square, relative, layer by layer on the unpacked model's inputs, the mean over layers). All in fp32. For TASKS_OF also
the accuracy of every task of mini's card. `+novels` calibrates on novels only, `+all` on all domains that mini was
trained on, seven documents in turn; nothing that is measured on is among these. With FORMATs, only these are measured
and --save keeps the others' rows.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from report import RESULTS, ROOT, publish
from torch import Tensor

sys.path.insert(0, str(ROOT))  # the recipe says what mini was not trained on

import moedge
from moedge.measure.compare import Divergence, Recording
from moedge.measure.machine import commit
from moedge.measure.quality import Window, score_windows, windows
from moedge.measure.tasks import Judge
from moedge.measure.templates import TEMPLATES, Example
from moedge.runtime.formats import Format
from moedge.runtime.generate import logits_in_chunks
from moedge.runtime.pack import pack
from recipes.mini import sources, tasks

FORMATS = (
    *("plain", "int8-g32", "int8-g32+all", "int8-g128"),
    *("int4-g32", "int4-g32+all", "int4-g32+novels", "int4-g32-asym", "int4-g32-asym+all"),
    *("int4-g64-asym", "int4-g128", "int4-g128+all"),
)
TASKS_OF = ("plain", "int8-g32")
WINDOW, DOMAINS = 512, ("novel", "biomedicine")
SKIP = 20_000
ERROR_TOKENS = 1024  # of each domain, for the error of the experts' outputs
DOCUMENT = 2000  # characters of a calibration document, about 512 tokens


def calibration(texts: Mapping[str, sources.Split], domains: Sequence[str], path: Path) -> Path:
    """A JSONL file of training documents of the domains in turn, more than calibrating reads."""
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(100):
            pool = texts[domains[number % len(domains)]].train
            text = chance.choice(pool)
            start = chance.randrange(max(1, len(text) - DOCUMENT))
            file.write(json.dumps({"text": text[start : start + DOCUMENT]}) + "\n")
    return path


def held_windows(lm: moedge.LM, texts: Mapping[str, sources.Split], tokens: int) -> dict[str, list[Window]]:
    """After SKIP characters: on the beginnings the settings of calibrating were chosen."""
    return {name: list(windows(lm, [texts[name].held_out[0][SKIP:]], WINDOW, tokens)) for name in DOMAINS}


def questions(data: Path, texts: Mapping[str, sources.Split], tokenizer: Any, count: int) -> dict[str, list[Example]]:
    """The tasks of mini's card: as they are, longer reviews alone, and asked in a chat (half as many)."""
    found: dict[str, list[Example]] = {}
    for name, records in tasks.held_out(data, texts).items():
        some = random.Random(0).sample(records, min(count, len(records)))
        found[name] = [TEMPLATES[name](record) for record in some]
        found[f"{name}, asked in chat"] = [
            replace(TEMPLATES[name](r), prompt=_turn(tokenizer, tasks.ASKS[name].format(**r)))
            for r in some[: count // 2]
        ]
        if name == "sst2":
            longer = [record for record in some if len(str(record["sentence"]).split()) >= 10]
            found["sst2, 10 words or more"] = [TEMPLATES[name](record) for record in longer]
    return found


def _turn(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def accuracies(lm: moedge.LM, sets: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Share of right answers."""
    found = {}
    for name, examples in sets.items():
        verdicts = list(Judge(lm, name.partition(",")[0]).verdicts(examples))
        found[name] = sum(verdict.correct for verdict in verdicts) / len(verdicts)
    return found


def expert_inputs(lm: moedge.LM, some: Sequence[Window]) -> list[list[tuple[Tensor, ...]]]:
    """For each layer, what each pass gives to its experts, and their output: hidden, index, weights, output."""
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in lm.anatomy.layers]

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, output: seen[layer].append((*args, output))

    handles = [
        lm.model.get_submodule(layer.experts).register_forward_hook(keep(layer.index)) for layer in lm.anatomy.layers
    ]
    for window in some:
        for _ in logits_in_chunks(lm, window.ids):
            pass
    for handle in handles:
        handle.remove()
    return seen


@torch.inference_mode()
def output_error(lm: moedge.LM, seen: Sequence[Sequence[tuple[Tensor, ...]]]) -> float:
    """Relative root mean square error of the layers' experts on those inputs, the mean over layers."""
    errors = []
    for layer in lm.anatomy.layers:
        wrong = whole = 0.0
        for *inputs, expected in seen[layer.index]:
            output = lm.model.get_submodule(layer.experts)(*inputs)
            wrong += float((output - expected).square().sum())
            whole += float(expected.square().sum())
        errors.append((wrong / whole) ** 0.5)
    return sum(errors) / len(errors)


class Original:
    """The unpacked model: its logits, its experts' inputs, its accuracies."""

    def __init__(self, folder: Path, data: Path, tokens: int, records: int) -> None:
        self.folder, self.texts = folder, sources.texts(data)
        with moedge.load(folder, dtype="fp32") as lm:
            self.windows = held_windows(lm, self.texts, tokens)
            self.logits = {name: Recording() for name in DOMAINS}
            self.perplexity = {}
            for name, some in self.windows.items():
                for _ in self.logits[name].record(lm, some):
                    pass
                self.perplexity[name] = self._scores(lm, name)["perplexity"]
            self.questions = questions(data, self.texts, lm.tokenizer, records)
            some = [window for each in self.windows.values() for window in each[: ERROR_TOKENS // WINDOW]]
            self.inputs = expert_inputs(lm, some)

    def _scores(self, lm: moedge.LM, name: str) -> dict[str, Any]:
        distance = Divergence(self.logits[name])
        *_, score = score_windows(lm, self.windows[name], distance.observe)
        return {"perplexity": score.perplexity, **distance.as_dict()}

    def measure(self, packed: Path, name: str) -> dict[str, Any]:
        """A row of figures about a pack."""
        row: dict[str, Any] = {}
        with moedge.load(packed, dtype="fp32") as lm:
            for domain in DOMAINS:
                scores = self._scores(lm, domain)
                row[f"{domain} ppl"] = scores["perplexity"]
                row[f"{domain} ppl %"] = 100 * (scores["perplexity"] / self.perplexity[domain] - 1)
                row[f"{domain} KL"] = scores["kl"]
                row[f"{domain} top-1 %"] = 100 * scores["top1_agreement"]
            if name in TASKS_OF:
                row["tasks"] = accuracies(lm, self.questions)
            row["output error %"] = 100 * output_error(lm, self.inputs)
        return row


def rows_of(original: Original, names: Sequence[str], scratch: Path) -> Iterator[dict[str, Any]]:
    """Pack and measure each format; a pack is deleted before the next is made."""
    everything = calibration(original.texts, sources.DOMAINS, scratch / "all.jsonl")
    files = {"": None, "all": everything, "novels": calibration(original.texts, ["novel"], scratch / "novels.jsonl")}
    for name in names:
        started = time.perf_counter()
        form, _, texts = name.partition("+")
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            sizes = pack(original.folder, Path(folder) / "out", Format.parse(form), calibrate=files[texts])
            packing = time.perf_counter() - started
            figures = original.measure(Path(folder) / "out", name)
        click.echo(f"{name}: {time.perf_counter() - started:.0f} s, {packing:.1f} of them for packing", err=True)
        yield {"format": name, "experts_bytes": sizes["experts_bytes"], **figures}


def saved(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the saved result, by format, where it was measured with the same settings."""
    path = RESULTS / "pack_quality.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return {row["format"]: row for row in result.get("rows", ())} if result.get("settings") == settings else {}


@click.command()
@click.argument("formats", nargs=-1)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "checkpoints" / "mini")
@click.option("--tokens", type=click.IntRange(ERROR_TOKENS), default=4096, show_default=True, help="Of each domain.")
@click.option("--records", type=click.IntRange(2), default=200, show_default=True, help="At most so many of a task.")
@click.option("--save", is_flag=True, help="Also write benchmarks/results/pack_quality.json.")
def main(formats: tuple[str, ...], data: Path, model: Path, tokens: int, records: int, save: bool) -> None:
    """Measure what packing the mini model costs in quality."""
    wrong = [name for name in formats if name not in FORMATS]
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}: choose from {', '.join(FORMATS)}", param_hint="FORMAT")
    with tempfile.TemporaryDirectory(dir=os.environ.get("MOEDGE_BENCH_DIR")) as scratch:
        original = Original(model, data, tokens, records)
        settings = {"tokens": tokens, "records": records, "window": WINDOW, "perplexity": original.perplexity}
        found = saved(settings) if formats else {}
        for row in rows_of(original, formats or FORMATS, Path(scratch)):
            found[row["format"]] = row | {"commit": commit(ROOT / "moedge", ROOT / "benchmarks")}
    rows = [found[name] for name in FORMATS if name in found]
    table = [{key: value for key, value in islice(row.items(), 12) if key not in ("tasks", "commit")} for row in rows]
    publish("pack_quality", table, {"settings": settings, "rows": rows}, save)


if __name__ == "__main__":
    main()
