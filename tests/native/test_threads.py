"""How many threads: the quickest for the bytes, measured once, kept in the cache folder."""

from pathlib import Path

import pytest

from moedge.native import library, threads

LIBRARY = library.load()


def test_small_work_gets_one_thread_and_large_work_as_many_as_pay() -> None:
    speeds = {1: (1e-6, 10e9), 2: (30e-6, 18e9), 4: (60e-6, 18e9)}
    assert threads.best(speeds, 100_000) == 1
    assert threads.best(speeds, 50_000_000) == 2


@pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")
def test_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(found: library.Library, most: int) -> threads.Speeds:
        calls.append(most)
        return {1: (0.0, 1e9), most: (1e-5, 2e9)}

    monkeypatch.setattr(threads, "measure", measure)
    first = threads.calibrated(LIBRARY, 2)
    assert first == {1: (0.0, 1e9), 2: (1e-5, 2e9)}
    assert threads.calibrated(LIBRARY, 2) == first
    assert calls == [2]
    (tmp_path / "moedge" / "kernels.json").write_text("{ half a file")
    assert threads.calibrated(LIBRARY, 2) == first
    assert calls == [2, 2]
    assert [p.name for p in (tmp_path / "moedge").iterdir()] == ["kernels.json"]


@pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")
def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    (tmp_path / "moedge").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(threads, "measure", lambda found, most: {1: (0.0, 1e9), 2: (0.0, 2e9)})
    assert set(threads.calibrated(LIBRARY, 2)) == {1, 2}


@pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")
def test_measuring_gives_a_positive_speed_for_every_number_of_threads() -> None:
    assert LIBRARY is not None
    speeds = threads.measure(LIBRARY, 2)
    assert set(speeds) == {1, 2}
    assert all(seconds > 0 and speed > 0 for seconds, speed in speeds.values())


@pytest.mark.skipif(LIBRARY is None, reason="the C kernels were not built here")
@pytest.mark.parametrize("two", [(4.6e-3, 5e16), (5e-5, 5e16), (5e-5, 0.9e9)])
def test_what_others_disturbed_is_not_kept(
    two: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIBRARY is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(threads, "_DISTURBED", {})
    calls: list[int] = []
    monkeypatch.setattr(threads, "measure", lambda found, most: calls.append(most) or {1: (5e-5, 1e9), 2: two})
    assert threads.calibrated(LIBRARY, 2) == threads.calibrated(LIBRARY, 2) == {1: (5e-5, 1e9)}
    assert calls == [2]
    assert not (tmp_path / "moedge").exists()
