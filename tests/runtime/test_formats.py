"""Number formats: what is stored is as near as the format allows, zeros stay zeros, parts lie where the layout says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedge.errors import CheckpointError
from moedge.native import library as native
from moedge.runtime import formats
from moedge.runtime.formats import (
    PLAIN,
    Format,
    dequantise,
    from_integers,
    from_mxfp4,
    layout,
    pack_nibbles,
    part_shapes,
    quantise,
    unpack_nibbles,
)

FORMATS = [
    Format(code, group, symmetric) for code in ("int8", "int4") for group in (32, 64) for symmetric in (True, False)
]


def matrix(rows: int, columns: int, scale: float, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * scale


def steps(parts: dict[str, torch.Tensor], columns: int, group: int) -> torch.Tensor:
    """The distance between neighbouring numbers, per element."""
    scales = parts["scales"].double().abs() * parts["factors"].double()[:, None]
    return scales.repeat_interleave(group, 1)[:, :columns]


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    exponent=st.integers(-36, 37),
    seed=st.integers(0, 99),
)
def test_every_number_is_within_half_a_step(format: Format, rows: int, columns: int, exponent: int, seed: int) -> None:
    w = matrix(rows, columns, 10.0**exponent, seed)
    parts = quantise(w, format)
    error = (dequantise(parts, format, columns).double() - w.double()).abs()
    step = steps(parts, columns, format.group)
    # symmetric int4 has 7 steps on the side away from the largest number: up to one step is cut off there
    # asymmetric: rounding of the zero adds half a step at the ends
    allowed = 0.5 if format.symmetric and format.code == "int8" else 1.0
    assert (error <= allowed * step * 1.001).all()
    largest = w.abs().amax(1, keepdim=True).double()
    assert (step <= largest / (7 if format.bits == 4 else 120)).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_groups_of_zeros_and_negative_zeros_stay_zero(format: Format) -> None:
    w = matrix(4, 96, 1.0, 0)
    w[1], w[2, :32], w[3] = 0.0, -0.0, -0.0
    w[2, 32:64] = 0.0
    back = dequantise(quantise(w, format), format, 96)
    assert (back[1] == 0).all()
    assert (back[3] == 0).all()
    assert (back[2, :32] == 0).all()
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_groups_far_smaller_than_their_row_keep_their_digits(format: Format) -> None:
    small = 2.0**-22
    w = torch.cat([matrix(3, 64, 1e6, 1), matrix(3, 64, 1e6, 2) * small], 1)
    back = dequantise(quantise(w, format), format, 128)
    error = (back[:, 64:] - w[:, 64:]).norm() / w[:, 64:].norm()
    assert error < (0.01 if format.bits == 8 else 0.13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    w = matrix(2, 40, 1.0, 0)
    w[1, 39] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.up_proj"):
        quantise(w, Format("int8"), name="layers.3.up_proj")


def test_clipping_gives_finer_steps_and_cuts_the_ends() -> None:
    w = matrix(2, 64, 1.0, 3)
    format = Format("int4")
    whole, cut = quantise(w, format), quantise(w, format, clip=0.5)
    torch.testing.assert_close(steps(cut, 64, 32), steps(whole, 64, 32) / 2, rtol=2e-3, atol=0.0)
    per_group = quantise(w, format, clip=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert per_group["scales"][0, 0] == whole["scales"][0, 0]
    assert per_group["scales"][0, 1] == cut["scales"][0, 1]
    reach = dequantise(cut, format, 64).abs().amax(1)
    assert (reach < 0.55 * w.abs().amax(1)).all()


def test_nibbles_lie_so_that_a_mask_and_a_shift_unpack_them_in_order() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    codes[0, 3], codes[0, 19] = 5, 9
    packed = pack_nibbles(codes)
    assert packed[0, 3] == 5 | 9 << 4
    assert torch.equal(unpack_nibbles(packed), codes)


def test_mxfp4_is_kept_exactly() -> None:
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.randint(0, 16, (5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    exponents = torch.randint(100, 138, (5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    codes[2, :32] = 8  # negative zeros
    exponents[2, 0] = 0  # the scale of zeros does not matter
    signed = torch.where(codes >= 8, -1.0, 1.0) * value[(codes & 7).int()]
    expected = signed * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(dequantise(from_mxfp4(codes, exponents), Format("mxfp4"), 96), expected)


def test_mxfp4_that_fp16_scales_cannot_hold_is_refused_by_name() -> None:
    codes = torch.full((1, 64), 3, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"gate.*--bits"):
        from_mxfp4(codes, torch.tensor([[40, 127]], dtype=torch.uint8), "gate")
    with pytest.raises(CheckpointError, match=r"gate.*NaN"):
        from_mxfp4(codes, torch.tensor([[255, 127]], dtype=torch.uint8), "gate")


@pytest.mark.parametrize("format", [PLAIN, *FORMATS], ids=str)
def test_parts_written_through_the_layouts_views_come_back(format: Format) -> None:
    parameters = {"up_proj": ((5, 75), torch.bfloat16), "up_proj_bias": ((5,), torch.bfloat16)}
    extent = layout(parameters, format)
    memory = torch.zeros(extent.nbytes, dtype=torch.uint8)
    w, bias = matrix(5, 75, 1.0, 4).bfloat16(), matrix(1, 5, 1.0, 5)[0].bfloat16()
    views = extent.views(memory)
    for part, value in quantise(w, format).items():
        views["up_proj"][part].copy_(value)
    views["up_proj_bias"]["values"].copy_(bias)
    again = extent.views(memory.clone())
    back = dequantise(again["up_proj"], format, 75, torch.bfloat16)
    assert torch.equal(back, dequantise(quantise(w, format), format, 75, torch.bfloat16))
    assert torch.equal(again["up_proj_bias"]["values"], bias)
    if format == PLAIN:
        assert torch.equal(back, w)


@pytest.mark.parametrize("format", [PLAIN, *FORMATS], ids=str)
def test_parts_are_aligned_and_do_not_overlap(format: Format) -> None:
    extent = layout({"a": ((3, 33), torch.float32), "b": ((7,), torch.float32), "c": ((2, 1), torch.float32)}, format)
    planes = [plane for stored in extent.tensors.values() for plane in stored.planes.values()]
    assert all(plane.offset % 64 == 0 for plane in planes)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(planes))
    assert planes[-1].offset + planes[-1].nbytes <= extent.nbytes


@pytest.mark.parametrize("format", [PLAIN, Format("mxfp4"), *FORMATS], ids=str)
def test_a_format_reads_its_own_name(format: Format) -> None:
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize("text", ["int5", "int8-g", "int8-g32-sym", "", "INT8"])
def test_unknown_formats_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not known"):
        Format.parse(text)


@pytest.mark.parametrize("group", [0, 16, 48, 96, 512])
def test_groups_that_the_kernels_do_not_take_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"group {group}"):
        Format("int8", group)


def test_bytes_per_number() -> None:
    for format, bits in ((Format("int8"), 8.5), (Format("int4"), 4.5), (Format("int4", 32, symmetric=False), 4.75)):
        parts = part_shapes((64, 1024), torch.bfloat16, format)
        stored = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts.values())
        assert stored * 8 / (64 * 1024) == pytest.approx(bits, abs=0.04)


@pytest.mark.parametrize("columns", [64, 96, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", ["int4", "int8"])
def test_integers_of_others_are_kept_exactly(code: str, dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(4)
    levels = 16 if code == "int4" else 256
    q = torch.randint(0, levels, (5, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, levels, (5, 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(5, 2, generator=generator) * 1e-4 + 1e-7).to(dtype)
    scales[3] = 0
    index = torch.arange(columns) // 64
    expected = (q.double() - zeros[:, index].double()) * scales[:, index].double()
    for group in (32, 64):
        format = Format(code, group, symmetric=False)
        parts = from_integers(q, scales, zeros[:, : -(-columns // 64)], 64, format)
        assert parts is not None
        shapes = {part: (tuple(each.shape), each.dtype) for part, each in parts.items()}
        assert shapes == part_shapes((5, columns), dtype, format)
        assert torch.equal(dequantise(parts, format, columns).double(), expected)


def test_integers_that_a_format_cannot_hold() -> None:
    q = torch.zeros(2, 64, dtype=torch.uint8)
    scales, middle = torch.ones(2, 2).half(), torch.full((2, 2), 8, dtype=torch.uint8)
    assert from_integers(q, scales, middle, 32, Format("int4")) is not None
    assert from_integers(q, scales, middle, 32, Format("int4", 64)) is None, "two scales in a group"
    assert from_integers(q, scales, middle + 1, 32, Format("int4")) is None, "not symmetric"
    assert from_integers(q, scales, middle + 1, 32, Format("int4", symmetric=False)) is not None
    with pytest.raises(CheckpointError, match="up has scales that are NaN or infinity"):
        from_integers(q, scales * float("inf"), middle, 32, Format("int4"), "up")


@pytest.mark.skipif(native.load() is None, reason="the C kernels were not built here")
@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from([f for f in FORMATS if f.code in ("int8", "int4")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    exponent=st.integers(-30, 10),
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_the_library_rounds_to_the_same_bytes(
    format: Format, dtype: torch.dtype, rows: int, columns: int, exponent: int, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(columns, rows, generator=generator).T if transposed else torch.randn(rows, columns)
    spread = torch.exp2(torch.randint(-8, 8, (1, columns), generator=generator).float())
    matrix = matrix * 10.0**exponent * spread
    matrix[:, : columns // 3] *= torch.randint(0, 2, (rows, 1), generator=generator)  # groups of zeros
    matrix = matrix.to(dtype)
    if not torch.isfinite(matrix).all():
        return
    found, expected = formats._with_library(matrix, format), formats._with_torch(matrix, format, 1.0, "it")
    assert found is not None
    for name, part in expected.items():
        assert torch.equal(found[name].view(torch.uint8), part.contiguous().view(torch.uint8)), name
    assert found.keys() == expected.keys()


@pytest.mark.skipif(native.load() is None, reason="the C kernels were not built here")
def test_the_library_leaves_what_is_not_finite_to_the_error() -> None:
    matrix = torch.ones(3, 40)
    matrix[2, 39] = float("nan")
    assert formats._with_library(matrix, Format("int8")) is None
    with pytest.raises(CheckpointError, match="NaN"):
        quantise(matrix, Format("int8"))
