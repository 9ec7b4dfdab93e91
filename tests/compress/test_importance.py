"""Every score is its formula on sums made by hand, and finite for an expert never chosen; damaged files are named."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedge.compress import importance
from moedge.compress.importance import METHODS, Statistics, super_experts
from moedge.errors import DataError


def statistics() -> Statistics:
    """One layer, three experts: 0 chosen by 4 of 5 tokens with small outputs, 1 by one with a large one, 2 by none."""
    return Statistics(
        tokens=np.array([5.0]),
        counts=np.array([[4.0, 1.0, 0.0]]),
        mass=np.array([[3.0, 1.5, 0.5]]),
        gate=np.array([[2.0, 0.25, 0.0]]),
        gate_norm=np.array([[6.0, 2.0, 0.0]]),
        even_gate_norm=np.array([[8.0, 7.0, 0.0]]),
        energy=np.array([[9.0, 4.0, 0.0]]),
        norm=np.array([[12.0, 10.0, 0.0]]),
        utility=np.array([[10.0, 1.0, 0.0]]),
        largest=np.array([[1.0, 30.0, 0.0]]),
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("frequency", [4, 1, 0]),
        ("litemoe", [3, 1.5, 0.5]),
        ("reap", [2, 7, 0]),
        ("reap-sum", [6, 2, 0]),
        ("reap-mass", [6 / 8 + 3 / 5, 2 / 8 + 1.5 / 5, 0.5 / 5]),
        ("ean", [3, 10, 0]),
        ("premoe", [2, 0.2, 0]),
        ("energy", [9, 4, 0]),
    ],
)
def test_formula(method: str, expected: list[float]) -> None:
    np.testing.assert_allclose(METHODS[method](statistics()), [expected])


@pytest.mark.parametrize("method", METHODS)
def test_expert_that_was_never_chosen_has_a_finite_score(method: str) -> None:
    for seen in (statistics(), Statistics.empty(2, 4)):
        scores = METHODS[method](seen)
        assert scores.shape == seen.counts.shape
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_score_is_a_copy(method: str) -> None:
    seen = statistics()
    METHODS[method](seen)[:] = 77
    for name, value in vars(statistics()).items():
        np.testing.assert_array_equal(getattr(seen, name), value, err_msg=name)


def test_random_is_the_same_for_every_task_and_no_constant() -> None:
    one, other = METHODS["random"](statistics()), METHODS["random"](Statistics.empty(1, 3))
    np.testing.assert_array_equal(one, other)
    assert len(set(one[0])) == 3


def test_unrouted_experts_are_reported_up_to_each_layers_count() -> None:
    seen = Statistics.empty(2, 3)
    seen.counts[0, 1] = seen.counts[1, 0] = 1
    assert seen.unrouted([3, 2]) == [(0, 0), (0, 2), (1, 1)]


def test_adding_sums_and_keeps_the_largest() -> None:
    seen = statistics()
    seen.add(statistics())
    for name, value in vars(statistics()).items():
        np.testing.assert_array_equal(getattr(seen, name), value if name == "largest" else 2 * value, err_msg=name)
    with pytest.raises(DataError, match=r"statistics of \(2, 3\) layers and experts do not fit \(1, 3\)"):
        seen.add(Statistics.empty(2, 3))


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    statistics().save(path, first=np.arange(3))
    found, more = Statistics.load(path)
    for name, value in vars(statistics()).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    assert list(more) == ["first"]
    assert [file.name for file in tmp_path.iterdir()] == ["profile.npz"]


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.npz"
    statistics().save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importance.np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space"):
        Statistics.empty(1, 3).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["profile.npz"]


@given(data=st.data())
def test_damaged_file_is_named(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut short, or with bytes that are others: read whole or refused with its name, never half."""
    path = tmp_path_factory.getbasetemp() / "profile.npz"
    statistics().save(path)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
    else:
        path.write_bytes(whole[:at] + os.urandom(1) + whole[at + 1 :])
    try:
        found, _ = Statistics.load(path)
    except DataError as error:
        assert "profile.npz does not hold the statistics of a profile" in str(error)  # noqa: PT017
        assert "delete it" in str(error)  # noqa: PT017
    else:
        for name, value in vars(statistics()).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    np.savez(path, tokens=np.zeros(1))
    with pytest.raises(DataError, match=r"profile\.npz does not hold .*counts.*: delete it"):
        Statistics.load(path)
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        Statistics.load(tmp_path / "nowhere.npz")


def test_super_experts_are_outliers_of_the_whole_model() -> None:
    """Above the 99.5th percentile and a tenth of the largest; experts that a layer does not have are not seen."""
    seen = Statistics.empty(4, 100)
    seen.largest[:] = 1
    seen.largest[1, 7], seen.largest[2, 3] = 500, 600
    assert super_experts(seen, [100] * 4) == [(1, 7), (2, 3)]
    seen.largest[1, 7] = 50  # below a tenth of the largest
    assert super_experts(seen, [100] * 4) == [(2, 3)]
    assert super_experts(seen, [100, 100, 3, 100]) == [(1, 7)]
    assert super_experts(Statistics.empty(2, 4), [4, 4]) == []
