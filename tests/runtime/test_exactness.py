"""Logits are equal to the stock model's, to the last bit, whatever share of the experts is in memory.

Stock means transformers' own eager experts at the same dtype and input shape. The best-known architectures get the full
grid; all others that have a text model get each dtype once, with the fewest slots and with half of them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MULTIMODAL, NAMED, OTHERS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moedge.models.architecture import text_class
from moedge.models.tiny import make_tiny, tiny_config
from moedge.native import library
from moedge.runtime.lm import LM

Tiny = Callable[..., Path]
DTYPES = (torch.float32, torch.bfloat16)
FEWEST, HALF, ALL = 0, 4, 8  # experts of each layer that stay in memory; the fewest leaves one token's top-k


def stock(folder: Path, dtype: torch.dtype | None = None) -> Any:
    config = AutoConfig.from_pretrained(folder)
    eager = {} if config.is_encoder_decoder else {"experts_implementation": "eager"}
    return text_class(config).from_pretrained(folder, dtype=dtype or "auto", **eager).eval()


def inputs(model: Any, batches: tuple[int, ...] = (1, 4)) -> Iterator[dict[str, torch.Tensor]]:
    """Each batch without an attention mask, and with one that leaves out the first tokens of the first row."""
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        ids = torch.randint(3, 280, (batch, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        more = {"decoder_input_ids": ids[:, 4:]} if model.config.is_encoder_decoder else {}
        yield {"input_ids": ids, **more}
        yield {"input_ids": ids, "attention_mask": mask, **more}


def assert_same_logits(model: Any, reference: Any, given: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        mine, theirs = model(**given).logits, reference(**given).logits
    assert theirs.isfinite().all()
    assert torch.equal(mine, theirs), f"off by {(mine.float() - theirs.float()).abs().max()} at {given.keys()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", NAMED)
def test_named_architectures(model_type: str, dtype: torch.dtype, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny(model_type, dtype=dtype)
    reference = stock(folder)
    for capacity in (FEWEST, HALF, ALL):
        with load_with(capacity, folder) as lm:
            assert lm.model.dtype == dtype
            for given in inputs(reference):
                assert_same_logits(lm.model, reference, given)
            read = lm.store.counters.bytes_read
            for given in inputs(reference):  # again: now from memory where there is room
                assert_same_logits(lm.model, reference, given)
            if capacity == ALL:
                assert lm.store.counters.bytes_read == read


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures(model_type: str, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny(model_type)
    for dtype, capacity, batch in ((torch.bfloat16, FEWEST, 4), (torch.float32, HALF, 1)):
        reference = stock(folder, dtype)
        with load_with(capacity, folder, dtype=dtype) as lm:
            for given in inputs(reference, (batch,)):
                assert_same_logits(lm.model, reference, given)


@pytest.mark.skipif(library.load() is None, reason="the C kernels were not built")
@pytest.mark.parametrize("model_type", NAMED)
def test_experts_kept_in_12_bits(model_type: str, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny(model_type, dtype=torch.bfloat16)
    reference = stock(folder)
    for capacity in (HALF, ALL):
        with load_with(capacity, folder, short=True) as lm:
            for _ in range(2):
                for given in inputs(reference):
                    assert_same_logits(lm.model, reference, given)
            assert lm.store.counters.hits


@pytest.mark.parametrize("model_type", [name for name in NAMED if not tiny_config(name).is_encoder_decoder])
def test_token_by_token(model_type: str, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny(model_type, dtype=torch.bfloat16)
    reference = stock(folder)
    ids = torch.randint(3, 280, (1, 9), generator=torch.Generator().manual_seed(2))
    with load_with(FEWEST, folder) as lm, torch.inference_mode():
        caches: list[Any] = [None, None]
        for piece in ids.split([5, 1, 1, 1, 1], dim=1):
            outputs = [
                m(piece, past_key_values=c, use_cache=True) for m, c in zip((lm.model, reference), caches, strict=True)
            ]
            assert torch.equal(outputs[0].logits, outputs[1].logits)
            caches = [output.past_key_values for output in outputs]
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(lm.model.generate(ids, **settings), reference.generate(ids, **settings))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "deepseek_v3"])
def test_experts_stored_in_one_tensor(model_type: str, tmp_path: Path, load_with: Callable[..., LM]) -> None:
    """The layout that transformers has in memory, in place of the one that the family is published in."""
    reference = stock(make_tiny(model_type, tmp_path / "published"))
    reference.save_pretrained(tmp_path / "fused", save_original_format=False, max_shard_size="300KB")
    fused = stock(tmp_path / "fused")
    with load_with(FEWEST, tmp_path / "fused") as lm:
        for given in inputs(fused, (4,)):
            assert_same_logits(lm.model, fused, given)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_multimodal_models_given_text(model_type: str, tiny: Tiny, load_with: Callable[..., LM]) -> None:
    folder = tiny(model_type)
    reference = stock(folder)
    with load_with(HALF, folder) as lm:
        for given in inputs(reference, (2,)):
            assert_same_logits(lm.model, reference, given)


def test_older_files_of_qwen3_vl_moe_are_transposed(tmp_path: Path, load_with: Callable[..., LM]) -> None:
    make_tiny("qwen3_vl_moe", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    reference = stock(tmp_path)
    with load_with(HALF, tmp_path) as lm:
        for given in inputs(reference, (2,)):
            assert_same_logits(lm.model, reference, given)
