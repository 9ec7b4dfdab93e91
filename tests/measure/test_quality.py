"""Perplexity and bits per byte against the definition, on windows, documents and tokenizers with and without BOS."""

import math
from typing import Any

import pytest
import torch
from fake_lm import FakeLM, tiny_lm, tokenizer, with_bos, without
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moedge.errors import DataError, ModelError
from moedge.measure.quality import (
    TextScore,
    Window,
    beginning,
    score_windows,
    target_logprobs,
    window_nats,
    window_size,
    windows,
)

TEXT = "The sea was calm and the old man slept. Hello world, hello moon: 12 + 7 = 19. Größe 中文 🌍\n"


def naive_nats(lm: FakeLM, ids: tuple[int, ...]) -> float:
    """Cross entropy of all tokens but the first, the whole sequence at once."""
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1].float()
    return float(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


def last(steps: Any) -> TextScore:
    *_, final = steps
    assert isinstance(final, TextScore)
    return final


def test_one_window_is_the_definition() -> None:
    lm = tiny_lm()
    ids = tuple(lm.tokenizer(TEXT)["input_ids"])
    score = last(score_windows(lm, windows(lm, [TEXT], 512)))
    assert score.nats == pytest.approx(naive_nats(lm, ids), rel=1e-5)
    assert score.tokens == len(ids) - 1
    first = len(lm.tokenizer.decode(ids[:1]).encode())
    assert score.nbytes == len(TEXT.encode()) - first
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.nbytes)


@pytest.mark.parametrize("chunk", [3, 512])
def test_windows_are_scored_each_by_itself(chunk: int) -> None:
    lm = tiny_lm()
    lm.prefill_chunk = chunk
    found = list(windows(lm, [TEXT], 9))
    assert all(len(window.ids) == 9 for window in found[:-1])
    score = last(score_windows(lm, found))
    assert score.nats == pytest.approx(sum(naive_nats(lm, window.ids) for window in found), rel=1e-5)


@given(size=st.integers(2, 40), texts=st.lists(st.sampled_from([TEXT, "sea", "", "a", TEXT * 2]), max_size=4))
@settings(max_examples=30, deadline=None)
def test_every_token_but_each_documents_first_is_predicted_once(size: int, texts: list[str]) -> None:
    lm = tiny_lm_words()
    found = list(windows(lm, texts, size))
    documents = [lm.tokenizer(text)["input_ids"] for text in texts]
    assert [token for window in found for token in window.ids[1:]] == [t for ids in documents for t in ids[1:]]
    nbytes = 0
    for text, ids in zip(texts, documents, strict=True):
        nbytes += len(text.encode()) - len(lm.tokenizer.decode(ids[:1]).encode()) if len(ids) > 1 else 0
    assert sum(window.nbytes for window in found) == pytest.approx(nbytes)


def tiny_lm_words() -> FakeLM:
    """Only the tokenizer is looked at."""
    return FakeLM(None, tokenizer())


def test_with_bos_every_window_begins_with_it_and_all_bytes_count() -> None:
    lm = with_bos(tiny_lm())
    assert beginning(lm.tokenizer) == [1]
    plain = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = list(windows(lm, [TEXT], 10))
    assert all(window.ids[0] == 1 for window in found)
    assert [token for window in found for token in window.ids[1:]] == plain
    assert sum(window.nbytes for window in found) == pytest.approx(len(TEXT.encode()))
    score = last(score_windows(lm, found))
    assert score.nats == pytest.approx(sum(naive_nats(lm, window.ids) for window in found), rel=1e-5)


def test_without_bos_nothing_is_put_before() -> None:
    assert beginning(tiny_lm().tokenizer) == []
    assert beginning(without(tiny_lm().tokenizer, bos_token="<bos>")) == []  # it has one, but does not use it


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("most", [1, 5, 30, 1000])
def test_only_the_first_tokens(most: int, bos: bool) -> None:
    lm = with_bos(tiny_lm_words()) if bos else tiny_lm_words()
    found = list(windows(lm, [TEXT, TEXT], 8, most))
    ids = lm.tokenizer(TEXT)["input_ids"]
    predicted = [token for window in found for token in window.ids[1:]]
    assert predicted == (ids[1:] * 2)[:most]
    if most == 5:
        text = lm.tokenizer.decode(ids[1:6])
        assert sum(window.nbytes for window in found) == pytest.approx(len(text.encode()))


def test_totals_grow_window_by_window() -> None:
    lm = tiny_lm()
    seen = [(score.tokens, score.nats) for score in score_windows(lm, windows(lm, [TEXT], 9))]
    assert seen == sorted(seen)
    assert seen[0][0] == 8


def test_an_observer_sees_the_logits_on_their_way() -> None:
    lm = tiny_lm()
    seen: list[int] = []

    def observe(window: Window, logits: Any) -> Any:
        for piece in logits:
            seen.append(len(piece))
            yield piece

    found = list(windows(lm, [TEXT], 12))
    plain, watched = last(score_windows(lm, found)), last(score_windows(lm, found, observe))
    assert watched == plain
    assert sum(seen) == plain.tokens


def test_nats_do_not_depend_on_the_pieces() -> None:
    logits, ids = torch.randn(6, 20), tuple(range(7))
    window = Window(ids, 1)
    assert window_nats(window, [logits]) == pytest.approx(window_nats(window, list(logits.split([1, 3, 2]))))


def test_logprobs_are_single_precision() -> None:
    logits = torch.randn(4, 3000).half()
    targets = torch.tensor([5, 0, 2999, 7])
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert torch.allclose(target_logprobs(logits, targets).double(), expected, atol=1e-5)


def test_a_recurrent_model_is_scored_too() -> None:
    lm = tiny_lm("jamba")
    lm.prefill_chunk = 5
    found = list(windows(lm, [TEXT[:30]], 12))
    score = last(score_windows(lm, found))
    assert score.nats == pytest.approx(sum(naive_nats(lm, window.ids) for window in found), rel=1e-4)


def test_encoder_decoders_do_not_predict_texts() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        list(score_windows(tiny_lm("switch_transformers"), [Window((5, 6), 1)]))


def test_an_empty_score_divides_by_nothing() -> None:
    assert TextScore().as_dict() == {"bits_per_byte": None, "perplexity": None, "tokens": 0, "bytes": 0}


def test_the_window_is_the_context_but_at_most_2048() -> None:
    lm = tiny_lm()
    assert window_size(lm) == 512
    lm.context = 100
    assert window_size(lm) == 100
    assert window_size(lm, 64) == 64
    for wrong in (1, 101):
        with pytest.raises(DataError, match=rf"window of {wrong} tokens: it must be 2 to the context's 100"):
            window_size(lm, wrong)
    lm.context = 9000
    assert window_size(lm) == 2048
