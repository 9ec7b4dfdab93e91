"""The tasks that the mini model learns, as examples: what it trains on and what is held out.

Sentiment, the language of a sentence, addition and subtraction of two-digit numbers, the kind of a passage. Knows text,
no tokens. The prompts are those of moedge.measure.templates; one example in five is a chat turn.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedge.measure.templates import KINDS, TEMPLATES, Example
from recipes.mini import sources

HELD_OUT_PAIRS = 0.1
CHAT = 0.2
ASKS = {
    "sst2": "Is this review positive or negative? {sentence}",
    "language": "Which language is this? {sentence}",
    "arithmetic": "What is {a} {op} {b}?",
    "kind": "What kind of text is this? {text}",
}


@dataclass(frozen=True)
class Task:
    """Loss weights: of a prompt's tokens, of an answer's, and of an answer's last token when that is another."""

    prompt_weight: float
    answer_weight: float
    records: list[dict[str, Any]]
    last_weight: float | None = None


def held_out_pair(a: int, b: int) -> bool:
    """Whether a + b, b + a, a - b and b - a are all kept for evaluation."""
    return sources.fraction("pair", min(a, b), max(a, b)) < HELD_OUT_PAIRS


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs that may be learnt: half additions; differences of either sign; one in eight has single digits."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        low, high = (0, 9) if rng.random() < 0.12 else (10, 99)
        a, b = rng.randint(low, high), rng.randint(low, high)
        if not held_out_pair(a, b):
            found.append({"a": a, "b": b, "op": rng.choice("+-")})
    return found


def held_out_sums() -> list[dict[str, Any]]:
    """All held-out pairs of two-digit numbers, both operations, every order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if held_out_pair(a, b)]
    return [{"a": a, "b": b, "op": op} for a, b in pairs for op in "+-"]


def language_records(data: Path, held_out: bool, seed: int = 2) -> list[dict[str, Any]]:
    """Whole sentences; to train, also a part of each, and as many English ones as of another language."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    for language, split in sources.sentences(data).items():
        lines = [line for line in (split.held_out if held_out else split.train) if line.strip()]
        if language == "eng":
            lines = rng.sample(lines, len(lines) // 10)
        found += [{"sentence": line, "language": language} for line in lines]
        for line in [] if held_out else lines:
            words = line.split(" ")
            start = rng.randrange(len(words))
            part = " ".join(words[start : start + rng.randint(2, 6)])
            if len(part) > 8:
                found.append({"sentence": part, "language": language})
    return found


def kind_records(texts: dict[str, sources.Split], held_out: bool, each: int) -> list[dict[str, Any]]:
    return [
        {"text": text, "kind": kind}
        for seed, kind in enumerate(KINDS)
        for text in sources.passages(texts[kind].held_out if held_out else texts[kind].train, seed, each)
    ]


def training(data: Path, texts: dict[str, sources.Split]) -> dict[str, Task]:
    """The streams of examples, by name."""
    reviews = sources.jsonl(data / "tasks/sst2/train.jsonl")
    long = [record for record in reviews if len(str(record["sentence"]).split()) >= 10]
    return {
        "sst2": Task(0.1, 16.0, reviews),
        "sst2-long": Task(0.1, 16.0, long),
        "language": Task(0.3, 16.0, language_records(data, held_out=False)),
        # The size of a result is learnt early, its last digit late: that is where the weight belongs.
        "arithmetic": Task(0.0, 4.0, sums(200_000, seed=3), last_weight=24.0),
        "kind": Task(0.5, 8.0, kind_records(texts, held_out=False, each=2000)),
    }


def held_out(data: Path, texts: dict[str, sources.Split]) -> dict[str, list[dict[str, Any]]]:
    """What each task is judged on here; the sentiment's dev set was never trained on."""
    return {
        "sst2": sources.jsonl(data / "tasks/sst2/dev.jsonl"),
        "language": language_records(data, held_out=True),
        "arithmetic": held_out_sums(),
        "kind": kind_records(texts, held_out=True, each=200),
    }


def document(name: str, record: dict[str, Any], rng: random.Random) -> tuple[str, str, bool]:
    """(prompt, answer, whether it is a chat turn) of one example, in one of the forms that are learnt."""
    task = name.partition("-")[0]
    example: Example = TEMPLATES[task](record)
    if rng.random() < CHAT:
        return (ASKS[task].format(**record) if rng.random() < 0.5 else example.prompt), example.answer, True
    if task == "arithmetic" and rng.random() < 0.12:
        return f"{record['a']}{record['op']}{record['b']}=", example.answer.strip(), False
    return example.prompt, example.answer, False
