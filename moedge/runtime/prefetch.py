"""Guess the next layer's experts while one token is decoded, so that the disk works while attention is computed.

The guess is the next router's own: applied, through the next layer's norm, to this layer's output, which attention has
yet to change (as in Eliseev & Mazur 2023, arXiv 2312.17238, section 3.2). Of the experts on disk the likeliest are
read, in this order, as far down as such guesses prove right. A guess changes no result and no cache, only when bytes
are read. Knows no disk.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedge.models.anatomy import Anatomy, MoeLayer, decoder_layer
from moedge.runtime.product import product
from moedge.runtime.store import Glimpse

WORTH = 0.8  # a place in the order is read while it is right this often
MEMORY = 64  # how many guesses back that is judged, about
UNKNOWN = 0.5  # what a place begins with: it has to prove itself before anything is read for it


class Prefetching(Protocol):
    """What a prefetcher needs of an expert store."""

    @property
    def glimpses(self) -> Sequence[Glimpse]: ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> None: ...


class Prefetcher:
    """Watches `model` run and tells `store` what the next MoE layer will probably ask for. `enabled` turns it off.

    Nothing is guessed for a layer whose router is not a matrix or whose norm is not found, nor under grad.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, store: Prefetching) -> None:
        self.enabled = True
        self._store = store
        modules = dict(model.named_modules())
        blocks = [modules[decoder_layer(modules, layer)] for layer in anatomy.layers]
        self.right = [UNKNOWN] * max(layer.top_k for layer in anatomy.layers)  # by place, of all layers together
        pairs = zip(anatomy.layers, blocks, strict=True)
        self._next = [_Target(layer, modules, block, self.right) for layer, block in pairs]
        for index, block in enumerate(blocks):
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            block.register_forward_hook(self._hook(index, guess=following is not None and following is not block))

    def _hook(self, index: int, guess: bool) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not self.enabled or torch.is_grad_enabled():
                return
            hidden = output[0] if isinstance(output, tuple) else output  # [B, T, H]
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2].numel() != 1:
                return
            self._next[index].learn(self._store.glimpses[index].used)
            if guess:
                experts = self._next[index + 1].guess(hidden, self._store.glimpses[index + 1].resident)
                if experts:
                    self._store.prefetch(index + 1, experts)

        return after


class _Target:
    """The MoE layer that is guessed for: its norm and router. `right[i]`: how often the i-th guess was right."""

    def __init__(self, layer: MoeLayer, modules: dict[str, nn.Module], block: nn.Module, right: list[float]) -> None:
        self._top_k = layer.top_k
        self._router = modules[layer.router]
        self._norm: nn.Module | None = None
        self._last: list[int] = []
        self._right = right
        self._find_norm(modules[layer.block], block)

    def _find_norm(self, moe: nn.Module, block: nn.Module) -> None:
        """The module of the layer whose output goes into the MoE block: seen in the first pass."""
        outputs: dict[int, nn.Module] = {}
        handles: list[Any] = []

        def made(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[output.data_ptr()] = module

        def arrives(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                self._norm = outputs.get(args[0].data_ptr())
            for handle in handles:
                handle.remove()

        handles.extend(child.register_forward_hook(made) for child in block.children() if child is not moe)
        handles.append(moe.register_forward_pre_hook(arrives))

    def guess(self, hidden: Tensor, resident: Sequence[int]) -> list[int]:
        """The experts that are worth reading, most likely first; hidden [1, 1, H]."""
        weight, bias = getattr(self._router, "weight", None), getattr(self._router, "bias", None)
        if self._norm is None or not isinstance(weight, Tensor) or weight.dim() != 2:
            return []
        with torch.inference_mode():
            scores = product(self._norm(hidden)[0].to(weight.dtype), {"weight": weight}, "weight")[0]  # [E]
            scores = scores if bias is None else scores + bias
        self._last = [expert for expert in scores.topk(self._top_k).indices.tolist() if expert not in resident]
        return [expert for expert, right in zip(self._last, self._right, strict=False) if right >= WORTH]

    def learn(self, used: Sequence[int]) -> None:
        """Compare the last guess with the experts that the router then chose."""
        for place, expert in enumerate(self._last):
            self._right[place] += ((expert in used) - self._right[place]) / MEMORY
        self._last = []
