"""Load the compiled kernels, choose the variant that this processor has, and call it: addresses and integers only.

A variant is used only after it gave the portable C code's results on a small layer here, as not every one could be run
where it was written. ctypes lets go of the GIL during each call. Knows no tensors.
"""

import ctypes
import logging
import random
import struct
from collections.abc import Sequence
from ctypes import POINTER, Structure, addressof, byref, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from moedge.native.build import HERE, LIBRARY, source_hash

F32, BF16, F16, INT8, INT4, MXFP4 = range(6)  # the codes of moedge.h
PARTS = ("values", "scales", "factors", "zeros")
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4, "clamped_swiglu": 5}
_LOG = logging.getLogger("moedge")


class Matrix(Structure):
    """moedge_matrix of moedge.h."""

    _fields_ = (
        *((name, c_int64) for name in ("values", "scales", "factors", "zeros", "bias")),
        *((name, c_int32) for name in ("code", "bias_code", "rows", "columns", "group", "first", "step")),
    )


class Expert(Structure):
    """moedge_expert of moedge.h."""

    _fields_ = (
        *((name, Matrix) for name in ("gate", "up", "down")),
        *(("activation", c_int32), ("alpha", c_float), ("limit", c_float)),
    )


class Call(Structure):
    """moedge_call of moedge.h."""

    _fields_ = (
        *(("experts", c_int32), ("tokens_count", c_int32), ("extents", POINTER(c_void_p))),
        *(("starts", POINTER(c_int32)), ("tokens", c_void_p), ("weights", c_void_p)),
        *((name, c_void_p) for name in ("x", "out", "terms", "workspace")),
    )


class Rows(Structure):
    """moedge_rows of moedge.h."""

    _fields_ = (
        *((name, c_int32) for name in ("count", "x_code", "out_code")),
        *((name, c_void_p) for name in ("x", "out", "workspace")),
    )


class Norm(Structure):
    """moedge_norm of moedge.h."""

    _fields_ = (
        *((name, c_int32) for name in ("count", "columns", "code", "weight_code")),
        *(("epsilon", c_float), ("offset", c_float)),
        *((name, c_void_p) for name in ("x", "weight", "out")),
    )


class Projection(Structure):
    """moedge_projection of moedge.h."""

    _fields_ = (("matrix", Matrix), ("memory", c_void_p), ("bias", c_void_p))


class HeadNorm(Structure):
    """moedge_head_norm of moedge.h."""

    _fields_ = (("weight", c_void_p), ("columns", c_int32), ("epsilon", c_float), ("offset", c_float))


class Attention(Structure):
    """moedge_attention of moedge.h."""

    _fields_ = (
        *((name, Projection) for name in ("q", "k", "v", "o")),
        *((name, HeadNorm) for name in ("q_norm", "k_norm")),
        ("sinks", c_void_p),
        *((name, c_int32) for name in ("heads", "kv_heads", "head_size", "rotated", "angles", "code")),
        ("scale", c_float),
    )


class AttentionCall(Structure):
    """moedge_attention_call of moedge.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "keys", "values")),
        *(("head_stride", c_int64), ("past", c_int32), ("out", c_void_p), ("workspace", c_void_p)),
    )


class DecoderLayer(Structure):
    """moedge_decoder_layer of moedge.h."""

    _fields_ = (
        *(("attention", Attention), ("before", HeadNorm), ("after", HeadNorm), ("router", Projection)),
        *((name, c_int32) for name in ("top_k", "normalised")),
    )


class DecoderCall(Structure):
    """moedge_decoder_call of moedge.h."""

    _fields_ = (("attention", AttentionCall), *((name, c_void_p) for name in ("normed", "experts", "weights")))


class Rounding(Structure):
    """moedge_rounding of moedge.h."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "columns", "code", "x_code", "group")),
        *(("row_step", c_int64), ("column_step", c_int64)),
        *((name, c_void_p) for name in ("x", "values", "scales", "factors", "zeros")),
    )


class Product(Structure):
    """moedge_product of moedge.h."""

    _fields_ = (
        *(("matrix", c_void_p), ("shortened", c_void_p), ("count", c_int64), ("first", c_int64)),
        *((name, c_void_p) for name in ("x", "out", "workspace")),
        *((name, c_int32) for name in ("rows", "columns", "order", "step")),
    )


class Piece(Structure):
    """moedge_piece of moedge.h."""

    _fields_ = (("offset", c_int64), ("nbytes", c_int64), ("to", c_void_p))


class Library:
    """The functions of one compiled library, with one variant. `variant` is its name."""

    def __init__(self, path: Path, variant: int) -> None:
        self._c, self._variant = _functions(path), variant
        self.variant = self._c.moedge_variant_name(variant).decode()

    def workspace(self, expert: Expert, tokens: int, routed: int) -> int:
        """Bytes that a call with so many tokens and routed rows needs."""
        return int(self._c.moedge_workspace(byref(expert), tokens, routed))

    def layer(self, expert: Expert, call: Call, threads: int) -> None:
        self._c.moedge_layer(self._variant, byref(expert), byref(call), threads)

    def linear_workspace(self, matrix: Matrix, count: int) -> int:
        """Bytes that `count` inputs of a matrix need."""
        return int(self._c.moedge_linear_workspace(byref(matrix), count))

    def linear(self, matrix: Matrix, extent: int, rows: Rows, threads: int) -> None:
        self._c.moedge_linear(self._variant, byref(matrix), extent, byref(rows), threads)

    def attention_workspace(self, attention: Attention, tokens: int, threads: int) -> int:
        """Bytes that a call needs, `tokens` with the one that is new."""
        return int(self._c.moedge_attention_workspace(byref(attention), tokens, threads))

    def attend(self, attention: Attention, call: AttentionCall, threads: int) -> None:
        self._c.moedge_attend(self._variant, byref(attention), byref(call), threads)

    def route_workspace(self, layer: DecoderLayer, tokens: int, threads: int) -> int:
        """Bytes that a call needs, `tokens` with the one that is new."""
        return int(self._c.moedge_route_workspace(byref(layer), tokens, threads))

    def attend_and_route(self, layer: DecoderLayer, call: DecoderCall, threads: int) -> None:
        self._c.moedge_attend_and_route(self._variant, byref(layer), byref(call), threads)

    def quantise(self, rounding: Rounding) -> int:
        """0; 1 where a number is not finite; 2 without memory."""
        return int(self._c.moedge_quantise(self._variant, byref(rounding)))

    def rms_norm(self, norm: Norm) -> None:
        self._c.moedge_rms_norm(byref(norm))

    def short_bytes(self, count: int) -> int:
        """Bytes of `count` bf16 numbers in 12 bits each; a multiple of 32 of them."""
        return int(self._c.moedge_short_bytes(count))

    def shorten(self, numbers: int, count: int, out: int) -> bool:
        """bf16 numbers to 12 bits each, without loss; False where their exponents differ too much."""
        return bool(self._c.moedge_shorten(numbers, count, out))

    def compact(self, numbers: int, count: int, out: int, room: int) -> int:
        """bf16 numbers in as few bits as their exponents allow: the bytes written; 0 where `room` is too little."""
        return int(self._c.moedge_compact(numbers, count, out, room))

    def restore(self, shortened: int, count: int, out: int) -> None:
        self._c.moedge_restore(self._variant, shortened, count, out)

    def orders(self) -> dict[str, int]:
        """The orders of addition that this processor has the instructions for, and their numbers."""
        found = range(self._c.moedge_orders())
        return {self._c.moedge_order_name(o).decode(): o for o in found if self._c.moedge_order_runs(o)}

    def product_workspace(self, product: Product, threads: int) -> int:
        """Bytes that a call needs."""
        return int(self._c.moedge_product_workspace(byref(product), threads))

    def one_row(self, product: Product, threads: int) -> None:
        self._c.moedge_one_row(self._variant, byref(product), threads)

    def dequantise(self, matrix: Matrix, extent: int, rows: tuple[int, int], bf16: bool, out: int) -> None:
        """Rows from, to of a stored matrix to the address `out`, as fp32 or bf16."""
        self._c.moedge_dequantise(self._variant, byref(matrix), extent, *rows, bf16, out)

    def read(self, file: int, pieces: Sequence[Piece], ends: tuple[int, int], block: int, size: int) -> int:
        """Pieces of a file between two offsets, through a block of memory: the bytes read, -1 where that failed."""
        array = (Piece * len(pieces))(*pieces)
        return int(self._c.moedge_read(file, array, len(pieces), *ends, block, size))

    def read_sum(self, address: int, nbytes: int, threads: int) -> int:
        """Read memory once, as fast as it goes."""
        return int(self._c.moedge_read_sum(self._variant, address, nbytes, threads))


@cache
def _functions(path: Path) -> Any:
    c = ctypes.CDLL(str(path))
    c.moedge_sources.restype = c.moedge_variant_name.restype = c_char_p
    c.moedge_workspace.restype, c.moedge_workspace.argtypes = ctypes.c_size_t, (POINTER(Expert), c_int, c_int)
    c.moedge_layer.restype, c.moedge_layer.argtypes = None, (c_int, POINTER(Expert), POINTER(Call), c_int)
    c.moedge_linear_workspace.restype, c.moedge_linear_workspace.argtypes = ctypes.c_size_t, (POINTER(Matrix), c_int)
    c.moedge_linear.restype = None
    c.moedge_linear.argtypes = (c_int, POINTER(Matrix), c_void_p, POINTER(Rows), c_int)
    c.moedge_attention_workspace.restype = ctypes.c_size_t
    c.moedge_attention_workspace.argtypes = (POINTER(Attention), c_int, c_int)
    c.moedge_attend.restype = None
    c.moedge_attend.argtypes = (c_int, POINTER(Attention), POINTER(AttentionCall), c_int)
    c.moedge_route_workspace.restype = ctypes.c_size_t
    c.moedge_route_workspace.argtypes = (POINTER(DecoderLayer), c_int, c_int)
    c.moedge_attend_and_route.restype = None
    c.moedge_attend_and_route.argtypes = (c_int, POINTER(DecoderLayer), POINTER(DecoderCall), c_int)
    c.moedge_quantise.restype, c.moedge_quantise.argtypes = c_int, (c_int, POINTER(Rounding))
    c.moedge_rms_norm.restype, c.moedge_rms_norm.argtypes = None, (POINTER(Norm),)
    c.moedge_dequantise.restype = None
    c.moedge_dequantise.argtypes = (c_int, POINTER(Matrix), c_void_p, c_int, c_int, c_int, c_void_p)
    c.moedge_short_bytes.restype, c.moedge_short_bytes.argtypes = ctypes.c_size_t, (c_int64,)
    c.moedge_shorten.restype, c.moedge_shorten.argtypes = c_int, (c_void_p, c_int64, c_void_p)
    c.moedge_compact.restype = ctypes.c_size_t
    c.moedge_compact.argtypes = (c_void_p, c_int64, c_void_p, ctypes.c_size_t)
    c.moedge_restore.restype, c.moedge_restore.argtypes = None, (c_int, c_void_p, c_int64, c_void_p)
    c.moedge_order_name.restype = c_char_p
    c.moedge_product_workspace.restype = ctypes.c_size_t
    c.moedge_product_workspace.argtypes = (POINTER(Product), c_int)
    c.moedge_one_row.restype, c.moedge_one_row.argtypes = None, (c_int, POINTER(Product), c_int)
    c.moedge_read.restype = c_int64
    c.moedge_read.argtypes = (c_int, POINTER(Piece), c_int, c_int64, c_int64, c_void_p, c_int64)
    c.moedge_read_sum.restype, c.moedge_read_sum.argtypes = ctypes.c_uint64, (c_int, c_void_p, ctypes.c_size_t, c_int)
    return c


def variants(path: Path = HERE / LIBRARY) -> list[int]:
    """The variants of a library that this processor can run, best last. Raises OSError for what is no library."""
    c = _functions(path)
    return [v for v in range(c.moedge_variants()) if c.moedge_variant_runs(v)]


@cache
def load() -> Library | None:
    """The kernels, or None, said once in the log, where they were not built, are stale, or fail their check."""
    library, reason = _load(HERE / LIBRARY)
    if library is None:
        _LOG.warning(
            "the C kernels are not used: %s. Experts in int8 and int4 are slower, and fewer in bf16 fit", reason
        )
    return library


def _load(path: Path) -> tuple[Library | None, str]:
    if not path.exists():
        return None, "they were not built: install a C compiler, then moedge again"
    try:
        sources = _functions(path).moedge_sources().decode()
        choices = variants(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}): install moedge again"
    if sources != source_hash():
        return None, f"{path.name} was built from other sources: run python -m moedge.native.build"
    portable = Library(path, choices[0])
    expected = _small_layer(portable)
    for choice in reversed(choices[1:]):
        library = Library(path, choice)
        if _agree(_small_layer(library), expected):
            return library, ""
        _LOG.warning("the %s kernels give wrong results on this processor: please report it", library.variant)
    return portable, ""


def _agree(found: list[float], expected: list[float]) -> bool:
    size = max(map(abs, expected))
    return all(abs(a - b) <= 1e-5 * size for a, b in zip(found, expected, strict=True))


def _small_layer(library: Library) -> list[float]:
    """Outputs of small layers of every quantised kind, for five tokens; the same for every library."""
    rng, side, tokens = random.Random(0), 96, 5
    found: list[float] = []
    for code, asymmetric in ((INT8, False), (INT8, True), (INT4, False), (INT4, True), (MXFP4, False)):
        expert, nbytes = square_expert(side, code, asymmetric)
        matrix = expert.up
        content = bytearray(rng.randbytes(nbytes))
        for i in range(side * (side // 32)):
            struct.pack_into("<e", content, matrix.scales + 2 * i, rng.uniform(-1, 1))
        for i in range(side):
            struct.pack_into("<f", content, matrix.factors + 4 * i, 1 / 64)
        memory = (c_char * nbytes).from_buffer(content)
        x = (c_float * (tokens * side))(*[rng.uniform(-1, 1) for _ in range(tokens * side)])
        out = (c_float * (tokens * side))()
        run_once(library, expert, [addressof(memory)], (addressof(x), addressof(out)), tokens)
        found += out
    return found


def square_expert(side: int, code: int, asymmetric: bool) -> tuple[Expert, int]:
    """A gated expert whose three matrices are one [side, side] matrix in groups of 32, and the bytes of its extent."""
    sizes = (side * side // (1 if code == INT8 else 2), side * (side // 32) * 2, side * 4, side * (side // 32))
    offsets = [sum(-(-size // 64) * 64 for size in sizes[:i]) for i in range(5)]
    zeros = offsets[3] if asymmetric else -1
    matrix = Matrix(*offsets[:3], zeros, -1, code, F32, side, side, 32, 0, 1)
    return Expert(matrix, matrix, matrix, ACTIVATIONS["silu"], 0, 0), offsets[4]


def run_once(
    library: Library, expert: Expert, extents: Sequence[int], ends: tuple[int, int], tokens: int, threads: int = 1
) -> None:
    """All of `tokens` tokens through every extent with weight 1. `ends`: addresses of input and output."""
    routed = tokens * len(extents)
    starts = (c_int32 * (len(extents) + 1))(*range(0, routed + 1, tokens))
    token_of = (c_int32 * routed)(*[*range(tokens)] * len(extents))
    weights = (c_float * routed)(*[1.0] * routed)
    workspace = (c_char * library.workspace(expert, tokens, routed))()
    arrays = (c_void_p * len(extents))(*extents), starts, addressof(token_of), addressof(weights)
    library.layer(expert, Call(len(extents), tokens, *arrays, *ends, None, addressof(workspace)), threads)
