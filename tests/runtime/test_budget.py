"""The plan: what each row claims, what is refused, and that a loaded model keeps to it."""

import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moedge.errors import ContextError, MemoryLimitError, ModelError
from moedge.models.load import Blueprint, draw
from moedge.runtime import budget, device
from moedge.runtime.budget import Plan, activation_bytes, context_bytes, make_plan, share_slots
from moedge.runtime.device import private_memory, process_memory
from moedge.runtime.growing import LEAST
from moedge.runtime.lm import load
from moedge.units import parse_size


@pytest.fixture
def blueprint(tiny: Callable[..., Path]) -> Iterator[Blueprint]:
    drawn = draw(tiny("qwen3_moe"))
    yield drawn
    drawn.checkpoint.close()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose size does not change between two plans."""
    monkeypatch.setattr(budget, "private_memory", lambda: 100 << 20)
    monkeypatch.setattr(budget, "process_memory", lambda: (100 << 20, 100 << 20))


def fixed(plan: Plan) -> int:
    return plan.total - plan.rows[-1].nbytes


@given(st.integers(0, 200), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_slots_are_shared_evenly_and_none_is_lost(slots: int, counts: list[int]) -> None:
    given_ = share_slots(slots, counts)
    assert sum(given_) == min(slots, sum(counts))
    assert all(0 <= g <= c for g, c in zip(given_, counts, strict=True))
    still_open = [g for g, c in zip(given_, counts, strict=True) if g < c]
    assert not still_open or max(given_) <= max(max(still_open), *still_open) + 1


def test_without_a_limit_every_expert_has_a_slot(blueprint: Blueprint) -> None:
    plan = make_plan(blueprint)
    assert plan.capacities == plan.num_experts
    assert plan.resident_share == 1
    assert plan.context is None
    assert plan.logits_bytes is None


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("slots", [2, 3, 9, 33])
def test_the_rows_add_up_to_the_limit(blueprint: Blueprint, slots: int) -> None:
    roomy = make_plan(blueprint, limit=parse_size("4GiB"), context=64)
    limit = fixed(roomy) + slots * roomy.slot_bytes + 100
    plan = make_plan(blueprint, limit=limit, context=64)
    assert sum(plan.capacities) + plan.spare == slots
    assert plan.total == plan.as_dict()["total"] == limit - 100


def test_a_limit_below_the_minimum_names_need_and_remedy(blueprint: Blueprint) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"needs .* to hold one layer's 2 experts, --memory 50 MiB leaves 0 B"
    ) as e:
        make_plan(blueprint, limit=parse_size("50MiB"))
    assert "give at least" in str(e.value)


@pytest.mark.usefixtures("steady")
def test_minimum_is_the_top_k_experts_of_one_layer(blueprint: Blueprint) -> None:
    roomy = make_plan(blueprint, limit=parse_size("4GiB"), context=64)
    minimum = fixed(roomy) + 2 * roomy.slot_bytes
    assert sum(make_plan(blueprint, limit=minimum, context=64).capacities) == 0
    with pytest.raises(MemoryLimitError, match="give at least"):
        make_plan(blueprint, limit=minimum - 1, context=64)


@pytest.mark.parametrize(("context", "parallel"), [(0, 1), (16, 0), (10**9, 1)])
def test_impossible_contexts_are_refused(blueprint: Blueprint, context: int, parallel: int) -> None:
    with pytest.raises(ContextError, match="context"):
        make_plan(blueprint, context=context, parallel=parallel)


def test_context_bytes_are_those_of_the_real_cache(blueprint: Blueprint) -> None:
    stock = AutoModelForCausalLM.from_pretrained(blueprint.folder)
    with torch.no_grad():
        cache = stock(torch.ones(1, 40, dtype=torch.long), use_cache=True).past_key_values
    keys_and_values = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    real = sum(t.numel() * t.element_size() for t in keys_and_values)
    assert context_bytes(blueprint, 40) == real + 2 * keys_and_values[0].numel() * keys_and_values[0].element_size()


def test_windows_that_are_full_take_room_to_move_in(tiny: Callable[..., Path]) -> None:
    window = draw(tiny("gpt_oss", sliding_window=8))
    short, whole = context_bytes(window, 7), context_bytes(window, 40)
    window.checkpoint.close()
    config = window.config
    token = 2 * 4 * config.num_key_value_heads * config.head_dim  # keys and values in fp32
    layers = config.num_hidden_layers // 2
    assert whole - short == layers * (33 + LEAST) * token + 33 * token  # and the largest layer once more


def test_backbone_bytes_are_what_loading_materialises(tiny: Callable[..., Path]) -> None:
    with load(tiny("qwen3_moe")) as lm:
        loaded = {id(t): t for t in (*lm.model.parameters(), *lm.model.buffers())}
        nbytes = sum(t.numel() * t.element_size() for t in loaded.values())
        assert not any(p.is_meta for p in lm.model.parameters())
    row = next(row for row in lm.plan.rows if row.name == "backbone")
    assert row.nbytes == pytest.approx(nbytes, rel=0.05)


def test_activation_estimate_grows_with_chunk_and_context(blueprint: Blueprint) -> None:
    assert activation_bytes(blueprint, 64, 128) < activation_bytes(blueprint, 128, 128)
    assert activation_bytes(blueprint, 64, 128) < activation_bytes(blueprint, 64, 4096)


def test_more_tokens_than_reserved_are_refused_in_the_model_too(tiny: Callable[..., Path]) -> None:
    with load(tiny("qwen3_moe"), context=8, parallel=2) as lm, torch.no_grad():
        lm.model(torch.ones(2, 8, dtype=torch.long))
        with pytest.raises(ContextError, match="2 x 9 tokens are more than the reserved context of 2 x 8"):
            lm.model(torch.ones(2, 9, dtype=torch.long))
        with pytest.raises(ContextError, match="17 tokens"):
            lm.model(input_ids=torch.ones(1, 17, dtype=torch.long))
        cache = lm.model(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values
        with pytest.raises(ContextError, match="17 tokens"):
            lm.model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_logits_beyond_the_plan_are_refused_with_the_remedy(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_moe", vocab_size=60_000)
    with load(folder, memory="3GiB", context=400) as lm, torch.no_grad():
        ids = torch.ones(1, 300, dtype=torch.long)
        with pytest.raises(MemoryLimitError, match="logits_to_keep"):
            lm.model(ids)
        assert lm.model(ids, logits_to_keep=1).logits.shape == (1, 1, 60_000)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("slots", [2, 3, 10])
def test_a_small_cache_gives_the_same_answer(tiny: Callable[..., Path], slots: int) -> None:
    folder = tiny("qwen3_moe")
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    with load(folder, context=64, memory="4GiB") as free, torch.no_grad():
        expected = free.model(ids).logits
        limit = fixed(free.plan) + slots * free.plan.slot_bytes
    with load(folder, memory=limit, context=64) as tight, torch.no_grad():
        assert sum(tight.plan.capacities) == slots - 2
        for _ in range(2):
            assert torch.equal(tight.model(ids).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"memory": "a lot"}, MemoryLimitError),
        ({"policy": "psychic"}, ModelError),
        ({"device": "cuda"}, ModelError),
        ({"dtype": "int3"}, ModelError),
        ({"prefill_chunk": 0}, ContextError),
    ],
)
def test_bad_arguments_name_the_value(
    tiny: Callable[..., Path], arguments: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error, match=str(next(iter(arguments.values())))):
        load(tiny("qwen3_moe"), **arguments)  # type: ignore[arg-type]


def test_saving_a_model_without_experts_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with load(tiny("qwen3_moe")) as lm, pytest.raises(ModelError, match="experts"):
        lm.model.save_pretrained(tmp_path)


def test_quantised_dense_and_incomplete_models_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import json

    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"is quantised \(fp8\): convert it with `moedge pack .*model OUT`"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(Exception, match=r"8 like|4 experts"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 24}))
    with pytest.raises(Exception, match="do not belong together"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99}))
    with pytest.raises(Exception, match="not a whole checkpoint"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(Exception, match=r"no config\.json"):
        load(folder)


def test_process_memory_counts_this_process() -> None:
    (before, _), private_before = process_memory(), private_memory()
    block = torch.ones(16 << 20)
    (now, peak), private = process_memory(), private_memory()
    assert now - before > block.numel() * 4 * 0.9
    assert private - private_before > block.numel() * 4 * 0.9
    assert peak >= now >= private


def test_private_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "process_memory", lambda: (70 << 20, 90 << 20))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)
        assert private_memory() == 70 << 20


def test_private_memory_leaves_out_what_a_file_backs(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(bytes(32 << 20))
    (before, _), private_before = process_memory(), private_memory()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert not any(pages[at] for at in range(0, 32 << 20, mmap.PAGESIZE))
        (now, _), private = process_memory(), private_memory()
    if Path("/proc/self/status").exists():
        assert now - before > 24 << 20
        assert private - private_before < 8 << 20


def test_no_less_than_starting_took_is_accepted(blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code gives its memory back before the plan is made, but was in memory until then."""
    monkeypatch.setattr(budget, "process_memory", lambda: (900 << 20, 900 << 20))
    monkeypatch.setattr(budget, "private_memory", lambda: 200 << 20)
    with pytest.raises(MemoryLimitError, match="give at least 900 MiB"):
        make_plan(blueprint, limit=parse_size("600MiB"), context=64)


def test_each_expert_of_a_token_counts_with_its_output(tiny: Callable[..., Path]) -> None:
    found = []
    for top_k in (2, 5):
        drawn = draw(tiny("qwen3_moe", num_experts_per_tok=top_k))
        found.append(activation_bytes(drawn, chunk=16, context=32))
        hidden = drawn.meta.config.hidden_size
        drawn.checkpoint.close()
    assert found[1] - found[0] == 16 * 2 * (5 - 2) * hidden * 4  # chunk, the output and its weighted copy, fp32
