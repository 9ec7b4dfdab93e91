"""KL and agreement against the definition; a model is no distance from itself."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_lm import FakeLM, tiny_lm, without
from torch.nn import functional

from moedge.errors import DataError
from moedge.measure.compare import Divergence, Recording, kl_divergence
from moedge.measure.quality import score_windows, windows

TEXTS = ["The sea was calm and the old man slept.\n", "Hello world, hello moon: 12 + 7 = 19.\n"]


def compared(reference: FakeLM, lm: FakeLM, size: int = 9) -> Divergence:
    with Recording() as recording:
        tokens = list(recording.record(reference, windows(reference, TEXTS, size)))
        assert tokens == sorted(tokens)
        distance = Divergence(recording)
        list(score_windows(lm, windows(lm, TEXTS, size), distance.observe))
    return distance


def test_a_model_is_no_distance_from_itself() -> None:
    distance = compared(tiny_lm(), tiny_lm())
    assert distance.as_dict() == {"kl": 0.0, "top1_agreement": 1.0}


def test_the_distance_is_the_definition() -> None:
    reference, lm = tiny_lm(seed=0), tiny_lm(seed=1)
    reference.prefill_chunk = 4  # pieces of other sizes on both sides
    distance = compared(reference, lm)
    kl, agreed, tokens = 0.0, 0, 0
    for window in windows(lm, TEXTS, 9):
        ids = torch.tensor([window.ids[:-1]])
        with torch.inference_mode():
            p, q = (m.model(ids).logits[0].double().log_softmax(-1) for m in (reference, lm))
        kl += float(functional.kl_div(q, p, log_target=True, reduction="sum"))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    assert distance.tokens == tokens
    found = distance.as_dict()
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["kl"] > 0
    assert found["top1_agreement"] == pytest.approx(agreed / tokens)


def test_bfloat16_logits_come_back_as_they_were() -> None:
    lm = tiny_lm()
    lm.model.bfloat16()
    distance = compared(lm, lm)
    assert distance.as_dict() == {"kl": 0.0, "top1_agreement": 1.0}


def test_a_probability_of_nought_adds_nothing() -> None:
    nought = torch.tensor([[0.0, float("-inf"), 1.0]])
    assert kl_divergence(nought, torch.tensor([[0.0, 3.0, 1.0]])).isfinite().all()
    assert float(kl_divergence(nought, nought)) == 0


def test_another_tokenizer_is_an_error() -> None:
    other = tiny_lm(vocab_size=330)
    other.tokenizer = without(other.tokenizer)
    other.tokenizer.add_tokens(["the old"])
    with pytest.raises(DataError, match="splits the text differently"):
        compared(other, tiny_lm(vocab_size=330))


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match="320 logits a token and the model 330"):
        compared(tiny_lm(), tiny_lm(vocab_size=330))


def test_a_full_disk_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recording, lm = Recording(), tiny_lm()

    class Full:
        error = errno.ENOSPC

        def write(self, _: Any) -> int:
            raise OSError(self.error, "full")

        def close(self) -> None: ...

    monkeypatch.setattr(recording, "_file", Full())
    with pytest.raises(DataError, match=r"1.25 KiB a token, do not fit into .* --max-tokens"):
        list(recording.record(lm, windows(lm, TEXTS, 9)))
    Full.error = errno.EIO
    with pytest.raises(OSError, match="full"):
        list(recording.record(lm, windows(lm, TEXTS, 9)))


def test_nothing_compared_is_nothing_known() -> None:
    with Recording() as recording:
        assert Divergence(recording).as_dict() == {"kl": None, "top1_agreement": None}
