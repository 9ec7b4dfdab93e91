"""Routing traces as files: what is written is read again, and what is malformed is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.errors import DataError
from moedge.models.trace import RoutingTrace


def make_trace(lengths: tuple[int, ...] = (3, 0, 5), layers: int = 2, top_k: int = 2) -> RoutingTrace:
    random = np.random.default_rng(0)
    shape = (sum(lengths), layers, top_k)
    return RoutingTrace(
        random.integers(0, 8, shape).astype(np.uint8),
        random.random(shape).astype(np.float16),
        np.cumsum([0, *lengths], dtype=np.int64),
    )


def assert_equal(a: RoutingTrace, b: RoutingTrace) -> None:
    for name in ("experts", "probs", "offsets"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lengths", [(3, 0, 5), (), (1,)])
def test_load_gives_what_save_wrote(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    trace = make_trace(lengths)
    trace.save(tmp_path / "traces.npz")
    assert_equal(RoutingTrace.load(tmp_path / "traces.npz"), trace)
    assert_equal(RoutingTrace.load(tmp_path), trace)  # the folder that holds it
    assert [p.name for p in tmp_path.iterdir()] == ["traces.npz"]


def test_the_sizes_of_a_trace() -> None:
    trace = make_trace()
    assert (len(trace), trace.num_sequences, trace.num_layers, trace.top_k) == (8, 3, 2, 2)
    assert trace.num_experts == int(trace.experts.max()) + 1
    assert make_trace(()).num_experts == 0


def test_sequences_and_parts_are_cut_at_the_offsets() -> None:
    trace = make_trace()
    assert [len(s) for s in trace.sequences()] == [3, 0, 5]
    np.testing.assert_array_equal(list(trace.sequences())[2].experts, trace.experts[3:])
    assert_equal(trace.part(0), trace)
    assert_equal(trace.part(2, 3), list(trace.sequences())[2])
    assert len(trace.part(3)) == len(trace.part(2, 1)) == 0
    assert trace.part(-1).num_sequences == 1


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trace = tmp_path / "traces.npz", make_trace()
    trace.save(path)
    before = path.read_bytes()

    def fail(out: Any, **_: Any) -> None:
        out.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        make_trace((1,)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["traces.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.zeros((8, 2), np.uint8)}, r"experts must be integers \[N, L, k\], not uint8 \[8, 2\]"),
        ({"experts": np.zeros((8, 2, 2))}, "experts must be integers"),
        ({"experts": np.full((8, 2, 2), -2, np.int16)}, "id -2"),
        ({"probs": np.zeros((8, 2, 1))}, "probs must be floats"),
        ({"probs": np.zeros((8, 2, 2), int)}, "probs must be floats"),
        ({"offsets": np.array([0.0, 8.0])}, "offsets must be integers"),
        ({"offsets": np.array([], int)}, "offsets must be integers"),
        ({"offsets": np.array([1, 8])}, "offsets must rise from 0 to the 8 tokens"),
        ({"offsets": np.array([0, 7])}, "offsets must rise"),
        ({"offsets": np.array([0, 5, 3, 8])}, "offsets must rise"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    trace = make_trace()
    arrays = {"experts": trace.experts, "probs": trace.probs, "offsets": trace.offsets} | change
    with pytest.raises(DataError, match=message):
        RoutingTrace(**arrays)
    np.savez(tmp_path / "traces.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        RoutingTrace.load(tmp_path)
    assert str(tmp_path / "traces.npz") in str(caught.value)


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.npz"
    with pytest.raises(DataError, match="does not exist"):
        RoutingTrace.load(path)
    for content in (b"", b"not a zip", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not an npz file"):
            RoutingTrace.load(path)
    np.savez(path, experts=make_trace().experts)
    with pytest.raises(DataError, match="no array"):
        RoutingTrace.load(path)
    make_trace().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not an npz file"):
        RoutingTrace.load(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match="not an npz file"):
        RoutingTrace.load(tmp_path / "one.npy")
