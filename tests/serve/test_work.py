"""What requests make the model do: prompts refused before any work, and caches given back when the work ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moedge
from moedge.errors import ContextError, DataError, ModelError
from moedge.runtime.session import Session
from moedge.serve.work import Accepted, answering, can_chat, embedding, new_session

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, None])
def test_the_cache_is_given_back(steps: int | None, alone: Any) -> None:
    """At the end, and wherever the work is given up, also by those who keep the session."""
    session = Session(alone)
    work: Any = answering(alone, session, "The old house stood at the sea.", 2, GREEDY)
    for _ in range(steps or 100):
        next(work, None)
    assert bool(session.ids) == (steps in (2, 3, 4))
    work.close()
    assert session.ids == []


def test_an_embeddings_cache_is_given_back(alone: Any) -> None:
    session = Session(alone)
    *_, means = embedding(alone, session, ["The old house stood at the sea.", "x"])
    assert len(means) == 2
    assert session.ids == []


@pytest.mark.parametrize(
    ("prompt", "count", "error"),
    [("x" * 600, 1, ContextError), ("x" * 510, 3, ContextError), ([999], 1, DataError)],
)
def test_what_is_refused_before_any_work(prompt: Any, count: int, error: type[Exception], alone: Any) -> None:
    hits = alone.store.counters.hits
    with pytest.raises(error):
        next(answering(alone, Session(alone), prompt, count, GREEDY))
    assert alone.store.counters.hits == hits


def test_a_template_that_refuses(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    assert can_chat(alone)
    with pytest.raises(DataError, match="roles must alternate"):
        next(answering(alone, Session(alone), [{"role": "user", "content": "x"}], 1, GREEDY))


def test_a_model_that_reads_one_by_one_is_equal_too(tiny: Callable[..., Path]) -> None:
    """Jamba continues only token by token; the engine's chunks are then as small."""
    with moedge.load(tiny("jamba", tokenizer=True), prefill_chunk=8) as lm:
        prompt = "The old house stood."
        wanted = "".join(step.text for step in lm.generate(prompt, max_new_tokens=8))
        events = list(answering(lm, new_session(lm), prompt, 8, GREEDY))
        assert events[0] == Accepted(len(prompt) + 1) or events[0] == Accepted(len(prompt))
        assert events.count(None) >= 2
        assert "".join(event.text for event in events[1:] if event is not None) == wanted


def test_an_encoder_decoder_answers_but_has_no_embedding(tiny: Callable[..., Path]) -> None:
    with moedge.load(tiny("switch_transformers", tokenizer=True)) as lm:
        assert new_session(lm) is None
        wanted = "".join(step.text for step in lm.generate("The sea", max_new_tokens=4))
        _, *pieces = answering(lm, None, "The sea", 4, GREEDY)
        assert "".join(piece.text for piece in pieces if piece is not None) == wanted
        with pytest.raises(ModelError):
            next(embedding(lm, None, ["x"]))
