"""Who may take how many bytes of the limit: process, backbone, context, activations, read buffers, expert slots.

One estimator: `moedge plan` prints what `moedge.load` enforces. Everything but the slots is estimated from the meta
model and from this process; the slots get the rest. Knows sizes, reads no weights.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moedge.errors import ContextError, MemoryLimitError, ModelError
from moedge.models.expert_map import largest
from moedge.models.lean import forget_code
from moedge.models.load import Blueprint
from moedge.models.packed_experts import PackedExperts
from moedge.models.shorten import compact_bytes
from moedge.runtime.device import private_memory, process_memory, return_freed_memory
from moedge.runtime.extents import SCRATCH
from moedge.runtime.growing import bytes_beyond_windows
from moedge.runtime.reader import BLOCK
from moedge.runtime.store import READ_THREADS
from moedge.units import format_size, whole_pages

DEFAULT_CONTEXT = 2048  # tokens, where a limit is given and no context
FILES = 36 << 20  # pages of libraries that running keeps coming back to, else it waits for them all the time
KERNEL = 8 << 20  # page tables and the like, which count in a control group's limit
PRODUCTS = 12 << 20  # what oneDNN keeps for KEPT_PRODUCTS shapes of products in half precision
LATER = 2 << 20  # what running adds to the process's own memory after planning
EACH_THREAD, EACH_LAYER = 2 << 20, 1 << 18  # and for each its stack and BLAS buffers, its cache's memory of past events
LOGITS = 16 << 20  # the most reserved for logits, unless those of four tokens take more
ACTIVATION_COPIES = 14  # hidden-size tensors alive at once in one decoder layer, with room for the allocator


@dataclass(frozen=True)
class Row:
    """One line of the plan: `nbytes` for `name`, and where the figure comes from."""

    name: str
    nbytes: int
    basis: str


@dataclass(frozen=True)
class Plan:
    """How a memory limit is spent. `capacities[l]`: experts of layer l that stay in memory between tokens."""

    limit: int | None
    rows: tuple[Row, ...]
    capacities: tuple[int, ...]
    num_experts: tuple[int, ...]
    spare: int  # slots besides, for reads under way
    slot_bytes: int  # of each expert that stays
    short: bool  # whether these are kept in fewer bits than they are read in
    context: int | None
    parallel: int
    prefill_chunk: int
    logits_bytes: int | None  # None: not limited

    @property
    def total(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def resident_share(self) -> float:
        """Share of all experts that have a slot."""
        return sum(self.capacities) / sum(self.num_experts)

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, sizes in bytes."""
        return asdict(self) | {"total": self.total, "resident_share": self.resident_share}


def make_plan(
    blueprint: Blueprint,
    limit: int | None = None,
    context: int | None = None,
    parallel: int = 1,
    prefill_chunk: int = 512,
) -> Plan:
    """Share out `limit` bytes for the whole process (None: nothing is limited and every expert gets a slot).

    `context` is in tokens for each of `parallel` sequences. Raises MemoryLimitError when one layer's top-k experts do
    not fit, ContextError when the model has no such context.
    """
    layers = blueprint.anatomy.layers
    context = _checked_context(blueprint, limit, context, parallel)
    stride = whole_pages(blueprint.experts.slot_bytes)
    spare = max(layer.top_k for layer in layers)
    slot, short = stride, False
    counts = tuple(layer.num_experts for layer in layers)
    if limit is not None:
        return_freed_memory()
    started, _ = process_memory()
    if limit is not None:
        forget_code()
    limited = limit is not None
    fixed = _fixed_rows(blueprint, context, parallel, prefill_chunk, limited) if limited or context else ()
    if limit is None:
        fixed = fixed or _fixed_rows(blueprint, 0, 0, prefill_chunk, limited)
        capacities = counts
    else:
        left = limit - sum(row.nbytes for row in fixed)
        if left < spare * stride:
            raise _too_little(limit, started, spare * stride, spare, fixed)
        if limit < started:
            taken = format_size(started)
            raise MemoryLimitError(
                f"starting took {taken}, more than --memory {format_size(limit)}: give at least {taken}"
            )
        capacities = share_slots(left // stride - spare, counts)
        if capacities != counts and (shorter := _shorter_slots(blueprint, stride)):
            working = min(spare, READ_THREADS + 2)  # one for each thread, one to compute with, one for a guess
            more = share_slots((left - working * stride) // shorter, counts)
            if sum(more) > sum(capacities):
                capacities, spare, slot, short = more, working, shorter, True
    return Plan(
        limit=limit,
        rows=(*fixed, _slots_row(sum(capacities), slot, spare, stride)),
        capacities=capacities,
        num_experts=counts,
        spare=spare,
        slot_bytes=slot,
        short=short,
        context=context,
        parallel=parallel,
        prefill_chunk=prefill_chunk,
        logits_bytes=None if limit is None else next(row.nbytes for row in fixed if row.name == "logits"),
    )


def _shorter_slots(blueprint: Blueprint, stride: int) -> int | None:
    """Bytes of a slot for experts in fewer bits, where they can be kept so."""
    experts = blueprint.experts
    found = None if experts.short else compact_bytes(experts, blueprint.checkpoint, stride)
    return None if found is None else whole_pages(found)


def _slots_row(stay: int, slot: int, spare: int, stride: int) -> Row:
    if slot == stride:
        basis = f"{stay + spare} of {format_size(stride)}, {spare} of them for reads under way"
    else:
        bits = f"{16 * slot / stride:.1f} bits a number (exact)"
        basis = f"{stay} of {format_size(slot)}, {bits}; {spare} of {format_size(stride)} for reads"
    return Row("expert slots", stay * slot + spare * stride, basis)


def share_slots(slots: int, num_experts: Sequence[int]) -> tuple[int, ...]:
    """`slots` over the layers as evenly as their numbers of experts allow."""
    capacities = [0] * len(num_experts)
    slots = min(slots, sum(num_experts))
    while slots > 0:
        open_layers = [i for i, count in enumerate(num_experts) if capacities[i] < count][:slots]
        room = min(num_experts[i] - capacities[i] for i in open_layers)
        each = max(1, min(room, slots // len(open_layers)))
        for i in open_layers:
            capacities[i] += each
        slots -= each * len(open_layers)
    return tuple(capacities)


def _checked_context(blueprint: Blueprint, limit: int | None, context: int | None, parallel: int) -> int | None:
    longest = blueprint.max_context
    if parallel < 1 or (context is not None and context < 1):
        raise ContextError(f"context {context} for {parallel} sequences: both must be at least 1")
    if context is not None and longest is not None and context > longest:
        raise ContextError(f"context {context} is more than the model's {longest} tokens: ask for at most that")
    if context is None and limit is not None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    return context


def _fixed_rows(blueprint: Blueprint, context: int | None, parallel: int, chunk: int, limited: bool) -> tuple[Row, ...]:
    """Everything that is not an expert slot."""
    now = private_memory()
    tokens = context or 0
    chunk = min(chunk, tokens) if tokens else chunk
    cache = context_bytes(blueprint, tokens) * parallel if tokens else 0
    scratch = blueprint.experts.conversion_bytes
    return (
        Row(
            "process",
            now + (adds := later(blueprint.anatomy.num_layers, blueprint.dtype)),
            f"{format_size(now)} measured now, {format_size(adds)} for libraries' pages and what running adds",
        ),
        _backbone_row(blueprint, limited),
        Row("context", cache, f"{tokens} tokens for {parallel}, cache of the model run on the meta device"),
        Row(
            "activations",
            activation_bytes(blueprint, chunk, tokens) + _coded_bytes(blueprint, chunk) + _restored_bytes(blueprint),
            f"estimate for a prefill chunk of {chunk} tokens",
        ),
        Row("logits", logits_bytes(blueprint, tokens * parallel), "for inputs scored at once"),
        Row(
            "read buffers",
            READ_THREADS * (BLOCK + scratch),
            f"{READ_THREADS} threads of {format_size(BLOCK + scratch)}",
        ),
    )


def later(layers: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes beside the process's own now: libraries' pages, the kernel's share, and what running adds."""
    in_onednn = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    products = PRODUCTS if in_onednn and dtype != torch.float32 else 0
    return FILES + KERNEL + products + LATER + torch.get_num_threads() * EACH_THREAD + layers * EACH_LAYER


def _backbone_row(blueprint: Blueprint, limited: bool) -> Row:
    nbytes, basis = blueprint.backbone_bytes, f"parameters outside the experts, {blueprint.dtype}"
    if limited and blueprint.disk_rows is not None:
        nbytes -= blueprint.disk_rows.nbytes
        basis = f"{basis}; embeddings stay on disk"
    return Row("backbone", nbytes, basis)


def _too_little(limit: int, started: int, need: int, top_k: int, fixed: Sequence[Row]) -> MemoryLimitError:
    rest = ", ".join(f"{row.name} {format_size(row.nbytes)}" for row in fixed)
    others = sum(row.nbytes for row in fixed)
    least = format_size(max(others + need, started))
    return MemoryLimitError(
        f"needs {format_size(need)} to hold one layer's {top_k} experts, --memory {format_size(limit)} leaves "
        f"{format_size(max(0, limit - others))} after {rest}: give at least {least}, or a shorter --context, "
        "or fit the model first"
    )


def context_bytes(blueprint: Blueprint, tokens: int) -> int:
    """Bytes of the cache that the model itself makes for one sequence of `tokens` tokens, and of its growth by one.

    The model is run on the meta device with its experts replaced by the identity, so every kind of cache counts
    (sliding windows, latent attention, state-space states) without a line per architecture.
    """
    model: Any = blueprint.meta
    experts: list[Any] = [model.get_submodule(layer.experts) for layer in blueprint.anatomy.layers]
    try:
        for module in experts:
            module.forward = lambda hidden, *_, **__: hidden
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        encoded = blueprint.anatomy.encoder_decoder
        inputs: dict[str, Any] = {"input_ids": ids, **({"decoder_input_ids": ids} if encoded else {"use_cache": True})}
        with torch.inference_mode():
            cache = model.eval()(**inputs).past_key_values
    finally:
        for module in experts:
            del module.forward
    sizes = [tensor.numel() * tensor.element_size() for tensor in _tensors(cache)]
    if not sizes:
        raise ModelError(f"{type(model).__name__} keeps no cache of its context, so no limit can be planned for it")
    # a cache that grows holds the old and the new tensor of one layer at once
    return sum(sizes) + bytes_beyond_windows(cache) + 2 * max(sizes)


def _tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """The distinct tensors in nested lists, dicts and objects."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, int, float, type(None), torch.device, torch.dtype, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, (list, tuple)):
        value = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for item in value for tensor in _tensors(item, seen)]


def activation_bytes(blueprint: Blueprint, chunk: int, context: int) -> int:
    """What a forward pass of `chunk` tokens holds at once besides weights and cache: an upper estimate.

    The widest layer counts: copies of the hidden state, attention's heads and mask, a dense or shared feed-forward, and
    of the experts their outputs (top-k per token, kept to be added in order) and one expert's intermediate rows.
    """
    size = blueprint.dtype.itemsize
    hidden = _hidden(blueprint)
    widest = max(
        (
            p.shape[0]
            for n, p in blueprint.meta.named_parameters()
            if p.dim() == 2 and "embed" not in n and p.shape[0] < _vocabulary(blueprint)
        ),
        default=hidden,
    )
    experts = max(
        layer.top_k * hidden + 3 * max(shape[0] for shape, _ in layer.parameters.values())
        for layer in blueprint.anatomy.layers
    )
    per_token = ACTIVATION_COPIES * hidden + 4 * widest + 2 * experts
    scores = 16 * max(layer.num_experts for layer in blueprint.anatomy.layers)  # fp32 router logits and their copies
    mask = 5 * max(chunk, context)  # per token: bool, and the additive float that attention makes of it
    return chunk * (per_token * size + scores + mask)


def logits_bytes(blueprint: Blueprint, tokens: int) -> int:
    """What logits may take: those of `tokens` tokens, at most LOGITS; at least four in fp32, to be sampled from."""
    vocabulary = _vocabulary(blueprint)
    most = LOGITS if not tokens else min(LOGITS, tokens * vocabulary * blueprint.dtype.itemsize)
    return max(most, 4 * 4 * vocabulary)


def _coded_bytes(blueprint: Blueprint, chunk: int) -> int:
    """What experts in int8 or int4 take while they compute: one of them dequantised, and fp32 inputs and outputs."""
    if not isinstance(blueprint.experts, PackedExperts) or all(layer.plain for layer in blueprint.experts.layers):
        return 0
    layers = blueprint.anatomy.layers
    rows = max(layer.top_k for layer in layers) + 4
    return max(layer.expert_bytes for layer in layers) + SCRATCH + 4 * chunk * rows * _hidden(blueprint)


def _restored_bytes(blueprint: Blueprint) -> int:
    """Of the expert that is computed with, where they are read in 12 bits a number."""
    return largest(blueprint.experts.layouts) if blueprint.experts.short else 0


def _hidden(blueprint: Blueprint) -> int:
    embedding: Any = blueprint.meta.get_input_embeddings()
    return int(embedding.weight.shape[1])


def _vocabulary(blueprint: Blueprint) -> int:
    embedding: Any = blueprint.meta.get_input_embeddings()
    return int(embedding.weight.shape[0])
