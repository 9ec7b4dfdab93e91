"""Answers as Steps: the tokens of stock generate, text without gaps, stops, context, and the cache across turns."""

import time
from typing import Any

import pytest
import torch
from fake_lm import SHAPES, FakeLM, tiny_lm, without

from moedge.errors import CheckpointError, ContextError, DataError
from moedge.runtime.generate import Step, generate, logits_in_chunks, prompt_ids
from moedge.runtime.session import Session

PROMPT = "The sea was calm and the old man slept. Hello world, hello moon"


def stock(lm: FakeLM, ids: list[int], count: int, **settings: Any) -> list[int]:
    out = lm.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, **settings)[0].tolist()
    return out[1:] if lm.model.config.is_encoder_decoder else out[len(ids) :]


def tokens(steps: Any) -> list[int]:
    return [step.token for step in steps]


def text(steps: Any) -> str:
    return "".join(step.text for step in steps)


@pytest.mark.parametrize("architecture", list(SHAPES))
@pytest.mark.parametrize("chunk", [5, 512])
def test_greedy_tokens_are_those_of_stock_generate(architecture: str, chunk: int) -> None:
    lm = tiny_lm(architecture)
    lm.prefill_chunk = chunk
    ids = prompt_ids(lm, PROMPT)
    assert tokens(generate(lm, PROMPT, 30)) == stock(lm, ids, 30)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "switch_transformers"])
def test_the_repetition_penalty_is_that_of_stock_generate(architecture: str) -> None:
    lm = tiny_lm(architecture)
    ids = prompt_ids(lm, PROMPT)
    assert tokens(generate(lm, ids, 20, repetition_penalty=1.5)) == stock(lm, ids, 20, repetition_penalty=1.5)


def test_the_text_is_the_decoded_tokens() -> None:
    lm = tiny_lm()
    steps = list(generate(lm, PROMPT, 40))
    assert text(steps) == lm.tokenizer.decode(tokens(steps), skip_special_tokens=True)
    assert [step.finish for step in steps] == [None] * 39 + ["length"]


def test_steps_count_what_they_cost() -> None:
    lm = tiny_lm()
    lm.model.generation_config.eos_token_id = None
    lm.prefill_chunk = 10
    steps = list(generate(lm, list(range(40, 65)), 3))
    assert [(s.hits, s.misses, s.bytes_read) for s in steps] == [(3, 6, 60), (1, 2, 20), (1, 2, 20)]
    assert all(step.seconds > 0 for step in steps)


def test_without_a_store_nothing_is_counted() -> None:
    lm = tiny_lm()
    lm.store = None
    (step,) = generate(lm, "sea", 1)
    assert (step.hits, step.misses, step.bytes_read) == (0, 0, 0)


def test_the_consumers_time_is_not_counted() -> None:
    lm = tiny_lm()
    steps = []
    for step in generate(lm, "sea", 3):
        time.sleep(0.3)
        steps.append(step)
    assert steps[1].seconds < 0.3


@pytest.mark.parametrize("as_list", [True, False])
def test_the_models_end_token_ends_the_answer(as_list: bool) -> None:
    lm = tiny_lm()
    third = tokens(generate(lm, PROMPT, 3))[2]
    lm.model.generation_config.eos_token_id = [5000, third] if as_list else third
    steps = list(generate(lm, PROMPT, 30))
    assert steps[-1].token == third
    assert steps[-1].finish == "stop"
    assert text(steps) == lm.tokenizer.decode(tokens(steps)[:-1])


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it() -> None:
    lm = tiny_lm()
    full = text(generate(lm, PROMPT, 30))
    stop = full[8:14]
    steps = list(generate(lm, PROMPT, 30, stop=[stop, "never"]))
    assert text(steps) == full[: full.index(stop)]
    assert steps[-1].finish == "stop"
    assert len(steps) < 30


def test_a_stop_string_of_one_step_at_the_limit_is_still_a_stop() -> None:
    lm = tiny_lm()
    full = list(generate(lm, PROMPT, 4))
    last = next(step.text for step in reversed(full) if step.text)
    assert list(generate(lm, PROMPT, 4, stop=last))[-1].finish == "stop"


def test_the_seed_reproduces_an_answer() -> None:
    lm = tiny_lm()
    answers = [tokens(generate(lm, "sea", 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_logprobs_are_those_of_the_logits() -> None:
    lm = tiny_lm()
    ids = prompt_ids(lm, PROMPT)
    steps = list(generate(lm, ids, 4, temperature=0.7, seed=0, logprobs=2))
    with torch.inference_mode():
        rows = lm.model(torch.tensor([ids + tokens(steps)])).logits[0].log_softmax(-1)[len(ids) - 1 :]
    for step, row in zip(steps, rows, strict=False):
        assert step.logprob == pytest.approx(float(row[step.token]), abs=1e-4)
        assert step.top_logprobs is not None
        assert step.top_logprobs[0] == (int(row.argmax()), pytest.approx(float(row.max()), abs=1e-4))


def test_prompts_are_text_ids_or_messages() -> None:
    lm = tiny_lm()
    messages = [{"role": "user", "content": "sea"}]
    rendered = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>sea\n<|assistant|>"
    assert prompt_ids(lm, messages) == prompt_ids(lm, rendered) == prompt_ids(lm, tuple(prompt_ids(lm, rendered)))
    assert prompt_ids(lm, torch.tensor([5, 6])) == [5, 6]  # type: ignore[arg-type]


def test_chat_without_a_template_is_an_error() -> None:
    lm = tiny_lm()
    lm.tokenizer = without(lm.tokenizer, chat_template=None)
    with pytest.raises(DataError, match="no chat template"):
        generate(lm, [{"role": "user", "content": "sea"}])


@pytest.mark.parametrize("empty", ["", [], ()])
def test_an_empty_prompt_begins_a_text_or_is_an_error(empty: Any) -> None:
    lm = tiny_lm()
    with pytest.raises(DataError, match="prompt is empty"):
        generate(lm, empty)
    lm.tokenizer = without(lm.tokenizer, bos_token="<bos>")
    assert tokens(generate(lm, empty, 3)) == tokens(generate(lm, [1], 3))


def test_ids_of_another_vocabulary_are_an_error() -> None:
    lm = tiny_lm()
    for wrong in ([3, 320], [-1, 3]):
        with pytest.raises(DataError, match="outside the model's vocabulary of 320"):
            generate(lm, wrong)


def test_a_prompt_longer_than_the_context_is_refused_before_any_work() -> None:
    lm = tiny_lm()
    lm.context = 16
    assert lm.store is not None
    for length in (16, 40):
        with pytest.raises(ContextError, match=rf"{length} tokens, the context holds 16.*--context {length + 1}"):
            generate(lm, [5] * length)
    assert lm.store.counters.hits == 0


def test_the_answer_ends_with_the_context() -> None:
    lm = tiny_lm()
    lm.context = 16
    steps = list(generate(lm, [5] * 12, 64))
    assert len(steps) == 4
    assert steps[-1].finish == "length"


@pytest.mark.parametrize(("setting", "error"), [({"max_new_tokens": 0}, ValueError), ({"topp": 1}, TypeError)])
def test_wrong_settings_raise_before_any_work(setting: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        generate(tiny_lm(), "sea", **setting)


def test_an_iterator_closed_early_leaves_a_session_that_goes_on() -> None:
    lm = tiny_lm()
    session = Session(lm)
    steps = generate(lm, PROMPT, 30, session=session)
    first = [next(steps).token for _ in range(5)]
    steps.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()
    assert tokens(generate(lm, PROMPT, 30, session=session)) == tokens(generate(lm, PROMPT, 30))
    assert first == tokens(generate(lm, PROMPT, 5))


def test_inference_mode_does_not_leak_to_the_consumer() -> None:
    for _ in generate(tiny_lm(), "sea", 2):
        assert not torch.is_inference_mode_enabled()
        torch.ones(1, requires_grad=True).sum().backward()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "jamba"])
def test_turns_of_a_chat_reuse_the_cache_and_answer_the_same(architecture: str) -> None:
    lm = tiny_lm(architecture)
    session, messages = Session(lm), []
    for question in ("The sea was calm", "Hello world", "and the moon?"):
        messages.append({"role": "user", "content": question})
        fresh = list(generate(lm, messages, 12))
        reused = list(generate(lm, messages, 12, session=session))
        assert tokens(fresh) == tokens(reused)
        messages.append({"role": "assistant", "content": text(reused)})


def test_a_second_turn_computes_only_what_is_new() -> None:
    lm = tiny_lm()
    session = Session(lm)
    ids = prompt_ids(lm, PROMPT)
    answer = tokens(generate(lm, ids, 5, session=session))
    lm.prefill_chunk = 1  # now the counters count tokens
    (step,) = generate(lm, [*ids, *answer, 50, 51], 1, session=session)
    assert step.hits == 3  # the answer's last token, and the two new ones


def test_a_session_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        generate(tiny_lm(), "sea", session=Session(tiny_lm()))
    lm = tiny_lm("switch_transformers")
    with pytest.raises(ValueError, match="no encoder-decoder"):
        generate(lm, "sea", session=Session(tiny_lm()))


def test_an_encoder_decoder_is_forced_where_its_config_says() -> None:
    lm = tiny_lm("nllb-moe")
    lm.model.generation_config.forced_bos_token_id = 77
    ids = prompt_ids(lm, PROMPT)
    assert tokens(generate(lm, ids, 6)) == stock(lm, ids, 6)
    assert next(generate(lm, ids, 6)).token == 77


def test_without_a_tokenizer_ids_answer_ids() -> None:
    class Bare(FakeLM):
        @property
        def tokenizer(self) -> Any:
            raise CheckpointError("no tokenizer")

        @tokenizer.setter
        def tokenizer(self, _: Any) -> None: ...

    lm = tiny_lm()
    bare = Bare(lm.model, None)
    steps: list[Step] = list(generate(bare, [50, 60], 3))
    assert tokens(steps) == tokens(generate(lm, [50, 60], 3))
    assert text(steps) == ""
    with pytest.raises(CheckpointError):
        list(generate(bare, [50, 60], 3, stop="x"))


def test_logits_in_chunks_are_those_of_the_model() -> None:
    lm = tiny_lm()
    lm.prefill_chunk = 8
    ids = prompt_ids(lm, PROMPT)
    parts = list(logits_in_chunks(lm, ids))
    assert max(len(part) for part in parts) == 8
    with torch.inference_mode():
        assert torch.allclose(torch.cat(parts), lm.model(torch.tensor([ids])).logits[0], atol=3e-5)
    with pytest.raises(DataError):
        logits_in_chunks(lm, [])
    lm.context = 4
    with pytest.raises(ContextError):
        logits_in_chunks(lm, ids)
