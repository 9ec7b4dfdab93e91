"""The loss of a step: weighted cross entropy of the rows, and the balance of experts over the whole step.

Knows causal language models of transformers whose head is a linear layer on the base model's output, and softmax
routers. Legend: B rows, T tokens of a row, E experts, L layers, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moedge.train.data import PAD_SEGMENT, Row


@dataclass(frozen=True)
class Losses:
    """`total` is what is minimised; `rows` [B] is each row's mean loss by weight (nan where all weights are zero)."""

    total: Tensor
    text: float
    balance: float
    rows: list[float]
    load: Tensor  # [L, E] share of the chosen experts, of real tokens


def balance_loss(router_logits: Tensor, top_k: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One layer's E * sum_e(f_e * P_e) over all tokens of the step: 1 when balanced, E when one expert takes all.

    router_logits [N, E]; real [N] bool leaves padding out. f is the share of choices (no gradient), P the mean
    probability. Returns the loss and f [E]. Source: Switch Transformers, eq. 4 to 6, over the global batch as in
    Qiu et al. 2025 (Demons in the Detail).
    """
    logits = router_logits.float() if real is None else router_logits[real].float()
    probs = logits.softmax(-1)  # [N, E]
    chosen = logits.topk(top_k, dim=-1).indices  # [N, A]
    load = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).to(probs.dtype) / chosen.numel()
    return logits.shape[-1] * (load * probs.mean(0)).sum(), load


def attention_inputs(segments: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """Mask [B, 1, T, T] and positions [B, T] that keep the documents of a row apart; empty when each row is one."""
    if (segments == segments[:, :1]).all():
        return {}
    tokens = torch.from_numpy(segments)
    same = tokens[:, None, :, None] == tokens[:, None, None, :]
    causal = torch.ones(same.shape[-1], same.shape[-1], dtype=torch.bool).tril()
    columns = np.arange(segments.shape[1])[None]
    begins = np.concatenate([np.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1)
    starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return {"attention_mask": same & causal, "position_ids": torch.from_numpy(columns - starts)}


def losses(model: Any, batch: Row, balance: float) -> Losses:
    """Forward pass of one step: `batch` is stacked rows [B, T], `balance` the weight of the balance loss per layer."""
    ids = torch.from_numpy(batch.ids)
    weights = torch.from_numpy(batch.weights)[:, 1:]  # [B, T-1]
    extra = attention_inputs(batch.segments)
    routed = balance > 0
    output = model.base_model(input_ids=ids, use_cache=False, **extra, output_router_logits=routed)
    row, column = (weights > 0).nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(output.last_hidden_state[row, column])  # [S, V]
    each = functional.cross_entropy(logits.float(), ids[row, column + 1], reduction="none") * weights[row, column]
    text = each.sum() / weights.sum()
    total = text
    loads: Sequence[Tensor] = []
    penalty = 0.0
    if routed:
        real = torch.from_numpy(batch.segments != PAD_SEGMENT).flatten()
        layers = [balance_loss(router, model.config.num_experts_per_tok, real) for router in output.router_logits]
        loads = [load for _, load in layers]
        total = total + balance * sum(loss for loss, _ in layers)
        penalty = float(sum(loss.detach() for loss, _ in layers)) / len(layers)
    sums = torch.zeros(len(ids)).index_add_(0, row, each.detach().float())
    means = (sums / weights.sum(1)).tolist()
    return Losses(total, float(text.detach()), penalty, means, torch.stack(list(loads)) if routed else torch.empty(0))
