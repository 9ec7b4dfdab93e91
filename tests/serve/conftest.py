"""Servers on free ports, in threads of the tests' process, and a model whose steps a test lets pass."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import moedge
from moedge.runtime.generate import generate
from moedge.serve.app import Access, make_app
from moedge.serve.listen import Server, Stages, bind, url_of
from moedge.serve.service import Service

NAME = "tiny"


@dataclass
class Running:
    """A server and its parts."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread

    def client(self, **settings: Any) -> OpenAI:
        """The real client of OpenAI's, without its own retries."""
        return OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60} | settings))

    def end(self) -> None:
        """As SIGTERM does; returns when it has ended."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def wait(self, holds: Callable[[], bool]) -> None:
        """Until something holds that other threads bring about."""
        until = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.005)


Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """`serve(load, parallel=2, ...)`: a running server, ended with the module's tests."""
    with ExitStack() as stack:

        def begin(
            load: Callable[[], Any],
            parallel: int = 4,
            queue: int = 16,
            seconds: float = 60,
            grace: float = 5,
            access: Access | None = None,
            wait: bool = True,
        ) -> Running:
            service = Service(NAME, load, parallel, queue, seconds)
            listener = stack.enter_context(bind("127.0.0.1", 0))
            ready = threading.Event()
            stages = Stages(
                begin=lambda: service.start(lambda _: ready.set(), ready.set),
                drain=service.engine.drain,
                end=service.engine.end,
                grace=grace,
            )
            server = Server(make_app(service, access), stages)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            running = Running(url_of(listener), service, server, thread)
            thread.start()
            stack.callback(running.end)
            if wait:
                assert ready.wait(60)
                assert service.failure is None, service.failure
            return running

        yield begin


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", tokenizer=True)


@pytest.fixture(scope="session")
def alone(model: Path) -> Iterator[Any]:
    """The model by itself: what every answer has to be equal to."""
    with moedge.load(model, prefill_chunk=16) as lm:
        yield lm


@pytest.fixture(scope="module")
def served(serve: Serve, model: Path) -> Running:
    """A server with room for three answers; prompts are read 16 tokens at a time."""
    return serve(lambda: moedge.load(model, prefill_chunk=16, parallel=3), parallel=3)


@dataclass
class Gate:
    """A loaded model each of whose tokens waits until the test lets it `go`."""

    lm: Any
    passes: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: int = 0

    def go(self, steps: int) -> None:
        self.passes.release(steps)

    def generate(self, *args: Any, **settings: Any) -> Iterator[Any]:
        return self._pass(generate(self, *args, **settings))

    def _pass(self, steps: Iterator[Any]) -> Iterator[Any]:
        for step in steps:
            assert self.passes.acquire(timeout=30)
            self.steps += 1
            yield step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.lm.close()


@pytest.fixture
def gate(model: Path) -> Gate:
    return Gate(moedge.load(model))
