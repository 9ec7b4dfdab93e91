"""How near to the memory's speed are the kernels: microseconds and GB/s per expert, against torch's own products.

Tokens through a layer of 8 experts of three matrices of 2048 x 1024, in turn from 300 MiB of them, so that no cache
holds any. The memory's speed is that of a C loop that only reads and adds, with the same threads; it is measured in
turn with each product, call by call, so that a change of the machine's load meets both. Figures are medians of calls,
and "undisturbed" is the share when both take their best tenth of calls: what a busy machine shows of an idle one.
torch multiplies the same three matrices, stored as its kernels want them; its activation and sum are left out.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import click
import torch
from report import publish
from torch import Tensor

from moedge.native.library import Library, load
from moedge.runtime.formats import Format, layout, quantise
from moedge.runtime.kernels import LayerKernel, Recipe, Routing

HIDDEN, WIDTH, EXPERTS = 2048, 1024, 8
POOL = 300 << 20  # bytes of weights that are gone through
FORMATS = ("plain", "int8-g32", "int8-g128", "int4-g32", "int4-g32-asym", "int4-g128")
SHAPES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))  # of the matrices of an expert
Layer = Callable[[], None]


def kernel_layer(library: Library | None, name: str, threads: int, rows: int) -> tuple[Layer, int]:
    """Runs a layer on `rows` tokens per expert; and the bytes of one expert."""
    parameters = {"gate_up_proj": ((2 * WIDTH, HIDDEN), torch.bfloat16), "down_proj": ((HIDDEN, WIDTH), torch.bfloat16)}
    extent = layout(parameters, Format.parse(name))
    stride = -(-extent.nbytes // 4096) * 4096
    count = -(-POOL // stride)
    memory = torch.empty((count + 1) * stride, dtype=torch.uint8)
    pool = memory[-memory.data_ptr() % 4096 :][: count * stride].view(count, stride)
    for tensor, (shape, dtype) in parameters.items():
        for part, value in quantise((torch.randn(shape) / 40).to(dtype), Format.parse(name)).items():
            extent.views(pool[0])[tensor][part].copy_(value)
    pool[1:] = pool[0]
    kernel = LayerKernel(extent, Recipe(True, "silu"), library, threads)
    x, turn = torch.randn(rows, HIDDEN), Turn(list(pool))
    tokens = torch.arange(rows, dtype=torch.int32).repeat(EXPERTS)
    routing = Routing([rows * e for e in range(EXPERTS + 1)], tokens, torch.ones(rows * EXPERTS))

    def run() -> None:
        kernel.mix(x, [turn() for _ in range(EXPERTS)], routing)

    return run, extent.nbytes


class Turn:
    """The next of `items`, for ever."""

    def __init__(self, items: list[Any]) -> None:
        self._items, self._at = items, -1

    def __call__(self) -> Any:
        self._at = (self._at + 1) % len(self._items)
        return self._items[self._at]


def torch_layer(pack: Callable[[Tensor], Any], product: Callable[[Tensor, Any], Tensor], nbytes: int) -> Layer:
    """torch's products of 8 experts' matrices; `nbytes`: of one expert."""
    weights = [torch.randn(shape) / 40 for shape in SHAPES]
    turn = Turn([[pack(w) for w in weights] for _ in range(POOL // nbytes + 1)])
    inputs = [torch.randn(1, w.shape[1], dtype=torch.bfloat16) for w in weights]

    def run() -> None:
        for _ in range(EXPERTS):
            for x, packed in zip(inputs, turn(), strict=True):
                product(x, packed)

    return run


def torch_bf16() -> tuple[Layer, int]:
    nbytes = 6 * HIDDEN * WIDTH
    return torch_layer(lambda w: w.bfloat16(), torch.nn.functional.linear, nbytes), nbytes


def torch_int8() -> tuple[Layer, int]:
    """Dynamic int8: one scale per matrix, the input rounded to 8 bits."""
    torch.backends.quantized.engine = "fbgemm"

    def pack(w: Tensor) -> Any:
        return torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(w, 0.001, 0, torch.qint8), None)

    nbytes = 3 * HIDDEN * WIDTH
    return torch_layer(pack, lambda x, w: torch.ops.quantized.linear_dynamic(x.float(), w), nbytes), nbytes


def torch_int4() -> tuple[Layer, int]:
    """torch's int4 in groups of 32."""

    @cache
    def packed_once(shape: tuple[int, ...]) -> Tensor:
        codes = torch.randint(0, 16, shape, dtype=torch.int32)
        found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return found

    def pack(w: Tensor) -> Any:
        scales = torch.ones(w.shape[1] // 32, w.shape[0], 2, dtype=torch.bfloat16)
        return packed_once(tuple(w.shape)).clone(), scales

    def product(x: Tensor, packed: Any) -> Tensor:
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], 32, packed[1])
        return found

    nbytes = int(3 * HIDDEN * WIDTH * (4 + 1) / 8)
    return torch_layer(pack, product, nbytes), nbytes


def read_layer(library: Library, threads: int) -> tuple[Layer, int]:
    """Reads memory and does nothing else: 8 x 8 MiB at a time."""
    memory, nbytes = torch.ones(POOL, dtype=torch.uint8), 8 << 20
    turn = Turn([memory[at : at + EXPERTS * nbytes] for at in range(0, POOL - EXPERTS * nbytes + 1, EXPERTS * nbytes)])

    def run() -> None:
        library.read_sum(turn().data_ptr(), EXPERTS * nbytes, threads)

    return run, nbytes


def timed(layer: Layer) -> float:
    start = time.perf_counter()
    layer()
    return (time.perf_counter() - start) / EXPERTS


def in_turn(layer: Layer, read: Layer, calls: int) -> tuple[list[float], list[float]]:
    """(best tenth, median) seconds per expert of `layer` and of `read`, after two calls of each."""
    pairs = [(timed(layer), timed(read)) for _ in range(calls + 2)][2:]
    tenths = [statistics.quantiles(times, n=10) for times in zip(*pairs, strict=True)]
    return [tenths[0][0], tenths[0][4]], [tenths[1][0], tenths[1][4]]


def compared(library: Library, threads: int, rows: int) -> dict[str, Callable[[], tuple[Layer, int]]]:
    """name -> what makes the layer and says the bytes of an expert."""
    made: dict[str, Callable[[], tuple[Layer, int]]] = {}
    for name in FORMATS:
        made[f"C {name}"] = partial(kernel_layer, library, name, threads, rows)
    if rows == 1:
        return made | {"torch bf16": torch_bf16, "torch int8 dynamic": torch_int8, "torch int4": torch_int4}
    return made | {"int8-g32 through torch": partial(kernel_layer, None, "int8-g32", threads, rows)}


@click.command()
@click.option("--threads", default="1,2", show_default=True, help="numbers of threads, comma between them")
@click.option("--rows", default=1, show_default=True, help="tokens per expert")
@click.option("--calls", default=45, show_default=True, help="timed calls of each layer")
@click.option("--save", is_flag=True, help="write benchmarks/results/kernels.json")
def main(threads: str, rows: int, calls: int, save: bool) -> None:
    """Time every format of the C kernels and torch's products of the same shapes."""
    library = load()
    if library is None:
        raise click.ClickException("the C kernels were not built here: run make env")
    table: list[dict[str, Any]] = []
    for count in map(int, threads.split(",")):
        torch.set_num_threads(count)
        read, read_bytes = read_layer(library, count)
        for name, make in compared(library, count, rows).items():
            layer, nbytes = make()
            (best, seconds), (read_best, read_seconds) = in_turn(layer, read, calls)
            speed, read_speed = nbytes / seconds / 1e9, read_bytes / read_seconds / 1e9
            row = {"product": name, "threads": count, "µs per expert": seconds * 1e6, "GB/s": speed}
            undisturbed = nbytes / best / (read_bytes / read_best)
            table.append(row | {"memory GB/s": read_speed, "share": speed / read_speed, "undisturbed": undisturbed})
    name = "kernels" if rows == 1 else f"kernels-{rows}-rows"
    publish(name, table, {"variant": library.variant, "rows": rows, "calls": calls, "figures": table}, save)


if __name__ == "__main__":
    main()
