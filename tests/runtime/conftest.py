from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moedge.runtime.lm
from moedge.runtime.budget import make_plan
from moedge.runtime.lm import LM, load


@pytest.fixture
def load_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LM]:
    """`load_with(capacity, folder)`: loaded with slots for so many experts per layer, with `short` in fewer bits."""

    def call(capacity: int, folder: Path, short: bool = False, **settings: Any) -> LM:
        def plan(*args: Any, **kwargs: Any) -> Any:
            made = make_plan(*args, **kwargs)
            return replace(made, capacities=tuple(min(capacity, count) for count in made.num_experts), short=short)

        monkeypatch.setattr(moedge.runtime.lm, "make_plan", plan)
        return load(folder, **settings)

    return call
