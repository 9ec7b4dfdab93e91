"""What the recorder writes down is what the model's experts were given, per sequence and without padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

import moedge.models.recorder
from moedge.errors import DataError
from moedge.models.anatomy import ExpertKind, MoeLayer, dissect
from moedge.models.architecture import text_class
from moedge.models.recorder import record
from moedge.models.routing import choices
from moedge.models.trace import RoutingTrace

Tiny = Callable[..., Path]
IDS = torch.randint(3, 250, (2, 6), generator=torch.Generator().manual_seed(0))


def stock(folder: Path) -> Any:
    return text_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PreTrainedModel:
    return stock(tiny("qwen3_moe"))


def run(model: Any, *passes: dict[str, Any]) -> RoutingTrace:
    with record(model) as recorder, torch.inference_mode():
        for inputs in passes:
            model(**inputs)
        return recorder.trace()


def test_choices_are_the_top_k_of_the_router_logits(model: Any) -> None:
    with record(model) as recorder, torch.inference_mode():
        output = model(IDS[:1], output_router_logits=True)
    trace = recorder.trace()
    assert trace.experts.shape == (6, 4, 2)
    assert trace.experts.dtype == np.uint8
    for layer, logits in enumerate(output.router_logits):  # [T, E]
        weights, experts = logits.softmax(-1).topk(2)
        np.testing.assert_array_equal(trace.experts[:, layer], experts)
        np.testing.assert_allclose(trace.probs[:, layer], weights, atol=1e-3)


def test_a_batch_is_one_sequence_per_row_and_padding_is_left_out(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    trace = run(model, {"input_ids": IDS, "attention_mask": mask})
    assert trace.offsets.tolist() == [0, 4, 10]
    alone = run(model, {"input_ids": IDS[1:]})
    np.testing.assert_array_equal(trace.part(1).experts, alone.experts)
    right = mask.flip(1)
    assert run(model, {"input_ids": IDS, "attention_mask": right}).offsets.tolist() == [0, 4, 10]


def test_going_on_with_a_cache_adds_to_the_sequence_and_a_new_one_starts_another(model: Any) -> None:
    whole = run(model, {"input_ids": IDS[:1]})
    with record(model) as recorder, torch.inference_mode():
        cache = model(IDS[:1, :4], use_cache=True).past_key_values
        model(IDS[:1, 4:5], past_key_values=cache)
        model(IDS[:1, 5:], past_key_values=cache)
        assert recorder.trace().offsets.tolist() == [0, 6]
        np.testing.assert_array_equal(recorder.trace().experts, whole.experts)
        model(IDS[:1, :3])
        model(IDS[:1, :2], use_cache=False)
        assert recorder.trace().offsets.tolist() == [0, 6, 9, 11]
    model(IDS[:1])  # after the block nothing is recorded
    assert len(recorder.trace()) == 11


def test_generate_is_one_sequence(model: Any) -> None:
    with record(model) as recorder:
        model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert recorder.trace().offsets.tolist() == [0, 9]  # the last token is not run


def test_the_recorder_sees_a_model_with_its_experts_on_disk(tiny: Tiny, model: Any) -> None:
    from moedge.runtime.lm import load

    with load(tiny("qwen3_moe")) as lm:
        np.testing.assert_array_equal(
            run(lm.model, {"input_ids": IDS[:1]}).experts, run(model, {"input_ids": IDS[:1]}).experts
        )


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe"])
def test_of_an_encoder_decoder_each_token_has_the_layers_that_it_passes(tiny: Tiny, model_type: str) -> None:
    model = stock(tiny(model_type))
    trace = run(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]})
    assert trace.offsets.tolist() == [0, 9, 18]
    assert trace.experts.dtype == np.int16
    inside = [layer.experts.removeprefix("model.").startswith("encoder") for layer in dissect(model).layers]
    for sequence in trace.sequences():
        assert (sequence.experts[:6, inside] >= 0).all()
        assert (sequence.experts[6:, inside] == -1).all()
        assert (sequence.experts[:6, np.invert(inside)] == -1).all()
        assert (sequence.experts[6:, np.invert(inside)] >= 0).all()
    with record(model) as recorder:
        model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert np.diff(recorder.trace().offsets).tolist() == [10, 8, 8]


def test_beam_search_and_masks_without_tokens_are_refused(model: Any) -> None:
    with record(model), torch.inference_mode():
        cache = model(IDS[:1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(DataError, match="2 rows follows 1"):
            model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(DataError, match=r"\[batch, tokens\] only"):
            model(IDS, attention_mask=torch.zeros(2, 1, 6, 6))


def _layer(modular: bool, top_k: int = 2) -> MoeLayer:
    return MoeLayer(0, "experts", "", "router", None, 4, top_k, ExpertKind(True, False, False, False, modular), {})


def test_ids_beyond_the_experts_mean_none() -> None:
    experts, weights = choices(_layer(False), torch.tensor([[1, 4], [0, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    assert experts.tolist() == [[1, -1], [0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.0], [0.6, 0.4]]))


def test_a_token_over_capacity_has_no_expert() -> None:
    mask = torch.tensor([[[0, 0, 1, 0]], [[0, 0, 0, 0]]])  # [T, 1, E]
    experts, weights = choices(_layer(True, top_k=1), mask, torch.tensor([[0.9], [0.8]]))
    assert experts.tolist() == [[2], [-1]]
    torch.testing.assert_close(weights, torch.tensor([[0.9], [0.0]]))
    dense = torch.tensor([[0.0, 0.7, 0.0, 0.3], [0.0, 0.0, 0.0, 1.0]])  # [T, E]
    experts, weights = choices(_layer(True), (dense > 0.5).long(), dense)
    assert experts[0].tolist() == [1, 3]
    assert experts[1, 0].item() == 3
    assert experts[1, 1].item() == -1


def test_a_layer_that_routes_other_tokens_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = choices
    monkeypatch.setattr(moedge.models.recorder, "choices", lambda *args: tuple(tensor[:-1] for tensor in real(*args)))
    with record(model), pytest.raises(DataError, match="routed 5 tokens of 6"):
        model(IDS[:1])
