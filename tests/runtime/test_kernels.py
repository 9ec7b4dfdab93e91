"""A layer's experts against float64, the C kernels against torch, and neither changed by threads or by tiling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moedge.native import library as native
from moedge.runtime import kernels
from moedge.runtime.formats import PLAIN, Extent, Format, dequantise, from_mxfp4, layout, part_shapes, quantise
from moedge.runtime.kernels import ACTIVATIONS, LayerKernel, Recipe, Routing, recognise, route

FORMATS = [PLAIN, Format("mxfp4")] + [
    Format(code, group, symmetric) for code in ("int8", "int4") for group in (32, 128) for symmetric in (True, False)
]
RECIPES = [Recipe(gated, name, interleaved) for name in ACTIVATIONS for gated, interleaved in ((1, 0), (1, 1), (0, 0))]
RECIPES.append(Recipe(True, "clamped_swiglu", True, 1.702, 7.0))
LIBRARY = native.load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """Random experts of one kind in their extents, and what they compute in float64."""

    def __init__(self, format: Format, recipe: Recipe, hidden: int, width: int, biased: bool = False) -> None:
        self.recipe, self.hidden, self.width, self.biased = recipe, hidden, width, biased
        up = (2 if recipe.gated else 1) * width
        shapes = {recipe.up: (up, hidden), "down_proj": (hidden, width)}
        if biased:
            shapes |= {f"{recipe.up}_bias": (up,), "down_proj_bias": (hidden,)}
        self.extent = layout({name: (shape, torch.bfloat16) for name, shape in shapes.items()}, format)

    def expert(self, seed: int, scale: float = 1.0) -> torch.Tensor:
        memory = aligned(self.extent.nbytes)
        views = self.extent.views(memory)
        for i, (name, stored) in enumerate(self.extent.tensors.items()):
            w = random(stored.shape, 10 * seed + i) * scale / self.hidden**0.5
            if w.dim() == 2 and w.shape[1] > 64:
                w[0, :32], w[-1, 32:64] = 0, w[-1, 32:64] * 1e-6  # a group of zeros, and a tiny one
            for part, value in parts_of(w.bfloat16(), stored.format, seed).items():
                views[name][part].copy_(value)
        return memory

    def expected(self, memory: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, H] -> [N, H] in float64; and the same with the sizes of everything that is added up."""
        views = self.extent.views(memory)

        def weight(name: str) -> torch.Tensor:
            stored = self.extent.tensors[name]
            return dequantise(views[name], stored.format, stored.shape[1], torch.float64).T

        def bias(name: str) -> torch.Tensor:
            return views[f"{name}_bias"]["values"].double() if self.biased else torch.zeros((), dtype=torch.float64)

        up, down = self.recipe.up, "down_proj"
        middle = self.recipe.act(x.double() @ weight(up) + bias(up))
        size = self._size(x.double().abs() @ weight(up).abs() + bias(up).abs())
        return middle @ weight(down) + bias(down), size @ weight(down).abs() + bias(down).abs()

    def _size(self, x: torch.Tensor) -> torch.Tensor:
        """How large the middle may be; an activation is at most its input, or the square of it."""
        gate, up = (x, torch.ones(())) if not self.recipe.gated else (x[:, ::2], x[:, 1::2])
        if self.recipe.gated and not self.recipe.interleaved:
            gate, up = x.chunk(2, 1)
        gate = gate.square() if self.recipe.activation == "relu_squared" else gate
        return gate * (up + 1 if self.recipe.activation == "clamped_swiglu" else up)


def aligned(nbytes: int) -> torch.Tensor:
    memory = torch.empty(nbytes + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + nbytes]


def parts_of(w: torch.Tensor, format: Format, seed: int) -> dict[str, torch.Tensor]:
    if w.dim() == 1 or format == PLAIN:
        return {"values": w}
    if format.code != "mxfp4":
        return quantise(w, format)
    rows, bytes_per_row = part_shapes(tuple(w.shape), w.dtype, format)["values"][0]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, bytes_per_row * 2), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(119, 123, (rows, bytes_per_row // 16), dtype=torch.uint8, generator=generator)
    return from_mxfp4(codes, exponents)


def some_routing(tokens: int, experts: int, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return route(index, torch.rand(tokens, 2, generator=generator) + 0.1, range(experts))


def is_close(found: torch.Tensor, layer: Layer, extents: list[torch.Tensor], x: torch.Tensor, routing: Routing) -> bool:
    """Whether float64 agrees, to what inputs keep: within 2^-16 of the largest of 32, or 2^-8 for 4-bit weights.

    That the latter are exact but for that rounding is checked by tests/native/check.c.
    """
    out, size = torch.zeros(2, len(x), layer.hidden, dtype=torch.float64)
    for i, memory in enumerate(extents):
        rows = slice(routing.starts[i], routing.starts[i + 1])
        tokens, weights = routing.tokens[rows].long(), routing.weights[rows, None].double()
        value, value_size = layer.expected(memory, x[tokens])
        out.index_add_(0, tokens, value * weights)
        size.index_add_(0, tokens, value_size * weights)
    rounded = any(stored.format.bits == 4 for stored in layer.extent.tensors.values())
    return bool((found.double() - out).abs().max() <= (2**-7 if rounded else 1e-4) * size.max() + 1e-30)


def both() -> list[Any]:
    return [pytest.param(None, id="torch"), pytest.param(LIBRARY, id="c", marks=needs_library)]


@pytest.mark.parametrize("library", both())
@settings(max_examples=100, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    recipe=st.sampled_from(RECIPES),
    hidden=st.integers(1, 200),
    width=st.integers(1, 150),
    tokens=st.integers(1, 64),
    biased=st.booleans(),
    exponent=st.sampled_from([-5, -3, 0, 0, 0, 2]),
)
def test_float64_agrees(
    library: native.Library | None,
    format: Format,
    recipe: Recipe,
    hidden: int,
    width: int,
    tokens: int,
    biased: bool,
    exponent: int,
) -> None:
    layer = Layer(format, recipe, hidden, width, biased)
    extents = [layer.expert(seed, 10.0**exponent) for seed in range(3)]
    x, routing = random((tokens, hidden), 5), some_routing(tokens, 3, 6)
    found = LayerKernel(layer.extent, recipe, library).mix(x, extents, routing)
    assert is_close(found, layer, extents, x, routing)


@needs_library
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, kernels.MANY * 4])
def test_threads_and_tiles_change_no_bit(format: Format, tokens: int) -> None:
    layer = Layer(format, Recipe(True, "silu"), 130, 75)
    extents = [layer.expert(seed) for seed in range(3)]
    x, routing = random((tokens, 130), 1), some_routing(tokens, 3, 2)
    one = LayerKernel(layer.extent, layer.recipe, LIBRARY, threads=1)
    two = LayerKernel(layer.extent, layer.recipe, LIBRARY, threads=2)
    whole = one.mix(x, extents, routing)
    assert torch.equal(whole, two.mix(x, extents, routing))
    terms, out = one.terms(x, extents, routing), torch.zeros_like(whole)
    for i in range(3):
        rows = slice(routing.starts[i], routing.starts[i + 1])
        out.index_add_(0, routing.tokens[rows], terms[rows])
    assert torch.equal(whole, out)
    if tokens < kernels.MANY:  # one token alone gets what it got among others
        alone = [row for row in range(len(routing.tokens)) if routing.tokens[row] == 0]
        of_token = [sum(row >= start for start in routing.starts[1:]) for row in alone]
        only = Routing([0, 1, 2], torch.zeros(2, dtype=torch.int32), routing.weights[alone])
        assert torch.equal(one.mix(x[:1], [extents[e] for e in of_token], only), whole[:1])


@needs_library
def test_every_variant_that_runs_here_gives_the_same_numbers() -> None:
    layer = Layer(Format("int4"), Recipe(True, "silu"), 160, 96)
    extents = [layer.expert(seed) for seed in range(2)]
    x, routing = random((5, 160), 1), some_routing(5, 2, 2)
    path = native.HERE / native.LIBRARY
    for variant in native.variants(path):
        found = LayerKernel(layer.extent, layer.recipe, native.Library(path, variant)).mix(x, extents, routing)
        assert is_close(found, layer, extents, x, routing)


@pytest.mark.parametrize("library", both())
def test_nan_in_a_token_stays_in_that_token(library: native.Library | None) -> None:
    layer = Layer(Format("int8"), Recipe(True, "silu"), 96, 64)
    extents, x = [layer.expert(0), layer.expert(1)], random((3, 96), 1)
    x[1, 40] = float("nan")
    routing = route(torch.tensor([[0, 1]] * 3), torch.ones(3, 2), [0, 1])
    out = LayerKernel(layer.extent, layer.recipe, library).mix(x, extents, routing)
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


def test_routing_of_one_token_and_of_many_name_the_same_rows() -> None:
    index, weights = torch.tensor([[3, 0, 5]]), torch.tensor([[0.5, 0.25, 0.125]])
    one = route(index, weights, [0, 3])  # 5 stands for "none"
    assert one.starts == [0, 1, 2]
    assert one.weights.tolist() == [0.25, 0.5]
    many = route(torch.tensor([[3, 0], [0, 1], [1, 0]]), torch.tensor([[0.5, 0.25], [0.1, 0.2], [0.3, 0.4]]), [0, 1, 3])
    assert many.starts == [0, 3, 5, 6]
    assert many.tokens.tolist() == [1, 0, 2, 2, 1, 0]
    torch.testing.assert_close(many.weights, torch.tensor([0.1, 0.25, 0.4, 0.3, 0.2, 0.5]))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu_squared"),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_recipes_are_recognised_by_what_they_compute(act: str, name: str, gated: bool) -> None:
    module = SimpleNamespace(has_gate=gated, has_post_expert_norm=False, is_concatenated=True, act_fn=ACT2FN[act])
    module._apply_gate = lambda x: _default_apply_gate(module, x)
    assert recognise(module) == Recipe(gated, name)
    module.act_fn = torch.cos
    assert recognise(module) is None


def test_gpt_oss_is_recognised() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    assert recognise(GptOssExperts(config)) == Recipe(True, "clamped_swiglu", True, 1.702, 7.0)


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    extent: Extent = layout(
        {"gate_up_proj": ((64, 32), torch.bfloat16), "down_proj": ((32, 64), torch.bfloat16)}, Format("int8")
    )
    if LIBRARY is not None:
        with pytest.raises(ValueError, match="do not belong together"):
            LayerKernel(extent, Recipe(True, "silu"), LIBRARY)
