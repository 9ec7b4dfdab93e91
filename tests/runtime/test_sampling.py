"""The choice of one token: filters, penalty, seed, log-probabilities, and settings that are out of range."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moedge.errors import ModelError
from moedge.runtime.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.9, 0.5, -3.0])


def drawn(count: int = 400, logits: torch.Tensor = LOGITS, **given: Any) -> list[int]:
    sampler = Sampler(Sampling(**({"temperature": 1.0, "seed": 0} | given)))
    return [sampler([], logits).token for _ in range(count)]


def test_temperature_zero_is_the_most_likely_token() -> None:
    assert set(drawn(5, temperature=0)) == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_the_smallest_temperatures_do_not_overflow(temperature: float) -> None:
    assert set(drawn(20, temperature=temperature)) == {1}


def test_a_high_temperature_reaches_every_token() -> None:
    assert set(drawn(temperature=10.0)) == set(range(6))


@pytest.mark.parametrize(
    ("filters", "left"),
    [({"top_k": 2}, {1, 3}), ({"top_k": 100}, set(range(6))), ({"top_p": 0.5}, {1, 3}), ({"min_p": 0.5}, {1, 3})],
)
def test_filters_leave_only_likely_tokens(filters: dict[str, Any], left: set[int]) -> None:
    assert set(drawn(temperature=1.0 if "top_k" not in filters else 5.0, **filters)) == left


def test_a_top_p_that_leaves_nothing_leaves_the_most_likely_token() -> None:
    assert set(drawn(20, top_p=1e-9)) == {1}


def test_frequencies_follow_the_probabilities() -> None:
    tokens = torch.tensor(drawn(20000))
    share = torch.bincount(tokens, minlength=6) / 20000
    assert torch.allclose(share, LOGITS.softmax(-1), atol=0.015)


def test_the_seed_gives_the_same_tokens_and_touches_no_global_state() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = drawn(50, seed=3)
    assert first == drawn(50, seed=3)
    assert first != drawn(50, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_without_a_seed_answers_differ() -> None:
    assert drawn(50, seed=None) != drawn(50, seed=None)


@given(
    # far enough apart that no rounding makes two equal: which of equal ones a filter drops is not defined
    logits=st.lists(st.integers(-160, 160).map(lambda n: n / 8), min_size=3, max_size=12, unique=True),
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
    penalty=st.floats(0.5, 2),
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_filters_is_that_of_transformers(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    ids, row = [0, 1, 0], torch.tensor(logits)
    scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), row[None])
    scores = TemperatureLogitsWarper(temperature)(torch.tensor([ids]), scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.tensor([ids]), scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(torch.tensor([ids]), scores)
    allowed = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=0))
    assert {sampler(ids, row).token for _ in range(10)} <= allowed


def test_the_penalty_holds_for_prompt_and_answer_and_greedily() -> None:
    sampler = Sampler(Sampling(repetition_penalty=3.0))
    assert sampler([1], LOGITS).token == 3
    assert sampler([1, 3], LOGITS).token == 1  # both divided by three: 1 leads again, 4 has 0.5
    assert sampler([1, 3], LOGITS + 0.5).token == 4
    assert Sampler(Sampling(repetition_penalty=2.0))([1], LOGITS).token == 3


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(Sampling(temperature=0.3, top_k=2, repetition_penalty=2.0, seed=0, logprobs=3))
    choice = sampler([1], LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert choice.logprob == pytest.approx(float(expected[choice.token]))
    assert choice.top_logprobs is not None
    assert [token for token, _ in choice.top_logprobs] == [1, 3, 4]
    assert choice.top_logprobs[0][1] == pytest.approx(float(expected[1]))


def test_logprobs_none_zero_and_more_than_there_are() -> None:
    assert Sampler(Sampling())([], LOGITS).logprob is None
    none = Sampler(Sampling(logprobs=0))([], LOGITS)
    assert none.logprob is not None
    assert none.top_logprobs == ()
    every = Sampler(Sampling(logprobs=99))([], LOGITS).top_logprobs
    assert every is not None
    assert len(every) == 6
    assert sum(torch.tensor([value for _, value in every]).exp()) == pytest.approx(1)


def test_half_precision_logits_are_summed_in_single() -> None:
    row = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    choice = Sampler(Sampling(logprobs=0))([], row)
    assert choice.logprob == pytest.approx(float(row.float().log_softmax(-1)[choice.token]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_not_a_token(bad: float) -> None:
    row = LOGITS.clone()
    row[2] = bad
    with pytest.raises(ModelError, match="not numbers"):
        Sampler(Sampling())([7], row)


def test_masked_tokens_are_not_broken_logits() -> None:
    row = torch.tensor([float("-inf"), 1.0])
    assert Sampler(Sampling(temperature=1.0))([], row).token == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", (3,)),
        ("logprobs", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} is .*: it must be"):
        Sampling(**{setting: value})


def test_unknown_settings_raise() -> None:
    with pytest.raises(TypeError, match="topp"):
        Sampling(**{"topp": 1})


def test_stop_may_be_one_string_or_a_list() -> None:
    assert Sampling(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
