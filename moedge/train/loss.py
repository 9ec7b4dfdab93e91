"""The loss of a step: weighted cross entropy of the rows, and the balance of experts over the whole step.

Knows causal language models of transformers whose head is a linear layer on the base model's output, and softmax
routers. Legend: B rows, T tokens of a row, E experts, L layers, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moedge.train.data import PAD_SEGMENT, Row


@dataclass(frozen=True)
class Part:
    """What the forward pass of some rows of a step gives; a step's loss needs the sums of all its parts."""

    nll: Tensor  # sum of weighted negative log likelihoods
    weight: float  # sum of the weights
    rows: list[float]  # [B] each row's mean by weight, nan where all its weights are zero
    probs: Tensor  # [L, E] router probabilities summed over real tokens; empty without a router
    counts: Tensor  # [L, E] choices of each expert by real tokens, no gradient
    entropy: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum over layers and rows, see row_entropy


@dataclass(frozen=True)
class Losses:
    """Each part's share of the step's loss (their sum is minimised), and what is logged."""

    parts: list[Tensor]
    text: float
    balance: float  # mean over layers, 1 when balanced
    focus: float  # mean over layers and rows, 1 when every row uses all experts alike
    load: Tensor  # [L, E] share of the choices


def router_sums(router_logits: Tensor, top_k: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's router_logits [N, E], real [N] bool -> probabilities [E], choices [E]: sums over real tokens."""
    logits = router_logits[real].float()
    chosen = logits.topk(top_k, dim=-1).indices  # [N, A]
    counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
    return logits.softmax(-1).sum(0), counts.float()


def row_entropy(router_logits: Tensor, real: Tensor) -> Tensor:
    """One layer's router_logits [N, E] of rows real [B, T] bool: entropies of the rows' mean probabilities, summed.

    In units of log E, so that each is 0 (one expert) to 1 (all alike). A row is of one domain: with the load balanced
    over the step, small entropies mean that domains use different experts (their mutual information is large).
    """
    probs = router_logits.float().softmax(-1).view(*real.shape, -1) * real[..., None]  # [B, T, E]
    means = probs.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # [B, E]
    entropies: Tensor = torch.special.entr(means)
    return entropies.sum() / math.log(means.shape[-1])


def balance_terms(parts: Sequence[Part]) -> tuple[list[Tensor], Tensor]:
    """Each part's term of sum_layers(E * sum_e(f_e * P_e)), and f [L, E].

    f is the share of choices and P the mean probability, both over all parts, so balance holds for the whole step and
    not for each sequence. One layer gives 1 when balanced and E when one expert takes all. Source: Switch
    Transformers, eq. 4 to 6; over the global batch as in Qiu et al. 2025 (Demons in the Detail).
    """
    counts = torch.stack([part.counts for part in parts]).sum(0)
    load = counts / counts.sum(-1, keepdim=True)
    tokens = torch.stack([part.probs.detach() for part in parts]).sum((0, 2))  # [L]: probabilities sum to 1 a token
    return [load.shape[-1] * (load * part.probs / tokens[:, None]).sum() for part in parts], load


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


def forward(model: Any, batch: Row, routed: bool) -> Part:
    """Forward pass of stacked rows [B, T]."""
    ids = torch.from_numpy(batch.ids)
    weights = torch.from_numpy(batch.weights)[:, 1:]  # [B, T-1]
    extra = attention_inputs(batch.segments)
    output = model.base_model(input_ids=ids, use_cache=False, **extra, output_router_logits=routed)
    row, column = (weights > 0).nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(output.last_hidden_state[row, column])  # [S, V]
    each = functional.cross_entropy(logits.float(), ids[row, column + 1], reduction="none") * weights[row, column]
    sums = torch.zeros(len(ids)).index_add_(0, row, each.detach())
    probs = counts = torch.empty(0)
    entropy = torch.zeros(())
    if routed:
        real = torch.from_numpy(batch.segments != PAD_SEGMENT)  # [B, T]
        top_k, routers = model.config.num_experts_per_tok, output.router_logits
        layers = [router_sums(router, top_k, real.flatten()) for router in routers]
        probs, counts = (torch.stack(each_layer) for each_layer in zip(*layers, strict=True))
        entropy = torch.stack([row_entropy(router, real) for router in routers]).sum()
    return Part(each.sum(), float(weights.sum()), (sums / weights.sum(1)).tolist(), probs, counts, entropy)


def combine(parts: Sequence[Part], balance: float, focus: float = 0.0) -> Losses:
    """The step's loss from the forward passes of its rows.

    Weights of a layer's losses: `balance` of the experts' load over the step, `focus` of the entropy within each row.
    """
    weight = sum(part.weight for part in parts)
    totals = [part.nll / weight for part in parts]
    text = sum(float(total.detach()) for total in totals)
    if not balance:
        return Losses(totals, text, 0.0, 0.0, torch.empty(0))
    terms, load = balance_terms(parts)
    rows = sum(len(part.rows) for part in parts)
    entropies = [part.entropy / max(1, rows) for part in parts]  # sums over layers
    totals = [t + balance * b + focus * e for t, b, e in zip(totals, terms, entropies, strict=True)]
    balanced, focused = (sum(float(term.detach()) for term in each) / len(load) for each in (terms, entropies))
    return Losses(totals, text, balanced, focused, load)
