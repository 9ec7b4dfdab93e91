"""What goes into an experts module, as choices: which experts each token takes and with what weight.

Routers differ (softmax before or after top-k, sigmoid with a correction bias, groups, scaling, hash tables), but what
they hand to their experts does not, so choices are read there. Knows tensors; no models, no files.
"""

import torch
from torch import Tensor

from moedge.models.anatomy import MoeLayer
from moedge.models.trace import NONE


def choices(layer: MoeLayer, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts and their weights, [T, k] each, from the arguments of a call of `layer`'s experts module.

    Weights are those that scale the experts' outputs: after the architecture's own normalisation and scaling. Where a
    token takes fewer experts, the expert is NONE and the weight 0.
    """
    if not layer.kind.modular:  # [T, k], [T, k]; ids beyond the experts mean none
        return _without(index, weights, index >= layer.num_experts)
    if index.dim() == 3:  # Switch Transformers: [T, 1, E] one-hot or all zero, [T, 1]
        taken, expert = index[:, 0].max(-1)
        return _without(expert[:, None], weights, (taken == 0)[:, None])
    # NLLB-MoE: weights are [T, E], zero for experts that are not chosen. This is what its router means; transformers 5
    # takes the mask for ids and runs experts 0 and 1 only, and moedge with it.
    top, experts = weights.topk(layer.top_k)
    return _without(experts, top, top == 0)


def _without(experts: Tensor, weights: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    return experts.long().masked_fill(absent, NONE), weights.detach().masked_fill(absent, 0).to(torch.float32)
