"""Which class of transformers runs a checkpoint as a text model, and that model without weights.

Knows configs and classes; reads no weights and no network.
"""

import copy
from pathlib import Path
from typing import cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from moedge.errors import ModelError

_HEADS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
_VERSION = f"transformers {transformers.__version__}"


def text_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that answers `model(input_ids).logits` for a checkpoint with this config.

    It is the one that `config.architectures` names. Of a multimodal checkpoint it is the class of its text part, where
    transformers loads that alone, else the whole model, which is then given text only. Raises ModelError when the class
    is unknown, or does not predict tokens.
    """
    named = _named_class(config)
    mapped = _mapped_class(config)
    if named is None or "text_config" in config.sub_configs:
        named = mapped or named
    if named is None:
        raise ModelError(f"model type {config.model_type!r} has no text model in {_VERSION}")
    if not named.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise ModelError(
            f"{named.__name__} does not predict tokens: moedge runs language models (...ForCausalLM, "
            f"...ForConditionalGeneration); check 'architectures' in config.json"
        )
    return named


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that `text_class(config)` is made from: itself, or the text part of a multimodal one."""
    made_from = text_class(config).config_class
    return config if made_from is None or isinstance(config, made_from) else config.get_text_config()


def meta_model(config: str | Path | PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config (or of a checkpoint's folder) on the meta device: shapes without weights.

    `dtype` None takes the config's own, or float32. Raises ModelError.
    """
    if isinstance(config, (str, Path)):
        config = _read_config(config)
    cls, config = text_class(config), copy.deepcopy(text_config(config))
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = cls._from_config(config, dtype=dtype or config.dtype or torch.float32)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model)


def _read_config(path: str | Path) -> PreTrainedConfig:
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} has no config.json that {_VERSION} can read: {error}") from error


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    names = config.architectures or []
    found = [cls for name in names if (cls := getattr(transformers, name, None)) is not None]
    if names and not found:
        raise ModelError(f"architecture {', '.join(names)} is not in {_VERSION}: install a newer transformers")
    return found[0] if found else None


def _mapped_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """What transformers takes for the config: a causal model, else an encoder-decoder, else a multimodal one."""
    for mapping in _HEADS:
        found = mapping.get(type(config), None)
        for cls in found if isinstance(found, tuple) else (found,):
            if cls is not None:
                return cast(type[PreTrainedModel], cls)
    return None
