"""Where the experts of a model are: every MoE layer's router, experts, shared experts, top-k and kind of expert.

Works on loaded and on meta models. Knows modules, shapes and dtypes, never weights. No line per architecture:
`use_experts_implementation` of transformers marks the experts modules of all families but Switch Transformers and
NLLB-MoE, and these hold one module per expert.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from moedge.errors import ModelError

_DECORATED = (
    "has_gate",
    "has_bias",
    "has_post_expert_norm",
    "is_transposed",
    "is_concatenated",
)  # set by the decorator
_TOP_K = ("top_k", "topk", "moe_topk", "moe_top_k", "num_experts_per_tok", "top_k_experts", "router_top_k")
_TOP_K_IN_NAME = re.compile(r"Top(\d+)")


@dataclass(frozen=True)
class ExpertKind:
    """How an expert computes: gate and up (or up only), biases, weights as [in, out], gate and up rows alternating."""

    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    modular: bool  # one nn.Module per expert, not one tensor for all


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer. `experts`, `block`, `router` and `shared` are module paths in `model.named_modules()`."""

    index: int  # position among the MoE layers, dense layers not counted
    experts: str
    block: str  # the module that holds the router and the experts
    router: str
    shared: str | None
    num_experts: int
    top_k: int
    kind: ExpertKind
    parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of one expert: no expert axis

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the model's dtype."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.parameters.values())

    @property
    def expert_parameters(self) -> int:
        """Numbers in one expert."""
        return sum(prod(shape) for shape, _ in self.parameters.values())


@dataclass(frozen=True)
class Anatomy:
    """The MoE layers of a model in the order in which it runs them."""

    architecture: str
    layers: tuple[MoeLayer, ...]
    encoder_decoder: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Numbers in all experts of all layers."""
        return sum(layer.num_experts * layer.expert_parameters for layer in self.layers)


def dissect(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, loaded or on the meta device.

    A model whose expert parameters moedge took out carries the anatomy that it had before. Raises ModelError for a
    model without experts, or whose experts are of a kind that moedge cannot take out.
    """
    recorded = getattr(model, "_moedge_anatomy", None)
    if isinstance(recorded, Anatomy):
        return recorded
    modules = dict(model.named_modules())
    found = [path for path, module in modules.items() if is_experts(module)]
    if not found:
        raise _no_experts(model, modules)
    layers = tuple(_layer(index, path, modules, model) for index, path in enumerate(found))
    return Anatomy(type(model).__name__, layers, bool(getattr(model.config, "is_encoder_decoder", False)))


def decoder_layer(modules: Mapping[str, nn.Module], layer: MoeLayer) -> str:
    """Path of the element of the outermost ModuleList that holds the MoE block: `model.layers.3`."""
    names = layer.block.split(".")
    for end in range(1, len(names)):
        if isinstance(modules[".".join(names[:end])], nn.ModuleList):
            return ".".join(names[: end + 1])
    return layer.block


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the routed experts of a layer: decorated by transformers, or a ModuleDict of experts."""
    return _is_decorated(module) or _is_modular(module)


def expert_modules(experts: nn.Module) -> dict[str, nn.Module]:
    """The modules of the experts of a family that has one per expert, in order. NLLB keeps a dropout among them."""
    return {name: child for name, child in experts.named_children() if name.startswith("expert_")}


def _is_decorated(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _DECORATED)


def _is_modular(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) and hasattr(module, "num_experts") and "expert_0" in module


def _layer(index: int, path: str, modules: Mapping[str, nn.Module], model: PreTrainedModel) -> MoeLayer:
    experts = modules[path]
    parameters, num_experts = _modular_shapes(experts) if _is_modular(experts) else _stacked_shapes(experts)
    if not parameters:
        raise ModelError(f"{path} of {type(model).__name__} has no expert parameters: load the model with moedge.load")
    block_path = path.rpartition(".")[0]
    block, router_name = modules[block_path], _router_name(modules[block_path])
    if router_name is None:
        raise ModelError(f"{block_path or 'the model'} of {type(model).__name__} has experts but no router beside them")
    router = modules[_join(block_path, router_name)]
    top_k = _top_k(router, block, experts, model)
    if top_k is None:
        raise ModelError(f"{type(model).__name__} does not say how many experts a token takes: no {', '.join(_TOP_K)}")
    return MoeLayer(
        index=index,
        experts=path,
        block=block_path,
        router=_join(block_path, router_name),
        shared=_shared(block_path, modules),
        num_experts=num_experts,
        top_k=top_k,
        kind=_kind(experts, parameters),
        parameters=parameters,
    )


def _stacked_shapes(experts: nn.Module) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], int]:
    """One tensor for all experts, expert axis first. Parameters of submodules (post_expert_norm) serve all experts."""
    own = dict(experts.named_parameters(recurse=False))
    counts = {parameter.shape[0] for parameter in own.values()}
    if len(counts) > 1:
        raise ModelError(f"{type(experts).__name__} has parameters of {sorted(counts)} experts: not a stack of experts")
    return {name: (tuple(p.shape[1:]), p.dtype) for name, p in own.items()}, next(iter(counts), 0)


def _modular_shapes(experts: nn.Module) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], int]:
    assert isinstance(experts, nn.ModuleDict)
    each = expert_modules(experts)
    return {name: (tuple(p.shape), p.dtype) for name, p in each["expert_0"].named_parameters()}, len(each)


def _kind(experts: nn.Module, parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> ExpertKind:
    if _is_modular(experts):
        matrices = sum(len(shape) == 2 for shape, _ in parameters.values())
        biased = any(name.endswith("bias") for name in parameters)
        return ExpertKind(gated=matrices > 2, biased=biased, transposed=False, interleaved=False, modular=True)
    return ExpertKind(
        gated=bool(experts.has_gate),
        biased=bool(experts.has_bias),
        transposed=bool(experts.is_transposed),
        interleaved=not experts.is_concatenated,
        modular=False,
    )


def _router_name(block: nn.Module) -> str | None:
    """The child that routes: called router or gate, or of a class that says so."""
    children = dict(block.named_children())
    for name in ("router", "gate"):
        if name in children:
            return name
    return next((name for name, child in children.items() if "Router" in type(child).__name__), None)


def _shared(block_path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The experts that every token takes: in the block, or beside it in the decoder layer (Granite)."""
    for path in (block_path, block_path.rpartition(".")[0]):
        for name, _ in modules[path].named_children():
            if name.startswith("shared_") and "gate" not in name:
                return _join(path, name)
    return None


def _top_k(router: nn.Module, block: nn.Module, experts: nn.Module, model: PreTrainedModel) -> int | None:
    """How many experts a token takes: the router says it, or the config that it was made from, or its class's name."""
    for module in (router, block, experts):
        for holder in (module, getattr(module, "config", None)):
            for name in _TOP_K:
                if isinstance(value := getattr(holder, name, None), int):
                    return value
    if match := _TOP_K_IN_NAME.search(type(router).__name__):  # SwitchTransformersTop1Router, NllbMoeTop2Router
        return int(match[1])
    text_config = model.config.get_text_config()
    return next((v for name in _TOP_K if isinstance(v := getattr(text_config, name, None), int)), None)


def _no_experts(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> ModelError:
    name = type(model).__name__
    if any(path.rpartition(".")[2] == "experts" for path in modules):
        return ModelError(
            f"{name} has experts, but not of a kind that can be left on disk (transformers does not mark them with "
            f"use_experts_implementation): use a newer transformers or another architecture"
        )
    return ModelError(
        f"{name} is dense: it has no experts to leave on disk. moedge runs Mixture-of-Experts models; "
        f"run a dense one with transformers itself"
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
