"""The benchmark of prefetching: which guesses it counts, and as right or wrong."""

from collections.abc import Sequence

from prefetch import Places, watch


class Target:
    """A layer whose guess is always experts 5, 6, 7, most likely first."""

    def __init__(self) -> None:
        self._last: list[int] = []
        self.learnt: list[Sequence[int]] = []

    def guess(self, hidden: None, resident: Sequence[int]) -> list[int]:
        self._last = [expert for expert in (5, 6, 7) if expert not in resident]
        return self._last

    def learn(self, used: Sequence[int]) -> None:
        self.learnt.append(used)
        self._last = []


def test_guesses_count_by_place_and_those_on_disk_apart() -> None:
    target, every, on_disk = Target(), Places(3), Places(3)
    watch(target, every, on_disk)
    assert target.guess(None, (5,)) == [6, 7], "as without being watched"
    target.learn([5, 6, 1])
    target.learn([5, 6, 7])  # nothing was guessed for this one
    target.guess(None, (5, 7))
    target.learn([1, 2, 3])
    assert every.shares() == [1 / 2, 1 / 2, 0, 2 / 6]
    assert on_disk.shares() == [1 / 2, 0, None, 1 / 3]
    assert target.learnt == [[5, 6, 1], [5, 6, 7], [1, 2, 3]]
