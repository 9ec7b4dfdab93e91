"""One row times a matrix of bf16, bit-equal to torch's product and faster: the C kernels add in torch's own order.

In decoding every product is of this kind. The kernels read a matrix once, where it lies, also in fewer bits. In
which order torch adds depends on the processor, the shape and the number of threads, and is found by trying: an order
is used only after it gave torch's bits, and no other did. Knows matrices; no experts, no disk.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moedge.models.shorten import ShortExpert
from moedge.native import library as native
from moedge.native.library import Library, Product
from moedge.runtime.kernels import workspace_of

PROBES = 4096  # products that nearly cancel, and are compared before an order is taken for torch's
CANCELLED = 1 << 19  # numbers of the rows that have them with one input
OTHERS = 64  # as many other products tell as much as one of these
WIDTH = 32  # rows of a matrix must have a multiple of so many numbers
SMALL = 1 << 22  # bytes of a matrix that one thread multiplies faster than several: these have to be woken
SMALL_SHORT = 1 << 20  # and of one in fewer bits, which takes longer
_STEPS = {"pairs": (64, 128, 256, 512, 1024, 2048, 4096), "lanes": (32, 64)}  # of the orders of native/order.h


class Order(NamedTuple):
    """A way of adding: native/order.h."""

    number: int
    step: int


class _Key(NamedTuple):
    """What torch's order depends on."""

    rows: int
    columns: int
    dimensions: int  # of the input
    threads: int
    onednn: bool


_found: dict[_Key, Order | None] = {}


def product(x: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """functional.linear(x, parameters[name]): [..., I], [O, I] -> [..., O]."""
    library = native.load() if _is_row(x) else None
    if library is None:
        return functional.linear(x, parameters[name])
    if isinstance(parameters, ShortExpert):
        place = parameters.place(name)
        rows, columns = place.shape
        call = Product(None, parameters.memory.data_ptr(), parameters.numbers, place.offset // x.itemsize)
    else:
        weight = parameters[name]
        if weight.dtype != x.dtype or not weight.is_contiguous():
            return functional.linear(x, weight)
        rows, columns = weight.shape
        call = Product(weight.data_ptr())
    threads = torch.get_num_threads()
    key = _Key(rows, columns, x.dim(), threads, torch._C._get_mkldnn_enabled())
    if key not in _found:
        _found[key] = find_order(parameters[name], x.dim(), library)
    order = _found[key]
    if order is None:
        return functional.linear(x, parameters[name])
    return _times(call, x, rows, order, library, threads)


def _is_row(x: Tensor) -> bool:
    columns = x.shape[-1]
    return (
        x.dtype == torch.bfloat16
        and x.numel() == columns
        and columns % WIDTH == 0
        and x.dim() > 1
        and x.is_contiguous()
        and x.is_cpu
        and not torch.is_grad_enabled()
    )


def _times(call: Product, x: Tensor, rows: int, order: Order, library: Library, threads: int) -> Tensor:
    """x [..., I] of one row by the matrix that `call` says -> [..., rows]."""
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], rows)
    call.x, call.out = x.data_ptr(), out.data_ptr()
    call.rows, call.columns, call.order, call.step = rows, columns, *order
    threads = 1 if 2 * rows * columns < (SMALL_SHORT if call.shortened else SMALL) else threads
    call.workspace = workspace_of(_workspace_bytes(library, columns, call.shortened is not None, threads)).data_ptr()
    library.one_row(call, threads)
    return out


@cache
def _workspace_bytes(library: Library, columns: int, shortened: bool, threads: int) -> int:
    call = Product(columns=columns)
    call.shortened = 1 if shortened else None  # any address: it is not read
    return library.product_workspace(call, threads)


def find_order(weight: Tensor, dimensions: int, library: Library) -> Order | None:
    """The one order that gives torch's bits for `weight` [O, I]; None where none does, or several.

    Two orders seldom differ in a bit that is left after rounding to bf16, except where terms cancel. So the inputs are
    random ones made orthogonal to some rows; then a wrong order is seen in one of 20 to 225 of these rows' products.
    """
    orders, threads = list(_orders(weight.shape[1], library)), torch.get_num_threads()
    for x in _telling(weight):
        x = x.view(*[1] * (dimensions - 1), -1)
        expected = functional.linear(x, weight)
        call = Product(weight.data_ptr())
        orders = [o for o in orders if torch.equal(_times(call, x, len(weight), o, library, threads), expected)]
        if not orders:
            return None
    return orders[0] if len(orders) == 1 else None


def _telling(weight: Tensor) -> Iterator[Tensor]:
    """Inputs [I] for find_order."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(rows, generator=generator)[: max(1, min(CANCELLED // columns, columns // 2))]
    basis = torch.linalg.qr(weight[some].float().T).Q  # [I, R]
    for _ in range(-(-PROBES // (len(some) + rows // OTHERS))):
        x = torch.randn(columns, generator=generator)
        yield (x - basis @ (basis.T @ x)).to(weight.dtype)


def _orders(columns: int, library: Library) -> Iterator[Order]:
    """All that may be torch's, each once."""
    for name, number in library.orders().items():
        for step in sorted({min(step, columns) for step in _STEPS[name]} if name == "pairs" else _STEPS[name]):
            yield Order(number, step)


class RowLinear(nn.Linear):
    """An nn.Linear without bias whose products with one row are `product`'s."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, {"weight": self.weight}, "weight")


def put_row_products(model: nn.Module) -> None:
    """Make the linear layers of a loaded model RowLinears, where that can be."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and module.weight.dtype == torch.bfloat16:
            module.__class__ = RowLinear
