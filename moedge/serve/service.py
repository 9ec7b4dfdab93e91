"""The model, its thread and its figures, while it loads, serves and ends. Knows events and errors, no formats.

`Answers` is one request's view of it: the events of its jobs as an asynchronous iterator.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from moedge.api.errors import ApiError
from moedge.errors import MoedgeError
from moedge.runtime.device import return_freed_memory
from moedge.runtime.lm import LM
from moedge.runtime.session import context_of
from moedge.serve.engine import BusyError, ClosedError, Ended, Engine, Job
from moedge.serve.metrics import Metrics
from moedge.serve.work import Accepted, Piece, can_chat

log = logging.getLogger("moedge.serve")


class Service:
    """One model, loaded and used by one thread of its own. `name` is what clients call it."""

    def __init__(self, name: str, load: Callable[[], LM], parallel: int, queue: int, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.created = int(time.time())
        self.engine = Engine(parallel, queue, self._tidy)
        self.metrics = Metrics()
        self.failure: BaseException | None = None
        self.chat = False
        self._load = load
        self._lm: LM | None = None
        self._thread: threading.Thread | None = None

    def start(self, ready: Callable[["Service"], None], ended: Callable[[], None]) -> None:
        """Load and serve. `ready` and `ended` are called on the model's thread."""
        self._thread = threading.Thread(target=self._run, args=(ready, ended), name="moedge-model", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the model is closed; `failure` says whether something went wrong."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, ready: Callable[["Service"], None], ended: Callable[[], None]) -> None:
        try:
            with self._load() as lm:
                self.chat = can_chat(lm)
                self._lm = lm
                ready(self)
                self.engine.run()
        except BaseException as error:
            self.failure = error
        finally:
            self._lm = None
            self.engine.end()
            ended()

    def _tidy(self) -> None:
        """Give back what an answer has freed: malloc would keep it in pieces, a little more with every coincidence."""
        if self._lm is not None and self._lm.plan.limit is not None:
            return_freed_memory()

    @property
    def lm(self) -> LM:
        """The model. ApiError 503 while it is loading, or not there any more."""
        lm = self._lm
        if lm is None:
            raise ApiError(503, "the model is loading: try again soon", code="loading", headers={"retry-after": "1"})
        return lm

    def check_model(self, name: str) -> None:
        """ApiError 404 when clients ask for another model."""
        if name != self.name:
            raise ApiError(
                404, f"the model {name!r} is not here: this server has {self.name!r}",
                code="model_not_found", param="model",
            )  # fmt: skip

    def cache(self) -> dict[str, Any]:
        """The experts in memory and what was counted since the start."""
        lm = self.lm
        store, plan = lm.store, lm.plan
        return {
            "model": self.name,
            "slots": sum(plan.capacities) + plan.spare,
            "slot_bytes": plan.slot_bytes,
            "resident_bytes": store.resident_bytes,
            "hits": store.counters.hits,
            "misses": store.counters.misses,
            "bytes_read": store.counters.bytes_read,
            "tokens": self.metrics.generation_tokens,
            "requests_running": self.engine.running,
            "requests_waiting": self.engine.waiting,
            "layers": [
                {
                    "layer": layer,
                    "experts": experts,
                    "resident": sorted(glimpse.resident),
                    "used": sorted(glimpse.used),
                    "missed": sorted(glimpse.missed),
                }
                for layer, (experts, glimpse) in enumerate(zip(plan.num_experts, store.glimpses, strict=True))
            ],
        }

    def metrics_text(self) -> str:
        """For Prometheus."""
        lm, engine = self.lm, self.engine
        counters, context = lm.store.counters, context_of(lm)
        gauges = {
            "vllm:num_requests_running": engine.running,
            "vllm:num_requests_waiting": engine.waiting,
            "vllm:kv_cache_usage_perc": engine.held / (context * engine.parallel) if context else 0.0,
            "moedge:resident_bytes": lm.store.resident_bytes,
            "moedge:slots": sum(lm.plan.capacities) + lm.plan.spare,
            "moedge:slot_bytes": lm.plan.slot_bytes,
        }
        counted = {
            "moedge:expert_hits": counters.hits,
            "moedge:expert_misses": counters.misses,
            "moedge:bytes_read": counters.bytes_read,
        }
        return self.metrics.text(self.name, gauges, counted)


Work = tuple[Iterator[Any], Callable[[], int]]  # what a job does, and how many tokens it holds


class Answers:
    """The events (index of the job, event) of one request, until all its jobs have ended. ApiError when one fails.

    `close` ends what is still going on; closing again does nothing.
    """

    def __init__(self, service: Service, works: Sequence[Work], brief: bool = False) -> None:
        self.count = len(works)
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._deadline = self._began + service.seconds
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._last: dict[int, float] = {}
        self._jobs = [Job(work, partial(self._put, index), brief, held) for index, (work, held) in enumerate(works)]
        self._open = set(range(len(works)))
        try:
            service.engine.submit(self._jobs)
        except BusyError as error:
            service.metrics.refused["queue"] += 1
            headers = {"retry-after": str(error.seconds)}
            message = f"the queue of {service.engine.queue} is full: try again in {error.seconds} s"
            raise ApiError(429, message, code="queue_full", headers=headers) from error
        except ClosedError as error:
            raise _closed(error) from error

    def _put(self, index: int, event: Any) -> None:
        """On the model's thread. A last step may outlive the server: nobody is there to be told then."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> tuple[int, Any]:
        while self._open:
            index, event = await self._next()
            if not isinstance(event, Ended):
                self._observe(index, event)
                return index, event
            self._open.discard(index)
            if event.error is not None:
                self.close()
                raise self._failed(event)
        raise StopAsyncIteration

    async def _next(self) -> tuple[int, Any]:
        if not self._events.empty():
            return self._events.get_nowait()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._events.get()
        except TimeoutError as error:
            self.close()
            message = f"the answer took longer than {self._service.seconds:g} s: ask for fewer tokens"
            raise ApiError(504, message, code="timeout") from error

    def _observe(self, index: int, event: Any) -> None:
        metrics, now = self._service.metrics, self._loop.time()
        if isinstance(event, Accepted):
            metrics.prompt_tokens += event.tokens
        elif isinstance(event, Piece):
            metrics.generation_tokens += 1
            if index in self._last:
                metrics.between_tokens.observe(now - self._last[index])
            else:
                metrics.first_token.observe(now - self._began)
            self._last[index] = now
            if event.finish:
                metrics.finished[event.finish] += 1
                self._open.discard(index)
                if not self._open:
                    metrics.whole.observe(now - self._began)

    def _failed(self, end: Ended) -> ApiError:
        error, metrics = end.error, self._service.metrics
        if isinstance(error, ClosedError):
            return _closed(error)
        if not end.admitted and isinstance(error, (MoedgeError, ValueError)):
            metrics.refused["invalid"] += 1
            return ApiError(400, str(error), code="invalid_prompt")
        metrics.finished["error"] += 1
        if isinstance(error, MoedgeError):
            return ApiError(500, str(error))
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed; its log says why")

    def close(self) -> None:
        """Stop what is still going on; it ends within one step."""
        if self._open:
            self._service.metrics.finished["abort"] += len(self._open)
            self._service.engine.stop([self._jobs[index] for index in self._open])
            self._open.clear()


def _closed(error: ClosedError) -> ApiError:
    return ApiError(503, f"{error}: send it again to another server, or later", code="shutting_down")
