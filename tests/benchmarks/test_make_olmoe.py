"""The benchmark's checkpoint is one that stock transformers loads whole, and its tokenizer speaks."""

from pathlib import Path

import torch
from make_olmoe import Shape, make
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Shape(hidden=64, intermediate=32, layers=3, experts=4, top_k=2, heads=4, vocabulary=512)


def test_stock_transformers_loads_every_tensor(tmp_path: Path) -> None:
    total = make(tmp_path, TINY)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(value.nbytes for value in model.parameters()) == total
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("import sys  # é").input_ids
    assert tokenizer.decode(ids) == "import sys  # é"
    assert max(ids) < TINY.vocabulary
