"""Every template on one record of its file's format."""

from typing import Any

import pytest

from moedge.errors import DataError
from moedge.measure.templates import TEMPLATES

RECORDS: dict[str, tuple[Any, str, tuple[str, ...] | None, str]] = {
    "sst2": (
        {"sentence": "a fine film ", "label": 1},
        "Review: a fine film\nSentiment:",
        (" negative", " positive"),
        " positive",
    ),
    "qnli": (
        {"question": "Who?", "sentence": "He did.", "label": "not_entailment"},
        "Question: Who?\nSentence: He did.\nDoes the sentence answer the question?",
        (" no", " yes"),
        " no",
    ),
    "boolq": (
        {"passage": "It is.", "question": "is it", "idx": 1, "label": "true"},
        "Passage: It is.\nQuestion: is it?\nAnswer:",
        (" no", " yes"),
        " yes",
    ),
    "medmcqa": (
        {"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "subject_name": "Skin"},
        "Question: Q\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        (" w", " x", " y", " z"),
        " x",
    ),
    "mmlu": (
        ["Q", "w", "x", "y", "z", "D"],
        "Question: Q\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        (" w", " x", " y", " z"),
        " z",
    ),
    "arc-easy": (
        {
            "instruction": "Please choose the correct answer to the question: Why?\n\nAnswer1: a b Answer2: c\n\n"
            "Answer format: answer1/answer2",
            "answer": "answer1",
        },
        "Question: Why?\nA. a b\nB. c\nAnswer:",
        (" a b", " c"),
        " a b",
    ),
    "gsm8k": ({"question": "Q", "answer": "1+1=2\n#### 2"}, "Question: Q\nAnswer:", None, " 2"),
    "pubmedqa": (
        {"QUESTION": "Q", "CONTEXTS": ["A.", "B."], "final_decision": "maybe"},
        "Abstract: A. B.\nQuestion: Q\nAnswer:",
        (" no", " maybe", " yes"),
        " maybe",
    ),
    "squad_v2": (
        {"context": "C", "question": "Q ", "answers": [{"text": "a"}, {"text": "a"}], "is_impossible": False},
        "Passage: C\nQuestion: Q\nAnswer:",
        None,
        " a",
    ),
    "arithmetic": ({"a": 12, "b": 40, "op": "-"}, "12 - 40 =", None, " -28"),
    "author": (
        {"text": "T", "author": "Hardy", "authors": ["Dickens", "Hardy"]},
        "Passage: T\nAuthor:",
        (" Dickens", " Hardy"),
        " Hardy",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_prompt_choices_and_answer(name: str) -> None:
    record, prompt, choices, answer = RECORDS[name]
    example = TEMPLATES[name](record)
    assert (example.prompt, example.choices, example.answer) == (prompt, choices, answer)


@pytest.mark.parametrize(
    ("name", "record", "answer"),
    [
        ("language", {"sentence": "Ja.", "language": "deu"}, " German"),
        ("kind", {"text": "x = 1", "kind": "code"}, " code"),
        ("medmcqa-subject", {"question": "Q", "subject_name": "Skin"}, " Skin"),
    ],
)
def test_the_answer_is_one_of_the_choices(name: str, record: dict[str, str], answer: str) -> None:
    example = TEMPLATES[name](record)
    assert example.answer == answer
    assert example.choices is not None
    assert answer in example.choices


def test_an_unanswerable_question_says_so_and_other_answers_are_accepted() -> None:
    record = {"context": "C", "question": "Q", "answers": [{"text": "a"}, {"text": "b"}], "is_impossible": False}
    assert TEMPLATES["squad_v2"](record).also == (" b",)
    assert TEMPLATES["squad_v2"](record | {"is_impossible": True}).answer == " unanswerable"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("sst2", {"sentence": "no label"}),
        ("medmcqa", {"question": "Q", "opa": "", "opb": "", "opc": "", "opd": "", "cop": 0}),
        ("qnli", {"question": "Q", "sentence": "S", "label": "perhaps"}),
        ("mmlu", []),
    ],
)
def test_a_record_that_does_not_fit_names_what_is_needed(name: str, record: Any) -> None:
    with pytest.raises(DataError, match="does not fit the template: it needs"):
        TEMPLATES[name](record)
