"""bf16 in 12 bits a number: every bit comes back, or it is said that it would not."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import moedge
from moedge.models import shorten as module
from moedge.models.expert_map import Field
from moedge.models.load import draw
from moedge.models.shorten import (
    ShortExpert,
    can_shorten,
    compact,
    compact_bytes,
    restore,
    restore_plain,
    short_bytes,
    shorten,
)
from moedge.native import library
from moedge.runtime import product as product_module
from moedge.runtime.pack import pack
from moedge.runtime.product import Order, product

MINI = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
KERNELS = library.load()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the C kernels were not built")
NUMBERS = KERNELS.orders() if KERNELS else {}


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


def compacted(numbers: torch.Tensor) -> torch.Tensor:
    """The bytes that `compact` makes, no more."""
    kernels = library.load()
    assert kernels is not None
    memory = torch.empty(4 * numbers.numel() + 4096, dtype=torch.uint8)
    taken = kernels.compact(numbers.data_ptr(), numbers.numel(), memory.data_ptr(), len(memory))
    if not taken:
        pytest.skip("this processor has not the instructions")
    return memory[:taken].clone()


@given(
    st.integers(0, 2**32),
    st.integers(1, 4000),
    st.floats(-30, 30),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(-(2**15), 2**15 - 1)), max_size=50),
)
def test_whatever_there_is_comes_back_from_fewest_bits(
    seed: int, blocks: int, size: float, rare: list[tuple[int, int]]
) -> None:
    chance = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(32 * blocks, generator=chance) * 2.0**size).bfloat16()
    numbers[: 32 * (blocks // 3)] *= 2**-9  # another matrix, with other sizes
    for place, bits in rare:
        numbers.view(torch.int16)[place % len(numbers)] = bits
    short, again = compacted(numbers), torch.empty_like(numbers)
    restore(short, 2 * len(numbers), again.view(torch.uint8))
    assert torch.equal(again.view(torch.int16), numbers.view(torch.int16))


@pytest.mark.parametrize("zeros", [0, 0.1, 0.9])
def test_fewest_bits_are_close_to_the_entropy(zeros: float) -> None:
    chance = torch.Generator().manual_seed(0)
    numbers = (torch.randn(1 << 20, generator=chance) / 50).bfloat16()
    numbers[torch.rand(1 << 20, generator=chance) < zeros] = 0
    counts = (numbers.view(torch.int16).int() >> 7 & 255).bincount().double() / numbers.numel()
    entropy = -float((counts[counts > 0] * counts[counts > 0].log2()).sum())
    bits = 8 * len(compacted(numbers)) / numbers.numel() - 8
    assert entropy <= bits <= max(2, entropy) + 0.25  # a level has two bits


def test_what_does_not_fit_into_fewest_bits_goes_into_12_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(1 << 16).bfloat16()
    raw, nbytes = numbers.view(torch.uint8), 2 * numbers.numel()
    room = torch.empty(short_bytes(nbytes), dtype=torch.uint8)
    assert not compact(raw, nbytes, room[: len(compacted(numbers)) - 1])
    monkeypatch.setattr(library.Library, "compact", lambda *_: 0)
    assert compact(raw, nbytes, room)
    again = torch.empty_like(numbers)
    restore(room, nbytes, again.view(torch.uint8))
    assert torch.equal(again, numbers)
    assert not compact(raw, nbytes, room[:-64])


def test_slots_have_room_for_every_expert_of_mini() -> None:
    drawn = draw(MINI)
    nbytes = drawn.experts.slot_bytes
    room = compact_bytes(drawn.experts, drawn.checkpoint, nbytes)
    assert room is not None
    assert room <= short_bytes(nbytes)
    drawn.checkpoint.close()
    with moedge.load(MINI) as lm:
        for layer in lm.anatomy.layers:
            for expert, parameters in lm.store.fetch(layer.index, range(layer.num_experts)):
                numbers = torch.cat([value.flatten() for value in parameters.values()])
                assert len(compacted(numbers)) <= room, (layer.index, expert)


def test_without_the_instructions_slots_are_of_12_bits(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw(tiny("olmoe", dtype=torch.bfloat16))
    monkeypatch.setattr(library.Library, "compact", lambda *_: 0)
    assert compact_bytes(drawn.experts, drawn.checkpoint, 1 << 20) == short_bytes(1 << 20)
    monkeypatch.setattr(module, "shorten", lambda *_: False)
    assert compact_bytes(drawn.experts, drawn.checkpoint, 1 << 20) is None
    drawn.checkpoint.close()


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
            monkeypatch.setattr("moedge.runtime.budget.compact_bytes", lambda *_: None)
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


# ---- experts in 12 bits ----


class Kept:
    """An expert in 12 bits whose two matrices begin `shift` bytes behind a multiple of 64; counts its restorations."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, shift: int) -> None:
        self.matrices = {"up_proj": up, "down_proj": down}
        self.restored = 0
        fields, end = {}, 0
        for name, matrix in self.matrices.items():
            fields[name] = Field(name, end + shift, tuple(matrix.shape), matrix.dtype)
            end += -(-matrix.nbytes // 64) * 64 + 64
        slot = random(end // 2, seed=9)
        for name, matrix in self.matrices.items():
            slot.view(torch.uint8)[fields[name].offset :][: matrix.nbytes] = matrix.view(torch.uint8).flatten()
        memory = torch.empty(short_bytes(end), dtype=torch.uint8)
        assert shorten(slot.view(torch.uint8), end, memory)
        # a slot's bytes need not be a multiple of 64
        self.expert = ShortExpert(memory, end - 24, fields.__getitem__, self._restore)

    def _restore(self) -> dict[str, torch.Tensor]:
        self.restored += 1
        return self.matrices


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def odd_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """[70, 544] and [544, 96] with numbers that stand in the list, or are zero, also where groups of rows meet."""
    up, down = random(70, 544, seed=1), random(544, 96, seed=2)
    odd = torch.tensor([2.0**100, -(2.0**-100), 0.0, -0.0, 1e-40, 3e30, -(2.0**-60)]).bfloat16()
    for matrix, groups in ((up, (0, 32, 64)), (down, (0, 32, 512))):
        flat = matrix.view(-1)
        flat[5:12], flat[-40:-33] = odd, odd
        for row in groups:
            matrix[row, 0] = -(2.0**80)
            matrix[row - 1, -1] = 2.0**-70
    return up, down


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets how many there are until the end of the test. No order of addition is known before."""
    monkeypatch.setattr(product_module, "_found", {})
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("name", "step"), [("lanes", 32), ("lanes", 64), ("pairs", 64), ("pairs", 512)])
@pytest.mark.parametrize("shift", [0, 2, 8, 62])
@torch.no_grad()
def test_an_expert_is_multiplied_where_it_lies(
    shift: int, name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in NUMBERS:
        pytest.skip(f"this processor has not the instructions of {name}")
    kept = Kept(*odd_matrices(), shift)
    monkeypatch.setattr(product_module, "find_order", lambda *_: Order(NUMBERS[name], step))
    for matrix, weight in kept.matrices.items():
        for seed in range(3):
            x = random(1, weight.shape[1], seed=seed)
            expected = product(x, kept.matrices, matrix)
            found = product(x, kept.expert, matrix)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert kept.restored == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shift", [0, 8])
@torch.no_grad()
def test_an_expert_gives_torchs_bits(shift: int, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    for up, down in (odd_matrices(), (random(1050, 2048), random(2048, 544))):
        kept = Kept(up, down, shift)
        for name, weight in kept.matrices.items():
            for seed in range(3):
                x = random(1, weight.shape[1], seed=seed)
                found, expected = product(x, kept.expert, name), functional.linear(x, weight)
                assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        assert kept.restored == 1  # for the order of both


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", ["fp32", "rows", "gradients", "no order", "no kernels"])
def test_an_expert_is_restored_once_for_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(random(70, 544, seed=1), random(544, 96, seed=2), 8)
    monkeypatch.setattr(product_module, "find_order", lambda *_: Order(0, 64) if case != "no order" else None)
    monkeypatch.setattr(library.Library, "one_row", lambda *_: pytest.fail("the kernels multiplied"))
    if case == "fp32":
        kept.matrices = {name: weight.float() for name, weight in kept.matrices.items()}
    if case == "no kernels":
        monkeypatch.setattr(library, "load", lambda: None)
    assert kept.restored == 0
    with torch.set_grad_enabled(case == "gradients"):
        for name, weight in [*kept.matrices.items()] * 2:
            x = random(3 if case == "rows" else 1, weight.shape[1]).to(weight.dtype)
            assert torch.equal(product(x, kept.expert, name), functional.linear(x, weight))
    assert kept.restored == 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", ["olmoe", "granitemoe", "gpt_oss"])
def test_it_is_known_where_an_experts_parameters_lie(
    model_type: str, packed: bool, stored: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny(model_type, dtype=stored)
    if packed:
        pack(folder, tmp_path / "out")
    drawn = draw(tmp_path / "out" if packed else folder, torch.bfloat16)
    slot, places = torch.empty(drawn.experts.slot_bytes + 64, dtype=torch.uint8), set()
    for layer, expert in ((layer, expert) for layer in range(len(drawn.experts.layouts)) for expert in range(4)):
        for name, view in drawn.experts.views(layer, expert, slot).items():
            place = drawn.experts.place(layer, expert, name)
            assert place.offset == view.data_ptr() - slot.data_ptr()
            assert (place.name, place.shape, place.dtype) == (name, view.shape, view.dtype)
            places.add(place.offset % 64)
    drawn.checkpoint.close()
    assert model_type != "gpt_oss" or stored != torch.bfloat16 or places != {0}
