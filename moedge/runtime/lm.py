"""`moedge.load`: a model whose experts stay on disk, within a memory limit for the whole process.

Puts the parts together: blueprint, plan, backbone, expert store. What each part does is in its own module.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moedge.errors import CheckpointError, ContextError, MemoryLimitError, ModelError
from moedge.models.anatomy import Anatomy
from moedge.models.embedding import put_on_disk
from moedge.models.hub import resolve
from moedge.models.lean import forget_code
from moedge.models.load import Blueprint, draw, load_backbone, load_tokenizer
from moedge.models.pack import PackedCheckpoint
from moedge.models.packed_experts import PackedExperts
from moedge.runtime.budget import Plan, make_plan
from moedge.runtime.device import keep_few_products
from moedge.runtime.experts import IMPLEMENTATION, ExpertSource, connect, register, take_out_experts
from moedge.runtime.fitted import Experts, fit, make_caches
from moedge.runtime.forward import vocabulary
from moedge.runtime.generate import Prompt, Step, generate
from moedge.runtime.policy import POLICIES, LayerCache
from moedge.runtime.prefetch import Prefetcher
from moedge.runtime.product import put_row_products
from moedge.runtime.reader import DirectReader
from moedge.runtime.store import DiskStore
from moedge.units import format_size, parse_size

if TYPE_CHECKING:
    from moedge.runtime.coded_backbone import CodedBackbone


class LM:
    """A loaded model. `.model` is the transformers model; `.store` holds the experts that are in memory.

    `.prefetcher` guesses which are needed next, None where all are in memory.

    Close it, or use it in a `with` statement: its files and threads are released then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        store: DiskStore,
        plan: Plan,
        blueprint: Blueprint,
        sources: Sequence[ExpertSource],
    ) -> None:
        self.model, self.store, self.plan = model, store, plan
        self.anatomy: Anatomy = blueprint.anatomy
        self._tokenizer = tokenizer
        self._folder = blueprint.folder
        connect(sources, store)
        self.prefetcher = None if plan.capacities == plan.num_experts else Prefetcher(model, self.anatomy, store)
        self._release = weakref.finalize(self, _release, store, blueprint, sources)
        model.register_forward_pre_hook(_Guard(plan, blueprint.dtype.itemsize), with_kwargs=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer. Raises CheckpointError where it has none."""
        if self._tokenizer is None:
            raise CheckpointError(f"{self._folder} has no tokenizer: copy the tokenizer's files beside the weights")
        return self._tokenizer

    @property
    def context(self) -> int | None:
        """Tokens that are reserved for one sequence; None where nothing is limited."""
        return self.plan.context

    @property
    def prefill_chunk(self) -> int:
        """Tokens that are read at once from a prompt. Independent of the limit, because float results depend on it."""
        return self.plan.prefill_chunk

    def generate(self, prompt: Prompt, max_new_tokens: int = 64, **settings: Any) -> Iterator[Step]:
        """Answer `prompt` token by token; settings as in `moedge.Sampling`. See runtime/generate.py."""
        return generate(self, prompt, max_new_tokens, **settings)

    def close(self) -> None:
        """Release files, threads and slots; the model cannot run afterwards. Closing again does nothing."""
        self._release()

    def __enter__(self) -> "LM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Extra:
    """What `moedge.load` takes besides: sequences at once, tokens of a prompt read at once, and a fit's experts."""

    parallel: int = 1
    prefill_chunk: int = 512
    experts: Experts | None = None
    fallback: bool = False

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise ContextError(f"prefill_chunk {self.prefill_chunk} must be at least 1 token")


def load(
    model: str | os.PathLike[str],
    memory: str | int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    policy: str = "default",
    context: int | None = None,
    **extra: Any,
) -> LM:
    """Load an MoE checkpoint (folder, hub cache folder or hub id) with its experts left on disk.

    memory: limit for the whole process, `"600MiB"` or bytes; None limits nothing.
    dtype: "fp32", "bf16", "fp16" or None for the checkpoint's own. policy: a key of `moedge.POLICIES`.
    context: tokens reserved for each sequence; with a limit at most 2048 by default.
    extra: parallel=1, sequences at once; prefill_chunk=512, tokens of a prompt read at once; experts=None, a fit's
    folder, or the ids to keep of each MoE layer: the model has only these. With fallback=True it has all, and these
    stay in memory, the most important first, as far as the limit allows.

    Raises ModelError, CheckpointError, MemoryLimitError, ContextError, DataError (for a fit); each names the thing, its
    value and the remedy.
    """
    more = Extra(**extra)
    if device != "cpu":
        raise ModelError(f"device {device!r} is not one that moedge computes on yet: use 'cpu'")
    if policy not in POLICIES:
        raise ModelError(f"policy {policy!r} does not exist: choose {', '.join(POLICIES)}")
    whole = draw(resolve(model), dtype)
    try:
        blueprint, pins = fit(whole, more.experts, more.fallback)
        tokenizer = load_tokenizer(blueprint.folder)
        limit = None if memory is None else _limit(memory)
        plan = make_plan(blueprint, limit, context, more.parallel, more.prefill_chunk)
        if limit is not None:
            keep_few_products()
        lm = _assemble(blueprint, plan, tokenizer, make_caches(plan.num_experts, plan.capacities, policy, pins))
        if limit is not None:
            forget_code()
        return lm
    except BaseException:
        whole.checkpoint.close()
        raise


def _limit(memory: str | int) -> int:
    try:
        return parse_size(memory)
    except ValueError as error:
        raise MemoryLimitError(str(error)) from error


def _assemble(
    blueprint: Blueprint, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, caches: Sequence[LayerCache]
) -> LM:
    register()
    sources: list[ExpertSource] = []
    modular = any(layer.kind.modular for layer in blueprint.anatomy.layers)
    coded: CodedBackbone | None = None
    checkpoint = blueprint.checkpoint
    if isinstance(checkpoint, PackedCheckpoint) and checkpoint.manifest.coded:
        from moedge.runtime import coded_backbone  # here: other models do without the kernels

        coded = coded_backbone.CodedBackbone(blueprint.meta, checkpoint, blueprint.dtype)

    on_disk = blueprint.disk_rows if plan.limit is not None else None

    def take_out(meta: PreTrainedModel, anatomy: Anatomy) -> None:
        sources.extend(take_out_experts(meta, anatomy))
        if on_disk is not None:
            put_on_disk(meta, checkpoint, on_disk, blueprint.dtype)
        if coded is not None:
            coded.put_into(meta)

    without = frozenset[str]() if coded is None else coded.tensors
    if on_disk is not None:
        without |= {on_disk.tensor}
        checkpoint.check_tensor(on_disk.tensor)  # once and whole, as its rows have no checksums of their own
    model = load_backbone(blueprint, take_out, None if modular else IMPLEMENTATION, without)
    experts = blueprint.experts
    rounded = coded is not None
    if isinstance(experts, PackedExperts) and not all(layer.plain for layer in experts.layers):
        rounded = True
        from moedge.runtime.coded import coded_layers

        for source, layer in zip(sources, coded_layers(model, blueprint.anatomy, experts), strict=True):
            source.coded = layer
    if rounded:
        from moedge.runtime.fast import put_fast_paths

        put_fast_paths(model, blueprint.anatomy, sources)
    else:
        put_row_products(model)
    short = plan.slot_bytes if plan.short else None
    store = DiskStore(experts, DirectReader(blueprint.checkpoint), caches, plan.spare, short)
    return LM(model, tokenizer, store, plan, blueprint, sources)


def _release(store: DiskStore, blueprint: Blueprint, sources: Sequence[ExpertSource]) -> None:
    connect(sources, None)
    store.close()
    blueprint.checkpoint.close()


class _Guard:
    """Runs before every forward pass and refuses what the plan has no memory for. `itemsize`: bytes of a logit."""

    def __init__(self, plan: Plan, itemsize: int) -> None:
        self._plan, self._itemsize = plan, itemsize

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = (
            ("decoder_input_ids", "input_ids") if model.config.is_encoder_decoder else ("input_ids", "inputs_embeds")
        )
        given = [value for name in names if (value := kwargs.get(name)) is not None] + list(args[:1])
        if not given:
            return
        batch, length = given[0].shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self._check_context(batch, past + length)
        keep = kwargs.get("logits_to_keep", 0)
        self._check_logits(model, batch * (min(keep, length) if isinstance(keep, int) and keep else length))

    def _check_context(self, batch: int, length: int) -> None:
        context, parallel = self._plan.context, self._plan.parallel
        if context is not None and batch * length > context * parallel:
            raise ContextError(
                f"{batch} x {length} tokens are more than the reserved context of {parallel} x {context}: "
                f"shorten the input, or load with a larger --context or --parallel"
            )

    def _check_logits(self, model: Any, rows: int) -> None:
        reserved = self._plan.logits_bytes
        if reserved is None:
            return
        need = rows * vocabulary(model) * self._itemsize
        if need > reserved:
            raise MemoryLimitError(
                f"the logits of {rows} tokens need {format_size(need)}, the plan has {format_size(reserved)} for them: "
                "pass logits_to_keep, score the text with moedge eval (which goes chunk by chunk), or raise --memory"
            )
