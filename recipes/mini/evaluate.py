"""Measures a trained mini model on what was held out: `python -m recipes.mini.evaluate CHECKPOINT --out FILE.json`.

Bits per byte of each domain, accuracy of each task, and what the routers do. Stock transformers only, so that the
figures do not rest on the runtime they are later compared with. Legend: B rows, T tokens, L layers, E experts,
A experts a token, D domains.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from moedge.measure.templates import TEMPLATES, Example
from moedge.terminal import console
from recipes.mini import sources, tasks

Array = NDArray[np.float64]
WINDOWS = (512, 2048)  # tokens
CHAT_RECORDS = 200
ROUTED_TOKENS = 10_000  # of each domain and task


def windows(ids: Sequence[int], size: int) -> Iterator[list[int]]:
    """Pieces of at most `size` tokens that share one token, so that every token but the first is predicted once."""
    for start in range(0, max(1, len(ids) - 1), size - 1):
        yield list(ids[start : start + size])


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, text: str, size: int) -> float:
    """Of the whole text, read in pieces of `size` tokens without memory of the piece before."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nll = 0.0
    for piece in windows(ids, size):
        tokens = torch.tensor([piece])
        logits = model(tokens, use_cache=False).logits[0, :-1].float()
        nll += float(functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    return nll / math.log(2) / len(text.encode())


@torch.no_grad()
def _batches(model: Any, rows: list[tuple[list[int], int]], size: int = 64) -> Iterator[tuple[int, float]]:
    """(place, mean log likelihood of the tokens from `start`) of every (ids, start); rows of like length together."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    for at in range(0, len(order), size):
        places = order[at : at + size]
        longest = max(len(rows[place][0]) for place in places)
        ids = torch.zeros(len(places), longest, dtype=torch.long)  # padding stands after, so causal needs no mask
        for line, place in enumerate(places):
            ids[line, : len(rows[place][0])] = torch.tensor(rows[place][0])
        logs = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        logs = logs.gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, T-1]
        for line, place in enumerate(places):
            tokens, start = rows[place]
            yield place, float(logs[line, start - 1 : len(tokens) - 1].mean())


def chosen(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """For every example the choice with the highest mean log likelihood of its tokens."""
    rows: list[tuple[list[int], int]] = []
    owners: list[tuple[int, str]] = []
    prompts = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        for choice in example.choices or ():
            rows.append((prompt + tokenizer(choice, add_special_tokens=False)["input_ids"], len(prompt)))
            owners.append((number, choice))
    best: dict[int, tuple[float, str]] = {}
    for place, score in _batches(model, rows):
        number, choice = owners[place]
        best[number] = max(best.get(number, (-math.inf, "")), (score, choice))
    return [best[number][1] for number in range(len(examples))]


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 8) -> list[str]:
    """Greedy continuations up to the end of the document; prompts of one length run together."""
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    found = [""] * len(encoded)
    stops = set(model.generation_config.eos_token_id)
    for length in sorted({len(ids) for ids in encoded}):
        places = [place for place, ids in enumerate(encoded) if len(ids) == length]
        for at in range(0, len(places), 256):
            some = places[at : at + 256]
            ids_in = torch.tensor([encoded[place] for place in some])  # [B, T], no padding
            out = model.generate(
                ids_in, attention_mask=torch.ones_like(ids_in), max_new_tokens=new_tokens, do_sample=False
            )
            for place, ids in zip(some, out[:, length:].tolist(), strict=True):
                end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
                found[place] = tokenizer.decode(ids[:end])
    return found


def accuracy(model: Any, tokenizer: Any, task: str, records: Sequence[Mapping[str, Any]], chat: bool = False) -> float:
    examples = [TEMPLATES[task](record) for record in records]
    if chat:
        examples = [
            Example(_turn(tokenizer, tasks.ASKS[task].format(**record)), example.choices, example.answer)
            for record, example in zip(records, examples, strict=True)
        ]
    if examples[0].choices is None:
        answers = written(model, tokenizer, [example.prompt for example in examples])
        return round(float(np.mean([a.strip() == e.answer.strip() for a, e in zip(answers, examples, strict=True)])), 4)
    answers = chosen(model, tokenizer, examples)
    return round(float(np.mean([a == e.answer for a, e in zip(answers, examples, strict=True)])), 4)


def _turn(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def routing(model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], tokens: int) -> dict[str, Array]:
    """Router mass by domain: [L, E], the weights of the chosen experts summed over about `tokens` tokens, to sum 1."""
    found = {}
    for name, documents in texts.items():
        mass = np.zeros((model.config.num_hidden_layers, model.config.num_experts))
        for ids, real in _padded(tokenizer, documents, tokens):
            output = model.base_model(ids, use_cache=False, output_router_logits=True)
            for layer, logits in enumerate(output.router_logits):
                probs = logits[real.flatten()].float().softmax(-1)  # [N, E]
                weights, experts = probs.topk(model.config.num_experts_per_tok)  # [N, A]
                weights = weights / weights.sum(-1, keepdim=True)
                mass[layer] += np.bincount(
                    experts.flatten().numpy(), weights.flatten().double().numpy(), minlength=mass.shape[1]
                )
        found[name] = mass / mass.sum(-1, keepdims=True)
    return found


def _padded(tokenizer: Any, documents: Sequence[str], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of documents, cut at 512 tokens: ids [B, T] padded at the end, real [B, T] bool; `tokens` in all."""
    rows: list[list[int]] = []
    for document in documents:
        rows.append(tokenizer(document[:3000], add_special_tokens=False)["input_ids"][:512])
        if sum(map(len, rows)) >= tokens:
            break
    rows.sort(key=len)
    for at in range(0, len(rows), 32):
        some = rows[at : at + 32]
        ids = torch.zeros(len(some), len(some[-1]), dtype=torch.long)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for line, row in enumerate(some):
            ids[line, : len(row)] = torch.tensor(row)
            real[line, : len(row)] = True
        yield ids, real


def best_half(mass: Array) -> Array:
    """[L, E] to [L]: the share of the router mass that the best half of the experts carries."""
    half: Array = np.sort(mass, axis=-1)[:, mass.shape[-1] // 2 :].sum(-1)
    return half


def information(masses: Mapping[str, Array]) -> Array:
    """[L]: mutual information of expert and domain in bits, every domain as likely as the next."""
    given = np.stack(list(masses.values()))  # [D, L, E]
    overall = given.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(given > 0, given * np.log2(given / overall), 0.0)
    bits: Array = terms.sum(-1).mean(0)
    return bits


def router_report(model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], tokens: int) -> dict[str, Any]:
    masses = routing(model, tokenizer, texts, tokens)
    overall = np.stack(list(masses.values())).mean(0)  # [L, E]
    even = overall.shape[1]
    return {
        "best_half": {name: best_half(mass).round(4).tolist() for name, mass in masses.items()},
        "mutual_information_bits": information(masses).round(4).tolist(),
        "load_over_even": {
            "min": (overall.min(-1) * even).round(3).tolist(),
            "max": (overall.max(-1) * even).round(3).tolist(),
        },
        "dead_experts": int((overall * even < 0.01).sum()),
    }


def documents_of(name: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Task documents as the router sees them: prompt and answer."""
    examples = [TEMPLATES[name](record) for record in records]
    return [example.prompt + example.answer for example in examples]


class Figures:
    """The figures in a file: each is measured once, and written at once; what stands there already is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        kept = self.all.setdefault(part, {})
        if name not in kept:
            kept[name] = measure()
            self.path.write_text(json.dumps(self.all, indent=2) + "\n", encoding="utf-8")
            console.print(f"{part}, {name}: {kept[name]}")


def measure_tasks(figures: Figures, model: Any, tokenizer: Any, held: Mapping[str, list[dict[str, Any]]]) -> None:
    """Every task on all its records, on the longer reviews, and as questions in a chat."""
    longer = [record for record in held["sst2"] if len(str(record["sentence"]).split()) >= 10]
    jobs = [(name, name, lines, False) for name, lines in held.items()]
    jobs.append(("sst2, 10 words or more", "sst2", longer, False))
    jobs += [(f"{name}, asked in chat", name, lines[:CHAT_RECORDS], True) for name, lines in held.items()]
    for label, task, lines, chat in jobs:
        figures.once("accuracy", label, partial(accuracy, model, tokenizer, task, lines, chat))
        figures.once("records", label, partial(len, lines))


def measure_texts(
    figures: Figures, model: Any, tokenizer: Any, texts: Mapping[str, sources.Split], budget: int
) -> None:
    """Bits per byte of each domain; of novels the mean over the books."""
    for name, split in texts.items():
        parts = split.held_out if name == "novel" else ["\n\n".join(split.held_out)]
        cut = [part[: budget // len(parts)] for part in parts]
        figures.once("bits_per_byte", name, partial(_by_window, model, tokenizer, cut))


def _by_window(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    return {
        str(size): round(float(np.mean([bits_per_byte(model, tokenizer, text, size) for text in texts])), 4)
        for size in WINDOWS
    }


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the figures go, as JSON.")
@click.option("--bytes", "budget", type=int, default=60_000, show_default=True, help="Characters of text a domain.")
@click.option("--records", type=int, default=1000, show_default=True, help="At most so many records a task.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(checkpoint: Path, data: Path, out: Path, budget: int, records: int, threads: int) -> None:
    """Evaluate CHECKPOINT and write the figures to --out.

    Figures that it holds already are kept: run again to continue, delete it to measure afresh.
    """
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = sources.texts(data)
    rng = np.random.default_rng(0)
    held = {
        name: [lines[place] for place in rng.permutation(len(lines))[:records]]
        for name, lines in tasks.held_out(data, texts).items()
    }
    figures = Figures(out)
    measure_tasks(figures, model, tokenizer, held)
    measure_texts(figures, model, tokenizer, texts, budget)
    seen = {name: [d for whole in split.held_out for d in _pieces(whole)] for name, split in texts.items()}
    seen |= {name: documents_of(name, lines) for name, lines in held.items()}
    figures.once("router", "experts", partial(router_report, model, tokenizer, seen, ROUTED_TOKENS))


def _pieces(document: str, size: int = 1500) -> list[str]:
    return [document[start : start + size] for start in range(0, len(document), size)]


if __name__ == "__main__":
    main()
