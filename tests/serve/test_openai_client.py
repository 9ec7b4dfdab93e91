"""The real client of OpenAI's over a real socket: every answer is the one that the model gives alone."""

import asyncio
from typing import Any

import openai
import pytest

PROMPT = "The sea was"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wer bist du? 中文 🌍"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Any) -> openai.OpenAI:
    return served.client()


def steps_of(lm: Any, prompt: Any, count: int, **settings: Any) -> list[Any]:
    return list(lm.generate(prompt, max_new_tokens=count, **settings))


def text_of(lm: Any, prompt: Any, count: int, **settings: Any) -> str:
    return "".join(step.text for step in steps_of(lm, prompt, count, **settings))


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert card.moedge == {"chat": True, "context": 512, "parallel": 3}
    assert client.models.retrieve("tiny") == card


def test_a_completion(client: openai.OpenAI, alone: Any) -> None:
    done = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY)
    assert done.choices[0].text == text_of(alone, PROMPT, 20)
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is None
    assert done.object == "text_completion"
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 20,
        "total_tokens": len(PROMPT) + 20,
    }


def test_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    assert client.completions.create(prompt=PROMPT, **GREEDY).usage.completion_tokens == 16


def test_several_prompts_as_texts_and_as_ids(client: openai.OpenAI, alone: Any) -> None:
    texts = [PROMPT, "A"]
    ids = [list(alone.tokenizer(text)["input_ids"]) for text in texts]
    wanted = [text_of(alone, text, 5) for text in texts]
    for prompt in (texts, ids):
        done = client.completions.create(prompt=prompt, max_tokens=5, **GREEDY)
        assert [choice.text for choice in done.choices] == wanted
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.usage.prompt_tokens == len(PROMPT) + 1
    assert client.completions.create(prompt=ids[0], max_tokens=5, **GREEDY).choices[0].text == wanted[0]


def test_a_streamed_completion(client: openai.OpenAI, alone: Any) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(prompt=PROMPT, max_tokens=20, stream=True, stream_options=options, **GREEDY)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text_of(alone, PROMPT, 20)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(client: openai.OpenAI, alone: Any) -> None:
    done = client.chat.completions.create(messages=CHAT, max_completion_tokens=20, **GREEDY)
    assert done.choices[0].message.content == text_of(alone, CHAT, 20)
    assert done.choices[0].message.role == "assistant"
    assert done.object == "chat.completion"


def test_a_chat_in_parts_and_with_a_developer(client: openai.OpenAI, alone: Any) -> None:
    parts = [{"type": "text", "text": "Wer bist du? "}, {"type": "text", "text": "中文 🌍"}]
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY)
    assert done.choices[0].message.content == text_of(alone, CHAT, 5)


def test_an_answer_may_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=CHAT, max_tokens=5, **GREEDY).choices[0].message
    messages: Any = [*CHAT, first, {"role": "user", "content": "More."}]
    assert client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY).usage.completion_tokens == 5


def test_a_streamed_chat(client: openai.OpenAI, alone: Any) -> None:
    chunks = list(client.chat.completions.create(messages=CHAT, max_tokens=20, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(alone, CHAT, 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_a_chat_may_go_on_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(messages=[{"role": "user", "content": "x" * 400}], **GREEDY).usage
    assert usage.total_tokens <= 512
    assert usage.total_tokens == 512 or usage.completion_tokens < 512 - usage.prompt_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_stop_strings(stream: bool, client: openai.OpenAI, alone: Any) -> None:
    whole = text_of(alone, PROMPT, 40)
    stop = whole[10:13]
    wanted = whole[: whole.index(stop)]
    done: Any = client.completions.create(prompt=PROMPT, max_tokens=40, stop=[stop, "\0"], stream=stream, **GREEDY)
    choices = [chunk.choices[0] for chunk in (done if stream else [done])]
    assert "".join(choice.text for choice in choices) == wanted
    assert choices[-1].finish_reason == "stop"


def test_the_seed(client: openai.OpenAI, alone: Any) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, extra_body={"min_p": 0.01}, **settings)
    assert done.choices[0].text == text_of(alone, PROMPT, 20, min_p=0.01, **settings)


def test_several_choices_are_those_of_the_seeds_that_follow(client: openai.OpenAI, alone: Any) -> None:
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, n=3, seed=7, temperature=2)
    wanted = [text_of(alone, PROMPT, 20, seed=seed, temperature=2) for seed in (7, 8, 9)]
    assert [choice.text for choice in done.choices] == wanted
    assert done.usage.prompt_tokens == len(PROMPT)
    assert done.usage.completion_tokens == 60


def test_streamed_choices(client: openai.OpenAI, alone: Any) -> None:
    texts = ["", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=20, n=2, seed=7, temperature=2, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [text_of(alone, CHAT, 20, seed=seed, temperature=2) for seed in (7, 8)]


def test_logprobs_of_a_completion(client: openai.OpenAI, alone: Any) -> None:
    found = client.completions.create(prompt=PROMPT, max_tokens=8, logprobs=3, **GREEDY).choices[0].logprobs
    steps = steps_of(alone, PROMPT, 8, logprobs=3)
    assert found.token_logprobs == [step.logprob for step in steps]
    assert found.tokens == [alone.tokenizer.decode([step.token]) for step in steps]
    assert [max(top.values()) for top in found.top_logprobs] == [step.top_logprobs[0][1] for step in steps]
    assert found.text_offset[:2] == [0, len(found.tokens[0])]


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_of_a_chat(stream: bool, client: openai.OpenAI, alone: Any) -> None:
    done: Any = client.chat.completions.create(
        messages=CHAT, max_tokens=8, logprobs=True, top_logprobs=2, stream=stream, **GREEDY
    )
    choices = [chunk.choices[0] for chunk in (done if stream else [done])]
    found = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    steps = steps_of(alone, CHAT, 8, logprobs=2)
    assert [token.logprob for token in found] == [step.logprob for step in steps]
    assert [[top.logprob for top in token.top_logprobs] for token in found] == [
        [logprob for _, logprob in step.top_logprobs] for step in steps
    ]
    for token in found:
        assert token.bytes == (None if "\ufffd" in token.token else list(token.token.encode()))


def test_an_embedding_is_the_mean_of_the_last_hidden_states(client: openai.OpenAI, alone: Any) -> None:
    import torch

    texts = ["The sea was calm and the old man slept.", "x"]
    found = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="tiny", input=texts)
    for text, row, other in zip(texts, found.data, packed.data, strict=True):
        ids = torch.tensor([alone.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            hidden = alone.model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(row.embedding), hidden.float().mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(other.embedding), torch.tensor(row.embedding))
    assert found.usage.prompt_tokens == sum(map(len, texts))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other' is not here"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 4}, openai.BadRequestError, "--parallel"),
        ({"max_tokens": 510}, openai.BadRequestError, "ask for at most 501"),
        ({"prompt": "x" * 600}, openai.BadRequestError, "600 tokens"),
        ({"prompt": [999]}, openai.BadRequestError, "token 999"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"echo": True}, openai.BadRequestError, "echo"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty: not supported here: leave it out"),
        ({"stop": ["a"] * 17}, openai.BadRequestError, "stop"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature: not a parameter here: leave it out"),
    ],
)
def test_errors(settings: Any, kind: type[openai.APIStatusError], words: str, client: openai.OpenAI) -> None:
    with pytest.raises(kind) as error:
        client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 4} | settings))
    assert words in error.value.message
    assert error.value.type in {"invalid_request_error", "not_found_error"}


def test_a_chat_without_text_is_refused(client: openai.OpenAI) -> None:
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=picture)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert error.value.param == "tools"


def test_answers_under_load_are_those_alone(serve: Any, tiny: Any) -> None:
    """Three at a time, prompts of up to six chunks, room for about half of the experts: as if each were alone."""
    import moedge

    model = tiny("qwen3_moe", tokenizer=True, hidden_size=256, moe_intermediate_size=340)  # experts of 1 MiB
    limit = half_memory(model)
    running = serve(lambda: moedge.load(model, memory=limit, prefill_chunk=16, parallel=3, context=160), 3, 16)
    prompts = [f"{index} " + "The old house stood at the sea. " * (index % 4) for index in range(12)]
    settings = [{"temperature": 0.0} if index % 2 else {"temperature": 1.5, "seed": index} for index in range(12)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str, own: dict[str, Any], stream: bool) -> str:
                done: Any = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=24, stream=stream, **own
                )
                if not stream:
                    return str(done.choices[0].text)
                return "".join([chunk.choices[0].text async for chunk in done])

            jobs = [one(p, s, i % 3 > 0) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
            return list(await asyncio.gather(*jobs))

    found = asyncio.run(ask())
    with moedge.load(model, prefill_chunk=16) as alone:
        assert found == [text_of(alone, p, 24, **s) for p, s in zip(prompts, settings, strict=True)]
    assert running.service.lm.store.counters.misses > sum(running.service.lm.plan.capacities)


def half_memory(model: Any) -> int:
    """The limit that leaves slots for half of the experts in this process."""
    from moedge.models.load import draw
    from moedge.runtime.budget import make_plan

    blueprint = draw(model)
    plan = make_plan(blueprint, limit=1 << 40, context=160, parallel=3, prefill_chunk=16)
    blueprint.checkpoint.close()
    fixed = sum(row.nbytes for row in plan.rows if row.name != "expert slots")
    return fixed + (sum(plan.num_experts) // 2 + plan.spare) * plan.slot_bytes
