"""Judging a model on questions: by the likelihood of choices, or by what it writes. Prompts are in templates.py.

With choices, the one whose tokens have the highest mean log-likelihood after the prompt is the model's answer. Without
choices the model writes greedily up to a line's end, and that must be the answer exactly (SQuAD: in its official normal
form; GSM8K: as a number). Knows no files: see records.py. Letters: t positions, V vocabulary.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moedge.errors import DataError
from moedge.measure.quality import beginning, target_logprobs
from moedge.measure.templates import TEMPLATES, Example
from moedge.runtime.forward import logits_at
from moedge.runtime.generate import generate, logits_in_chunks
from moedge.runtime.session import EncodedSession, Model, Session, check_ids, context_of


@dataclass(frozen=True)
class Verdict:
    """One judged question. `overlap`: F1 of words, where the task has it. `cut`: the prompt lost its beginning."""

    correct: bool
    given: str
    expected: str
    overlap: float | None = None
    cut: bool = False


@dataclass(frozen=True)
class Row:
    """Ids of prompt + choice as one text, and where the choice begins in them. `cut`: the prompt lost its beginning."""

    ids: list[int]
    start: int
    cut: bool = False


def _size(rows: Sequence[Row]) -> int:
    """Tokens of a pass over all rows, filled up to the longest; rows equal up to the last token count once."""
    contexts = {tuple(row.ids[:-1]) for row in rows}
    return len(contexts) * max(map(len, contexts))


def _chosen(example: Example, rows: Sequence[Row], scores: Sequence[float]) -> Verdict:
    choices = example.choices or ()
    given = choices[max(range(len(choices)), key=scores.__getitem__)]
    cut = any(row.cut for row in rows)
    return Verdict(given == example.answer, given.strip(), example.answer.strip(), cut=cut)


class Judge:
    """Asks one model the questions of one task. Holds a cache from question to question."""

    def __init__(self, lm: Model, task: str) -> None:
        self._lm = lm
        self._match = MATCHES.get(task, _exact)
        self._overlap = task in OVERLAP
        self._encoded = bool(lm.model.config.is_encoder_decoder)
        self._session = None if self._encoded else Session(lm)
        self._start = [] if self._encoded else beginning(lm.tokenizer)

    def verdicts(self, examples: Iterable[Example]) -> Iterator[Verdict]:
        """The model's answer to each question, in order, and whether it is right.

        Questions whose choices fit into one pass of the prefill chunk's tokens share it with their neighbours.
        """
        room = min(self._lm.prefill_chunk, context_of(self._lm) or self._lm.prefill_chunk)
        waiting: list[tuple[Example, list[Row]]] = []
        for example in examples:
            rows = [] if self._encoded else [self._joined(example.prompt, choice) for choice in example.choices or ()]
            if not rows or _size(rows) > room:
                yield from self._together(waiting)
                waiting = []
                yield self._alone(example, rows)
                continue
            if _size([*(row for _, others in waiting for row in others), *rows]) > room:
                yield from self._together(waiting)
                waiting = []
            waiting.append((example, rows))
        yield from self._together(waiting)

    def _alone(self, example: Example, rows: Sequence[Row]) -> Verdict:
        if rows:
            return _chosen(example, rows, self._scores(rows))
        if example.choices:
            return _chosen(example, rows, self._decoder_scores(example.prompt, example.choices))
        return self._write(example)

    @torch.inference_mode()
    def _together(self, questions: Sequence[tuple[Example, list[Row]]]) -> Iterator[Verdict]:
        """All choices of several questions in one pass."""
        rows = [row for _, some in questions for row in some]
        if not rows:
            return
        contexts = {context: number for number, context in enumerate(dict.fromkeys(tuple(r.ids[:-1]) for r in rows))}
        places = [(contexts[tuple(row.ids[:-1])], at) for row in rows for at in range(row.start - 1, len(row.ids) - 1)]
        targets = torch.tensor([token for row in rows for token in row.ids[row.start :]])
        found, at = [], 0
        for piece in logits_at(self._lm.model, list(contexts), places):  # [t, V]
            found.append(target_logprobs(piece, targets[at : at + len(piece)]).cpu())
            at += len(piece)
        logprobs = iter(torch.cat(found).tolist())
        means = iter([sum(next(logprobs) for _ in row.ids[row.start :]) / (len(row.ids) - row.start) for row in rows])
        for example, some in questions:
            yield _chosen(example, some, [next(means) for _ in some])

    def _joined(self, prompt: str, choice: str) -> Row:
        row = joined(self._lm.tokenizer, prompt, choice, context_of(self._lm), self._start)
        check_ids(self._lm, row.ids)
        return row

    def _ids(self, text: str) -> list[int]:
        return self._start + list(self._lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _scores(self, rows: Sequence[Row]) -> list[float]:
        """Mean log-likelihood of each row's choice; what rows have in common is computed once and kept."""
        sums = [0.0] * len(rows)
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            shared.setdefault(tuple(row.ids[:-1]), []).append(number)
        for context, numbers in shared.items():
            at = min(rows[number].start for number in numbers) - 1
            for piece in logits_in_chunks(self._lm, context, at, self._session):  # [t, V], of positions `at` on
                for number in numbers:
                    skip = max(0, rows[number].start - 1 - at)
                    targets = torch.tensor(rows[number].ids[at + skip + 1 : at + len(piece) + 1])
                    sums[number] += float(target_logprobs(piece[skip:], targets).double().sum())
                at += len(piece)
        return [total / (len(row.ids) - row.start) for total, row in zip(sums, rows, strict=True)]

    @torch.inference_mode()
    def _decoder_scores(self, prompt: str, choices: Sequence[str]) -> list[float]:
        """As `_scores`, of an encoder-decoder: the prompt is encoded, the choice decoded."""
        prompt_ids = list(self._lm.tokenizer(prompt, verbose=False)["input_ids"])
        scores = []
        for choice in choices:
            ids = list(self._lm.tokenizer(choice.strip(), add_special_tokens=False, verbose=False)["input_ids"])
            session = EncodedSession(self._lm)
            logits: list[Tensor] = [session.begin(prompt_ids)]
            logits += [session.push(token) for token in ids[:-1]]
            scores.append(float(target_logprobs(torch.stack(logits), torch.tensor(ids)).mean()))
        return scores

    def _write(self, example: Example) -> Verdict:
        accepted = (example.answer, *example.also)
        longest = max(len(self._ids(answer)) for answer in accepted)
        ids, cut, room = self._ids(example.prompt), False, 2 * longest + 4
        context = context_of(self._lm)
        if self._encoded:
            ids = list(self._lm.tokenizer(example.prompt, verbose=False)["input_ids"])
        elif context is not None and len(ids) + room > context:
            keep = len(self._start)
            if room + keep >= context:
                raise DataError(f"the answer {example.answer[:60]!r} is longer than the context of {context} tokens")
            ids, cut = ids[:keep] + ids[len(ids) + room + keep - context :], True
        steps = generate(self._lm, ids, room, session=self._session, stop="\n")
        given = "".join(step.text for step in steps)
        overlap = max(word_overlap(given, answer) for answer in accepted) if self._overlap else None
        correct = any(self._match(given, answer) for answer in accepted)
        return Verdict(correct, given.strip(), example.answer.strip(), overlap, cut)


def joined(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    choice: str,
    context: int | None,
    start: Sequence[int],
) -> Row:
    """Prompt and choice as one text of at most `context` tokens; `start`: ids that begin any text.

    Of a longer one the prompt loses its beginning. Raises DataError where even the choice is too long.
    """
    before, ids = (
        [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        for text in (prompt, prompt + choice)
    )
    at = next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    if len(ids) < 2:
        raise DataError(f"the choice {choice[:60]!r} is one token and nothing comes before it: give a prompt")
    at = max(1, min(at, len(ids) - 1))
    over = 0 if context is None else len(ids) - context
    if over <= 0:
        return Row(ids, at)
    keep = len(start)
    if at - over <= keep:
        raise DataError(
            f"the choice {choice[:60]!r} alone is longer than the context of {context} tokens: shorten it, or leave it "
            "out"
        )
    return Row(ids[:keep] + ids[keep + over :], at - over, cut=True)


def example_of(task: str, record: Any) -> Example:
    """The question that a record of `task` asks: by the task's template, else the record's own prompt and answer.

    Of other tasks a record is {prompt, choices, answer}: the answer one of the choices, or its number from 0; without
    choices a text. A space is put between prompt and choice where neither has one.
    """
    if task in TEMPLATES:
        return TEMPLATES[task](record)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or "answer" not in record:
        raise DataError(
            f"task {task!r} has no template ({', '.join(TEMPLATES)} have), so its records need prompt and answer, and "
            f"choices where there are any: {str(record)[:120]!r}"
        )
    prompt, answer, choices = record["prompt"], record["answer"], record.get("choices")
    if not choices:
        return Example(prompt, None, _spaced(prompt, str(answer)))
    choices = [str(choice) for choice in choices]
    if isinstance(answer, int) and not isinstance(answer, bool) and str(answer) not in choices:
        if not 0 <= answer < len(choices):
            raise DataError(f"answer {answer} is not the number of one of {len(choices)} choices: {prompt[:80]!r}")
        answer = choices[answer]
    stripped = [choice.strip() for choice in choices]
    if str(answer).strip() not in stripped:
        raise DataError(f"answer {str(answer)[:60]!r} is none of the choices {stripped}: {prompt[:80]!r}")
    spaced = tuple(_spaced(prompt, choice) for choice in choices)
    return Example(prompt, spaced, spaced[stripped.index(str(answer).strip())])


def _spaced(prompt: str, text: str) -> str:
    return text if not prompt or prompt[-1].isspace() or text[:1].isspace() else f" {text}"


def _exact(given: str, answer: str) -> bool:
    return given.strip() == answer.strip()


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _normally_equal(given: str, answer: str) -> bool:
    return normalised(given) == normalised(answer)


def word_overlap(given: str, answer: str) -> float:
    """SQuAD's F1 of words in normal form; of nothing with nothing 1."""
    ours, theirs = normalised(given).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def _same_number(given: str, answer: str) -> bool:
    """The last number of what was written, thousands separators aside."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", given)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer.strip().replace(",", ""))


MATCHES: dict[str, Callable[[str, str], bool]] = {"squad_v2": _normally_equal, "gsm8k": _same_number}
OVERLAP = ("squad_v2",)
