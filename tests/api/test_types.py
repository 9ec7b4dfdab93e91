"""Requests: what is accepted, and how it reads as settings."""

from typing import Any

import pytest
from pydantic import ValidationError

from moedge.api.errors import from_validation
from moedge.api.types import ChatRequest, CompletionRequest, EmbeddingRequest
from moedge.runtime.sampling import Sampling

LEAST = {"model": "m", "prompt": "x"}


def test_settings_are_those_of_sampling() -> None:
    asked = CompletionRequest(**LEAST, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=3, stop=["a", "b"])
    sampling = Sampling(**asked.settings())
    assert sampling == Sampling(
        temperature=1.0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=3, stop=("a", "b")
    )
    assert Sampling(**CompletionRequest(**LEAST, temperature=0, stop="a").settings()) == Sampling(stop=("a",))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_one_prompt_or_many(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest(model="m", prompt=prompt).prompts == prompts
    assert EmbeddingRequest(model="m", input=prompt).inputs == prompts


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "suffix": None, "n": None, "stop": None},
    ],
)
def test_what_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    CompletionRequest(**LEAST, **neutral)


@pytest.mark.parametrize(
    ("name", "value"),
    [("echo", True), ("best_of", 2), ("logit_bias", {"1": 2}), ("presence_penalty", False), ("suffix", "x")],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest(**LEAST, **{name: value})
    found = from_validation(error.value.errors())
    assert (found.status, found.detail.param) == (400, name)


def test_an_unknown_name_is_what_is_told() -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"model": "m", "promt": "x"})
    assert from_validation(error.value.errors()).detail.param == "promt"


def test_messages_as_templates_take_them() -> None:
    asked = ChatRequest(
        model="m",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ],
    )
    assert [message.plain() for message in asked.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
