"""bf16 in 12 bits a number: every bit comes back, or it is said that it would not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moedge
from moedge.models import shorten as module
from moedge.models.load import draw
from moedge.models.shorten import can_shorten, restore, restore_plain, short_bytes, shorten
from moedge.native import library

MINI = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
pytestmark = pytest.mark.skipif(library.load() is None, reason="the C kernels were not built")


def shortened(numbers: torch.Tensor) -> torch.Tensor | None:
    """The bytes of bf16 `numbers` in 12 bits each, None where they cannot be."""
    into = torch.empty(short_bytes(2 * numbers.numel()), dtype=torch.uint8)
    return into if shorten(numbers.view(torch.uint8), 2 * numbers.numel(), into) else None


def restored(short: torch.Tensor, count: int) -> torch.Tensor:
    numbers = torch.empty(count, dtype=torch.bfloat16)
    restore(short, 2 * count, numbers.view(torch.uint8))
    again = torch.empty_like(numbers)
    restore_plain(short, 2 * count, again.view(torch.uint8))
    assert torch.equal(again.view(torch.int16), numbers.view(torch.int16))
    return numbers


@given(
    st.integers(0, 2**32),
    st.integers(1, 300),
    st.floats(-30, 30),
    st.lists(st.sampled_from([0.0, -0.0, float("inf"), float("nan"), 1e-40, -1e-40, 3e38]), max_size=20),
)
def test_weights_with_rare_extremes_come_back(seed: int, blocks: int, size: float, rare: list[float]) -> None:
    chance = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(32 * blocks, generator=chance) * 2.0**size).bfloat16()
    numbers[torch.randperm(len(numbers), generator=chance)[: min(len(rare), 16)]] = torch.tensor(rare[:16]).bfloat16()
    short = shortened(numbers)
    assert short is not None
    assert torch.equal(restored(short, len(numbers)).view(torch.int16), numbers.view(torch.int16))


def test_numbers_of_all_sizes_are_refused() -> None:
    numbers = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16)
    assert shortened(numbers) is None


def test_zeros_take_no_place_in_the_list() -> None:
    numbers = torch.randn(4096).bfloat16() * (torch.arange(4096) % 4 == 0)
    short = shortened(numbers)
    assert short is not None
    assert torch.equal(restored(short, 4096), numbers)


def test_a_third_more_fit() -> None:
    assert short_bytes(3 << 20) < 0.76 * (3 << 20)


@given(st.integers(1, 1 << 40))
def test_the_kernels_need_as_much_room(nbytes: int) -> None:
    kernels = library.load()
    assert kernels is not None
    assert short_bytes(nbytes) == kernels.short_bytes(-(-nbytes // 64) * 32)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, True), (torch.float32, False)])
def test_only_bf16_is_shortened(tiny: Callable[..., Path], dtype: torch.dtype, expected: bool) -> None:
    drawn = draw(tiny("olmoe"), dtype)
    assert can_shorten(drawn.experts, drawn.checkpoint) == expected
    drawn.checkpoint.close()


def test_a_checkpoint_whose_numbers_have_all_sizes_is_left_alone(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE", 1024)
    drawn = draw(tiny("olmoe", dtype=torch.bfloat16))
    assert can_shorten(drawn.experts, drawn.checkpoint)
    monkeypatch.setattr(module, "shorten", lambda *_: False)
    assert not can_shorten(drawn.experts, drawn.checkpoint)
    drawn.checkpoint.close()


def test_more_experts_stay_within_the_same_limit_and_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moedge.runtime.budget.private_memory", lambda: 100 << 20)
    monkeypatch.setattr("moedge.runtime.budget.process_memory", lambda: (100 << 20, 100 << 20))
    found = []
    for lossless in (True, False):
        if not lossless:
            monkeypatch.setattr("moedge.runtime.budget.can_shorten", lambda *_: False)
        with moedge.load(MINI, memory="700MiB", context=64) as roomy:
            limit = sum(row.nbytes for row in roomy.plan.rows[:-1]) + (6 << 20)
        with moedge.load(MINI, memory=limit, context=64) as lm:
            steps = list(lm.generate("The sea was calm and the", max_new_tokens=24, temperature=0))
            found.append((lm.plan.short, sum(lm.plan.capacities), lm.store.counters.hits, [s.token for s in steps]))
    (short, more, hits, answer), (plain, fewer, fewer_hits, same) = found
    assert (short, plain) == (True, False)
    assert more > 1.2 * fewer
    assert hits > fewer_hits
    assert answer == same
