"""Muon: momentum made orthogonal, for weight matrices and stacks of them (one matrix per expert).

Source: Keller Jordan et al., 2024 (kellerjordan.github.io/posts/muon). Knows matrices only: embeddings, norms and
routers belong to AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: singular values of [..., M, N] brought near 1 (0.7 to 1.2), singular vectors kept."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Parameters [M, N] or [E, M, N]. `split` parts of M (gate and up fused) are made orthogonal apart.

    lr is the root mean square that a step adds to a square matrix's unit-norm row space, about 0.02.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "split": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad
        assert grad is not None
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(state["momentum"], group["momentum"])
        *stack, rows, columns = update.shape
        rows //= group["split"]
        update = orthogonalise(update.reshape(*stack, group["split"], rows, columns)).reshape(parameter.shape)
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
