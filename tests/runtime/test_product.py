"""One row times a matrix: torch's own bits, or torch itself. Weights in 12 bits: tests/models/test_shorten.py."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moedge.native import library as native
from moedge.runtime import product as module
from moedge.runtime.product import Order, RowLinear, find_order, product, put_row_products

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built")
COLUMNS = (32, 64, 96, 512, 544, 1024, 2048)
NUMBERS = LIBRARY.orders() if LIBRARY else {}
STEPS = {"lanes": (32, 64), "pairs": (64, 128, 256, 512, 1024)}
ORDERS = [pytest.param(Order(NUMBERS[name], step), id=f"{name}-{step}") for name in NUMBERS for step in STEPS[name]]


@pytest.fixture(autouse=True)
def _tried_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No order is known before, and the number of threads is as it was behind."""
    monkeypatch.setattr(module, "_found", {})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels must not be asked for a product."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the kernels multiplied")

    monkeypatch.setattr(native.Library, "one_row", refuse)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs(weight: Tensor, count: int = 4, seed: int = 0) -> Iterator[Tensor]:
    """Rows [I]: a random one, and some whose products with rows of `weight` cancel, so that the order is seen."""
    rows, columns = weight.shape
    yield numbers(columns, seed=seed)
    for other in range(1, count):
        chance = torch.Generator().manual_seed(100 * seed + other)
        some = torch.randperm(rows, generator=chance)[: min(64, columns // 2)]
        basis = torch.linalg.qr(weight[some].float().T).Q
        x = torch.randn(columns, generator=chance)
        yield (x - basis @ (basis.T @ x)).bfloat16()


def always(order: Order | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_order", lambda *_: order)


def by_kernel(order: Order) -> Callable[[Tensor, Tensor], Tensor]:
    """A functional.linear that adds in this order."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        assert LIBRARY is not None
        out = x.new_empty(*x.shape[:-1], len(weight))
        call = native.Product(weight.data_ptr(), x=x.data_ptr(), out=out.data_ptr())
        (call.rows, call.columns), call.order, call.step = weight.shape, *order
        LIBRARY.one_row(call, 1)
        return out

    return linear


def rounded_once(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double().T).bfloat16()


# ---- plain weights ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("rows", [1, 16, 33, 1000, 1050])
@torch.no_grad()
def test_one_row_gives_torchs_bits(rows: int, dimensions: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for columns in COLUMNS:
        weight = numbers(rows, columns)
        for x in inputs(weight):
            x = x.view(*[1] * (dimensions - 1), columns)
            found = product(x, {"other": weight[:1], "w": weight}, "w")
            assert found.shape == (*x.shape[:-1], rows)
            assert torch.equal(found, functional.linear(x, weight)), columns


@pytest.mark.parametrize("shape", [(4, 4096), (8, 4096), (16, 8192), (60, 2048), (64, 4096)], ids=str)
@torch.no_grad()
def test_matrices_of_few_rows_give_torchs_bits_on_two_threads(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN splits these among threads along their rows: none of the orders is right, and each seldom wrong."""
    torch.set_num_threads(2)
    for seed in range(8):
        monkeypatch.setattr(module, "_found", {})
        weight = numbers(*shape, seed=seed)
        for x in inputs(weight, 40, seed):
            assert torch.equal(product(x[None], {"w": weight}, "w"), functional.linear(x[None], weight)), seed


@torch.no_grad()
def test_the_last_row_of_a_longer_prompt_gives_torchs_bits() -> None:
    """As a model's head gets it: contiguous, with other strides."""
    weight = numbers(1000, 1024)
    for x in inputs(weight):
        hidden = torch.stack((numbers(1024, seed=5), x))[None][:, -1:]
        assert hidden.stride() != (1024, 1024, 1)
        assert torch.equal(product(hidden, {"w": weight}, "w"), functional.linear(hidden, weight))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (63, 544), (1050, 2048)], ids=str)
@torch.no_grad()
def test_every_order_is_the_product_on_any_number_of_threads(
    shape: tuple[int, int], order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(order, monkeypatch)
    weight = numbers(*shape)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([product(x[None], {"w": weight}, "w") for x in inputs(weight)])
    for x, one, *others in zip(inputs(weight), *found, strict=True):
        size = x.double().abs() @ weight.double().abs().T
        error = (one.double() - x[None].double() @ weight.double().T).abs()
        assert (error <= 2**-8 * one.double().abs() + 2**-15 * size).all()
        assert torch.equal(one, by_kernel(order)(x[None], weight))
        assert all(torch.equal(one, other) for other in others)


# ---- torch's part ----


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        pytest.param(numbers(2, 64), numbers(40, 64), id="two rows"),
        pytest.param(numbers(2, 1, 64), numbers(40, 64), id="two rows of three dimensions"),
        pytest.param(numbers(0, 64), numbers(40, 64), id="no row"),
        pytest.param(numbers(64), numbers(40, 64), id="one dimension"),
        pytest.param(numbers(1, 64).float(), numbers(40, 64).float(), id="fp32"),
        pytest.param(numbers(1, 64).half(), numbers(40, 64).half(), id="fp16"),
        pytest.param(numbers(1, 80), numbers(40, 80), id="80 columns"),
        pytest.param(numbers(1, 128)[:, ::2], numbers(40, 64), id="every other number of a row"),
        pytest.param(numbers(1, 64), numbers(64, 40).T, id="a transposed weight"),
        pytest.param(numbers(1, 64), numbers(40, 96)[:, 32:], id="a part of a weight"),
    ],
)
@pytest.mark.usefixtures("torch_only")
@torch.no_grad()
def test_what_the_kernels_do_not_know_is_torchs(x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    always(Order(0, 64), monkeypatch)
    assert torch.equal(product(x, {"w": weight}, "w"), functional.linear(x, weight))


@pytest.mark.usefixtures("torch_only")
@torch.no_grad()
def test_without_kernels_and_with_two_dtypes_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    always(Order(0, 64), monkeypatch)
    x, weight = numbers(1, 64), numbers(40, 64)
    with pytest.raises(RuntimeError, match="dtype"):
        product(x, {"w": weight.float()}, "w")
    monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(product(x, {"w": weight}, "w"), functional.linear(x, weight))


@pytest.mark.usefixtures("torch_only")
def test_gradients_reach_input_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    always(Order(0, 64), monkeypatch)
    plain = nn.Linear(64, 40, bias=False, dtype=torch.bfloat16)
    layer = copy.deepcopy(plain)
    put_row_products(layer)
    grads = []
    for each in (plain, layer):
        x = numbers(1, 64).requires_grad_()
        each(x).square().sum().backward()
        assert x.grad is not None
        assert each.weight.grad is not None
        grads.append((x.grad, each.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert grads[0][0].any()


# ---- which order ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dimensions", [2, 3])
@torch.no_grad()
def test_the_order_of_a_product_is_found(dimensions: int, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    linear, seen = by_kernel(order), []

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(x.dim())
        return linear(x, weight)

    monkeypatch.setattr(module, "functional", SimpleNamespace(linear=torchs))
    assert find_order(numbers(300, 2048), dimensions, LIBRARY) == order
    assert set(seen) == {dimensions}


@pytest.mark.parametrize("shape", [(1, 4096), (2, 512), (8, 4096), (60, 2048), (300, 96), (1024, 1024)], ids=str)
@torch.no_grad()
def test_no_order_is_found_for_a_product_that_adds_in_another(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIBRARY is not None
    monkeypatch.setattr(module, "functional", SimpleNamespace(linear=rounded_once))
    for seed in range(12 if shape[0] < 100 else 3):
        assert find_order(numbers(*shape, seed=seed), 2, LIBRARY) is None, seed


@torch.no_grad()
def test_weights_that_cannot_tell_orders_apart_find_none() -> None:
    assert LIBRARY is not None
    if len(ORDERS) < 2:
        pytest.skip("this processor has one order or none")
    assert find_order(torch.zeros(64, 1024).bfloat16(), 2, LIBRARY) is None
    assert find_order(torch.eye(64).bfloat16(), 2, LIBRARY) is None


FIND = """
import torch
from moedge.native import library
from moedge.runtime.product import find_order
weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
with torch.backends.mkldnn.flags(enabled={onednn}), torch.no_grad():
    print(find_order(weight, 2, library.load()))
"""


@pytest.mark.parametrize(
    ("name", "step", "onednn", "setting"),
    [
        ("lanes", 64, False, {"ATEN_CPU_CAPABILITY": "avx2"}),
        ("pairs", 512, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    ],
)
def test_torchs_own_orders_are_known(name: str, step: int, onednn: bool, setting: dict[str, str]) -> None:
    if name not in NUMBERS:
        pytest.skip(f"this processor has not the instructions of {name}")
    command = [sys.executable, "-c", FIND.format(onednn=onednn)]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Order(NUMBERS[name], step))


@torch.no_grad()
def test_an_order_is_looked_for_once_in_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def find(weight: Tensor, dimensions: int, library: native.Library) -> None:
        tried.append((tuple(weight.shape), dimensions, torch.get_num_threads(), torch._C._get_mkldnn_enabled()))

    monkeypatch.setattr(module, "find_order", find)
    expected = []
    for rows, columns, dimensions, threads, onednn in (
        *((40, 64, 2, 1, True), (41, 64, 2, 1, True), (40, 96, 2, 1, True)),
        *((40, 64, 3, 1, True), (40, 64, 2, 2, True), (40, 64, 2, 1, False)),
    ):
        torch.set_num_threads(threads)
        with torch.backends.mkldnn.flags(enabled=onednn):
            for seed in range(2):  # another matrix of the same shape
                x = numbers(columns).view(*[1] * (dimensions - 1), columns)
                product(x, {"w": numbers(rows, columns, seed=seed)}, "w")
        expected.append(((rows, columns), dimensions, threads, onednn))
    assert tried == expected


# ---- layers ----


class OwnLinear(nn.Linear):
    """A linear layer that computes something else."""


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96, bias=False, dtype=torch.bfloat16),
        nn.Linear(96, 96, dtype=torch.bfloat16),
        OwnLinear(96, 64, bias=False, dtype=torch.bfloat16),
        nn.Sequential(nn.Linear(64, 1056, bias=False, dtype=torch.bfloat16)),
    )


def test_only_plain_bf16_layers_without_bias_are_changed() -> None:
    model = layers()
    before = model.state_dict()
    put_row_products(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [
        RowLinear,
        nn.Linear,
        OwnLinear,
        RowLinear,
    ]
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    single = nn.Linear(64, 64, bias=False)
    put_row_products(single)
    assert type(single) is nn.Linear


@torch.no_grad()
def test_a_changed_model_and_its_copy_give_the_same_bits() -> None:
    model, x = layers(), numbers(1, 64)
    expected = [model(x), model(numbers(3, 64))]
    put_row_products(model)
    other = copy.deepcopy(model)
    for each in (model, other):
        assert isinstance(each[0], RowLinear)
        assert torch.equal(each(x), expected[0])
        assert torch.equal(each(numbers(3, 64)), expected[1])
    other[0].get_parameter("weight").mul_(-2)
    assert torch.equal(other[0](x), -2 * model[0](x))


def test_peft_trains_beside_a_changed_layer() -> None:
    peft = pytest.importorskip("peft")
    model, x = layers(), numbers(1, 64)
    put_row_products(model)
    with torch.no_grad():
        expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    assert isinstance(adapted.base_model.model[0].base_layer, RowLinear)
    adapted(x).float().square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for name, p in adapted.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        assert torch.equal(adapted(x), expected)
        merged = adapted.merge_and_unload()
        assert isinstance(merged[0], RowLinear)
        assert torch.equal(merged(x), expected)
