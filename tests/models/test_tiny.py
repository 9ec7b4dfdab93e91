"""Tiny checkpoints: standard files, the same every time, with routing that differs from token to token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moedge.errors import ModelError
from moedge.models.recorder import record
from moedge.models.tiny import make_tiny

Tiny = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def test_a_seed_gives_the_same_checkpoint_in_several_shards(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    a, b, c = (make_tiny("mixtral", tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(list(a.glob("*.safetensors"))) > 2
    assert (a / "model.safetensors.index.json").exists()
    one, same, other = tensors(a), tensors(b), tensors(c)
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_dtype_sizes_and_layout_are_as_asked(tmp_path: Path) -> None:
    found = tensors(make_tiny("qwen3_moe", tmp_path, dtype=torch.float16, num_experts=3, hidden_size=32))
    assert {t.dtype for t in found.values()} == {torch.float16}
    names = [name for name in found if ".layers.0.mlp.experts." in name and name.endswith("down_proj.weight")]
    assert len(names) == 3  # one tensor per expert, as Qwen3-MoE is published
    assert found[names[0]].shape == (32, 48)


def test_tokens_take_different_experts_and_logits_differ(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).eval()
    with record(model) as recorder, torch.inference_mode():
        logits = model(torch.arange(3, 67)[None]).logits
    for layer in recorder.trace().experts.transpose(1, 0, 2):
        assert len(set(layer.reshape(-1).tolist())) >= 6  # of 8
    assert logits.std() > 0.1
    assert len(set(logits.argmax(-1).flatten().tolist())) > 8


def test_biases_are_noise_so_that_a_forgotten_one_shows(tiny: Tiny) -> None:
    biases = [t for name, t in tensors(tiny("gpt_oss")).items() if name.endswith("bias")]
    assert len(biases) > 4
    assert all(bias.min() < 0 < bias.max() for bias in biases)


def test_the_table_of_deepseek_v4_names_experts(tiny: Tiny) -> None:
    tables = [t for name, t in tensors(tiny("deepseek_v4")).items() if name.endswith("tid2eid")]
    assert tables
    for table in tables:
        assert set(table.flatten().tolist()) == set(range(8))


def test_the_tokenizer_gives_text_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny("mixtral", tmp_path, tokenizer=True))
    text = "Grüße,\n\tworld! 你好"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 288
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\nassistant: "
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_types_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'never_heard_of' is not one that transformers knows"):
        make_tiny("never_heard_of", tmp_path)
    with pytest.raises(ModelError, match="dense"):
        make_tiny("llama", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_routers_correction_bias_is_not_zero(tmp_path: Path) -> None:
    found = tensors(make_tiny("deepseek_v3", tmp_path))
    biases = [each for name, each in found.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) >= 2
    assert all(each.any() and each.abs().max() < 1 for each in biases)
