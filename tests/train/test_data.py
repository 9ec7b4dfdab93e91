"""Rows: which tokens, which weights, in which order."""

import numpy as np
import pytest

from moedge.errors import DataError
from moedge.train.data import ExampleStream, Mixture, TextStream, stack


def test_an_epoch_of_text_shows_every_row_once_and_the_next_cuts_elsewhere() -> None:
    stream = TextStream(np.arange(100, dtype=np.uint16), seed=1)
    shift, order = stream._order(0, 10)
    rows = [stream.row(number, 10) for number in range(len(order))]
    starts = sorted(int(row.ids[0]) for row in rows)
    assert starts == [shift + 10 * index for index in range(len(order))]
    assert all((np.diff(row.ids) == 1).all() for row in rows)
    later = sorted(int(stream.row(len(order) + n, 10).ids[0]) for n in range(len(stream._order(1, 10)[1])))
    assert later != starts


def test_the_first_token_of_a_row_of_text_weighs_nothing() -> None:
    row = TextStream(np.arange(50, dtype=np.uint16)).row(0, 8)
    assert row.weights.tolist() == [0.0] + [1.0] * 7
    assert (row.segments == 0).all()


def test_too_little_text_names_the_remedy() -> None:
    with pytest.raises(DataError, match="add text or shorten rows"):
        TextStream(np.arange(10, dtype=np.uint16)).row(0, 8)


def test_examples_are_packed_whole_with_their_weights_and_padded() -> None:
    ids = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.uint16)
    weights = np.array([9, 0.5, 2, 9, 2, 9, 0.5, 0.5, 2], np.float32)
    offsets = np.array([0, 3, 5, 9])
    stream = ExampleStream(ids, weights, offsets, seed=3)
    rows = [stream.row(number, 7) for number in range(2)]
    seen = {}
    for row in rows:
        for segment in set(row.segments.tolist()) - {-1}:
            inside = row.segments == segment
            seen[tuple(row.ids[inside].tolist())] = row.weights[inside].tolist()
        assert (row.weights[row.segments == -1] == 0).all()
    assert seen == {(1, 2, 3): [0.0, 0.5, 2.0], (4, 5): [0.0, 2.0], (6, 7, 8, 9): [0.0, 0.5, 0.5, 2.0]}


def test_a_document_longer_than_a_row_is_cut() -> None:
    stream = ExampleStream(np.arange(9, dtype=np.uint16), np.ones(9, np.float32), np.array([0, 9]))
    assert stream.row(0, 4).ids.tolist() == [0, 1, 2, 3]


def test_examples_that_disagree_with_their_offsets_are_refused() -> None:
    with pytest.raises(DataError, match="must agree"):
        ExampleStream(np.arange(4), np.ones(4, np.float32), np.array([0, 5]))


def streams() -> Mixture:
    return Mixture({name: TextStream(np.arange(400) + start, 1) for name, start in (("a", 0), ("b", 1000))})


def test_streams_come_in_proportion_to_their_shares() -> None:
    mixture = streams()
    names = [mixture.next({"a": 3.0, "b": 1.0}, 8)[0] for _ in range(40)]
    assert names.count("a") == 30
    assert names[:4].count("b") == 1


def test_a_restored_mixture_continues_with_the_same_rows() -> None:
    one, two = streams(), streams()
    shares = {"a": 0.6, "b": 0.4}
    one.batch(shares, 7, 8)
    two.restore(one.state())
    ours, theirs = stack(one.batch(shares, 9, 16)), stack(two.batch(shares, 9, 16))
    assert (ours.ids == theirs.ids).all()
    assert ours.ids.shape == (9, 16)


@pytest.mark.parametrize("shares", [{"c": 1.0}, {"a": 0.0}])
def test_shares_without_a_stream_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(DataError, match="shares"):
        streams().next(shares, 8)


def test_a_state_of_other_streams_is_refused() -> None:
    with pytest.raises(DataError, match="the saved run mixed"):
        streams().restore({"credit": {"z": 0.0}, "taken": {}})
