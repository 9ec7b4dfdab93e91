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

LIFT = 16.0  # the most that being chosen rarely counts: a sixteenth of the even load
LEAST = 1e-6  # mean probability below which the floor lifts an expert no more


@dataclass(frozen=True)
class RouterLoss:
    """Weights of what a layer's router adds to the loss.

    `balance` of the experts' load, see balance_terms; without it there is no router to train. `focus` of the entropy
    within each row, see row_entropy. `floor` of experts that are hardly used, see floor_terms. Usage is a mean over
    about `steps` steps: with more than one, an expert of a rare domain is not unused in a step that lacks it.
    """

    balance: float = 0.01
    focus: float = 0.0
    floor: float = 0.0
    steps: int = 1


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
    focus: float  # mean over layers and rows of row_entropy, 1 when every row uses all experts alike
    load: Tensor  # [L, E] share of the step's choices
    used: Tensor  # [2, L, E] usage over many steps, to be given to the next


def router_sums(router_logits: Tensor, top_k: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's router_logits [N, E], real [N] bool -> probabilities [E], choices [E]: sums over real tokens."""
    logits = router_logits[real].float()
    chosen = logits.topk(top_k, dim=-1).indices  # [N, A]
    counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
    return logits.softmax(-1).sum(0), counts.float()


def row_entropy(router_logits: Tensor, real: Tensor) -> Tensor:
    """One layer's router_logits [N, E] of rows real [B, T] bool: the fourth powers of the rows' entropies, summed.

    The entropy of a row's mean probabilities is in units of log E, 0 (one expert) to 1 (all alike); its fourth power
    matters most to rows and layers that are spread out. A row is of one domain: with the load balanced over the step,
    small entropies mean that domains use different experts (their mutual information is large).
    """
    probs = router_logits.float().softmax(-1).view(*real.shape, -1) * real[..., None]  # [B, T, E]
    means = probs.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # [B, E]
    entropies = torch.special.entr(means).sum(-1) / math.log(means.shape[-1])
    total: Tensor = entropies.pow(4).sum()
    return total


def usage(parts: Sequence[Part]) -> Tensor:
    """Each expert's share of the step's choices, f, and its mean router probability, P: [2, L, E]."""
    sums = torch.stack([torch.stack([part.counts, part.probs.detach()]) for part in parts]).sum(0)
    return sums / sums.sum(-1, keepdim=True)


def balance_terms(parts: Sequence[Part], used: Tensor) -> list[Tensor]:
    """Each part's term of sum_layers(E * sum_e(f_e * P_e)); f is of `used` [2, L, E], P the step's.

    P is the mean probability over all parts, so balance holds for the whole step and not for each sequence. One layer
    gives 1 when balanced and E when one expert takes all. Source: Switch Transformers, eq. 4 to 6; over the global
    batch as in Qiu et al. 2025 (Demons in the Detail).
    """
    return [used.shape[-1] * (used[0] * part.probs / _tokens(parts)).sum() for part in parts]


def floor_terms(parts: Sequence[Part], used: Tensor) -> list[Tensor]:
    """Each part's term of -sum_layers(mean_e(w_e log P_e)), w = min(1 / (E f), LIFT), to first order about f and P of
    `used` [2, L, E].

    An expert may be used less than others, but none dies: the balance's gradient vanishes with an expert's
    probability, the logarithm's does not, and the less it is chosen the more it is lifted.
    """
    load, probs = used
    lift = (1 / (load.shape[-1] * load)).clamp(max=LIFT) / probs.clamp(min=LEAST)
    return [-(lift * part.probs / _tokens(parts)).mean(-1).sum() for part in parts]


def _tokens(parts: Sequence[Part]) -> Tensor:
    """Real tokens of the step [L, 1]: probabilities sum to 1 a token."""
    return torch.stack([part.probs.detach() for part in parts]).sum((0, 2))[:, None]


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


def combine(parts: Sequence[Part], router: RouterLoss, used: Tensor | None = None) -> Losses:
    """The step's loss from the forward passes of its rows; `used` [2, L, E] is the mean usage in the steps before."""
    weight = sum(part.weight for part in parts)
    totals = [part.nll / weight for part in parts]
    text = sum(float(total.detach()) for total in totals)
    if not router.balance:
        return Losses(totals, text, 0.0, 0.0, torch.empty(0), torch.empty(0))
    now = usage(parts)
    used = now if used is None else used.lerp(now, 1 / router.steps)
    rows = max(1, sum(len(part.rows) for part in parts))
    entropies = [part.entropy / rows for part in parts]  # sums over layers
    balances, floors = balance_terms(parts, used), floor_terms(parts, used)
    terms = zip(totals, balances, entropies, floors, strict=True)
    totals = [t + router.balance * b + router.focus * e + router.floor * f for t, b, e, f in terms]
    balanced, focused = (sum(float(term.detach()) for term in each) / now.shape[1] for each in (balances, entropies))
    return Losses(totals, text, balanced, focused, now[0], used)
