"""`moedge info` says of a checkpoint what is true, without reading its weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moedge.errors import CheckpointError, ModelError
from moedge.models.tiny import make_tiny
from moedge.models.verb_info import _count, command
from moedge.native import library
from moedge.runtime.formats import Format
from moedge.runtime.pack import pack

Tiny = Callable[..., Path]


def info(*args: object) -> Result:
    result = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2_moe", tmp_path_factory.mktemp("info"), dtype=torch.bfloat16, tokenizer=True)


def test_json_holds_the_facts(folder: Path) -> None:
    facts = json.loads(info(folder, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(count for name, count in parameters.items() if ".experts." in name)
    total = sum(parameters.values())
    assert facts["parameters"] == total
    assert facts["active_parameters"] == total - experts + experts * 2 // 8
    assert facts["architecture"] == "Qwen2MoeForCausalLM"
    assert (facts["layers"], facts["moe_layers"]) == (4, 4)
    assert (facts["num_experts"], facts["top_k"], facts["experts_per_layer"]) == (8, 2, [8] * 4)
    assert facts["expert_kind"]["gated"] is True
    assert facts["shared_experts"] is True
    assert facts["experts_bytes"] == 2 * experts == 32 * facts["expert_bytes"]
    assert facts["stored"] == {"bfloat16": {"backbone": 2 * (total - experts), "experts": 2 * experts}}
    assert facts["context"] == 512
    assert facts["tokenizer"]["chat_template"] is True
    assert sum(file["bytes"] for file in facts["files"]) == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert len(facts["files"]) > 1


def test_sizes_follow_the_dtype_in_which_it_would_be_loaded(folder: Path) -> None:
    own, double = (json.loads(info(folder, "--json", *more).stdout) for more in ((), ("--dtype", "fp32")))
    assert double["experts_bytes"] == 2 * own["experts_bytes"]
    assert double["stored"] == own["stored"]


def test_the_table_for_people(folder: Path, tiny: Tiny) -> None:
    table = info(folder).stdout
    for words in ("8 a layer, 2 for each token", "shared experts", "yes", "with chat template", "512 tokens"):
        assert words in table
    table = info(tiny("switch_transformers")).stdout
    for words in ("8, 4 of them with experts", "not gated, modular", "not stated", "none"):
        assert words in table


def test_a_pack_says_its_formats_and_what_computes_them(folder: Path, tmp_path: Path) -> None:
    kernels = library.load()
    for name, computed_by in (("int8", kernels and kernels.variant), ("plain", None)):
        pack(folder, tmp_path / name, Format(name))
        packed = json.loads(info(tmp_path / name, "--json").stdout)["packed"]
        assert packed == {"formats": [str(Format(name))], "kernels": computed_by}
    assert "experts in plain, computed by torch" in info(tmp_path / "plain").stdout
    assert json.loads(info(folder, "--json").stdout)["packed"] is None


def test_a_hybrid_counts_the_layers_with_experts(tiny: Tiny) -> None:
    facts = json.loads(info(tiny("jamba"), "--json").stdout)
    assert (facts["layers"], facts["moe_layers"]) == (4, 2)


def test_no_weights_are_read(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("*.safetensors"):  # the same headers, other weights
        with safe_open(file, "pt") as shard:
            assert shard.keys()
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        with open(file, "r+b") as out:
            size = file.stat().st_size
            out.truncate(header)
            out.truncate(size)
    assert json.loads(info(tmp_path, "--json").stdout)["parameters"] > 0


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ModelError), match=str(tmp_path / "nothing")):
        info(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12"), (1500, "1.5 k"), (11_700_000, "11.7 M"), (6_919_161_856, "6.92 B")]
)
def test_counts_are_rounded(number: int, text: str) -> None:
    assert _count(number) == text
