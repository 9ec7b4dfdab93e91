"""Samples: forms of files, disjoint parts, windows whose counting positions predict what matters, bad input."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fake_lm import tiny_lm, tokenizer, with_bos

from moedge.compress.samples import Sample, Task, parse_spec, read_task, windows
from moedge.errors import DataError

SST2 = [{"sentence": f"a film number {n}", "label": n % 2} for n in range(10)]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def texts(count: int) -> Task:
    return Task("words", tuple(Sample(f"The old man number {n} slept.") for n in range(count)), "text")


def test_a_template_is_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", SST2)
    task = read_task(f"sst2={path}")
    assert (task.name, task.kind, task.template, len(task)) == ("sst2", "questions", "sst2", 10)
    first = task.samples[0]
    assert first.text == "Review: a film number 0\nSentiment: negative"
    assert first.example.choices == (" negative", " positive")
    assert read_task(path, name="sst2") == task
    with pytest.raises(DataError, match=r"write sst2=FILE"):
        read_task(path)


def test_fields_decide_otherwise(tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "1 + 1 =", "answer": 2}, {"prompt": "b", "answer": " c"}])
    task = read_task(f"sums={asked}")
    assert (task.name, task.kind, task.template) == ("sums", "questions", "")
    assert [sample.text for sample in task.samples] == ["1 + 1 = 2", "b c"]
    told = tmp_path / "told.json"
    told.write_text(json.dumps([{"text": "one"}, {"text": " "}, {"text": "two"}, "three"]))
    task = read_task(told)
    assert (task.name, task.kind, task.skipped) == ("told", "text", 1)
    assert [sample.prompt for sample in task.samples] == ["one", "two", "three"]
    with pytest.raises(DataError, match="passage of text is no question"):
        _ = task.samples[0].example


def test_a_csv_with_a_header_has_fields_and_one_without_is_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,choices,answer\nIs it?,yes|no,no\n")
    assert read_task(path).samples[0].example.choices == (" yes", " no")
    path.write_text("label,sentence\n1,good\n")
    assert read_task(f"sst2={path}").samples[0].answer == " positive"
    path.write_text("What is it?,one,two,three,four,B\n")
    assert read_task(f"mmlu={path}").samples[0].answer == " two"
    with pytest.raises(DataError, match=r"record 1: .* name the template, as in mmlu=FILE"):
        read_task(path)
    path.write_text("text,more\nhello\n")
    with pytest.raises(DataError, match="row 2 has 1 cells, the header 2"):
        read_task(path)
    path.write_text("text\n")
    with pytest.raises(DataError, match="a header and no rows"):
        read_task(path)


def test_a_name_is_what_stands_before_the_first_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_spec("sst2=a=b.txt") == ("sst2", Path("a=b.txt"))
    Path("a=b.txt").write_text("x")
    assert parse_spec("a=b.txt") == (None, Path("a=b.txt"))


def test_a_text_is_cut_into_passages_that_end_with_lines(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    lines = [f"Line {n} of a tale that goes on and on for a while.\n" for n in range(3000)]
    path.write_text("".join(lines))
    task = read_task(path)
    assert "".join(sample.prompt for sample in task.samples) == "".join(lines)
    assert all(sample.prompt.endswith("\n") and len(sample.prompt) < 2100 for sample in task.samples)
    long = " ".join(map(str, range(3000)))  # no line ends at all
    path.write_text(long)
    task = read_task(path)
    assert len(task) > 20
    assert "".join(sample.prompt for sample in task.samples) == long


def test_a_repeated_line_is_read_once_so_that_no_text_is_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "twice.txt"
    half = "".join(f"Line {n} of a tale that goes on and on for a while.\n" for n in range(200)) + "The end\n"
    path.write_text(half + half.upper())
    task = read_task(path)
    assert task.skipped == 200
    assert "".join(sample.prompt for sample in task.samples) == half + "THE END\n"


def test_parts_are_disjoint_and_only_content_decides() -> None:
    samples = [Sample(f"question {n}", f" {n}") for n in range(40)] + [Sample("QUESTION  3", " 4")]
    fit, test = Task("t", tuple(samples), "questions").split(seed=1)
    assert len(test) + len(fit) == 41
    assert {s.key for s in fit.samples}.isdisjoint({s.key for s in test.samples})
    assert len({s.key for s in test.samples}) == 8
    random.Random(0).shuffle(samples)
    shuffled = Task("t", tuple(samples), "questions")
    assert shuffled.split(seed=1) == (fit, test)
    assert shuffled.split(seed=2) != (fit, test)
    assert shuffled.split(seed=1, fit_limit=5, test_limit=3) == (fit.take(0, 5), test.take(0, 3))
    draws = [fit.take(first, first + 10) for first in (0, 10, 20)]
    assert len({s.key for draw in draws for s in draw.samples}) >= 29
    with pytest.raises(DataError, match="none from number 100 on"):
        fit.take(100)


def test_a_fingerprint_knows_every_sample() -> None:
    task = texts(4)
    assert task.fingerprint == texts(4).fingerprint
    assert len({task.fingerprint, texts(5).fingerprint, task.take(1).fingerprint}) == 3


def test_at_least_one_sample_on_each_side() -> None:
    for share in (0.01, 0.99):
        fit, test = texts(2).split(test_share=share)
        assert (len(fit), len(test)) == (1, 1)
    with pytest.raises(DataError, match="has 1 different sample"):
        Task("t", (Sample("same"), Sample(" SAME ")), "text").split()
    with pytest.raises(ValueError, match="test_share 1"):
        texts(2).split(test_share=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: write samples"),
        (b" \n\n", "no records|no usable samples"),
        (b"\xff\xfe\x00b", "UTF-8|utf-8"),
        (b'{"text": "a"}\n{"text": ', ":2 is not JSON"),
        (b'{"text": ""}', "no usable samples"),
        (b'{"question": "a"}', 'record 1: records need "text", or "prompt" and "answer"'),
        (b'{"text": "a"}\n{"prompt": "b", "answer": "c"}', "1 texts and 1 questions"),
        (b'{"prompt": "b", "answer": "c", "choices": ["d"]}', r"record 1: answer 'c' is none of"),
        (b"[1, 2]", "record 1: records need"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.txt"])
def test_bad_files_are_errors_that_name_them(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if name.endswith(".txt") and content.strip() and content[0] < 128:
        assert read_task(path).kind == "text"  # anything in UTF-8 is a text
        return
    with pytest.raises(DataError, match=message) as caught:
        read_task(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_zero_bytes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_task(f"sst2={tmp_path / 'none.jsonl'}")
    (tmp_path / "binary").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="zero bytes"):
        read_task(tmp_path / "binary")


def test_positions_that_count_predict_the_answer() -> None:
    words = tokenizer()
    task = Task("t", (Sample("12 + 7 =", " 19"), Sample("Hello", " moon")), "questions")
    for window, sample in zip(windows(task, words, 64), task.samples, strict=True):
        counted = [window.ids[at + 1] for at in window.mask.nonzero()[0]]
        assert words.decode(counted) == sample.answer
        assert window.counted == len(counted)
        assert words.decode(list(window.ids)) == sample.text
        assert window.nbytes == len(words.decode(list(window.ids[1:])))
    whole = windows(task, words, 64, "text")
    assert whole.tokens == sum(len(window.ids) - 1 for window in whole)
    assert (whole.cut, whole.split) == (0, 0)


def test_a_text_longer_than_the_context_becomes_several_windows() -> None:
    words = tokenizer()
    task = Task("t", (Sample("The sea was calm and the old man slept. " * 9), Sample("Größe")), "text")
    found = windows(task, words, 16)
    assert found.split == 1
    assert max(len(window.ids) for window in found) == 16
    first = [window for window in found if window.sample == 0]
    ids = list(first[0].ids[:1]) + [token for window in first for token in window.ids[1:]]
    assert words.decode(ids) == task.samples[0].prompt
    everything = sum(len(sample.prompt.encode()) for sample in task.samples)
    assert everything - 8 < sum(window.nbytes for window in found) < everything
    with_start = windows(task, with_bos(tiny_lm()).tokenizer, 16)
    assert all(window.ids[0] == 1 for window in with_start)


def test_a_question_longer_than_the_context_loses_its_beginning() -> None:
    words = tokenizer()
    task = Task("t", (Sample("The sea was calm and the old man slept. " * 9 + "12 + 7 =", " 19"),), "questions")
    found = windows(task, words, 16)
    (window,) = found
    assert (found.cut, len(window.ids)) == (1, 16)
    assert words.decode(list(window.ids)).endswith("12 + 7 = 19")
    assert words.decode([window.ids[at + 1] for at in window.mask.nonzero()[0]]) == " 19"
    with pytest.raises(DataError, match="alone is longer than the context of 4 tokens"):
        windows(Task("t", (Sample("a", " " + "calm " * 9),), "questions"), words, 4)


def test_windows_of_nothing_or_of_another_writing_are_errors() -> None:
    words = tokenizer()
    with pytest.raises(DataError, match="a text without answers"):
        windows(texts(2), words, 64, "answer")
    with pytest.raises(DataError, match="one token each"):
        windows(Task("t", (Sample("a"),), "text"), words, 64)
    with pytest.raises(DataError, match="context of 1 tokens"):
        windows(texts(2), words, 1)
    with pytest.raises(DataError, match=r"9\d% of the \d+ tokens .* part of a character, as in 'الطقس"):
        windows(Task("t", (Sample("الطقس جميل اليوم ونحن ذاهبون"),), "text"), words, 64)
    assert len(windows(Task("t", (Sample("12 + 7 = 19; 7 = 3?"),), "text"), words, 64)) == 1
