"""Build a model with its experts left out, and its tokenizer.

The model is made by transformers' own `from_pretrained`, from a state dict that reads each tensor when it is asked for
and has no experts in it; a quantizer hook lets the caller take the expert parameters out of the meta model before.
Knows how a model is made; what runs in place of the experts is the caller's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moedge.errors import CheckpointError, ModelError
from moedge.models.anatomy import Anatomy, dissect
from moedge.models.architecture import meta_model, text_class, text_config
from moedge.models.backbone import coded_modules, parts_of
from moedge.models.checkpoint import Checkpoint
from moedge.models.embedding import DiskRows, rows_on_disk
from moedge.models.expert_map import ExpertMap
from moedge.models.pack import PackedCheckpoint, is_packed
from moedge.models.packed_experts import PackedExperts
from moedge.models.quantised import KEY, QuantisedCheckpoint, quantisation, scheme_of
from moedge.models.scheme import Scheme

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
TakeOut = Callable[[PreTrainedModel, Anatomy], None]


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`"bf16"`, `"bfloat16"` or a torch dtype. Raises ModelError for one that moedge does not run in."""
    if dtype is None:
        return None
    for name, known in DTYPES.items():
        if dtype in (name, known, str(known).removeprefix("torch.")):
            return known
    raise ModelError(f"dtype {dtype} is not one that moedge runs in: choose {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Blueprint:
    """All that can be known of a checkpoint without loading weights."""

    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    checkpoint: Checkpoint
    meta: PreTrainedModel  # whole, on the meta device
    anatomy: Anatomy
    experts: ExpertMap | PackedExperts

    @property
    def backbone_bytes(self) -> int:
        """Bytes of all parameters and buffers that are not experts, tied ones once, in the form they have in memory."""
        tensors = {id(t): t for t in (*self.meta.parameters(), *self.meta.buffers())}
        dense = sum(t.numel() * t.element_size() for t in tensors.values()) - self.anatomy.expert_bytes
        return dense - self._saved_by_codes()

    def _saved_by_codes(self) -> int:
        """Bytes by which the matrices that a pack keeps in groups are smaller than dense ones."""
        checkpoint = self.checkpoint
        if not isinstance(checkpoint, PackedCheckpoint):
            return 0
        coded = checkpoint.manifest.coded
        names = list(coded_modules(self.meta, coded))
        dense = sum(math.prod(coded[name].shape) * self.dtype.itemsize for name in names)
        return dense - sum(checkpoint.stored[part].nbytes for name in names for part in parts_of(name).values())

    @cached_property
    def disk_rows(self) -> DiskRows | None:
        """The input embedding, if it can stay on disk."""
        return rows_on_disk(self.meta, self.checkpoint, self.dtype)

    @property
    def max_context(self) -> int | None:
        """The model's own limit in tokens, where its config has one."""
        value = getattr(self.config, "max_position_embeddings", None)
        return value if isinstance(value, int) else None


def draw(folder: Path, dtype: str | torch.dtype | None = None, *, quantised: bool = False) -> Blueprint:
    """Read config and headers of the checkpoint in `folder`; close `.checkpoint` when done.

    `dtype` None takes the checkpoint's own. With `quantised`, also a quantised one, as if it were dense. Raises
    ModelError for a model that moedge cannot run (dense, multimodal only, quantised), CheckpointError for files that
    are missing or damaged.
    """
    config = read_config(folder)
    given = quantisation(folder)
    scheme = scheme_of(folder, given) if given else None
    if given and not quantised:
        raise ModelError(
            f"{folder} is quantised ({given['quant_method']}): convert it with `moedge pack {folder} OUT` and use OUT"
        )
    for part in (config, text_config(config)):
        vars(part).pop(KEY, None)  # to transformers it is the dense model
    checkpoint = _open(folder, scheme)
    try:
        chosen = parse_dtype(dtype) or _own_dtype(config, checkpoint)
        if isinstance(checkpoint, QuantisedCheckpoint):
            checkpoint = checkpoint.presented_as(chosen)
        meta = meta_model(config, chosen)
        anatomy = dissect(meta)
        experts = (
            PackedExperts(anatomy, checkpoint)
            if isinstance(checkpoint, PackedCheckpoint)
            else ExpertMap(meta, anatomy, checkpoint)
        )
        return Blueprint(folder, text_config(config), chosen, checkpoint, meta, anatomy, experts)
    except BaseException:
        checkpoint.close()
        raise


def _open(folder: Path, scheme: Scheme | None) -> Checkpoint:
    if scheme is not None:
        return QuantisedCheckpoint(folder, scheme)
    return PackedCheckpoint(folder) if is_packed(folder) else Checkpoint(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's config. Raises CheckpointError without one, ModelError for one transformers does not read."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: name the folder of a Hugging Face checkpoint")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"config.json in {folder} is not one that transformers {transformers.__version__} reads: {error}"
        ) from error
    return config


def _own_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    own = text_config(config).dtype or config.dtype
    if isinstance(own, torch.dtype) and own in DTYPES.values():
        return own
    infos = checkpoint.stored if isinstance(checkpoint, QuantisedCheckpoint) else checkpoint.tensors
    return next((i.dtype for i in infos.values() if i.dtype in DTYPES.values()), torch.float32)


def load_backbone(
    blueprint: Blueprint,
    take_out: TakeOut,
    experts_implementation: str | None,
    without: frozenset[str] = frozenset(),
) -> PreTrainedModel:
    """The model with every parameter but the experts'; `take_out(meta model, anatomy)` removes those before loading.

    `without`: tensors of the checkpoint whose parameters `take_out` removes as well.

    Raises CheckpointError when the checkpoint lacks a tensor of the backbone or has one of another shape.
    """

    def on_meta(model: Any) -> None:
        model._moedge_anatomy = blueprint.anatomy
        take_out(model, blueprint.anatomy)

    # only families whose experts transformers' decorator marks know the argument
    implementation: dict[str, Any] = (
        {"experts_implementation": experts_implementation} if experts_implementation else {}
    )
    make: Any = text_class(blueprint.config).from_pretrained
    with _quiet():
        try:
            model, info = make(
                None,
                config=blueprint.config,
                state_dict=blueprint.checkpoint.lazy_state_dict(without=blueprint.experts.tensors | without),
                dtype=blueprint.dtype,
                quantization_config=_LeaveOutExperts(on_meta),
                output_loading_info=True,
                **implementation,
            )
        except RuntimeError as error:
            raise CheckpointError(f"the weights in {blueprint.folder} do not fit config.json: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{blueprint.folder} has no tensor for {missing[0]} ({len(missing)} missing): it is not a whole checkpoint"
        )
    _forget_hook(model)
    if (blueprint.folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(blueprint.folder)
    model.name_or_path = str(blueprint.folder)
    result: PreTrainedModel = model
    return result


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None where it has none. Raises CheckpointError for one that cannot be read."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and remarks on missing experts away: moedge reports itself."""
    hub = cast(Any, transformers.utils.logging)
    level, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity_error()
    hub.disable_progress_bar()
    try:
        yield
    finally:
        hub.set_verbosity(level)
        if bars:
            hub.enable_progress_bar()


@register_quantization_config("moedge")
class _LeaveOutExperts(QuantizationConfigMixin):
    """Carries the hook to the quantizer below; never written to a config."""

    def __init__(self, on_meta: Callable[[PreTrainedModel], None]) -> None:
        self.quant_method = cast(Any, "moedge")
        self.on_meta = on_meta


@register_quantizer("moedge")
class _LeaveOutExpertsHook(HfQuantizer):
    """transformers calls it with the model on the meta device, before any weight is read."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        cast(_LeaveOutExperts, self.quantization_config).on_meta(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _forget_hook(model: Any) -> None:
    """The model is not quantised: PEFT, Trainer and its config must not take it for one."""
    model.hf_quantizer.remove_quantization_config(model)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    for module in model.modules():  # Jamba computes dt_proj in another order when its config says quantised
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise ModelError(
            "save_pretrained would save the model without its experts, which are on disk: copy the checkpoint"
        )

    model.save_pretrained = save_pretrained
