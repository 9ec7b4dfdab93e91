"""Linear layers and embeddings in int8 and int4: against their dense matrices, and in models from packs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moedge import load
from moedge.native import library as native
from moedge.runtime.formats import Format, quantise
from moedge.runtime.kernels import MANY
from moedge.runtime.linear import CodedEmbedding, CodedLinear, CodedMatrix
from moedge.runtime.pack import pack
from moedge.runtime.session import Session

LIBRARY = native.load()
BOTH = [None, pytest.param(LIBRARY, marks=pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built"))]
FORMATS = [Format("int8"), Format("int4")]
Tiny = Callable[..., Path]


def coded(format: Format, shape: tuple[int, int], dtype: torch.dtype) -> CodedMatrix:
    matrix = CodedMatrix(format, shape, dtype)
    for part, made in quantise(torch.randn(shape, generator=torch.Generator().manual_seed(1)), format).items():
        matrix.parts[part].copy_(made)
    return matrix


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 70, MANY])
def test_it_is_the_product_with_the_dense_matrix(
    library: native.Library | None, dtype: torch.dtype, format: Format, rows: int
) -> None:
    matrix = coded(format, (75, 130), dtype)
    bias = nn.Parameter(torch.randn(75).to(dtype))
    x = torch.randn(1, rows, 130).to(dtype)
    expected = x.double() @ matrix.rows(slice(None)).double().T + bias.double()
    size = x.double().abs() @ matrix.rows(slice(None)).double().abs().T + bias.double().abs()
    for threads in (1, 2):
        layer = CodedLinear(matrix, bias, library, {threads: (0.0, 1.0)})
        with torch.inference_mode():
            found = layer(x)
        assert found.dtype == dtype
        kept = {torch.float32: 2**-15, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        kept += 2**-8 if format.bits == 4 and library else 0  # inputs as int8
        assert ((found.double() - expected).abs() <= kept * size).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_reach_the_input(format: Format) -> None:
    matrix = coded(format, (40, 64), torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    CodedLinear(matrix, None, LIBRARY, {1: (0.0, 1.0)})(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.rows(slice(None)).sum(0).expand(3, 64))


def test_an_embedding_reads_the_rows_it_is_asked_for() -> None:
    matrix = coded(Format("int8"), (50, 64), torch.bfloat16)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(CodedEmbedding(matrix, None)(ids), matrix.rows(slice(None))[ids])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "jamba"])
def test_a_packed_model_computes_with_its_coded_backbone(
    model_type: str, bits: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = Format(f"int{bits}")
    pack(tiny(model_type), tmp_path / "out", format, backbone=bits)
    ids = torch.tensor([[5, 9, 3, 7, 2, 8]])
    with load(tmp_path / "out") as lm, torch.inference_mode():
        assert any(isinstance(module, CodedLinear) for module in lm.model.modules())
        for module in lm.model.modules():
            if isinstance(module, CodedLinear):
                monkeypatch.setattr(module, "_library", None)
        found = lm.model(ids).logits
        bytes_planned = next(row.nbytes for row in lm.plan.rows if row.name == "backbone")
    monkeypatch.setattr("moedge.models.backbone.coded_modules", lambda *_: {})
    monkeypatch.setattr("moedge.runtime.coded_backbone.coded_modules", lambda *_: {})
    monkeypatch.setattr("moedge.models.load.coded_modules", lambda *_: {})
    with load(tmp_path / "out") as lm, torch.inference_mode():  # every matrix made dense on loading
        assert not any(isinstance(module, CodedLinear) for module in lm.model.modules())
        torch.testing.assert_close(found, lm.model(ids).logits, rtol=1e-4, atol=1e-4)
        dense = next(row.nbytes for row in lm.plan.rows if row.name == "backbone")
    assert bytes_planned < dense


def test_tied_embeddings_share_one_matrix(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe", tie_word_embeddings=True), tmp_path / "out", Format("int8"), backbone=8)
    with load(tmp_path / "out") as lm:
        assert lm.model.get_input_embeddings().matrix is lm.model.get_output_embeddings().matrix


def test_logits_in_pieces_within_a_limit(tiny: Tiny, tmp_path: Path) -> None:
    """While the head computes, the model has no plain parameter at all."""
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("int8"), backbone=8)
    ids = [5, 9, 3, 7]
    with load(tmp_path / "out", memory="8GiB", context=16) as lm:
        found = torch.cat(list(Session(lm).stream(ids)))
        assert lm.plan.logits_bytes is not None
    with load(tmp_path / "out") as lm:
        assert torch.equal(found, torch.cat(list(Session(lm).stream(ids))))
