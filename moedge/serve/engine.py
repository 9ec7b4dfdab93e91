"""Many jobs, one model thread: their steps take turns and are never batched, so each computes what it would alone.

A job is an iterator; the first item is its admission (quick, done as soon as it arrives), each further one a slice of
work: None while a prompt is being read, otherwise an event for whoever asked. Each job that decodes gets one slice per
round, and of those that read a prompt only the first does, so nobody waits longer than one chunk. Knows no model.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

log = logging.getLogger("moedge.serve")


class BusyError(Exception):
    """No room in the queue. `seconds`: until what is there now will have ended, so that nobody asks in vain."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


class ClosedError(Exception):
    """The engine is shutting down and takes, or finishes, no more."""


class Ended:
    """The last event of a job: `error` is None when it is complete."""

    def __init__(self, error: BaseException | None = None, admitted: bool = True) -> None:
        self.error, self.admitted = error, admitted


class Job:
    """One iterator to be worked off. `deliver` gets its events, and Ended last, on the model thread.

    brief: the work takes no memory to speak of, so it needs no slot. held: tokens that it holds in a cache.
    """

    def __init__(
        self,
        work: Iterator[Any],
        deliver: Callable[[Any], None],
        brief: bool = False,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        self.work, self.deliver, self.brief, self.held = work, deliver, brief, held
        self.stopped = False  # set by anybody; looked at before every slice
        self.reading = True


class Engine:
    """`parallel` jobs at once and `queue` more that wait. `run` is the model thread's; the rest is for any thread.

    tidy: called on the model thread whenever one of the `parallel` has ended.
    """

    def __init__(self, parallel: int, queue: int, tidy: Callable[[], None] = lambda: None) -> None:
        self.parallel, self.queue = parallel, queue
        self._tidy = tidy
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._known = 0  # jobs that were submitted and have not ended
        self._accepting, self._ending = True, False
        self._last_end, self._between_ends = 0.0, 1.0

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def held(self) -> int:
        """Tokens in the caches of all that runs."""
        return sum(job.held() for job in self._running.copy())

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of `jobs`, or BusyError, or ClosedError."""
        with self._changed:
            if not self._accepting:
                raise ClosedError("the server is shutting down")
            if self._known + len(jobs) > self.parallel + self.queue:
                raise BusyError(min(60, max(1, round(self._between_ends * self._known))))
            self._known += len(jobs)
            self._arrived.extend(jobs)
            self._changed.notify()

    def stop(self, jobs: Sequence[Job]) -> None:
        """The jobs end before their next slice."""
        with self._changed:
            for job in jobs:
                job.stopped = True
            self._changed.notify()

    def drain(self) -> None:
        """Take no more jobs, and end those that have not begun."""
        with self._changed:
            self._accepting = False
            self._changed.notify()

    def end(self) -> None:
        """End everything, and `run`."""
        with self._changed:
            self._accepting, self._ending = False, True
            self._changed.notify()

    def run(self) -> None:
        """Work until `end`. Every job that was submitted gets its Ended."""
        try:
            while self._wait():
                self._round()
        finally:
            self.end()
            for job in [*self._arrived, *self._waiting, *self._running]:
                self._finish(job, Ended(ClosedError("the server shut down before the answer was complete")))
            self._arrived.clear()
            self._waiting.clear()
            self._running.clear()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._arrived or self._waiting or self._running)
            return not self._ending

    def _round(self) -> None:
        if self._arrived:
            self._admit(self._arrived.popleft())
        for job in [job for job in self._waiting if job.stopped or not self._accepting]:
            self._waiting.remove(job)
            self._finish(job, Ended(None if job.stopped else ClosedError("the server is shutting down")))
        while self._waiting and len(self._running) < self.parallel:
            self._running.append(self._waiting.popleft())
        reader = next((job for job in self._running if job.reading), None)
        for job in self._running.copy():
            if (job is reader or not job.reading or job.stopped) and not self._slice(job):
                self._running.remove(job)
                self._tidy()
                self._note_end()

    def _admit(self, job: Job) -> None:
        if self._slice(job, admitted=False):
            if not job.brief:
                self._waiting.append(job)
            else:
                while self._slice(job):
                    pass

    def _slice(self, job: Job, admitted: bool = True) -> bool:
        """One item of a job's work; whether there is more."""
        if job.stopped:
            self._finish(job, Ended())
            return False
        try:
            event = next(job.work)
        except StopIteration:
            self._finish(job, Ended())
            return False
        except Exception as error:
            self._finish(job, Ended(error, admitted))
            return False
        if event is not None:
            job.reading = not admitted
            job.deliver(event)
        return True

    def _finish(self, job: Job, end: Ended) -> None:
        close = getattr(job.work, "close", None)
        if close is not None:
            close()
        with self._changed:
            self._known -= 1
        job.deliver(end)

    def _note_end(self) -> None:
        """Learn how long it takes until a place is free, from ends while somebody waits."""
        now = time.monotonic()
        if self._last_end and self._waiting:
            self._between_ends += 0.2 * (now - self._last_end - self._between_ends)
        self._last_end = now if self._running else 0.0
