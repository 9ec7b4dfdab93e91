"""Experts in int8 or int4, one layer of a model: computed by a kernel from their extents, or turned into parameters.

The kernel is used where it knows how the model's experts compute; elsewhere, and in a backward pass, an expert is
dequantised to the model's dtype. Knows extents and tokens; no disk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from moedge.models.anatomy import Anatomy, MoeLayer
from moedge.models.pack import PackedLayer
from moedge.models.packed_experts import EXTENT, PackedExperts
from moedge.native import library as native
from moedge.native.threads import best, calibrated
from moedge.runtime.extents import extent_of, parameters
from moedge.runtime.kernels import LayerKernel, Routing, recognise, route, route_token

Fetched = Iterable[tuple[int, Mapping[str, Tensor]]]
Batches = Iterable[list[tuple[int, Mapping[str, Tensor]]]]


class CodedLayer:
    """`kernel` None: it does not know this kind of expert."""

    def __init__(self, packed: PackedLayer, layer: MoeLayer, kernel: LayerKernel | None) -> None:
        self.kernel = kernel
        self._extent, self._transposed = extent_of(packed), layer.kind.transposed

    def decode(self, fetched: Fetched) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The experts with parameters as the model has them."""
        for expert, held in fetched:
            yield expert, parameters(self._extent, held[EXTENT], self._transposed)

    def mix(self, hidden: Tensor, index: Tensor, weights: Tensor, experts: list[int], batches: Batches) -> Tensor:
        """Weighted outputs added up in the order of `experts`, [T, H], [T, k], [T, k] -> [T, H]."""
        return self._mix(hidden, route(index, weights, experts), experts, batches)

    def mix_token(self, hidden: Tensor, experts: list[int], weights: Sequence[float], batches: Batches) -> Tensor:
        """The same for one token whose `experts` have these `weights`, [1, H] -> [1, H]."""
        assert self.kernel is not None
        batches = iter(batches)
        first = next(batches)
        if [expert for expert, _ in first] == experts:
            return self.kernel.mix_token(hidden, [held[EXTENT] for _, held in first], weights).to(hidden.dtype)
        return self._mix(hidden, route_token(weights), experts, chain([first], batches))

    def _mix(self, hidden: Tensor, routing: Routing, experts: list[int], batches: Batches) -> Tensor:
        """Each batch is computed in one call. The sum waits until the last: its order must not depend on the cache."""
        assert self.kernel is not None
        rows: dict[int, tuple[int, int]] = {}
        for batch in batches:
            extents = [held[EXTENT] for _, held in batch]
            if [expert for expert, _ in batch] == experts:
                return self.kernel.mix(hidden, extents, routing).to(hidden.dtype)
            if not rows:
                rows = dict(zip(experts, pairwise(routing.starts), strict=True))
                terms = hidden.new_empty(len(routing.tokens), hidden.shape[1], dtype=torch.float32)  # [R, H]
            of_batch = [rows[expert] for expert, _ in batch]
            row = torch.cat([torch.arange(*each) for each in of_batch])
            starts = [0, *accumulate(end - begin for begin, end in of_batch)]
            own = Routing(starts, routing.tokens[row], routing.weights[row])
            terms[row] = self.kernel.terms(hidden, extents, own)
        out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        for begin, end in rows.values():
            out.index_add_(0, routing.tokens[begin:end], terms[begin:end])
        return out.to(hidden.dtype)


def coded_layers(model: Any, anatomy: Anatomy, experts: PackedExperts) -> list[CodedLayer | None]:
    """For each layer of a loaded model what computes its experts; None for those that are plain."""
    library = native.load()
    speeds = calibrated(library, torch.get_num_threads())
    found: list[CodedLayer | None] = []
    for layer, packed in zip(anatomy.layers, experts.layers, strict=True):
        if packed.plain:
            found.append(None)
            continue
        recipe = None if layer.kind.modular else recognise(model.get_submodule(layer.experts))
        known = recipe is not None and {recipe.up, "down_proj"} <= packed.tensors.keys()
        threads = best(speeds, packed.nbytes)
        kernel = LayerKernel(extent_of(packed), recipe, library, threads) if recipe and known else None
        found.append(CodedLayer(packed, layer, kernel))
    return found
