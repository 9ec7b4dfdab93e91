"""One sequence's cache: chunks, going back, and what is recomputed, against the model in one go."""

from typing import Any

import pytest
import torch
from fake_lm import FakeLM, tiny_lm

from moedge.errors import ContextError, ModelError
from moedge.runtime import forward
from moedge.runtime.forward import continues
from moedge.runtime.session import EncodedSession, Session, check_length, context_of

DECODERS = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "jamba", "deepseek_v3"]
IDS = list(range(40, 75))


def whole(lm: FakeLM, ids: list[int]) -> torch.Tensor:
    """The logits [T, V] of the model reading everything at once."""
    with torch.inference_mode():
        logits: torch.Tensor = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("chunk", [1, 6, 512])
def test_chunks_give_the_logits_of_the_whole(architecture: str, chunk: int) -> None:
    lm = tiny_lm(architecture)
    lm.prefill_chunk = chunk
    got = list(Session(lm).stream(IDS))
    assert close(torch.cat(got), whole(lm, IDS))
    assert close(Session(lm).begin(IDS), whole(lm, IDS)[-1])


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("kept", [0, 1, 5, 12, 30])  # gpt_oss slides over 8, mixtral over 16 tokens
def test_going_back_gives_what_a_new_session_gives(architecture: str, kept: int) -> None:
    lm = tiny_lm(architecture)
    lm.prefill_chunk = 7
    session = Session(lm)
    session.begin(IDS)
    other = IDS[:kept] + list(range(80, 90))
    assert close(session.begin(other), whole(lm, other)[-1])
    assert session.ids == other
    assert close(session.push(50), whole(lm, [*other, 50])[-1])
    shorter = other[: max(kept, 2)]
    assert close(session.begin(shorter), whole(lm, shorter)[-1])


@pytest.mark.parametrize("architecture", DECODERS)
def test_streaming_from_the_middle(architecture: str) -> None:
    lm = tiny_lm(architecture)
    lm.prefill_chunk = 4
    session = Session(lm)
    for start in (0, 9, 20, len(IDS)):
        got = list(session.stream(IDS, start))
        assert close(torch.cat(got) if got else whole(lm, IDS)[:0], whole(lm, IDS)[start:])


def test_only_what_is_new_is_computed() -> None:
    lm = tiny_lm()
    seen: list[int] = []

    def record(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.append(given["input_ids"].shape[1])

    lm.model.register_forward_pre_hook(record, with_kwargs=True)
    session = Session(lm)
    session.begin(IDS)
    session.begin(IDS)  # the last token again: its logits are needed
    session.begin([*IDS, 90, 91])
    session.begin([*IDS[:10], 90, 91])
    assert seen == [35, 1, 2, 2]


def test_logits_of_a_large_vocabulary_come_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    monkeypatch.setattr(forward, "LOGITS_BYTES", 4 * 320 * 3 + 5)
    parts = list(Session(lm).stream(IDS))
    assert [len(part) for part in parts] == [3] * 11 + [2]
    assert close(torch.cat(parts), whole(lm, IDS))


def test_pieces_of_logits_run_the_layers_once_and_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    monkeypatch.setattr(forward, "LOGITS_BYTES", 4 * 320 * 3)
    body, passes = lm.model.model, []
    body.register_forward_hook(lambda *_: passes.append(1))
    assert len(list(Session(lm).stream(IDS))) == 12
    assert passes == [1]
    assert lm.model.model is body
    assert list(dict(lm.model.named_children())) == ["model", "lm_head"]


def test_a_fault_in_the_head_leaves_the_model_as_it_was() -> None:
    lm = tiny_lm()
    body = lm.model.model
    hook = lm.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(Session(lm).stream(IDS))
    hook.remove()
    assert lm.model.model is body
    assert close(torch.cat(list(Session(lm).stream(IDS))), whole(lm, IDS))


def test_a_model_that_cannot_continue_with_several_tokens_gets_them_one_by_one() -> None:
    jamba = tiny_lm("jamba")
    session = Session(jamba)
    session.begin(IDS)
    assert not continues(jamba.model, session._cache)
    with torch.inference_mode():  # why: stock Jamba starts from an empty state
        cache = jamba.model(torch.tensor([IDS[:20]]), use_cache=True).past_key_values
        wrong = jamba.model(torch.tensor([IDS[20:]]), past_key_values=cache).logits[0, -1]
    assert not close(wrong, whole(jamba, IDS)[-1])


def test_attention_continues_without_being_tried() -> None:
    lm = tiny_lm()
    session = Session(lm)
    session.begin(IDS)
    assert lm.store is not None
    before = lm.store.counters.hits
    assert continues(lm.model, session._cache)
    assert lm.store.counters.hits == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_forward_leaves_an_empty_session(fault: type[BaseException]) -> None:
    lm = tiny_lm()
    session = Session(lm)
    session.begin(IDS[:10])
    layer = lm.model.model.layers[1]

    def fail(*_: Any) -> None:
        raise fault

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(fault):
        session.push(5)
    hook.remove()
    assert session.ids == []
    assert close(session.begin(IDS), whole(lm, IDS)[-1])


def test_growing_beyond_the_context_is_refused() -> None:
    lm = tiny_lm()
    lm.context = 12
    session = Session(lm)
    session.begin(IDS[:12])
    with pytest.raises(ContextError, match=r"13 tokens, the context holds 12.*--context 13"):
        session.push(1)
    assert session.ids == IDS[:12]


def test_the_remedy_is_one_that_helps() -> None:
    lm = tiny_lm()
    lm.context = 12
    for tokens, remedy in ((600, "holds 12: use a shorter text"), (500, "--context 500, or use a shorter text")):
        with pytest.raises(ContextError, match=remedy):
            check_length(lm, tokens)
    lm.context = None
    with pytest.raises(ContextError, match="holds 512 including the answer: use a shorter text"):
        check_length(lm, 512, 1)


def test_the_context_is_the_reserved_one_else_the_models() -> None:
    lm = tiny_lm()
    assert context_of(lm) == 512
    lm.context = 40
    assert context_of(lm) == 40
    assert context_of(tiny_lm("switch_transformers")) is None


def test_encoder_decoders_have_no_growing_text() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        Session(tiny_lm("switch_transformers"))


def test_a_model_without_a_cache_is_an_error() -> None:
    lm = tiny_lm()
    lm.model.forward = lambda **_: type("Output", (), {"past_key_values": None})()
    with pytest.raises(ModelError, match="no key/value cache"):
        Session(lm).begin(IDS)


def test_decoding_step_by_step_is_decoding_at_once() -> None:
    lm = tiny_lm("switch_transformers")  # NLLB-MoE's experts have a capacity, so it depends on how many come at once
    lm.model.double()  # how float32 is rounded differs between processors
    session = EncodedSession(lm)
    steps = [session.begin(IDS), *(session.push(token) for token in (50, 60, 70))]
    with torch.inference_mode():
        together = lm.model(torch.tensor([IDS]), decoder_input_ids=torch.tensor([session.ids])).logits[0]
    assert close(torch.stack(steps), together)


def test_an_encoder_decoder_without_a_start_token_is_an_error() -> None:
    lm = tiny_lm("switch_transformers")
    lm.model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        EncodedSession(lm).begin(IDS)
