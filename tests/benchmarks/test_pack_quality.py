"""The benchmark of packs: its error of experts' outputs, its calibration texts, and the rows that it keeps."""

import json
from collections.abc import Callable
from pathlib import Path

import pack_quality
import pytest
import torch
from pack_quality import calibration, expert_inputs, output_error, saved

import moedge
from moedge.measure.quality import windows
from moedge.runtime.formats import PLAIN, Format
from moedge.runtime.pack import pack
from recipes.mini.sources import Split

TEXT = "The old house stood at the end of a long lane. Nobody had lived in it for years.\n" * 9


def test_the_error_is_that_of_the_experts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tokenizer=True, dtype=torch.float32)
    with moedge.load(model) as lm:
        some = list(windows(lm, [TEXT], 64))
        seen = expert_inputs(lm, some)
    assert [sum(len(hidden) for hidden, *_ in layer) for layer in seen] == [sum(len(w.ids) for w in some)] * len(seen)
    errors = []
    for format in (PLAIN, Format("int8"), Format("int4")):
        pack(model, tmp_path / str(format), format)
        with moedge.load(tmp_path / str(format), dtype="fp32") as lm:
            errors.append(output_error(lm, seen))
    assert errors[0] == 0
    assert 0.003 < errors[1] < 0.02
    assert 0.05 < errors[2] < 0.3


def test_domains_take_turns(tmp_path: Path) -> None:
    texts = {name: Split([name * 1000], ["held out"]) for name in "ab"}
    records = calibration(texts, ["a", "b"], tmp_path / "texts.jsonl").read_text().splitlines()
    assert [json.loads(record)["text"][0] for record in records[:4]] == list("abab")
    assert "held out" not in "".join(records)


def test_rows_of_other_settings_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_quality, "RESULTS", tmp_path)
    assert saved({"tokens": 1}) == {}
    row = {"format": "int8-g32"}
    (tmp_path / "pack_quality.json").write_text(json.dumps({"settings": {"tokens": 1}, "rows": [row]}))
    assert saved({"tokens": 1}) == {"int8-g32": row}
    assert saved({"tokens": 2}) == {}
