"""Root mean square norms of a few tokens by one C call instead of eight of torch's. Knows modules; no quantisation.

Which modules these are is found by trying them, not by their names. Results may differ from torch's in the last bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moedge.native import library as native
from moedge.native.library import Library, Norm

FEW = 64  # rows up to which the call is what takes the time
_CODES = {torch.float32: native.F32, torch.bfloat16: native.BF16}
_OFFSETS = (0.0, 1.0)  # what is added to the weight: 1 in Gemma


class FastNorm(nn.Module):
    """In the place of `norm`, whose weight it shares."""

    def __init__(self, norm: nn.Module, offset: float, epsilon: float, library: Library) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        object.__setattr__(self, "_norm", norm)  # not a submodule: its weight would be there twice
        self.offset, self.epsilon, self._library = offset, epsilon, library

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:  # a gate, say: not the norm that was found
            return self._norm(x, *others, **named)  # type: ignore[no-any-return, operator]
        columns = x.shape[-1]
        rows, code = x.numel() // columns, _CODES.get(x.dtype)
        if rows > FEW or code is None or torch.is_grad_enabled() or not x.is_contiguous():
            return self._norm(x)  # type: ignore[no-any-return, operator]
        out, weight = torch.empty_like(x), self.weight
        call = Norm(rows, columns, code, _CODES[weight.dtype], self.epsilon, self.offset)
        call.x, call.weight, call.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._library.rms_norm(call)
        return out


def put_fast_norms(model: nn.Module, library: Library) -> int:
    """Replace the norms of a loaded model that are what FastNorm computes; how many."""
    found = list(_norms(model))
    for path, norm, offset, epsilon in found:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FastNorm(norm, offset, epsilon, library))
    return len(found)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, float, float]]:
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")  # not the property of a coded matrix, which makes it dense
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        alone = [name for name, _ in module.named_parameters()] == ["weight"]
        if not (path and alone and isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.dtype in _CODES):
            continue
        if isinstance(epsilon, float) and (offset := _offset(module, weight, epsilon)) is not None:
            yield path, module, offset, epsilon


@torch.inference_mode()
def _offset(module: nn.Module, weight: Tensor, epsilon: float) -> float | None:
    """The offset with which the formula gives what the module gives; None where none does."""
    x = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype)[None, None]
    try:
        given = module(x)
    except (TypeError, RuntimeError, ValueError, AttributeError):  # takes other inputs: no such norm
        return None
    if not isinstance(given, Tensor) or given.shape != x.shape or given.dtype != x.dtype:
        return None
    normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)).to(x.dtype).float()
    for offset in _OFFSETS:
        expected = normed * (offset + weight.float())
        if torch.allclose(given.float(), expected, rtol=2**-7 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-6):
            return offset
    return None
