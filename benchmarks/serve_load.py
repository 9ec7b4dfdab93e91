"""Many clients at once, some of them hostile, against `moedge serve` in a process of its own: does it hold?

Every answer is compared with the one that the model gives alone; refused requests have to be 429 with Retry-After.
Memory is looked at every second: it is flat when it does not rise in the second half of the time.
"""

import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import click
import report

MODEL = report.ROOT / "checkpoints" / "mini"
STARTS = ("The old house stood at", "The sea was", "Once upon a time", "A: What is the capital of France?\nB:")
HANG = 120.0  # seconds after which a request counts as hung


def questions() -> list[dict[str, Any]]:
    """What the clients ask: greedy and drawn, short and of more than one chunk."""
    found = []
    for index, start in enumerate(STARTS):
        for tokens, repeat in ((16, 1), (32, 1), (8, 60)):
            own: dict[str, Any] = {"temperature": 0} if index % 2 else {"temperature": 1, "seed": index}
            found.append({"model": "mini", "prompt": f"{start} " * repeat, "max_tokens": tokens} | own)
    return found


def solo_answers(asked: list[dict[str, Any]]) -> list[str]:
    """The answers of the model alone, without a limit, in this process."""
    import moedge

    with moedge.load(MODEL) as lm:
        answers = []
        for question in asked:
            settings = {name: value for name, value in question.items() if name in ("temperature", "seed")}
            steps = lm.generate(question["prompt"], question["max_tokens"], **settings)
            answers.append("".join(step.text for step in steps))
        return answers


@contextmanager
def server(memory: str, *options: object) -> Iterator[tuple[str, int]]:
    """Address and process id of `moedge serve` on the mini model."""
    command = [sys.executable, "-m", "moedge", "serve", MODEL, "--memory", memory, "--port", 0, "--json", *options]
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: exit code {child.wait()}")
        yield json.loads(line)["url"], child.pid
    finally:
        child.terminate()
        child.wait(30)


def memory_of(pid: int) -> tuple[float, float]:
    """MiB of a process that are resident, now and at their highest."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return found["VmRSS"], found["VmHWM"]


@dataclass
class Watch:
    """Resident memory of a process, second by second or oftener: [(seconds, MiB)]."""

    pid: int
    every: float = 1.0
    samples: list[tuple[float, float]] = field(default_factory=list)

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            self.samples.append((loop.time() - began, memory_of(self.pid)[0]))
            await asyncio.sleep(self.every)

    def figures(self) -> dict[str, Any]:
        """How it went by quarters of the time, and how fast it rose in the second half (least squares)."""
        count = len(self.samples)
        quarters = [[mib for _, mib in self.samples[count * q // 4 : count * (q + 1) // 4]] for q in range(4)]
        late = self.samples[count // 2 :]
        seconds, mib = ([sample[i] for sample in late] for i in (0, 1))
        return {
            "resident_mib_low_median_high": [[round(f(part), 1) for f in (min, median, max)] for part in quarters],
            "second_half_mib_per_minute": round(60 * linear_regression(seconds, mib).slope, 2),
            "resident_mib_by_second": [round(mib, 1) for _, mib in self.samples],
        }


@dataclass
class Seen:
    """What came of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    hung: int = 0


class Crowd:
    """Clients of one server that speak HTTP by hand, which costs the machine less than a library does."""

    def __init__(
        self, url: str, asked: list[dict[str, Any]], answers: list[str], seed: int, hostile: Collection[str] = ()
    ) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._asked, self._answers = asked, answers
        self._random = random.Random(seed)
        self._hostile = list(hostile or HOSTILE)
        self._until = 0.0
        self.seen = Seen()

    async def run(self, clients: int, seconds: float, hostile: int) -> None:
        """`clients` ask for `seconds`, and `hostile` more misbehave; each finishes what it has begun."""
        self._until = asyncio.get_running_loop().time() + seconds
        behaviours = [self._ask] * clients + [self._misbehave] * hostile
        await asyncio.gather(*(self._again(behaviour) for behaviour in behaviours))

    async def _again(self, behaviour: Callable[[], Awaitable[None]]) -> None:
        while asyncio.get_running_loop().time() < self._until:
            try:
                async with asyncio.timeout(HANG):
                    await behaviour()
            except TimeoutError:
                self.seen.hung += 1

    async def _request(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(head(len(body)) + body)
            status, headers = await read_head(reader)
            return status, headers, dechunked(await reader.read(), headers)
        finally:
            writer.close()

    async def _ask(self) -> None:
        index = self._random.randrange(len(self._asked))
        stream = self._random.random() < 0.5
        body = json.dumps(self._asked[index] | {"stream": stream}).encode()
        status, headers, content = await self._request(body)
        self.seen.statuses[str(status)] += 1
        if status == 429:
            pause = int(headers["retry-after"]) * self._random.uniform(0.5, 1)
            await asyncio.sleep(min(pause, self._until - asyncio.get_running_loop().time()))
            return
        if status != 200:
            return
        text = text_of(content, stream)
        self.seen.tokens += self._asked[index]["max_tokens"]
        if text != self._answers[index]:
            self.seen.wrong.append(f"{self._asked[index]['prompt'][:30]!r} -> {text[:60]!r}")

    async def _misbehave(self) -> None:
        name = self._random.choice(self._hostile)
        try:
            outcome = await HOSTILE[name](self)
        except (ConnectionError, asyncio.IncompleteReadError):
            outcome = "cut off"
        self.seen.hostile[f"{name}: {outcome}"] += 1

    async def vanish(self) -> str:
        """Begins a stream and resets the connection in its middle."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        body = json.dumps(self._asked[0] | {"stream": True, "max_tokens": 500}).encode()
        writer.write(head(len(body)) + body)
        await reader.read(self._random.choice((1, 500)))
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return "gone"

    async def half(self, sent: bytes) -> str:
        """Sends no more than this, and waits."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(sent)
            found = await reader.read()
            return found.split(b" ", 2)[1].decode() if found else "cut off"
        finally:
            writer.close()

    async def huge(self) -> str:
        """100 MB of body."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(head(100_000_000))
            for _ in range(100):
                writer.write(b"x" * 1_000_000)
                await writer.drain()
            return str((await read_head(reader))[0])
        finally:
            writer.close()

    async def nonsense(self, body: bytes) -> str:
        return str((await self._request(body))[0])


HOSTILE: dict[str, Callable[[Crowd], Awaitable[str]]] = {
    "vanishes": Crowd.vanish,
    "slow body": lambda crowd: crowd.half(head(1000) + b'{"model": '),
    "half a header": lambda crowd: crowd.half(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le"),
    "100 MB": Crowd.huge,
    "no UTF-8": lambda crowd: crowd.nonsense(b'{"model": "mini", "prompt": "\xff"}'),
    "wrong types": lambda crowd: crowd.nonsense(b'{"model": "mini", "prompt": {"a": [1]}, "max_tokens": "8"}'),
}


def head(length: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % length
    )


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:] if line)


def dechunked(content: bytes, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return content
    parts = []
    while content:
        size, _, content = content.partition(b"\r\n")
        parts.append(content[: int(size, 16)])
        content = content[int(size, 16) + 2 :]
    return b"".join(parts)


def text_of(content: bytes, stream: bool) -> str:
    if not stream:
        return str(json.loads(content)["choices"][0]["text"])
    events = [event.removeprefix("data: ") for event in content.decode().split("\n\n") if event]
    if events[-1] != "[DONE]":
        return f"incomplete stream: {events[-1]}"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def state(url: str) -> dict[str, int]:
    """What the server says that it is doing."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /cache HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    _, headers = await read_head(reader)
    found = json.loads(dechunked(await reader.read(), headers))
    writer.close()
    return {name: found[name] for name in ("requests_running", "requests_waiting", "tokens")}


async def press(url: str, pid: int, crowd: Crowd, clients: int, seconds: float) -> dict[str, Any]:
    """Warm up, press, wait until nothing is left; the figures."""
    await crowd.run(4, min(seconds, 5), 0)  # so that code and experts are there before memory is looked at
    crowd.seen = Seen()
    before, files = memory_of(pid), len(os.listdir(f"/proc/{pid}/fd"))
    watch = Watch(pid, min(1.0, seconds / 10))
    watching = asyncio.create_task(watch.run())
    await crowd.run(clients, seconds, max(1, clients // 20))
    watching.cancel()
    for _ in range(300):
        left = await state(url)
        if not left["requests_running"] + left["requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    after = memory_of(pid)
    return {
        "answers": dict(crowd.seen.statuses),
        "wrong_answers": crowd.seen.wrong,
        "hung": crowd.seen.hung,
        "hostile": dict(sorted(crowd.seen.hostile.items())),
        "tokens_per_second": crowd.seen.tokens / seconds,
        "left_running": left["requests_running"],
        "left_waiting": left["requests_waiting"],
        "open_files": [files, len(os.listdir(f"/proc/{pid}/fd"))],
        "resident_mib": [round(before[0], 1), round(after[0], 1)],
        "peak_mib": [round(before[1], 1), round(after[1], 1)],
    } | watch.figures()


@click.command()
@click.option("--clients", default=200, show_default=True)
@click.option("--seconds", type=click.FloatRange(10), default=120.0, show_default=True)
@click.option("--queue", default=16, show_default=True)
@click.option("--memory", default="600MiB", show_default=True, help="Limit of the server's process.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/serve-load.json.")
def main(clients: int, seconds: float, queue: int, memory: str, seed: int, save: bool) -> None:
    """Press a server with many clients."""
    asked = questions()
    answers = solo_answers(asked)
    with server(memory, "--queue", queue) as (url, pid):
        figures = asyncio.run(press(url, pid, Crowd(url, asked, answers, seed), clients, seconds))
    settings = {"clients": clients, "seconds": seconds, "queue": queue, "memory": memory, "seed": seed}
    rows = [{"figure": name, "value": json.dumps(value)} for name, value in figures.items() if "by_second" not in name]
    report.publish("serve-load", rows, settings | figures, save)


if __name__ == "__main__":
    main()
