"""What a model gets whose pack rounds its weights, so that it is not bit-equal to the original anyway: C kernels for
norms, attention, decoder layers and the head, wherever they are found to give the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moedge.models.anatomy import Anatomy
from moedge.native import library as native
from moedge.native.threads import calibrated
from moedge.runtime.attention import put_fast_attention
from moedge.runtime.decoder_layer import put_fast_layers
from moedge.runtime.experts import ExpertSource
from moedge.runtime.linear import CODES, FastLinear
from moedge.runtime.norm import put_fast_norms


def put_fast_paths(model: PreTrainedModel, anatomy: Anatomy, sources: Sequence[ExpertSource]) -> None:
    """Once the weights are loaded, and sources know how their experts are computed."""
    library = native.load()
    if library is None:
        return
    put_fast_norms(model, library)
    speeds = calibrated(library, torch.get_num_threads())
    put_fast_attention(model, library, speeds)
    put_fast_layers(model, anatomy, sources, library)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear and head.weight.dtype in CODES and head.weight.is_contiguous():
        head.forward = FastLinear(head, library, speeds)  # type: ignore[method-assign, assignment]
