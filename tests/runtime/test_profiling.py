"""The profile pass: what is measured is what goes into the matrices of a stock model's experts."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NAMED
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from moedge.errors import CheckpointError, DataError, MemoryLimitError, ModelError
from moedge.models.load import Blueprint, draw
from moedge.runtime import profiling
from moedge.runtime.calibrate import Moments
from moedge.runtime.journal import Unfinished
from moedge.runtime.lm import LM
from moedge.runtime.profiling import TOKENS, WINDOW, Profile, inputs_of, measure
from moedge.runtime.session import Session

Tiny = Callable[..., Path]
Load = Callable[..., LM]
WINDOWS = [tuple(range(3, 40)), tuple(range(200, 270))]
DECORATED = [name for name in NAMED if name not in ("switch_transformers", "nllb-moe")]
TEXT = "The old house stood at the end of a long lane. Nobody had lived in it for years.\n" * 4


@contextmanager
def drawn(folder: Path) -> Iterator[Blueprint]:
    blueprint = draw(folder)
    try:
        yield blueprint
    finally:
        blueprint.checkpoint.close()


def measured(lm: LM) -> Moments:
    layers = lm.anatomy.layers
    moments = Moments([layer.num_experts for layer in layers], [inputs_of(layer) for layer in layers])
    measure(lm, WINDOWS, moments, lambda done, total: None)
    return moments


def test_they_are_a_stock_models(tiny: Tiny, load_with: Load) -> None:
    folder = tiny("qwen3_moe", dtype=torch.float32)
    with load_with(4, folder) as lm:
        found = measured(lm)
        layers = lm.anatomy.layers
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    expected = Moments([len(tokens) for tokens in found.tokens], [{"gate_up_proj": 64, "down_proj": 48}] * len(layers))
    assert {name: t.shape for name, t in found.sums[0].items()} == {n: t.shape for n, t in expected.sums[0].items()}

    def see(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            hidden, index, weights = args
            for token in range(len(hidden)):
                for expert, gate in zip(index[token].tolist(), weights[token], strict=True):
                    x = hidden[token : token + 1]
                    up = linear(x, module.gate_up_proj[expert])
                    inner = torch.nn.functional.silu(up[:, : up.shape[1] // 2]) * up[:, up.shape[1] // 2 :]
                    expected.add(layer, expert, {"gate_up_proj": x, "down_proj": inner}, gate[None])

        return hook

    for layer in layers:
        stock.get_submodule(layer.experts).register_forward_pre_hook(see(layer.index))
    with torch.inference_mode():
        for window in WINDOWS:
            stock(torch.tensor([window]))
    for layer in layers:
        assert torch.equal(found.tokens[layer.index], expected.tokens[layer.index])
        for name, sums in found.sums[layer.index].items():
            torch.testing.assert_close(sums, expected.sums[layer.index][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", DECORATED)
def test_every_matrix_of_every_architecture_is_seen(model_type: str, tiny: Tiny, load_with: Load) -> None:
    """And the model computes the same meanwhile and afterwards."""
    with load_with(4, tiny(model_type)) as lm:
        outputs: list[torch.Tensor] = []
        lm.model.base_model.register_forward_hook(lambda module, args, out: outputs.append(out.last_hidden_state))
        moments = measured(lm)
        watched = list(outputs)
        outputs.clear()
        for window in WINDOWS:
            list(Session(lm).hidden(window))
        for one, other in zip(watched, outputs, strict=True):
            torch.testing.assert_close(one, other)
        for layer in lm.anatomy.layers:
            tokens = moments.tokens[layer.index]
            assert int(tokens.sum()) == layer.top_k * sum(map(len, WINDOWS))
            for name, sums in moments.sums[layer.index].items():
                assert sums.flatten(1).any(1).equal(tokens > 0), (layer.index, name)
                assert torch.isfinite(sums).all()


def test_the_memory_limit_changes_nothing(tiny: Tiny, load_with: Load) -> None:
    found = []
    for capacity in (0, 3, 8):
        with load_with(capacity, tiny("qwen3_moe")) as lm:
            found.append(measured(lm).checksum)
    assert len(set(found)) == 1


def windows_of(folder: Path, path: Path) -> list[tuple[int, ...]]:
    with drawn(folder) as blueprint:
        return Profile(blueprint, path).windows


def test_documents_begin_anew_and_are_cut(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", tokenizer=True)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(record) for record in ({"text": TEXT}, {"prompt": "2 + 3 =", "answer": 5}))
    )
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("2 + 3 = 5")
    separate = windows_of(folder, tmp_path / "a.txt") + windows_of(folder, tmp_path / "b.txt")
    assert windows_of(folder, tmp_path / "a.jsonl") == separate
    (tmp_path / "long.txt").write_text(TEXT * 2000)
    long = windows_of(folder, tmp_path / "long.txt")
    assert sum(map(len, long)) == TOKENS
    with drawn(folder) as blueprint:
        assert max(map(len, long)) == min(WINDOW, blueprint.max_context or WINDOW)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"empty\.txt has no tokens to calibrate on: give a text"),
        ("empty.jsonl", "\n\n", r"empty\.jsonl has no tokens"),
        ("bad.jsonl", '{"text": "a"}\n{"text": 3}\n', r"bad\.jsonl:2 has neither text nor prompt and answer"),
        ("worse.jsonl", '{"text"\n', r"worse\.jsonl:1 is not JSON"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin\.txt is not UTF-8"),
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), r"latin\.jsonl is not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: str | bytes, message: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        windows_of(tiny("qwen3_moe", tokenizer=True), tmp_path / name)


def test_models_that_cannot_be_used(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CheckpointError, match=r"has no tokenizer to read .*a\.txt with: copy"):
        windows_of(tiny("qwen3_moe"), tmp_path / "a.txt")
    with pytest.raises(ModelError, match="encoder-decoder, which --calibrate does not run: pack without"):
        windows_of(tiny("switch_transformers"), tmp_path / "a.txt")


def test_a_limit_that_does_not_hold_them(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    folder = shutil.copytree(tiny("qwen3_moe", tokenizer=True), tmp_path / "model")
    with drawn(folder) as blueprint:
        unfinished = Unfinished(tmp_path / "out", {})
        with pytest.raises(MemoryLimitError, match=r"--calibrate measures .* KiB, --memory gives 1000 B: raise it"):
            Profile(blueprint, tmp_path / "a.txt").moments(1000, unfinished, lambda done, total: None)
        unfinished.close()


def test_the_model_is_gone_afterwards(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing has its memory then."""
    loaded = []
    real = profiling.load

    def see(*args: Any, **settings: Any) -> LM:
        lm = real(*args, **settings)
        loaded.append(weakref.ref(lm.model))
        return lm

    monkeypatch.setattr(profiling, "load", see)
    (tmp_path / "a.txt").write_text(TEXT)
    with drawn(tiny("qwen3_moe", tokenizer=True)) as blueprint:
        unfinished = Unfinished(tmp_path / "out", {})
        moments = Profile(blueprint, tmp_path / "a.txt").moments(None, unfinished, lambda done, total: None)
        unfinished.close()
    assert moments.unseen < 32
    assert [each() for each in loaded] == [None]
