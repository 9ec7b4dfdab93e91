"""`moedge info`: what a checkpoint is, from its config and headers; no weights are read."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from moedge.terminal import json_option, print_json
from moedge.units import format_size

if TYPE_CHECKING:
    from moedge.models.load import Blueprint

EXAMPLES = """\b
Examples:
  moedge info ./OLMoE-1B-7B
  moedge info allenai/OLMoE-1B-7B-0924 --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("--dtype", help="fp32, bf16 or fp16 for the sizes in memory; by default the checkpoint's own.")
@json_option
def command(model: str, dtype: str | None, as_json: bool) -> None:
    """Describe a checkpoint: layers, experts, router, sizes, tokenizer. Loads no weights.

    MODEL is a folder, a hub cache folder or a hub id.
    """
    from moedge.models.hub import resolve
    from moedge.models.load import draw

    blueprint = draw(resolve(model), dtype)
    try:
        facts = describe(blueprint)
    finally:
        blueprint.checkpoint.close()
    if as_json:
        print_json({"model": model} | facts)
    else:
        _print_table(model, facts)


def describe(blueprint: "Blueprint") -> dict[str, Any]:
    """The facts that `moedge info --json` prints. Sizes in bytes, parameters as counts."""
    anatomy = blueprint.anatomy
    first = anatomy.layers[0]
    backbone = sum(p.numel() for p in set(blueprint.meta.parameters())) - anatomy.expert_parameters
    return {
        "architecture": anatomy.architecture,
        "model_type": blueprint.config.model_type,
        "dtype": str(blueprint.dtype).removeprefix("torch."),
        "parameters": backbone + anatomy.expert_parameters,
        "active_parameters": backbone + sum(layer.top_k * layer.expert_parameters for layer in anatomy.layers),
        "layers": _count_layers(blueprint),
        "moe_layers": anatomy.num_layers,
        "num_experts": max(layer.num_experts for layer in anatomy.layers),
        "experts_per_layer": [layer.num_experts for layer in anatomy.layers],
        "top_k": max(layer.top_k for layer in anatomy.layers),
        "expert_kind": {name: getattr(first.kind, name) for name in first.kind.__dataclass_fields__},
        "expert_parameters": {name: list(shape) for name, (shape, _) in first.parameters.items()},
        "shared_experts": first.shared is not None,
        "encoder_decoder": anatomy.encoder_decoder,
        "backbone_bytes": blueprint.backbone_bytes,
        "experts_bytes": anatomy.expert_bytes,
        "expert_bytes": max(layer.expert_bytes for layer in anatomy.layers),
        "context": blueprint.max_context,
        "stored": _stored_bytes(blueprint),
        "packed": _packed(blueprint),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in sorted(blueprint.checkpoint.files)],
        "tokenizer": _tokenizer(blueprint),
    }


def _count_layers(blueprint: "Blueprint") -> int:
    """Dense and MoE layers of all stacks (encoder and decoder) that hold an MoE layer."""
    from torch.nn import ModuleList

    stacks: dict[str, int] = {}
    for layer in blueprint.anatomy.layers:
        parts = layer.block.split(".")
        for end in range(len(parts)):
            path = ".".join(parts[:end])
            if isinstance(module := blueprint.meta.get_submodule(path), ModuleList):
                stacks[path] = len(module)
                break
    return sum(stacks.values())


def _stored_bytes(blueprint: "Blueprint") -> dict[str, dict[str, int]]:
    """Bytes in the files by number format, of the backbone and of the experts."""
    stored: dict[str, dict[str, int]] = {}
    for info in blueprint.checkpoint.stored.values():
        row = stored.setdefault(str(info.dtype).removeprefix("torch."), {"backbone": 0, "experts": 0})
        row["experts" if info.name in blueprint.experts.tensors else "backbone"] += info.nbytes
    return stored


def _packed(blueprint: "Blueprint") -> dict[str, Any] | None:
    """The number formats of a pack's experts, and the kernels that compute them here; None for another checkpoint."""
    from moedge.models.pack import PackedCheckpoint
    from moedge.native import library

    if not isinstance(blueprint.checkpoint, PackedCheckpoint):
        return None
    layers = blueprint.checkpoint.manifest.layers
    formats = sorted(
        {"bf16-12" if layer.short else tensor.format for layer in layers for tensor in layer.tensors.values()}
    )
    kernels = library.load() if any(name != "plain" for name in formats) else None
    return {"formats": formats, "kernels": kernels and kernels.variant}


def _tokenizer(blueprint: "Blueprint") -> dict[str, Any] | None:
    from moedge.models.load import load_tokenizer

    tokenizer = load_tokenizer(blueprint.folder)
    if tokenizer is None:
        return None
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }


def _print_table(model: str, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}, {facts['architecture']}", title_justify="left", show_header=False)
    for name, value in _lines(facts):
        table.add_row(name, value)
    Console().print(table)


def _lines(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    total, active = facts["parameters"], facts["active_parameters"]
    yield "parameters", f"{_count(total)}, {_count(active)} of them for each token"
    yield "layers", f"{facts['layers']}, {facts['moe_layers']} of them with experts"
    yield "experts", f"{_range(facts['experts_per_layer'])} a layer, {facts['top_k']} for each token"
    kind = [
        name if value else f"not {name}" for name, value in facts["expert_kind"].items() if value or name == "gated"
    ]
    yield "kind of expert", ", ".join(kind)
    yield "one expert", ", ".join(f"{name} {shape}" for name, shape in facts["expert_parameters"].items())
    yield "shared experts", "yes" if facts["shared_experts"] else "no"
    expert = f"{format_size(facts['expert_bytes'])} each"
    yield (
        f"in memory ({facts['dtype']})",
        (f"backbone {format_size(facts['backbone_bytes'])}, experts {format_size(facts['experts_bytes'])}, {expert}"),
    )
    for dtype, row in facts["stored"].items():
        yield f"stored ({dtype})", f"backbone {format_size(row['backbone'])}, experts {format_size(row['experts'])}"
    if packed := facts["packed"]:
        by = f"C kernels ({packed['kernels']})" if packed["kernels"] else "torch"
        yield "packed", f"experts in {', '.join(packed['formats'])}, computed by {by}"
    yield "files", f"{len(facts['files'])} of {format_size(sum(file['bytes'] for file in facts['files']))} together"
    yield "context", "not stated" if facts["context"] is None else f"{facts['context']} tokens"
    yield "tokenizer", _tokenizer_line(facts["tokenizer"])


def _tokenizer_line(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    template = "with" if tokenizer["chat_template"] else "without"
    return f"{tokenizer['class']}, {tokenizer['vocabulary']} tokens, {template} chat template"


def _range(values: list[int]) -> str:
    return str(min(values)) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _count(number: int) -> str:
    """`"6.92 B"`: three significant digits."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
