"""Known tasks: how far two routings are apart, which task is near, and entries that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedge.compress.importance import Statistics
from moedge.compress.index import TaskIndex, distance, spread
from moedge.errors import DataError

masses = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=4, max_size=4).map(np.array)


def known(*mass: float) -> Statistics:
    seen = Statistics.empty(2, len(mass))
    seen.mass[0] = mass
    return seen


@pytest.fixture
def index(tmp_path: Path) -> TaskIndex:
    made = TaskIndex(tmp_path / "index", "this model")
    made.add("novels", known(8, 1, 1, 0), 0.05, {"scope": "text"})
    made.add("sums", known(0, 1, 1, 8), 0.05, {"scope": "text"})
    return made


@given(masses, masses)
def test_distance_is_a_distance(one: np.ndarray, other: np.ndarray) -> None:
    apart = distance(one, other)
    assert 0 <= apart <= 1 + 1e-9
    assert apart == pytest.approx(distance(other, one), abs=1e-9)
    assert distance(one, one) == pytest.approx(0, abs=1e-6)
    if one.sum() > 1e-3 and other.sum() > 1e-3:
        assert distance(3 * one, other) == pytest.approx(apart, abs=1e-6)


@given(masses.filter(np.any), masses.filter(np.any), masses.filter(np.any))
def test_distance_keeps_the_triangle(one: np.ndarray, two: np.ndarray, three: np.ndarray) -> None:
    assert distance(one, three) <= distance(one, two) + distance(two, three) + 1e-6


def test_distance_of_nothing_in_common_is_one() -> None:
    assert distance(np.array([1.0, 0]), np.array([0, 5.0])) == pytest.approx(1)


def test_spread_is_how_far_halves_are_apart() -> None:
    one, other = np.array([1.0, 0]), np.array([0, 1.0])
    assert spread([one, one, one]) == 0
    assert spread([one, other, one, other]) == pytest.approx(1)
    with pytest.raises(DataError, match="fill one pass"):
        spread([one])


def test_nearest(index: TaskIndex) -> None:
    near = index.nearest(np.array([79.0, 11, 10, 0]), "text")
    assert near is not None
    assert (near.name, near.near) == ("novels", True)
    far = index.nearest(np.array([1.0, 5, 5, 2]), "text")
    assert far is not None
    assert not far.near
    assert far.distance > far.limit == pytest.approx(0.1)


def test_task_whose_answers_were_counted_is_not_compared_with_texts(index: TaskIndex) -> None:
    assert index.nearest(np.array([8.0, 1, 1, 0]), "answer") is None


def test_empty_index_knows_none(tmp_path: Path) -> None:
    empty = TaskIndex(tmp_path / "nowhere", "this model")
    assert empty.nearest(np.ones(4), "text") is None
    with pytest.raises(DataError, match=r"has no task 'novels': it has none"):
        empty.read("novels")


def test_what_is_stored_is_read(index: TaskIndex) -> None:
    assert index.names == ["novels", "sums"]
    seen, own, about = index.read("novels")
    assert seen.mass[0].tolist() == [8, 1, 1, 0]
    assert (own, about) == (0.05, {"scope": "text", "model": "this model"})
    index.add("novels", known(1, 1, 1, 1), 0.5, {})
    assert index.read("novels")[0].mass[0].tolist() == [1, 1, 1, 1]


def test_index_of_another_model_is_refused(index: TaskIndex) -> None:
    other = TaskIndex(index.folder, "another model")
    with pytest.raises(DataError, match=r"novels\.npz was made with another model: give another --task-index folder"):
        other.nearest(np.ones(4), "text")


@pytest.mark.parametrize("content", [b"", b"no npz", "cut"])
def test_damaged_entry_is_named(index: TaskIndex, content: bytes | str) -> None:
    path = index.folder / "novels.npz"
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"novels\.npz .*: delete it"):
        index.nearest(np.ones(4), "text")


def test_entry_without_its_spread_is_named(index: TaskIndex) -> None:
    known(1, 1, 1, 1).save(index.folder / "half.npz", about=np.array("{}"))
    with pytest.raises(DataError, match=r"half\.npz is no entry of a task index .*: delete it"):
        index.read("half")


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a\nb"])
def test_name_that_names_no_file_is_refused(index: TaskIndex, name: str) -> None:
    with pytest.raises(DataError, match="cannot name a file of the index: give another"):
        index.add(name, known(1, 1, 1, 1), 0, {})
