"""Prompt templates: one record of a task's file becomes a prompt, its choices and its answer.

The training recipe and the evaluation both take them from here, so that a model is judged on the prompts it has learnt.
Knows no files and no models: how a file is read into records is in tasks.py. Choices and answers begin with the space
that follows the prompt, so that prompt + answer is the text of the document.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moedge.errors import DataError

LANGUAGES = {
    "deu": "German",
    "eng": "English",
    "fra": "French",
    "hun": "Hungarian",
    "ita": "Italian",
    "jpn": "Japanese",
    "nld": "Dutch",
    "por": "Portuguese",
    "rus": "Russian",
    "spa": "Spanish",
    "tur": "Turkish",
}
KINDS = ("novel", "play", "biomedicine", "encyclopaedia", "code", "mathematics")
SUBJECTS = (
    "Anaesthesia",
    "Anatomy",
    "Biochemistry",
    "Dental",
    "ENT",
    "Forensic Medicine",
    "Gynaecology & Obstetrics",
    "Medicine",
    "Microbiology",
    "Ophthalmology",
    "Orthopaedics",
    "Pathology",
    "Pediatrics",
    "Pharmacology",
    "Physiology",
    "Psychiatry",
    "Radiology",
    "Skin",
    "Social & Preventive Medicine",
    "Surgery",
    "Unknown",
)
LETTERS = "ABCDEFGH"
UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class Example:
    """One question. `choices` is None when the answer is written freely; `also` are further accepted answers."""

    prompt: str
    choices: tuple[str, ...] | None
    answer: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """`build` turns one record (fields named in `fields`) into an Example; DataError when a field is missing."""

    fields: tuple[str, ...]
    build: Callable[[Any], Example]

    def __call__(self, record: Any) -> Example:
        try:
            return self.build(record)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"record {str(record)[:120]!r} does not fit the template: it needs {', '.join(self.fields)} "
                f"({type(error).__name__}: {error})"
            ) from error


def _spaced(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {choice}" for choice in choices)


def _options(question: str, options: Sequence[str], gold: int) -> Example:
    """A question with its options written out; the choices are the texts of the options."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    choices = _spaced(options)
    return Example(f"Question: {question}\n{listed}\nAnswer:", choices, choices[gold])


def _sst2(record: Mapping[str, Any]) -> Example:
    choices = (" negative", " positive")
    return Example(f"Review: {record['sentence'].strip()}\nSentiment:", choices, choices[int(record["label"])])


def _qnli(record: Mapping[str, Any]) -> Example:
    prompt = f"Question: {record['question']}\nSentence: {record['sentence']}\nDoes the sentence answer the question?"
    answer = {"entailment": " yes", "not_entailment": " no"}[record["label"]]
    return Example(prompt, (" no", " yes"), answer)


def _boolq(record: Mapping[str, Any]) -> Example:
    label = str(record.get("label", record.get("answer"))).lower()
    prompt = f"Passage: {record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return Example(prompt, (" no", " yes"), {"true": " yes", "false": " no", "1": " yes", "0": " no"}[label])


def _medmcqa(record: Mapping[str, Any]) -> Example:
    options = [record[name] for name in ("opa", "opb", "opc", "opd")]
    return _options(record["question"], options, _one_based(record["cop"], 4))


def _one_based(number: Any, count: int) -> int:
    if not 1 <= int(number) <= count:
        raise ValueError(f"answer {number} is not 1 to {count}")
    return int(number) - 1


def _mmlu(row: Sequence[str]) -> Example:
    question, *options, letter = row
    return _options(question, options, LETTERS.index(letter.strip()))


def _arc(record: Mapping[str, Any]) -> Example:
    """The question and its options stand in one instruction: `... question: Q\\n\\nAnswer1: a Answer2: b ...`."""
    body = record["instruction"].split("question:", 1)[1].split("\n\nAnswer format", 1)[0]
    question, *options = re.split(r"\s*Answer\d+:\s*", body)
    return _options(question.strip(), options, _one_based(record["answer"].removeprefix("answer"), len(options)))


def _gsm8k(record: Mapping[str, Any]) -> Example:
    answer = record["answer"].rsplit("####", 1)[1].strip()
    return Example(f"Question: {record['question']}\nAnswer:", None, f" {answer}")


def _pubmedqa(record: Mapping[str, Any]) -> Example:
    prompt = f"Abstract: {' '.join(record['CONTEXTS'])}\nQuestion: {record['QUESTION']}\nAnswer:"
    choices = (" no", " maybe", " yes")
    return Example(prompt, choices, choices[choices.index(f" {record['final_decision']}")])


def _squad(record: Mapping[str, Any]) -> Example:
    prompt = f"Passage: {record['context']}\nQuestion: {record['question'].strip()}\nAnswer:"
    if record["is_impossible"]:
        return Example(prompt, None, f" {UNANSWERABLE}")
    first, *others = dict.fromkeys(answer["text"] for answer in record["answers"])
    return Example(prompt, None, f" {first}", _spaced(others))


def _language(record: Mapping[str, Any]) -> Example:
    names = _spaced(list(LANGUAGES.values()))
    return Example(f"Sentence: {record['sentence'].strip()}\nLanguage:", names, f" {LANGUAGES[record['language']]}")


def _arithmetic(record: Mapping[str, Any]) -> Example:
    a, b, sign = int(record["a"]), int(record["b"]), record["op"]
    result = {"+": a + b, "-": a - b}[sign]
    return Example(f"{a} {sign} {b} =", None, f" {result}")


def _kind(record: Mapping[str, Any]) -> Example:
    choices = _spaced(KINDS)
    return Example(f"Passage: {record['text'].strip()}\nKind:", choices, choices[KINDS.index(record["kind"])])


def _author(record: Mapping[str, Any]) -> Example:
    return Example(
        f"Passage: {record['text'].strip()}\nAuthor:", _spaced(record["authors"]), f" {record['author'].strip()}"
    )


def _subject(record: Mapping[str, Any]) -> Example:
    choices = _spaced(SUBJECTS)
    return Example(
        f"Question: {record['question']}\nSubject:", choices, choices[SUBJECTS.index(record["subject_name"])]
    )


TEMPLATES: dict[str, Template] = {
    "sst2": Template(("sentence", "label"), _sst2),
    "qnli": Template(("question", "sentence", "label"), _qnli),
    "boolq": Template(("passage", "question", "label"), _boolq),
    "medmcqa": Template(("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa),
    "mmlu": Template(("a CSV row: question", "options", "letter of the answer"), _mmlu),
    "arc-easy": Template(("instruction", "answer"), _arc),
    "arc-challenge": Template(("instruction", "answer"), _arc),
    "gsm8k": Template(("question", "answer"), _gsm8k),
    "pubmedqa": Template(("QUESTION", "CONTEXTS", "final_decision"), _pubmedqa),
    "squad_v2": Template(("context", "question", "answers", "is_impossible"), _squad),
    "language": Template(("sentence", "language"), _language),
    "arithmetic": Template(("a", "b", "op"), _arithmetic),
    "kind": Template(("text", "kind"), _kind),
    "author": Template(("text", "author", "authors"), _author),
    "medmcqa-subject": Template(("question", "subject_name"), _subject),
}
