"""The samples of a task: read from a file, divided into parts to fit and to test on, and as windows of token ids.

A sample is a question (prompt, answer, perhaps choices) or a passage of text; plain texts are cut into passages, so
that they can be divided too. Of a window those positions count after which a token stands that matters: every token of
a text, or a question's answer alone. So the last position never counts, as nothing is predicted there, and an answer
of one token counts at the position before it. Knows tokenizers; runs no model.
"""

import csv
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moedge.errors import DataError
from moedge.measure.quality import Window, beginning
from moedge.measure.records import read_records
from moedge.measure.tasks import example_of, joined
from moedge.measure.templates import TEMPLATES, Example
from moedge.runtime.texts import read_documents

PASSAGE = 2000  # characters: about 500 tokens
LINE = 500  # characters; a longer line is cut after a word
SHORTEST, AT_LEAST = 200, 50  # a short text is cut into about 50 passages, but none far below 200 characters
MOST = 1 << 25  # characters of a plain text that are read
REPEATED = 40  # a line this long that stood before would put the same text on both sides
RECORDS = (".jsonl", ".json", ".csv")
PIECES = 0.8  # share of tokens unknown or part of a character; mini has 0.76 of Japanese, which it reads, Arabic 0.91
FORMS = 'records need "text", or "prompt" and "answer" (and "choices" where there are any)'

Scope = Literal["text", "answer"]


@dataclass(frozen=True)
class Sample:
    """A question, or a passage of text: then `prompt` is the text and `answer` None. `also`: further right answers."""

    prompt: str
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a model reads: the text, or the prompt with its answer."""
        return self.prompt + (self.answer or "")

    @property
    def example(self) -> Example:
        """The question as measure/tasks.py judges it. DataError for a passage of text."""
        if self.answer is None:
            raise DataError(f"a passage of text is no question: {self.prompt[:60]!r}")
        return Example(self.prompt, self.choices, self.answer, self.also)

    @property
    def key(self) -> bytes:
        """The same for samples that ask the same: without regard to case, blanks and forms of a character."""
        plain = " ".join(unicodedata.normalize("NFKC", self.prompt).casefold().split())
        return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Task:
    """Samples of one kind. `template`: the key of measure's TEMPLATES that made them, else empty.

    `skipped` counts records without content, and lines of a text that repeat one before.
    """

    name: str
    samples: tuple[Sample, ...]
    kind: Literal["text", "questions"]
    template: str = ""
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def split(
        self, seed: int = 0, test_share: float = 0.2, fit_limit: int | None = None, test_limit: int | None = None
    ) -> tuple["Task", "Task"]:
        """Disjoint parts to fit on and to test on, at least one sample each, in an order that only content decides.

        Samples with equal keys stand on the same side, whatever their order in the file. The limits keep the first
        so many of a part. Raises DataError where there are not two different samples, ValueError for a bad share.
        """
        if not 0 < test_share < 1:
            raise ValueError(f"test_share {test_share} is not between 0 and 1")
        groups: dict[bytes, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.key, []).append(sample)
        if len(groups) < 2:
            raise DataError(
                f"task {self.name!r} has {len(groups)} different sample: one to fit on and one to test on are needed, "
                "and some hundreds to be of use; give more"
            )
        order = sorted(groups, key=lambda key: hashlib.sha256(seed.to_bytes(8, "big", signed=True) + key).digest())
        tested = min(max(1, round(test_share * len(order))), len(order) - 1)
        test, fit = (
            tuple(sample for key in keys for sample in sorted(groups[key], key=_content))
            for keys in (order[:tested], order[tested:])
        )
        return replace(self, samples=fit[:fit_limit]), replace(self, samples=test[:test_limit])

    def take(self, first: int, last: int | None = None) -> "Task":
        """Samples `first` to before `last`: of a part's order, disjoint draws. DataError where none is left."""
        samples = self.samples[first:last]
        if not samples:
            raise DataError(f"task {self.name!r} has {len(self)} samples, none from number {first} on: give more")
        return replace(self, samples=samples)

    @property
    def fingerprint(self) -> str:
        """Changes with any sample, their order, and the template: what a record of measurements is valid for."""
        digest = hashlib.sha256(self.template.encode())
        for sample in self.samples:
            digest.update(repr(_content(sample)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def _content(sample: Sample) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    return sample.prompt, sample.answer or "", sample.choices or (), sample.also


def parse_spec(spec: str | Path) -> tuple[str | None, Path]:
    """Name and file of `[NAME=]file`. A file whose whole name is `spec` is taken as it stands."""
    name, equals, file = str(spec).partition("=")
    if isinstance(spec, Path) or not equals or not name or Path(spec).exists():
        return None, Path(spec)
    return name, Path(file)


def read_task(spec: str | Path, name: str | None = None) -> Task:
    """The samples of `[NAME=]file`: task records (.jsonl, .json, .csv, a folder of MMLU's CSV files) or a text.

    A name that is a key of measure's TEMPLATES says what the records' fields mean; otherwise they have {"text"}, or
    {"prompt", "answer"[, "choices"]}. Any other file is a plain text. Raises DataError naming file, value and remedy.
    """
    given, path = parse_spec(spec) if name is None else (name, Path(spec))
    if not path.exists():
        raise DataError(f"{path} does not exist: give a file of task records or a text")
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} is empty: write samples of the task into it, some hundreds to be of use")
    name = given or path.stem or path.name
    template = name if given in TEMPLATES else ""
    if path.is_dir() or path.suffix in RECORDS or template:
        task = _from_records(path, name, template)
    else:
        passages, repeated = _passages(path)
        task = Task(name, tuple(Sample(passage) for passage in passages), "text", skipped=repeated)
    if not task.samples:
        raise DataError(f"{path} has no usable samples, only blanks: write samples of the task into it")
    return task


def _from_records(path: Path, name: str, template: str) -> Task:
    records, samples, skipped = _fields(path, read_records(path), template), [], 0
    for number, record in enumerate(records, start=1):
        try:
            sample = _sample(record, template)
        except DataError as error:
            raise DataError(f"{path}, record {number}: {error}") from error
        if not sample.prompt.strip() or (sample.answer is not None and not sample.answer.strip()):
            skipped += 1
        else:
            samples.append(sample)
    kinds = {sample.answer is None for sample in samples}
    if len(kinds) > 1:
        texts = sum(sample.answer is None for sample in samples)
        raise DataError(
            f"{path} has {texts} texts and {len(samples) - texts} questions: their measures differ, so write them into "
            "two files"
        )
    return Task(name, tuple(samples), "text" if kinds == {True} else "questions", template, skipped)


def _fields(path: Path, records: list[Any], template: str) -> Iterator[Any]:
    """Rows of a CSV file whose first one names the fields as objects; other records as they are."""
    first = records[0]
    names = set(first) if isinstance(first, list) and all(isinstance(cell, str) for cell in first) else set()
    wanted = set(TEMPLATES[template].fields) if template else {"text"}
    if path.suffix != ".csv" or not (wanted <= names or (not template and {"prompt", "answer"} <= names)):
        yield from records
        return
    if len(records) == 1:
        raise DataError(f"{path} has a header and no rows: write samples of the task into it")
    for number, row in enumerate(records[1:], start=2):
        if len(row) != len(first):
            raise DataError(f"{path}, row {number} has {len(row)} cells, the header {len(first)}: make them equal")
        record = dict(zip(first, row, strict=True))
        if not template and record.get("choices"):
            record["choices"] = next(csv.reader([record["choices"]], delimiter="|"))
        yield record


def _sample(record: Any, template: str) -> Sample:
    if isinstance(record, str):
        return Sample(record)
    if not template and isinstance(record, dict) and not {"prompt", "answer"} <= record.keys():
        if isinstance(record.get("text"), str):
            return Sample(record["text"])
        fitting = [name for name, some in TEMPLATES.items() if set(some.fields) <= record.keys()]
        remedy = f"; for its fields write {' or '.join(f'{name}=FILE' for name in fitting)}" if fitting else ""
        raise DataError(f"{FORMS}{remedy}: {str(record)[:120]!r}")
    if not template and not isinstance(record, dict):
        raise DataError(f"{FORMS}, or name the template, as in mmlu=FILE: {str(record)[:120]!r}")
    example = example_of(template, record)
    return Sample(example.prompt, example.answer, example.choices, example.also)


def _passages(path: Path) -> tuple[list[str], int]:
    """A text in pieces of about PASSAGE characters that end with a line, best a blank one; and the lines left out."""
    lines, length, repeated, seen = list[str](), 0, 0, set[bytes]()
    for line in _lines(path):
        if length >= MOST:
            break
        if len(line.strip()) >= REPEATED:
            key = Sample(line).key
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
        lines.append(line)
        length += len(line)
    size = min(PASSAGE, max(SHORTEST, length // AT_LEAST))
    return [passage for passage in _gathered(lines, size) if passage.strip()], repeated


def _gathered(lines: Sequence[str], size: int) -> Iterator[str]:
    kept, length = list[str](), 0
    for line in lines:
        kept.append(line)
        length += len(line)
        if length >= size or (length >= size // 2 and not line.strip()):
            yield "".join(kept)
            kept, length = [], 0
    if kept:
        yield "".join(kept)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text; a very long one in pieces that end with a word."""
    for document in read_documents(path):
        if "\0" in document:
            raise DataError(f"{path} is not a text, it has zero bytes: give a text in UTF-8, or task records")
        for line in document.splitlines(keepends=True):
            while len(line) > LINE:
                end = line.rfind(" ", LINE // 2, LINE) + 1 or LINE
                yield line[:end]
                line = line[end:]
            yield line


@dataclass(frozen=True)
class SampleWindow(Window):
    """A window of one sample. Positions `first` to the one before the last token count; `sample`: its number."""

    first: int
    sample: int

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which of the positions of `ids` count, [t]."""
        at = np.arange(len(self.ids))
        return (at >= self.first) & (at < len(self.ids) - 1)

    @property
    def counted(self) -> int:
        """How many positions count."""
        return len(self.ids) - 1 - self.first


@dataclass(frozen=True)
class Windows:
    """The windows of a task in order. `cut`: questions whose beginning was left out; `split`: texts in several."""

    windows: tuple[SampleWindow, ...]
    cut: int
    split: int

    @property
    def tokens(self) -> int:
        """Positions that count, of all windows."""
        return sum(window.counted for window in self.windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[SampleWindow]:
        return iter(self.windows)


def windows(task: Task, tokenizer: PreTrainedTokenizerBase, context: int | None, scope: Scope | None = None) -> Windows:
    """The samples of a task as windows of at most `context` tokens.

    scope: "text" counts every token, "answer" the answers' only; None is "answer" where the samples have answers.
    Texts longer than the context become several windows that share one token; of longer questions the beginning is
    left out. Raises DataError where an answer alone is too long, "answer" is asked of texts, nothing is left to
    predict, or the tokenizer was not made for this writing.
    """
    if scope is None:
        scope = "answer" if task.kind == "questions" else "text"
    if scope == "answer" and task.kind == "text":
        raise DataError(f"task {task.name!r} is a text without answers: count its whole text")
    if context is not None and context < 2:
        raise DataError(f"a context of {context} tokens predicts none: it must be at least 2")
    start = beginning(tokenizer)
    found, cut, split = list[SampleWindow](), 0, 0
    for number, sample in enumerate(task.samples):
        if sample.answer is None:
            pieces = list(_text_windows(sample, tokenizer, context, start, number))
            split += len(pieces) > 1
            found += pieces
        else:
            row = joined(tokenizer, sample.prompt, sample.answer, context, start)
            first = row.start - 1 if scope == "answer" else 0
            found.append(SampleWindow(tuple(row.ids), _text_bytes(tokenizer, row.ids, start), first, number))
            cut += row.cut
    if not found:
        raise DataError(
            f"the samples of task {task.name!r} are of one token each, nothing is predicted: give longer ones"
        )
    _check_writing(task, tokenizer, found)
    return Windows(tuple(found), cut, split)


def _text_windows(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, context: int | None, start: list[int], number: int
) -> Iterator[SampleWindow]:
    ids = [*start, *tokenizer(sample.prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    size = len(ids) if context is None else context
    if len(ids) < 2:
        return
    nbytes = _text_bytes(tokenizer, ids, start) if len(ids) <= size else len(sample.prompt.encode())
    for at in range(1, len(ids), size - 1):
        predicted = ids[at : at + size - 1]
        before = start or ids[at - 1 : at]
        yield SampleWindow((*before, *predicted), nbytes * len(predicted) / (len(ids) - 1), 0, number)


def _text_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: list[int]) -> float:
    """UTF-8 bytes of the predicted tokens: all but the first, which is the one that begins a text or was given."""
    text = tokenizer.decode(ids[1:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return float(len(text.encode()))


def _check_writing(task: Task, tokenizer: PreTrainedTokenizerBase, some: list[SampleWindow]) -> None:
    """DataError where most tokens are unknown or a part of a character: another writing than the tokenizer's."""
    counts = Counter(token for window in some for token in window.ids[1:])
    unknown = tokenizer.unk_token_id
    # a byte of ASCII is a character of its own, so numbers and signs never count as pieces
    bad = sum(n for token, n in counts.items() if token == unknown or "\ufffd" in str(tokenizer.decode([token])))
    share = bad / max(1, counts.total())
    if share > PIECES:
        raise DataError(
            f"{share:.0%} of the {counts.total()} tokens of task {task.name!r} are unknown to the tokenizer or only a "
            f"part of a character, as in {task.samples[0].prompt[:40]!r}: the model was not made for this writing, "
            "give samples in one that it reads"
        )
