"""Tasks: the likelihood of choices against naive scoring, free answers, templates, record files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_lm import FakeLM, tiny_lm, with_bos

from moedge.errors import DataError
from moedge.measure import tasks
from moedge.measure.records import read_records
from moedge.measure.tasks import MATCHES, Judge, Verdict, example_of, normalised, word_overlap
from moedge.measure.templates import TEMPLATES, Example
from moedge.runtime.generate import generate

PROMPT = "Review: the sea was calm and the old man slept\nSentiment:"
CHOICES = (" negative", " positive", " calm", " the old man slept here", " the old moon")


def naive(lm: FakeLM, prompt: str, choices: tuple[str, ...], start: list[int] | None = None) -> list[float]:
    """Mean log-likelihood of each choice's tokens, every sequence run by itself."""
    scores = []
    for choice in choices:
        before = (start or []) + lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = (start or []) + lm.tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logs = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        of_choice = [float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids))]
        scores.append(sum(of_choice) / len(of_choice))
    return scores


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "jamba"])
@pytest.mark.parametrize("chunk", [4, 512])
def test_scores_are_those_of_each_sequence_by_itself(architecture: str, chunk: int) -> None:
    lm = tiny_lm(architecture)
    lm.prefill_chunk = chunk
    judge = Judge(lm, "any")
    rows = [judge._joined(PROMPT, choice) for choice in CHOICES]
    assert judge._scores(rows) == pytest.approx(naive(lm, PROMPT, CHOICES), abs=1e-4)
    assert judge._scores(rows[:2]) == pytest.approx(naive(lm, PROMPT, CHOICES[:2]), abs=1e-4)  # from the cache


def test_the_answer_is_the_likeliest_choice() -> None:
    lm = tiny_lm()
    scores = naive(lm, PROMPT, CHOICES)
    best = CHOICES[scores.index(max(scores))]
    right, wrong = (ask(lm, Example(PROMPT, CHOICES, answer)) for answer in (best, " other"))
    assert (right.correct, right.given, right.expected) == (True, best.strip(), best.strip())
    assert not wrong.correct


def ask(lm: FakeLM, example: Example, task: str = "any") -> Verdict:
    (verdict,) = Judge(lm, task).verdicts([example])
    return verdict


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "jamba"])
@pytest.mark.parametrize("chunk", [20, 90, 100000])
def test_questions_together_are_judged_as_alone(architecture: str, chunk: int) -> None:
    lm = tiny_lm(architecture)
    prompts = [PROMPT, "sea", "Hello world, hello moon: " * 3, "12 + 7 =", "The"]
    examples = [Example(prompt, CHOICES[at:], CHOICES[-1]) for at, prompt in enumerate(prompts[:4])]
    examples.insert(2, Example(prompts[4], None, " x"))
    expected = []
    for example in examples:
        if example.choices is None:
            expected.append(_line(lm, example.prompt, example.answer))
        else:
            scores = naive(lm, example.prompt, example.choices)
            expected.append(example.choices[scores.index(max(scores))].strip())
    lm.prefill_chunk = chunk
    assert [verdict.given for verdict in Judge(lm, "any").verdicts(examples)] == expected


def test_scores_together_are_those_alone() -> None:
    lm = tiny_lm()
    judge, seen = Judge(lm, "any"), []
    examples = [Example(prompt, CHOICES, CHOICES[0]) for prompt in (PROMPT, "sea", "12 + 7 =")]
    questions = [(example, [judge._joined(example.prompt, choice) for choice in CHOICES]) for example in examples]
    original = tasks._chosen

    def record(example: Example, rows: Any, scores: Any) -> Verdict:
        seen.append(scores)
        return original(example, rows, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_chosen", record)
        list(judge._together(questions))
    for example, scores in zip(examples, seen, strict=True):
        assert scores == pytest.approx(naive(lm, example.prompt, CHOICES), abs=1e-4)


def test_passes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    bytes_ = tuple(lm.tokenizer.convert_ids_to_tokens([40, 41, 42]))
    shapes: list[tuple[int, ...]] = []

    def record(_: Any, __: Any, given: dict[str, Any]) -> None:
        shapes.append(tuple(given["input_ids"].shape))

    lm.model.model.register_forward_pre_hook(record, with_kwargs=True)
    size = len(lm.tokenizer("The sea")["input_ids"])
    one = Example("The sea", bytes_, bytes_[0])
    list(Judge(lm, "any").verdicts([one]))
    assert shapes == [(1, size)]  # choices of one token share their prompt
    shapes.clear()
    two = Example("The moon", bytes_, bytes_[0])
    list(Judge(lm, "any").verdicts([one, two, one]))
    assert len(shapes) == 1
    assert shapes[0][0] == 2  # the same question twice is run once
    shapes.clear()
    lm.prefill_chunk = size
    list(Judge(lm, "any").verdicts([Example("The sea", CHOICES, CHOICES[0])]))
    assert len(shapes) > len(CHOICES)  # too much for one pass: one choice after the other, from the kept prompt
    assert max(rows for rows, _ in shapes) == 1


def test_a_prompt_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing comes before it"):
        ask(tiny_lm(), Example("", ("a",), "a"))


def test_bos_comes_before_the_prompt_where_the_tokenizer_puts_it() -> None:
    lm = with_bos(tiny_lm())
    judge = Judge(lm, "any")
    rows = [judge._joined(PROMPT, choice) for choice in CHOICES]
    assert all(row.ids[0] == 1 for row in rows)
    assert judge._scores(rows) == pytest.approx(naive(lm, PROMPT, CHOICES, [1]), abs=1e-4)


def test_a_choice_that_merges_with_the_prompt_is_scored_from_where_they_part() -> None:
    lm = tiny_lm()
    judge = Judge(lm, "any")
    assert len(lm.tokenizer(" the")["input_ids"]) == 1
    row = judge._joined("calm t", "he")
    assert row.ids == lm.tokenizer("calm the")["input_ids"]
    assert row.start == len(row.ids) - 1


def test_a_prompt_too_long_loses_its_beginning_and_that_is_said() -> None:
    lm = with_bos(tiny_lm())
    lm.context = 24
    verdict = ask(lm, Example(PROMPT * 3, CHOICES[:2], " positive"))
    assert verdict.cut
    row = Judge(lm, "any")._joined(PROMPT * 3, " positive")
    full = [1, *lm.tokenizer(PROMPT * 3 + " positive", add_special_tokens=False)["input_ids"]]
    assert row.ids == [1, *full[-23:]]
    assert row.ids[row.start :] == lm.tokenizer(" positive", add_special_tokens=False)["input_ids"]
    written = ask(lm, Example(PROMPT * 3, None, " a"))
    assert written.cut
    assert not ask(lm, Example("sea", (" a", " b"), " a")).cut


@pytest.mark.parametrize("choices", [(" " + "longer than the context " * 5,), None])
def test_an_answer_longer_than_the_context_is_an_error(choices: tuple[str, ...] | None) -> None:
    lm = tiny_lm()
    lm.context = 16
    with pytest.raises(DataError, match="longer than the context of 16 tokens"):
        ask(lm, Example("sea", choices, " longer than the context" * 5))


def test_an_encoder_decoder_chooses_too() -> None:
    lm = tiny_lm("switch_transformers")
    scores = Judge(lm, "any")._decoder_scores(PROMPT, CHOICES)
    prompt = torch.tensor([lm.tokenizer(PROMPT)["input_ids"]])
    for choice, score in zip(CHOICES, scores, strict=True):
        ids = lm.tokenizer(choice.strip())["input_ids"]
        with torch.inference_mode():
            logs = lm.model(prompt, decoder_input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0].log_softmax(-1)
        assert score == pytest.approx(float(logs[range(len(ids)), ids].mean()), abs=1e-4)
    assert ask(lm, Example(PROMPT, CHOICES, CHOICES[scores.index(max(scores))])).correct
    assert ask(lm, Example(PROMPT, None, " x")).given == _line(lm, PROMPT, " x")


def _line(lm: FakeLM, prompt: str, answer: str) -> str:
    room = 2 * len(lm.tokenizer(answer)["input_ids"]) + 4
    return "".join(step.text for step in generate(lm, prompt, room, stop="\n")).strip()


def test_a_free_answer_is_what_the_model_writes_up_to_the_lines_end() -> None:
    lm = tiny_lm()
    lm.model.generation_config.eos_token_id = list(generate(lm, PROMPT, 5))[4].token
    expected = _line(lm, PROMPT, " anything")
    assert expected
    verdict = ask(lm, Example(PROMPT, None, " anything", (f" {expected}",)))
    assert (verdict.correct, verdict.given) == (True, expected)
    assert verdict.overlap is None
    assert not ask(lm, Example(PROMPT, None, " anything")).correct


def test_squad_has_its_normal_form_and_word_overlap() -> None:
    assert normalised(" The  old-man, a Sea!") == "oldman sea"
    assert MATCHES["squad_v2"]("The sea.", " sea")
    assert not MATCHES["squad_v2"]("calm sea", " sea")
    assert word_overlap("the calm sea", "calm old sea") == pytest.approx(0.8)
    assert word_overlap("", "the") == 1.0
    assert word_overlap("", "sea") == 0.0
    verdict = ask(tiny_lm(), Example(PROMPT, None, " sea", (" the sea",)), "squad_v2")
    assert verdict.overlap is not None


@pytest.mark.parametrize(
    ("given", "right"),
    [(" 18", True), ("18.0", True), ("3 + 15 = 18.", True), (" 1,8", True), ("18 of 20", False), ("none", False)],
)
def test_gsm8k_compares_numbers(given: str, right: bool) -> None:
    assert MATCHES["gsm8k"](given, " 18") == right


RECORDS: dict[str, Any] = {
    "sst2": {"sentence": "well-conceived", "label": 1},
    "qnli": {"question": "Who?", "sentence": "He.", "label": "entailment"},
    "boolq": {"question": "is it", "passage": "It is.", "label": "true"},
    "medmcqa": {"question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3},
    "mmlu": ["Q", "one", "two", "three", "four", "B"],
    "arc-easy": {"instruction": "x question: Q?\n\nAnswer1: a b Answer2: c\n\nAnswer format: y", "answer": "answer2"},
    "arc-challenge": {"instruction": "question: Q?\n\nAnswer1: a Answer2: c\n\nAnswer format", "answer": "answer1"},
    "gsm8k": {"question": "Q", "answer": "Long.\n#### 18"},
    "pubmedqa": {"QUESTION": "Q", "CONTEXTS": ["a", "b"], "final_decision": "maybe"},
    "squad_v2": {"context": "C", "question": "Q", "answers": [{"text": "x"}], "is_impossible": False},
}
ANSWERS = [" positive", " yes", " yes", " c", " two", " c", " a", " 18", " maybe", " x"]


@pytest.mark.parametrize(("task", "answer"), list(zip(RECORDS, ANSWERS, strict=True)))
def test_the_sets_have_templates(task: str, answer: str) -> None:
    example = example_of(task, RECORDS[task])
    assert example == TEMPLATES[task](RECORDS[task])
    assert example.answer == answer
    assert example.choices is None or answer in example.choices


@pytest.mark.parametrize("task", RECORDS)
def test_a_record_of_another_task_is_an_error(task: str) -> None:
    with pytest.raises(DataError, match="does not fit the template: it needs"):
        example_of(task, {"nothing": 1})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a:", "choices": ["x", "y"], "answer": "y"}, Example("a:", (" x", " y"), " y")),
        ({"prompt": "a:", "choices": ["x", "y"], "answer": 1}, Example("a:", (" x", " y"), " y")),
        ({"prompt": "a:", "choices": [" x", " y"], "answer": "x"}, Example("a:", (" x", " y"), " x")),
        ({"prompt": "a: ", "choices": ["x", "y"], "answer": "x"}, Example("a: ", ("x", "y"), "x")),
        ({"prompt": "a:", "choices": [3, 1], "answer": 1}, Example("a:", (" 3", " 1"), " 1")),
        ({"prompt": "a:", "answer": "free"}, Example("a:", None, " free")),
        ({"prompt": "a\n", "choices": [], "answer": 7}, Example("a\n", None, "7")),
    ],
)
def test_other_tasks_bring_their_prompts(record: Any, expected: Example) -> None:
    assert example_of("mine", record) == expected


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"choices": ["x"], "answer": "x"}, "its records need prompt and answer"),
        (["a", "b"], "its records need prompt and answer"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "answer 2 is not the number of one of 2"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "z"}, "answer 'z' is none of the choices"),
    ],
)
def test_a_record_that_cannot_be_judged_is_an_error(record: Any, part: str) -> None:
    with pytest.raises(DataError, match=part):
        example_of("mine", record)


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_record_files(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"x": 1}\n\n{"x": 2}\n{"x": 3}')
    assert read_records(lines) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert read_records(lines, 2) == [{"x": 1}, {"x": 2}]
    assert read_records(write(tmp_path / "list.json", [1, 2])) == [1, 2]
    assert read_records(write(tmp_path / "ids.json", {"17": {"x": 1}, "9": {"x": 2}})) == [{"x": 1}, {"x": 2}]
    folder = tmp_path / "csv"
    folder.mkdir()
    write(folder / "b.csv", 'q2,1,2,"3, 4",4,B\n')
    write(folder / "a.csv", '"q ""1"" x",1,2,3,4,A\n')
    assert read_records(folder) == [['q "1" x', "1", "2", "3", "4", "A"], ["q2", "1", "2", "3, 4", "4", "B"]]
    assert len(read_records(folder / "a.csv")) == 1
    question = {"question": "Q", "answers": [], "id": "7"}
    questions = [question | {"is_impossible": True}, question]
    squad = {"version": "v2.0", "data": [{"paragraphs": [{"context": "C", "qas": questions}]}]}
    first, second = read_records(write(tmp_path / "squad.json", squad))
    assert (first["context"], first["is_impossible"], second["is_impossible"]) == ("C", True, False)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.jsonl", '{"x": 1}\n{oops}', r"a.jsonl:2 is not JSON \(.*one record a line"),
        ("a.json", "{oops}", "a.json cannot be read"),
        ("a.json", "7", "a.json is neither a list"),
        ("a.json", '{"data": [{"title": "x"}]}', "not in SQuAD's format: KeyError 'paragraphs'"),
        ("a.jsonl", "\n", "a.jsonl has no records"),
        ("a.jsonl", b"\xff", "a.jsonl cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: Any, part: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=part):
        read_records(tmp_path / name)


def test_a_folder_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without CSV files"):
        read_records(tmp_path)
