"""The recipe of the mini model on a small folder of made-up data."""

import json
import random
from pathlib import Path

import pytest

from moedge.errors import DataError
from recipes.mini import evaluate, publish, sources, tasks
from recipes.mini.prepare import ASSISTANT, prepare, streams


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["the", "a", "of", "love", "ship", "house", "grew", "under", "cell", "gene", "was", "and", "she", "said"]

    def prose(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count)) + "."

    for name in ("text/books", "text/wikipedia", "text/shakespeare", "text/tatoeba", "tasks/sst2", "tasks/gsm8k"):
        (root / name).mkdir(parents=True)
    for name in (*sources.HELD_OUT_NOVELS, "Someone_Else_1900"):
        (root / f"text/books/{name}.txt").write_text("\r\n".join(prose(80) for _ in range(20)), newline="")
    (root / "text/biomed.txt").write_text("".join(prose(15) + "\n" for _ in range(200)))
    (root / "text/wikipedia/passages.txt").write_text("".join(prose(60) + "\n" for _ in range(60)))
    (root / "text/shakespeare/input.txt").write_text("\n\n".join(f"FOOL:\n{prose(20)}" for _ in range(60)))
    for language in sources.LANGUAGES:
        if language != "eng":
            english = [prose(5) for _ in range(40)]
            stem = root / f"text/tatoeba/tatoeba.{language}-eng"
            Path(f"{stem}.eng").write_text("\n".join(english) + "\n")
            Path(f"{stem}.{language}").write_text("\n".join(f"{language} {line}" for line in english) + "\n")
    for side in ("train", "dev"):
        rows = [{"sentence": prose(4 + 8 * (index % 2)), "label": index % 2} for index in range(30)]
        (root / f"tasks/sst2/{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problem = {"question": f"{prose(20)} How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5 apples\n#### 5"}
    (root / "tasks/gsm8k/train.jsonl").write_text((json.dumps(problem) + "\n") * 520)
    return root


def test_nothing_held_out_is_trained_on(data: Path) -> None:
    texts = sources.texts(data)
    assert tuple(texts) == sources.DOMAINS
    assert [len(texts["novel"].train), len(texts["novel"].held_out)] == [1, 3]
    assert len(texts["mathematics"].held_out) == sources.GSM8K_HELD_OUT
    assert texts["mathematics"].train[0].endswith("Solution: 2 + 3 = 5 apples\nAnswer: 5")
    for split in sources.sentences(data).values():
        assert split.train
        assert not set(split.train) & set(split.held_out)


def test_the_same_pair_is_held_out_in_both_orders_and_never_learnt() -> None:
    pairs = [(record["a"], record["b"]) for record in tasks.sums(3000, seed=1)]
    assert not any(tasks.held_out_pair(a, b) or tasks.held_out_pair(b, a) for a, b in pairs)
    held = tasks.held_out_sums()
    assert 0.05 < len(held) / (2 * 90 * 90) < 0.15
    assert {record["op"] for record in held} == {"+", "-"}


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"biomed\.txt is missing: give the data folder"):
        sources.biomedicine(tmp_path)
    with pytest.raises(DataError, match="lacks"):
        sources.novels(tmp_path)


def test_prepared_examples_weigh_answers_and_come_in_both_forms(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "code", lambda: sources.Split(["def f():\n    return 1\n" * 200], ["x = 1\n" * 50]))
    monkeypatch.setattr(tasks, "sums", lambda count, seed: [{"a": 47, "b": 28, "op": "+"}] * 40)
    prepare(data, tmp_path)
    found = streams(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert set(found) == {*sources.DOMAINS, "sst2", "sst2-long", "language", "arithmetic", "kind"}
    row = found["arithmetic"].row(0, 400)
    documents = [row.ids[row.segments == segment] for segment in range(row.segments.max() + 1)]
    plain = tokenizer("47 + 28 = 75<|endoftext|>")["input_ids"]
    assert plain in [ids.tolist() for ids in documents]
    assert any(tokenizer.convert_tokens_to_ids(ASSISTANT) in ids for ids in documents)
    place = next(number for number, ids in enumerate(documents) if ids.tolist() == plain)
    weights = row.weights[row.segments == place]
    answer = len(tokenizer(" 75")["input_ids"]) + 1
    assert (weights[:-answer] == 0).all()
    assert weights[-answer:].tolist() == [4.0] * (answer - 2) + [24.0, 4.0]
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turn == "<|user|>Hi<|end|><|assistant|>"


def test_router_figures_against_hand_computations() -> None:
    import numpy as np

    mass = np.array([[0.7, 0.1, 0.1, 0.1]])
    assert evaluate.best_half(mass).tolist() == pytest.approx([0.8])
    apart = {"a": np.array([[1.0, 0.0]]), "b": np.array([[0.0, 1.0]])}
    assert evaluate.information(apart).tolist() == [1.0]
    assert evaluate.information({"a": mass, "b": mass}).tolist() == [0.0]


def test_windows_predict_every_token_but_the_first_once() -> None:
    pieces = list(evaluate.windows(range(10), 4))
    assert [token for piece in pieces for token in piece[1:]] == list(range(1, 10))


def test_the_card_states_the_figures() -> None:
    result = {
        "bits_per_byte": {"novel": {"512": 1.7, "2048": 1.8}},
        "accuracy": {"sst2": 0.81},
        "records": {"sst2": 100},
        "router": {
            "experts": {
                "best_half": {"novel": [0.9, 0.85]},
                "mutual_information_bits": [0.5, 0.6],
                "load_over_even": {"min": [0.4, 0.5], "max": [1.6, 1.5]},
                "dead_experts": 0,
            }
        },
    }
    runs = {folder: {"tokens": 12_000_000 + i, "steps": 1465} for i, (folder, *_) in enumerate(publish.RUNS)}
    text = publish.card(result, runs)
    for expected in (
        "| specialised | 12,000,001 | 1,465 | 0.05 | 0.1 | 0.05 |",
        "| novel | 1.700 | 1.800 |",
        "| sst2 | 81.0% | 100 |",
        "| novel | 90.0% | 85.0% |",
        "CC BY 4.0",
    ):
        assert expected in text
