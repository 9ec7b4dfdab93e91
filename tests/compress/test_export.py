"""An exported folder is an ordinary one: transformers loads it, and its logits are those of the kept experts."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import FAMILIES, halves, logits_of, stock
from packing import contents
from quantising import quantised
from safetensors.torch import load_file, save_file

from moedge.compress import export as module
from moedge.compress.export import export
from moedge.errors import CheckpointError, ModelError
from moedge.models.checkpoint import Checkpoint
from moedge.models.load import draw
from moedge.models.tiny import make_tiny
from moedge.runtime.formats import Format
from moedge.runtime.lm import load
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]
CASES = [(name, False) for name in FAMILIES[:8]] + [(name, True) for name in ("qwen3_moe", "mixtral", "deepseek_v3")]


def exported(folder: Path, out: Path, **settings: Any) -> list[tuple[int, ...]]:
    """The experts that are kept of each layer."""
    blueprint = draw(folder)
    kept = halves(blueprint.anatomy.num_layers)
    out.mkdir()
    try:
        export(blueprint, kept, out, **settings)
    finally:
        blueprint.checkpoint.close()
    return kept


@pytest.mark.parametrize(("model_type", "stacked"), CASES)
def test_stock_transformers_loads_it(model_type: str, stacked: bool, tiny: Tiny, tmp_path: Path) -> None:
    """In the layout that the family is published in, and in the one that transformers has in memory."""
    folder = tiny(model_type, dtype=torch.bfloat16)
    if stacked:
        stock(folder).save_pretrained(tmp_path / "stacked", save_original_format=False, max_shard_size="300KB")
        folder = tmp_path / "stacked"
    kept = exported(folder, tmp_path / "out")
    model = stock(tmp_path / "out")
    expected = logits_of(model)
    with load(tmp_path / "out") as lm:
        assert torch.equal(logits_of(lm.model), expected)
    with load(folder, experts=kept) as lm:
        assert torch.equal(logits_of(lm.model), expected)
    size, full = (
        sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (tmp_path / "out", folder)
    )
    assert size < 0.8 * full


def test_a_stacked_checkpoint_stays_stacked(tiny: Tiny, tmp_path: Path) -> None:
    exported(tiny("gpt_oss"), tmp_path / "out")
    found, full = Checkpoint(tmp_path / "out"), Checkpoint(tiny("gpt_oss"))
    assert found.tensors.keys() == full.tensors.keys()
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(found.read(name), full.read(name)[[1, 3, 4, 6]])
    found.close()
    full.close()


def test_experts_get_new_numbers(tiny: Tiny, tmp_path: Path) -> None:
    exported(tiny("mixtral"), tmp_path / "out")
    found, full = Checkpoint(tmp_path / "out"), Checkpoint(tiny("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert {e for e in range(8) if name.format(e) in found.tensors} == {0, 1, 2, 3}
    for new, old in enumerate((1, 3, 4, 6)):
        assert torch.equal(found.read(name.format(new)), full.read(name.format(old)))
    found.close()
    full.close()


@pytest.mark.parametrize("model_type", ["switch_transformers", "qwen2_moe"])
def test_tensors_keep_their_alignment(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """On which the last bit of a product depends."""
    exported(tiny(model_type, dtype=torch.bfloat16), tmp_path / "out")
    found, full = Checkpoint(tmp_path / "out"), Checkpoint(tiny(model_type, dtype=torch.bfloat16))
    same = [name for name, info in found.tensors.items() if ".experts.expert_" not in name and info.nbytes % 64 == 0]
    assert {full.tensors[name].offset % 64 for name in same} != {0}, "the test needs a tensor that is not aligned"
    assert all(found.tensors[name].offset % 64 == full.tensors[name].offset % 64 for name in same)
    found.close()
    full.close()


def test_the_config_has_the_count_under_every_name(tiny: Tiny, tmp_path: Path) -> None:
    for model_type, names in (
        ("qwen3_moe", {"num_experts", "num_local_experts"}),
        ("deepseek_v3", {"num_experts", "num_local_experts", "n_routed_experts"}),
    ):
        exported(tiny(model_type), tmp_path / model_type)
        config = json.loads((tmp_path / model_type / "config.json").read_text())
        assert {name: config.get(name) for name in names} == dict.fromkeys(names, 4)
        full = json.loads((tiny(model_type) / "config.json").read_text())
        assert {name: value for name, value in config.items() if name not in names} == {
            name: value for name, value in full.items() if name not in names
        }


def test_a_multimodal_checkpoint_keeps_its_other_parts(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_vl_moe")
    exported(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 4
    assert "num_experts" not in config
    found, full = Checkpoint(tmp_path / "out"), Checkpoint(folder)
    others = {name for name in full.tensors if "visual" in name}
    assert others
    assert others <= found.tensors.keys()
    assert torch.equal(logits_of(stock(tmp_path / "out")), _narrowed(folder))
    found.close()
    full.close()


def _narrowed(folder: Path) -> torch.Tensor:
    with load(folder, experts=halves(4)) as lm:
        return logits_of(lm.model)


def test_small_files_go_along(tmp_path: Path) -> None:
    folder = make_tiny("qwen3_moe", tmp_path / "full", tokenizer=True)
    for name in ("LICENSE", "README.md", "evaluation.json"):
        (folder / name).write_text("the full model's")
    exported(folder, tmp_path / "out")
    names = contents(tmp_path / "out").keys()
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= names
    assert "chat_template.jinja" in names
    assert not names & {"README.md", "evaluation.json"}  # which are about the full model


def test_layers_that_guess_further_tokens_stay_behind(tmp_path: Path) -> None:
    """They have experts of their own, and transformers does not load them."""
    folder = make_tiny("deepseek_v3", tmp_path / "full")
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = "model.layers.61.mlp.experts.7.up_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors | {name: torch.ones(2, 2)}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    exported(folder, tmp_path / "out")
    assert not any(".61." in found for found in Checkpoint(tmp_path / "out").tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny("mixtral", tmp_path / "full")
    stock(folder).save_pretrained(tmp_path / "one")  # in one file
    kept = exported(tmp_path / "one", tmp_path / "single")
    assert [path.name for path in (tmp_path / "single").glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr(module, "LIMIT", 100_000)
    seen: list[tuple[int, int]] = []
    exported(tmp_path / "one", tmp_path / "several", note=lambda done, total: seen.append((done, total)))
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 100_000 + 10_000 for file in files)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == seen[-1][0] == seen[-1][1]
    assert sorted(seen) == seen
    with load(tmp_path / "several") as lm, load(tmp_path / "one", experts=kept) as narrowed:
        assert torch.equal(logits_of(lm.model), logits_of(narrowed.model))


def test_the_kept_experts_of_a_packed_model_are_those_of_a_packed_export(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype=torch.bfloat16)
    kept = exported(folder, tmp_path / "small")
    pack(folder, tmp_path / "full8", Format("int8"))
    pack(tmp_path / "small", tmp_path / "small8", Format("int8"))
    with load(tmp_path / "full8", experts=kept) as lm, load(tmp_path / "small8") as small:
        assert torch.equal(logits_of(lm.model), logits_of(small.model))


def _fp8(shape: tuple[int, ...], chance: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    zeros = torch.zeros(shape)
    return {"NAME.weight": zeros.to(torch.float8_e4m3fn), "NAME.weight_scale_inv": torch.ones(1, 1)}, zeros


def test_packed_and_quantised_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("mixtral"), tmp_path / "packed")
    with pytest.raises(ModelError, match=r"packed is packed, .*: fit the original, then pack the result"):
        exported(tmp_path / "packed", tmp_path / "out")
    folder = tmp_path / "quantised"
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    quantised(tiny("mixtral"), folder, lambda name: ".experts." in name, _fp8, config)
    blueprint = draw(folder, quantised=True)
    with pytest.raises(ModelError, match=r"quantised is quantised, .*fit the 16-bit original"):
        export(blueprint, halves(4), tmp_path / "out")
    blueprint.checkpoint.close()


def test_a_disk_that_is_or_becomes_full(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(CheckpointError, match=r"first will take .*, its disk has 1000 B for it: free"):
            exported(tiny("mixtral"), tmp_path / "first")
        assert not contents(tmp_path / "first")
    real, written = os.write, []

    def write(fd: int, data: Any) -> int:
        written.append(len(data))
        if sum(written) > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match=r"second cannot be written, its disk is full: free some space"):
        exported(tiny("mixtral"), tmp_path / "second")


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path / "full")
    blueprint = draw(folder)
    (tmp_path / "out").mkdir()
    file = max(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=file.name):
        export(blueprint, halves(4), tmp_path / "out")
    blueprint.checkpoint.close()
