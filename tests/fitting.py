"""What tests of fits share: experts to keep, the stock model of a folder, its logits, samples, and a full model that
may not route to the experts that are not kept."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from moedge.models.anatomy import dissect
from moedge.models.architecture import text_class

FAMILIES = (
    *("qwen3_moe", "olmoe", "mixtral", "granitemoe", "qwen2_moe", "gpt_oss", "deepseek_v3", "switch_transformers"),
    *("gemma4_text", "zaya"),  # a scale for each expert; a router that may skip the layer
)


WORDS = ("sea", "moon", "lamp", "tree", "bird", "stone")


def questions(path: Path, count: int = 12, mark: str = "?") -> Path:
    """A file of questions with two choices, all of the same few words; of another `mark`, other questions."""
    pairs = [(one, other) for one in WORDS for other in WORDS if one != other][:count]
    rows = [{"prompt": f"{a} {b}{mark}", "answer": f" {b}", "choices": [f" {a}", f" {b}"]} for a, b in pairs]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def halves(layers: int) -> list[tuple[int, ...]]:
    """Four of eight experts for each layer, two from each half, as two groups need it; other ones in each layer."""
    return [((0, 2, 5, 7), (1, 3, 4, 6), (0, 3, 5, 6))[layer % 3] for layer in range(layers)]


def stock(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model as transformers loads it."""
    config = AutoConfig.from_pretrained(folder)
    eager = {} if config.is_encoder_decoder else {"experts_implementation": "eager"}
    return text_class(config).from_pretrained(folder, dtype=dtype or "auto", **eager).eval()


def logits_of(model: Any) -> torch.Tensor:
    """Of two rows of eleven tokens."""
    ids = torch.randint(3, 280, (2, 11), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids[:, 4:]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        value: torch.Tensor = model(input_ids=ids, **more).logits
    return value


@contextmanager
def only(model: Any, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """A full stock model whose routers give every expert that is not kept the logit -inf, before all else.

    A correction bias, which is added to what a sigmoid made of the logits, is -inf as well.
    """
    dropped: dict[int, list[int]] = {}
    for layer, each in zip(dissect(model).layers, kept, strict=True):
        gone = [expert for expert in range(layer.num_experts) if expert not in each]
        sizes = (layer.num_experts, layer.num_experts + 1)  # the last row skips the layer, in Zaya
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in tensors.items():
            if name.startswith(f"{layer.router}.") and name.endswith("e_score_correction_bias"):
                tensor.data[..., gone] = -torch.inf
            elif name.startswith(f"{layer.router}.") and tensor.dim() == 2 and len(tensor) in sizes:
                dropped[id(tensor)] = gone
    with torch.no_grad(), _Masked(dropped):
        yield


class _Masked(TorchFunctionMode):
    def __init__(self, dropped: Mapping[int, list[int]]) -> None:
        self._dropped = dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        gone = self._dropped.get(id(args[1])) if func is torch.nn.functional.linear and len(args) > 1 else None
        return out if gone is None else out.index_fill(-1, torch.tensor(gone), -torch.inf)
