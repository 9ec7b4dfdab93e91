"""Attention and decoder layers in C: they give what the modules give, for whom, and when they step aside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ALL
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from moedge import LM, load
from moedge.errors import ModelError
from moedge.models.recorder import record
from moedge.models.trace import RoutingTrace
from moedge.native import library as native
from moedge.runtime import fast
from moedge.runtime.attention import FastAttention, put_fast_attention
from moedge.runtime.decoder_layer import FastDecoderLayer
from moedge.runtime.formats import Format
from moedge.runtime.growing import let_grow
from moedge.runtime.linear import FastLinear
from moedge.runtime.pack import pack
from moedge.runtime.session import Session

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")
Tiny = Callable[..., Path]
IDS = [5, 9, 3, 7, 2, 8, 11, 4]
WHOLE_LAYERS = {"qwen3_moe", "olmoe", "mixtral", "granitemoe", "mellum", "gpt_oss"}
ATTENTION = WHOLE_LAYERS | {
    "qwen2_moe",
    "phimoe",
    "glm4_moe",
    "dots1",
    "flex_olmo",
    "hy_v3",
    "minimax_m2",
    "solar_open",
}


@pytest.fixture
def packed(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    def make(model_type: str = "qwen3_moe", bits: int = 8, backbone: int = 8, **overrides: Any) -> Path:
        out = tmp_path / f"{model_type}-{bits}-{backbone}"
        if not out.exists():
            pack(tiny(model_type, **overrides), out, Format(f"int{bits}"), backbone=backbone)
        return out

    return make


def fast_ones(model: nn.Module, kind: type) -> list[Any]:
    return [module.forward for module in model.modules() if isinstance(module.__dict__.get("forward"), kind)]


def take_off(model: nn.Module) -> None:
    """Every module computes by itself from now on."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FastAttention | FastDecoderLayer | FastLinear):
            del module.forward


def decoded(lm: LM, ids: list[int] = IDS) -> Tensor:
    """Logits [n, V] of all but the first three of `ids`, each read alone."""
    session = Session(lm)
    session.begin(ids[:3])
    return torch.stack([session.push(token) for token in ids[3:]])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[int]]:
    """How often a function of the library is called."""
    calls, real = [], getattr(native.Library, name)
    with monkeypatch.context() as patch:
        patch.setattr(native.Library, name, lambda *args: (calls.append(1), real(*args))[1])
        yield calls


@pytest.mark.parametrize("model_type", ALL)
def test_any_model_decodes_as_its_modules_do(model_type: str, packed: Callable[..., Path]) -> None:
    with load(packed(model_type), dtype="fp32") as lm:
        layers = lm.anatomy.num_layers
        assert len(fast_ones(lm.model, FastDecoderLayer)) == (layers if model_type in WHOLE_LAYERS else 0)
        assert len(fast_ones(lm.model, FastAttention)) >= layers or model_type not in ATTENTION
        if lm.model.config.is_encoder_decoder:
            assert len(list(lm.generate(IDS, 2))) == 2
            return
        found = decoded(lm)
        take_off(lm.model)
        assert difference(found, decoded(lm)) < 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("bits", "backbone"), [(8, 16), (4, 4), (4, 16)])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "qwen2_moe"])
def test_stored_otherwise(
    model_type: str, bits: int, backbone: int, dtype: str, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(packed(model_type, bits, backbone), dtype=dtype) as lm:
        name = "attend_and_route" if model_type in WHOLE_LAYERS else "attend"
        with counted(monkeypatch, name) as calls:
            found = decoded(lm)
        assert len(calls) == lm.anatomy.num_layers * (len(IDS) - 3)
        take_off(lm.model)
        assert difference(found, decoded(lm)) < (0.03 if dtype == "fp32" else 0.1)  # 4 bits round their inputs


@pytest.mark.parametrize("tokens", [5, 8, 300])
def test_sinks_and_windows(tokens: int, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss: every other layer sees the last few tokens only, and a mask of zeros comes with each token."""
    ids = torch.randint(3, 60, (tokens + 3,), generator=torch.Generator().manual_seed(0)).tolist()
    with load(packed("gpt_oss", sliding_window=5), dtype="fp32") as lm:
        with counted(monkeypatch, "attend_and_route") as calls:
            found = decoded(lm, ids)
        assert len(calls) == lm.anatomy.num_layers * tokens
        take_off(lm.model)
        assert difference(found, decoded(lm, ids)) < 1e-3


def test_a_mask_that_hides_something_is_heeded(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(packed("gpt_oss"), dtype="fp32") as lm, torch.inference_mode():
        cache = lm.model(torch.tensor([IDS[:4]])).past_key_values
        let_grow(cache)
        padding = torch.tensor([[0, 1, 1, 1, 1]])
        with counted(monkeypatch, "attend_and_route") as calls:
            lm.model(torch.tensor([IDS[4:5]]), past_key_values=cache, attention_mask=padding)
        assert not calls


def test_a_limit_changes_no_bit(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed()
    with load(folder) as lm:
        expected, plan = decoded(lm), lm.plan
    small = replace(plan, capacities=tuple(2 for _ in plan.capacities))
    monkeypatch.setattr("moedge.runtime.lm.make_plan", lambda *_, **__: small)
    with load(folder) as lm, counted(monkeypatch, "attend_and_route") as calls:
        assert lm.store.counters.misses == 0
        assert torch.equal(decoded(lm), expected)
        assert lm.store.counters.misses > 20
        assert calls


def test_the_threads_change_no_bit(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(fast, "calibrated", lambda *_, threads=threads: {threads: (0.0, 1.0)})
        with load(packed()) as lm:
            found.append(decoded(lm))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_after_going_back_in_the_text(packed: Callable[..., Path]) -> None:
    with load(packed()) as lm:
        session = Session(lm)
        session.begin(IDS)
        session.push(6)
        again = session.begin(IDS[:5])
        torch.testing.assert_close(again, decoded(lm, IDS[:5])[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(session.push(7), decoded(lm, [*IDS[:5], 7])[-1], rtol=1e-4, atol=1e-4)


def test_who_watches_a_part_sees_it(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(packed()) as lm:
        with counted(monkeypatch, "attend_and_route") as calls, record(lm.model) as recorder:
            list(lm.generate(IDS, 4, temperature=0))
        trace: RoutingTrace = recorder.trace()
        assert trace.experts.shape[:2] == (len(IDS) + 3, lm.anatomy.num_layers)
        assert not calls
        with counted(monkeypatch, "attend_and_route") as calls:
            list(lm.generate(IDS, 4, temperature=0))
        assert len(calls) == 3 * lm.anatomy.num_layers


def test_an_adapter_on_attention_is_not_passed_by(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(packed(backbone=16)) as lm:
        plain = decoded(lm)
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(lm.model, config)
        with counted(monkeypatch, "attend_and_route") as calls, counted(monkeypatch, "attend") as alone:
            adapted = decoded(lm)
        assert not calls
        assert not alone
        assert difference(adapted, plain) > 0.01
        take_off(lm.model)
        assert difference(adapted, decoded(lm)) < 1e-3


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_weights_that_moved_or_changed_are_followed(model_type: str, packed: Callable[..., Path]) -> None:
    with load(packed(model_type, backbone=16), dtype="fp32") as lm:
        before = decoded(lm)
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                grown = parameter.clone() * (2 if "q_proj" in name or "layernorm" in name else 1)
                parameter.data = grown
        found = decoded(lm)
        assert difference(found, before) > 0.01
        take_off(lm.model)
        assert difference(found, decoded(lm)) < 1e-3
        lm.model.to(torch.bfloat16)
        assert decoded(lm).dtype == torch.bfloat16


def test_gradients_and_batches_go_the_long_way(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(packed()) as lm, counted(monkeypatch, "attend_and_route") as calls:
        cache = lm.model(torch.tensor([IDS[:3]] * 2)).past_key_values
        let_grow(cache)
        with torch.no_grad():
            both = lm.model(torch.tensor([[IDS[3]]] * 2), past_key_values=cache).logits[:, 0]
        assert not calls
        torch.testing.assert_close(both[0], decoded(lm)[0], rtol=1e-4, atol=1e-4)
        calls.clear()
        cache = lm.model(torch.tensor([IDS[:3]])).past_key_values
        let_grow(cache)
        embedded = lm.model.get_input_embeddings()(torch.tensor([[IDS[3]]])).detach().requires_grad_()
        lm.model(inputs_embeds=embedded, past_key_values=cache).logits.sum().backward()
        assert embedded.grad is not None
        assert not calls


def test_stock_generate_gives_the_same_text(packed: Callable[..., Path]) -> None:
    with load(packed(), dtype="fp32") as lm:
        stock = lm.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, len(IDS) :].tolist()
        assert [step.token for step in lm.generate(IDS, 6, temperature=0)] == stock


def test_a_closed_model_says_so(packed: Callable[..., Path]) -> None:
    lm = load(packed())
    session = Session(lm)
    session.begin(IDS)
    lm.close()
    with pytest.raises(ModelError, match="closed"):
        session.push(3)


def test_numbers_that_are_none_choose_distinct_experts(packed: Callable[..., Path]) -> None:
    with load(packed(), dtype="fp32") as lm, torch.inference_mode():
        layer = fast_ones(lm.model, FastDecoderLayer)[0]
        cache = DynamicCache()
        heads, size = layer.attention._heads[1:]
        cache.update(torch.zeros(1, heads, 2, size), torch.zeros(1, heads, 2, size), 0)
        let_grow(cache)
        x = torch.full((1, 1, lm.model.config.hidden_size), float("nan"))
        half = torch.ones(1, 1, layer.attention.rotated)
        routed = layer.route(cache.layers[0], x, (half, half))
        assert routed.experts == sorted(set(routed.experts))
        assert len(routed.experts) == lm.model.config.num_experts_per_tok


class Capped(LlamaAttention):
    """Cuts large queries off, which a small token does not show."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output.clamp(-3, 3), weights


class Cooled(LlamaAttention):
    """Scales by the position, from a thousand on."""

    def forward(self, hidden_states: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output * (1 + 0.1 * (position_ids[0, 0] >= 1000)), weights


@pytest.mark.parametrize(("kind", "fits"), [(LlamaAttention, 1), (Capped, 0), (Cooled, 0)])
def test_attention_that_computes_otherwise_is_left_alone(kind: Any, fits: int) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    attention = kind(LlamaConfig(**sizes, attn_implementation="sdpa", attention_bias=True), 1).eval()
    model = nn.ModuleDict({"attention": attention})
    assert put_fast_attention(model, LIBRARY, {1: (0.0, 1.0)}) == fits


def test_only_angles_as_the_model_gives_them_are_taken(packed: Callable[..., Path]) -> None:
    with load(packed(), dtype="fp32") as lm, torch.inference_mode():
        attention = fast_ones(lm.model, FastDecoderLayer)[0].attention
        cache = DynamicCache()
        heads, size = attention._heads[1:]
        cache.update(torch.zeros(1, heads, 2, size), torch.zeros(1, heads, 2, size), 0)
        let_grow(cache)
        x, right = torch.ones(1, 1, lm.model.config.hidden_size), torch.ones(1, 1, attention.angles)

        def taken(*rotation: torch.Tensor) -> bool:
            return attention.cache(x, {"past_key_values": cache, "position_embeddings": rotation}) is not None

        assert taken(right, right)
        plain = DynamicCache()  # as transformers makes it: it does not grow in place
        plain.update(torch.zeros(1, heads, 2, size), torch.zeros(1, heads, 2, size), 0)
        assert attention.cache(x, {"past_key_values": plain, "position_embeddings": (right, right)}) is None
        assert not taken(right.double(), right)
        assert not taken(right, right[:, :, 1:].contiguous())
        assert not taken(right, torch.ones(1, 1, 2 * attention.angles)[:, :, ::2])
