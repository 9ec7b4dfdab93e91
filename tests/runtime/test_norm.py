"""Norms in C: which modules they stand in for, and that they give the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moedge import load
from moedge.native import library as native
from moedge.runtime.formats import Format
from moedge.runtime.norm import FEW, FastNorm, put_fast_norms
from moedge.runtime.pack import pack

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Qwen3MoeRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("columns", [1, 13, 128])
def test_it_gives_what_the_module_gives(kind: type[nn.Module], dtype: torch.dtype, columns: int) -> None:
    norm = kind(columns, eps=1e-5)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    model = nn.ModuleDict({"norm": norm.to(dtype)})
    assert put_fast_norms(model, LIBRARY) == 1
    x = torch.randn(2, 3, columns).to(dtype)
    with torch.inference_mode():
        found, expected = model["norm"](x), norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


class Mean(nn.Module):
    """Looks like one and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) * self.weight


def test_others_are_left_alone() -> None:
    model = nn.ModuleDict({"mean": Mean(), "layer": nn.LayerNorm(8), "linear": nn.Linear(8, 8, bias=False)})
    assert put_fast_norms(model, LIBRARY) == 0


def test_many_rows_and_gradients_go_through_the_module() -> None:
    norm = Qwen3MoeRMSNorm(16)
    fast = FastNorm(norm, 0.0, 1e-6, LIBRARY)
    many = torch.randn(FEW + 1, 16)
    with torch.inference_mode():
        assert torch.equal(fast(many), norm(many))
    x = torch.randn(2, 16, requires_grad=True)
    fast(x).square().sum().backward()
    assert x.grad is not None
    assert [name for name, _ in fast.named_parameters()] == ["weight"]


def test_a_pack_with_a_coded_backbone_has_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("int8"), backbone=8)
    with load(tmp_path / "out") as lm:
        layers = lm.model.config.num_hidden_layers
        assert sum(isinstance(module, FastNorm) for module in lm.model.modules()) == 4 * layers + 1


def test_looking_for_norms_makes_no_coded_matrix_dense(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("int8"), backbone=8)
    made: list[object] = []
    monkeypatch.setattr("moedge.runtime.linear.CodedMatrix.rows", lambda matrix, index: made.append(index))
    with load(tmp_path / "out") as lm:
        assert any(isinstance(module, FastNorm) for module in lm.model.modules())
    assert not made
