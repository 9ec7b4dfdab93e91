"""Where the mini model's text comes from, cut into what it trains on and what is held out.

Knows files and text, no tokens. The data folder is described by its README; the code is the standard library of the
interpreter that runs this.
"""

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moedge.errors import DataError
from moedge.measure.templates import LANGUAGES

HELD_OUT_NOVELS = ("Trollope_Warden_1855", "Chesterton_Napoleon_1904", "Hardy_Madding_1874")
CODE_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data", "__pycache__"}
GSM8K_HELD_OUT = 500
DOMAINS = ("novel", "biomedicine", "encyclopaedia", "code", "languages", "play", "mathematics")


@dataclass(frozen=True)
class Split:
    """Documents of one domain."""

    train: list[str]
    held_out: list[str]


def fraction(*key: object) -> float:
    """A number in [0, 1) that depends on the key only: decides what is held out."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is missing: give the data folder with --data (see the README of the recipe)")
    return path.read_text(encoding="utf-8-sig")


def lines(text: str) -> list[str]:
    """Lines by newline only: sentences hold other characters that str.splitlines would cut at."""
    return text.removesuffix("\n").split("\n")


def jsonl(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines(read(path))]


def _cut(documents: list[str], share: float) -> Split:
    """The last `share` is held out."""
    at = round(len(documents) * (1 - share))
    return Split(documents[:at], documents[at:])


def novels(data: Path) -> Split:
    paths = sorted((data / "text/books").glob("*.txt"))
    missing = set(HELD_OUT_NOVELS) - {path.stem for path in paths}
    if missing:
        raise DataError(f"{data}/text/books lacks {sorted(missing)}: they are what the novels are judged on")
    train = [
        # Most readers of text translate line ends, some do not: one book in five keeps its own.
        path.read_bytes().decode("utf-8-sig") if fraction("line ends", path.stem) < 0.2 else read(path)
        for path in paths
        if path.stem not in HELD_OUT_NOVELS
    ]
    return Split(train, [read(path) for path in paths if path.stem in HELD_OUT_NOVELS])


def biomedicine(data: Path) -> Split:
    """Sentences one a line, in groups of 4 to 12; four groups in ten are written as a paragraph instead."""
    split = _cut(lines(read(data / "text/biomed.txt")), 0.05)
    rng = random.Random(0)
    documents, at = [], 0
    while at < len(split.train):
        size = rng.randint(4, 12)
        documents.append((" " if rng.random() < 0.4 else "\n").join(split.train[at : at + size]) + "\n")
        at += size
    return Split(documents, ["\n".join(split.held_out)])


def encyclopaedia(data: Path) -> Split:
    return _cut(lines(read(data / "text/wikipedia/passages.txt")), 0.05)


def code() -> Split:
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if CODE_LEFT_OUT & set(name.parts) or not 500 < path.stat().st_size < 120_000:
            continue
        (held_out if fraction("code", name.as_posix()) < 0.1 else train).append(path.read_text("utf-8", "replace"))
    return Split(train, held_out)


def sentences(data: Path) -> dict[str, Split]:
    """Sentences by language code; a sentence and its translation are on the same side of the split."""
    found: dict[str, Split] = {"eng": Split([], [])}
    for language in LANGUAGES:
        if language == "eng":
            continue
        stem = data / f"text/tatoeba/tatoeba.{language}-eng"
        foreign, english = (lines(read(Path(f"{stem}.{side}"))) for side in (language, "eng"))
        found[language] = Split([], [])
        for theirs, ours in zip(foreign, english, strict=True):
            held = fraction("tatoeba", ours) < 0.2
            for side, text in ((language, theirs), ("eng", ours)):
                (found[side].held_out if held else found[side].train).append(text)
    return found


def languages(data: Path) -> Split:
    """Runs of sentences of one language."""
    rng = random.Random(1)
    train: list[str] = []
    held_out: list[str] = []
    for language, split in sentences(data).items():
        if language == "eng":
            continue
        for side, documents in ((split.train, train), (split.held_out, held_out)):
            order = rng.sample(side, len(side))
            documents += ["\n".join(order[at : at + 10]) + "\n" for at in range(0, len(order), 10)]
    return Split(rng.sample(train, len(train)), held_out)


def plays(data: Path) -> Split:
    speeches = read(data / "text/shakespeare/input.txt").split("\n\n")
    split = _cut(speeches, 0.05)
    return Split(["\n\n".join(split.train)], ["\n\n".join(split.held_out)])


def mathematics(data: Path) -> Split:
    """Worked problems without the calculator's marks."""
    documents = []
    for record in jsonl(data / "tasks/gsm8k/train.jsonl"):
        steps, _, answer = str(record["answer"]).partition("\n#### ")
        while "<<" in steps:
            before, _, rest = steps.partition("<<")
            steps = before + rest.partition(">>")[2]
        documents.append(f"Question: {record['question']}\nSolution: {steps}\nAnswer: {answer}")
    return Split(documents[:-GSM8K_HELD_OUT], documents[-GSM8K_HELD_OUT:])


def texts(data: Path) -> dict[str, Split]:
    """All domains, in the order of DOMAINS."""
    return {
        "novel": novels(data),
        "biomedicine": biomedicine(data),
        "encyclopaedia": encyclopaedia(data),
        "code": code(),
        "languages": languages(data),
        "play": plays(data),
        "mathematics": mathematics(data),
    }


def passages(documents: Iterable[str], seed: int, count: int, low: int = 60, high: int = 400) -> list[str]:
    """`count` pieces of `low` to `high` characters that begin and end between words."""
    rng = random.Random(seed)
    pool = [document for document in documents if len(document) > 2 * low]
    if not pool:
        raise DataError(f"no document is longer than {2 * low} characters: passages need longer ones")
    sizes = [len(document) for document in pool]
    found: list[str] = []
    while len(found) < count:
        document = rng.choices(pool, sizes)[0]
        size = rng.randint(low, high)
        start = rng.randrange(max(1, len(document) - size))
        words = document[start : start + size].split(" ")
        piece = " ".join(words[1:-1]).strip() if len(words) > 4 else ""
        if len(piece) >= low // 2:
            found.append(piece)
    return found
