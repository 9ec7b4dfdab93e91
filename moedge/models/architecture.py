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
    transformers has one. Raises ModelError when the class is unknown, or has no language model head.
    """
    named = _named_class(config)
    if named is None or "text_config" in config.sub_configs:
        mapped = _mapped_class(config)
        if mapped is not None:
            return mapped
        if named is None:
            raise ModelError(f"model type {config.model_type!r} has no text model in {_VERSION}")
        raise ModelError(
            f"{named.__name__} is multimodal and {_VERSION} has no class for its text part alone: use a text checkpoint"
        )
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
    """The causal or sequence-to-sequence model of the config, or of its text part, that holds no other towers."""
    for part in (config, config.get_text_config()):
        for mapping in _HEADS:
            found = mapping.get(type(part), None)
            for cls in found if isinstance(found, tuple) else (found,):
                if cls is not None and "text_config" not in cls.config_class.sub_configs:
                    return cast(type[PreTrainedModel], cls)
    return None
