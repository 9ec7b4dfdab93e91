"""Processes of their own, with the mini model: none ever takes more memory than its limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "checkpoints" / "mini"
CONTEXT = 512


@pytest.fixture(scope="module")
def limit(moedge_command: Callable[..., Any]) -> int:
    """Room for a third of the experts."""
    done = moedge_command("plan", MINI, "--memory", "1TiB", "--context", CONTEXT, "--json")
    plan = json.loads(done.stdout)
    fixed = sum(row["nbytes"] for row in plan["rows"] if row["name"] != "expert slots")
    others = 8 << 20  # as verbs import different things
    return int(fixed + others + (sum(plan["num_experts"]) // 3 + plan["spare"]) * plan["slot_bytes"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-p", "The old house stood at", "-n", 48, "--temperature", 0),
        ("eval", "--text", ROOT / "docs" / "log.md", "--max-tokens", 6000),  # experts get some 100 numbers of rows
    ],
)
def test_the_peak_is_within_the_limit(
    arguments: tuple[Any, ...], limit: int, moedge_command: Callable[..., Any]
) -> None:
    verb, *rest = arguments
    done = moedge_command(verb, MINI, *rest, "--memory", limit, "--context", CONTEXT, "--json")
    assert done.returncode == 0, done.stderr
    assert 0.5 * limit < json.loads(done.stdout)["peak_memory"] <= limit
