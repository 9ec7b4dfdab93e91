"""Every architecture whose experts transformers marks, and the two with a module per expert: what dissect says is true.

The truth comes from running the stock model with hooks on its experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ALL, MULTIMODAL, NOT_TRIED, REFUSED, decorated
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from moedge.errors import ModelError
from moedge.models.anatomy import dissect
from moedge.models.architecture import meta_model, text_class
from moedge.models.load import draw

Tiny = Callable[..., Path]


def test_every_decorated_architecture_is_covered_or_listed_with_a_reason() -> None:
    covered = {name.removesuffix("_text") for name in ALL + MULTIMODAL}
    assert decorated() - covered - set(REFUSED) - set(NOT_TRIED) == set()


@pytest.mark.parametrize("model_type", ALL)
def test_dissect_agrees_with_the_running_model(model_type: str, tiny: Tiny) -> None:
    folder = tiny(model_type)
    config = AutoConfig.from_pretrained(folder)
    model = text_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, int] = {}  # path of experts -> experts per token
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda m, args, path=path: seen.update({path: _experts_per_token(m, args)})
            )
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(input_ids=ids, **inputs).logits
    assert logits.isfinite().all()

    anatomy = dissect(model)
    assert anatomy.architecture == type(model).__name__
    assert anatomy.num_layers >= 2
    assert [layer.index for layer in anatomy.layers] == list(range(anatomy.num_layers))
    assert {layer.experts: layer.top_k for layer in anatomy.layers} == seen
    parameters = dict(model.named_parameters())
    for layer in anatomy.layers:
        bank = {
            n: p for n, p in parameters.items() if n.startswith(f"{layer.experts}.") and "post_expert_norm" not in n
        }
        assert layer.num_experts == 8
        assert layer.num_experts * layer.expert_bytes == sum(p.numel() * 4 for p in bank.values())
        model.get_submodule(layer.router)
        if layer.shared is not None:
            assert isinstance(model.get_submodule(layer.shared), nn.Module)
    assert dissect(meta_model(folder, torch.float32)) == anatomy


def _experts_per_token(module: nn.Module, args: tuple[Any, ...]) -> int:
    _, index, weights = args
    if not isinstance(module, nn.ModuleDict):
        return int(index.shape[-1])
    if index.dim() == 3:  # Switch Transformers: one-hot over experts
        return int(index.sum(-1).max())
    return int((weights > 0).sum(-1).max())  # NLLB-MoE: weights over experts


@pytest.mark.parametrize("model_type", sorted(set(REFUSED) - {"ernie4_5_vl_moe"}))
def test_what_answers_no_text_is_refused(model_type: str) -> None:
    config: Any = CONFIG_MAPPING[model_type]()
    with pytest.raises(ModelError, match=r"no text model|does not predict"):
        text_class(config)


def test_experts_that_are_stored_mixed_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="stored mixed"):
        draw(tiny("ernie4_5_vl_moe"))
