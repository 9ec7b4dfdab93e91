"""Every example is short and runs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_the_demo_gives_the_same_text_within_the_limit(tiny: Callable[..., Path]) -> None:
    model = tiny("qwen3_moe", tokenizer=True, hidden_size=256, moe_intermediate_size=340)
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
    assert "expert slots" in done.stdout
    assert "hit rate" in done.stdout
