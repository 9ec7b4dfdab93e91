"""Embeddings whose rows stay on disk: for which models, and that they are the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moedge import load
from moedge.errors import CheckpointError
from moedge.models import embedding
from moedge.models.embedding import DiskEmbedding
from moedge.models.load import draw
from moedge.runtime.budget import make_plan
from moedge.runtime.formats import Format
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]
IDS = torch.tensor([[5, 9, 9, 3], [7, 0, 5, 95]])


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "LEAST", 1)


def logits(folder: Path, **options: Any) -> tuple[torch.Tensor, bool]:
    """And whether the embedding was on disk."""
    with load(folder, **options) as lm, torch.inference_mode():
        return lm.model(IDS % lm.model.config.vocab_size).logits, isinstance(
            lm.model.get_input_embeddings(), DiskEmbedding
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [None, 16, 8])
def test_within_a_limit_rows_are_read_and_the_same(bits: int | None, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    if bits:
        pack(folder, tmp_path / "out", Format("plain" if bits == 16 else "int8"))
        folder = tmp_path / "out"
    expected, on_disk = logits(folder, dtype=dtype)
    assert not on_disk
    found, on_disk = logits(folder, dtype=dtype, memory="8GiB")
    assert on_disk
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("qwen3_moe", {"tie_word_embeddings": True}), ("gemma4_text", {}), ("switch_transformers", {}), ("nllb-moe", {})],
)
def test_shared_and_scaled_ones_stay_in_memory(model_type: str, settings: dict[str, Any], tiny: Tiny) -> None:
    with load(tiny(model_type, **settings), memory="8GiB") as lm:
        assert not any(isinstance(module, DiskEmbedding) for module in lm.model.modules())


def test_coded_ones_stay_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("int8"), backbone=8)
    with load(tmp_path / "out", memory="8GiB") as lm:
        assert not isinstance(lm.model.get_input_embeddings(), DiskEmbedding)


def test_small_ones_stay_in_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not logits(tiny("qwen3_moe"), memory="8GiB")[1]


def test_the_plan_leaves_them_out(tiny: Tiny) -> None:
    blueprint = draw(tiny("qwen3_moe"))
    try:
        rows = [{row.name: row for row in make_plan(blueprint, limit, context=8).rows} for limit in (None, 8 << 30)]
    finally:
        blueprint.checkpoint.close()
    size = blueprint.meta.get_input_embeddings().weight.numel() * blueprint.dtype.itemsize
    assert rows[0]["backbone"].nbytes - rows[1]["backbone"].nbytes == size
    assert "embeddings stay on disk" in rows[1]["backbone"].basis


def test_gradients_reach_what_comes_after(tiny: Tiny) -> None:
    with load(tiny("qwen3_moe"), memory="8GiB", dtype="fp32") as lm:
        lm.model(IDS).logits.sum().backward()
        assert lm.model.lm_head.weight.grad is not None


def test_an_id_outside_the_vocabulary_is_refused(tiny: Tiny) -> None:
    with load(tiny("qwen3_moe"), memory="8GiB") as lm, pytest.raises(IndexError, match="token 100000 is outside 0 to"):
        lm.model.get_input_embeddings()(torch.tensor([[1, 100000]]))


def test_a_damaged_matrix_of_a_pack_is_named_when_it_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen3_moe"), tmp_path / "out", Format("plain"))
    blueprint = draw(tmp_path / "out")
    info = blueprint.checkpoint.stored["model.embed_tokens.weight"]
    blueprint.checkpoint.close()
    with open(info.file, "r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight .* is damaged"):
        load(tmp_path / "out", memory="8GiB")


def test_a_file_that_is_replaced_while_running_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    with load(folder, memory="8GiB") as lm:
        lm.model.get_input_embeddings()(IDS)
        for file in folder.glob("*.safetensors"):
            shutil.copy(file, tmp_path / "copy")
            file.unlink()
            shutil.move(tmp_path / "copy", file)
        with pytest.raises(CheckpointError, match=r"changed while model\.embed_tokens\.weight"):
            lm.model.get_input_embeddings()(IDS)
