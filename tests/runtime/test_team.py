"""While kernels decode, torch has one thread; afterwards what it had, also after an error."""

import pytest
import torch

from moedge.native import library as native
from moedge.runtime.team import one_team


class Fake:
    def __init__(self) -> None:
        self.calls: list[bool] = []

    def stay_awake(self, on: bool) -> None:
        self.calls.append(on)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is told, from two threads on."""
    told = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def test_torch_has_one_thread_inside(two_threads: list[int]) -> None:
    library = Fake()
    with one_team(library):  # type: ignore[arg-type]
        assert two_threads[-1] == 1
        assert library.calls == [True]
    assert two_threads == [2, 1, 2]
    assert library.calls == [True, False]


def test_an_error_ends_it_as_well(two_threads: list[int]) -> None:
    library = Fake()
    with pytest.raises(KeyError), one_team(library):  # type: ignore[arg-type]
        raise KeyError
    assert two_threads[-1] == 2
    assert library.calls == [True, False]


def test_without_kernels_nothing_changes(two_threads: list[int]) -> None:
    with one_team(None):
        assert two_threads == [2]


def test_kernels_awake_give_the_same_and_sleep_again() -> None:
    library = native.load()
    if library is None:
        pytest.skip("no kernels were built")
    before = native._small_layer(library)
    library.stay_awake(True)
    try:
        assert native._small_layer(library) == before
    finally:
        library.stay_awake(False)
    assert native._small_layer(library) == before
