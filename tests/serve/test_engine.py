"""Taking turns, waiting, stopping, ending: on jobs that are plain iterators."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from moedge.serve.engine import BusyError, ClosedError, Ended, Engine, Job


class Recorded:
    """Jobs whose slices are written down in the order in which they ran."""

    def __init__(self) -> None:
        self.slices: list[str] = []
        self.events: dict[str, list[Any]] = {}
        self.closed: list[str] = []

    def job(self, name: str, chunks: int = 0, tokens: int = 2, brief: bool = False) -> Job:
        self.events[name] = []

        def work() -> Iterator[Any]:
            try:
                self.slices.append(f"{name} admitted")
                yield "admitted"
                for _ in range(chunks):
                    self.slices.append(f"{name} reads")
                    yield None
                for count in range(tokens):
                    self.slices.append(f"{name} {count}")
                    yield count
            finally:
                self.closed.append(name)

        return Job(work(), self.events[name].append, brief)

    def ended(self, name: str) -> bool:
        return bool(self.events[name]) and isinstance(self.events[name][-1], Ended)


@pytest.fixture
def seen() -> Recorded:
    return Recorded()


def run_until(engine: Engine, holds: Any) -> None:
    """Run rounds in this thread."""
    for _ in range(200):
        if holds():
            return
        engine._round()
    raise AssertionError("never came about")


def finish(engine: Engine, seen: Recorded, *names: str) -> None:
    run_until(engine, lambda: all(seen.ended(name) for name in names))


def test_tidied_whenever_an_answer_has_ended(seen: Recorded) -> None:
    tidied: list[str] = []
    engine = Engine(2, 1, lambda: tidied.append(seen.closed[-1]))
    engine.submit([seen.job("a", tokens=3), seen.job("b", tokens=5), seen.job("c", brief=True)])
    finish(engine, seen, "a", "b", "c")
    assert tidied == ["a", "b"]


def test_steps_take_turns(seen: Recorded) -> None:
    engine = Engine(2, 0)
    engine.submit([seen.job("a", tokens=3), seen.job("b", tokens=3)])
    finish(engine, seen, "a", "b")
    tokens = [entry for entry in seen.slices if entry[-1].isdigit()]
    assert tokens == ["a 0", "a 1", "b 0", "a 2", "b 1", "b 2"]  # b is admitted one round later
    assert [event for event in seen.events["a"] if not isinstance(event, Ended)] == ["admitted", 0, 1, 2]
    assert seen.events["a"][-1].error is None


def test_nobody_waits_longer_than_one_chunk(seen: Recorded) -> None:
    engine = Engine(3, 0)
    engine.submit([seen.job("decodes", tokens=12)])
    run_until(engine, lambda: "decodes 0" in seen.slices)
    engine.submit([seen.job("long", chunks=4), seen.job("other", chunks=4)])
    finish(engine, seen, "decodes", "long", "other")
    order = "".join({"decodes": "d", "long": "r", "other": "r"}[entry.split()[0]] for entry in seen.slices if "reads" in entry or "decodes" in entry)  # fmt: skip # noqa: E501
    during = order[order.index("r") : order.rindex("d")]
    assert "rr" not in during


def test_more_than_parallel_wait_in_order(seen: Recorded) -> None:
    engine = Engine(1, 2)
    engine.submit([seen.job("a")])
    engine.submit([seen.job("b"), seen.job("c")])
    assert engine.waiting == 3
    run_until(engine, lambda: "a 0" in seen.slices)
    assert engine.running == 1
    finish(engine, seen, "a", "b", "c")
    tokens = [entry for entry in seen.slices if entry[-1].isdigit()]
    assert tokens == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]
    assert engine.running == engine.waiting == 0


def test_a_full_queue_refuses_all_of_a_request(seen: Recorded) -> None:
    engine = Engine(1, 1)
    engine.submit([seen.job("a")])
    with pytest.raises(BusyError) as error:
        engine.submit([seen.job("b"), seen.job("c")])
    assert 1 <= error.value.seconds <= 60
    engine.submit([seen.job("d")])
    finish(engine, seen, "a", "d")
    assert seen.events["b"] == seen.events["c"] == []
    engine.submit([seen.job("e"), seen.job("f")])  # there is room again


def test_a_refused_prompt_frees_its_place(seen: Recorded) -> None:
    def refused() -> Iterator[Any]:
        raise ValueError("no")
        yield

    engine, events = Engine(1, 0), []
    for _ in range(3):
        engine.submit([Job(refused(), events.append)])
        engine._round()
    assert [event.admitted for event in events] == [False] * 3
    assert str(events[0].error) == "no"


def test_a_failure_ends_one_job_only(seen: Recorded) -> None:
    def failing() -> Iterator[Any]:
        yield "admitted"
        raise OSError("disk")

    engine, events = Engine(2, 0), []
    engine.submit([Job(failing(), events.append), seen.job("b")])
    finish(engine, seen, "b")
    assert events[-1].admitted
    assert isinstance(events[-1].error, OSError)
    assert seen.events["b"][-1].error is None


@pytest.mark.parametrize("moment", ["arrived", "waiting", "running"])
def test_a_stopped_job_ends_before_its_next_slice(moment: str, seen: Recorded) -> None:
    engine = Engine(1, 1)
    first, second = seen.job("first", tokens=50), seen.job("second", tokens=50)
    engine.submit([first])
    engine.submit([second])
    stopped, name = (first, "first") if moment == "running" else (second, "second")
    if moment != "arrived":
        run_until(engine, lambda: "second admitted" in seen.slices and "first 0" in seen.slices)
    before = [entry for entry in seen.slices if entry.startswith(name)]
    engine.stop([stopped])
    finish(engine, seen, name)
    assert [entry for entry in seen.slices if entry.startswith(name)] == before
    assert name in seen.closed or moment == "arrived"  # a generator that never began has nothing to close
    engine.submit([seen.job("third")])  # its place is free


def test_brief_jobs_need_no_slot(seen: Recorded) -> None:
    engine = Engine(1, 1)
    engine.submit([seen.job("long", tokens=50)])
    run_until(engine, lambda: "long 0" in seen.slices)
    engine.submit([seen.job("brief", brief=True)])
    engine._round()
    assert seen.ended("brief")
    assert not seen.ended("long")


def test_draining_lets_what_runs_finish(seen: Recorded) -> None:
    engine = Engine(1, 2)
    engine.submit([seen.job("runs", tokens=5)])
    engine.submit([seen.job("waits")])
    run_until(engine, lambda: "runs 0" in seen.slices)
    engine.drain()
    with pytest.raises(ClosedError):
        engine.submit([seen.job("late")])
    finish(engine, seen, "runs", "waits")
    assert seen.events["runs"][-1].error is None
    assert isinstance(seen.events["waits"][-1].error, ClosedError)


def test_the_end_tells_everybody(seen: Recorded) -> None:
    engine = Engine(1, 2)
    engine.submit([seen.job("runs", tokens=10**9)])
    engine.submit([seen.job("waits")])
    thread = threading.Thread(target=engine.run)
    thread.start()
    while "runs 5" not in seen.slices:
        pass
    engine.end()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(seen.events["runs"][-1].error, ClosedError)
    assert isinstance(seen.events["waits"][-1].error, ClosedError)
    assert "runs" in seen.closed


def test_an_idle_engine_ends(seen: Recorded) -> None:
    engine = Engine(1, 1)
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.end()
    thread.join(10)
    assert not thread.is_alive()


def test_tokens_held(seen: Recorded) -> None:
    engine = Engine(2, 0)
    job = seen.job("a", tokens=5)
    job.held = lambda: 7
    engine.submit([job])
    assert engine.held == 0
    run_until(engine, lambda: "a 0" in seen.slices)
    assert engine.held == 7
