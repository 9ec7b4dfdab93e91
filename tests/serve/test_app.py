"""The server's own state over HTTP: health, cache, metrics, keys, full queues, clients that go, its end."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

import moedge
from moedge.api.keys import make_key, read_keys
from moedge.errors import CheckpointError
from moedge.runtime.generate import generate
from moedge.serve.app import Access

ASK = {"model": "tiny", "prompt": "The sea was", "max_tokens": 8, "temperature": 0}
STREAM = ASK | {"stream": True, "logprobs": 0}  # a chunk for every token, also where it is no whole character


@pytest.fixture(scope="module")
def http(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def test_health(http: httpx.Client) -> None:
    found = http.get("/health")
    assert (found.status_code, found.json()) == (200, {"status": "ok"})


def test_while_loading_everything_says_so(serve: Any, model: Path) -> None:
    loaded = threading.Event()

    def load() -> Any:
        assert loaded.wait(30)
        return moedge.load(model)

    running = serve(load, wait=False)
    running.wait(lambda: running.server.started)
    with httpx.Client(base_url=running.url) as http:
        found = http.get("/health")
        assert (found.status_code, found.json()) == (503, {"status": "loading"})
        for reply in (http.get("/v1/models"), http.post("/v1/completions", json=ASK), http.get("/cache")):
            assert reply.status_code == 503
            assert reply.headers["retry-after"] == "1"
            assert reply.json()["error"]["code"] == "loading"
        loaded.set()
        running.wait(lambda: http.get("/health").status_code == 200)
        assert http.post("/v1/completions", json=ASK).status_code == 200


def test_a_model_that_does_not_load_ends_the_server(serve: Any) -> None:
    def load() -> Any:
        raise CheckpointError("shard 3 is cut off")

    running = serve(load, wait=False)
    running.wait(lambda: running.service.failure is not None)
    assert str(running.service.failure) == "shard 3 is cut off"


def test_the_cache(http: httpx.Client, served: Any) -> None:
    before = http.get("/cache").json()
    http.post("/v1/completions", json=ASK)
    after = http.get("/cache").json()
    assert after["model"] == "tiny"
    assert after["tokens"] - before["tokens"] == 8
    assert after["hits"] - before["hits"] >= 8 * 4 * 2 - 8 * 4
    assert after["requests_running"] == after["requests_waiting"] == 0
    plan, store = served.service.lm.plan, served.service.lm.store
    assert after["slots"] == sum(plan.capacities) + plan.spare
    assert after["slot_bytes"] == plan.slot_bytes
    assert (
        after["resident_bytes"]
        == store.resident_bytes
        == sum(len(layer["resident"]) * plan.slot_bytes for layer in after["layers"])
    )
    assert [layer["layer"] for layer in after["layers"]] == list(range(4))
    for layer in after["layers"]:
        assert set(layer["resident"]) == store.resident(layer["layer"])
        assert len(layer["used"]) == 2
        assert set(layer["missed"]) <= set(layer["used"]) <= set(range(layer["experts"]))


def samples(text: str) -> dict[str, float]:
    """Name with labels -> value, of a page in Prometheus' format; every line has to be one that it knows."""
    found, typed = {}, set()
    for line in text.splitlines():
        if match := re.fullmatch(r"# (HELP|TYPE) (\S+) (.+)", line):
            typed.add(match[2])
            continue
        match = re.fullmatch(r'([a-z_:]+[a-z0-9_]*)\{((?:\w+="[^"]*",?)+)\} (\S+)', line)
        assert match, line
        assert 'model_name="tiny"' in match[2]
        assert match[1] in typed or re.sub("_(bucket|sum|count)$", "", match[1]) in typed
        labels = match[2].replace('model_name="tiny"', "").strip(",")
        found[match[1] + (f"{{{labels}}}" if labels else "")] = float(match[3])
    return found


def test_metrics(http: httpx.Client, served: Any) -> None:
    before = samples(http.get("/metrics").text)
    http.post("/v1/completions", json=ASK)
    http.post("/v1/completions", json=ASK | {"prompt": "x" * 600})
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = samples(reply.text)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == len("The sea was")
    assert grown["vllm:generation_tokens_total"] == 8
    assert grown['vllm:request_success_total{finished_reason="length"}'] == 1
    assert grown['moedge:requests_refused_total{reason="invalid"}'] == 1
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 7
    assert grown['vllm:inter_token_latency_seconds_bucket{le="+Inf"}'] == 7
    assert grown["vllm:e2e_request_latency_seconds_count"] == 1
    assert grown["vllm:e2e_request_latency_seconds_sum"] > 0
    counters = served.service.lm.store.counters
    assert after["moedge:expert_hits_total"] == counters.hits
    assert after["moedge:expert_misses_total"] == counters.misses
    assert after["moedge:bytes_read_total"] == counters.bytes_read
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0
    assert {"moedge:slots", "moedge:slot_bytes", "moedge:resident_bytes", "vllm:num_requests_waiting"} <= set(after)


def test_tokenize(http: httpx.Client, served: Any, alone: Any) -> None:
    aborted = served.service.metrics.finished["abort"]
    found = http.post("/tokenize", json={"prompt": "Größe"}).json()
    assert found == {"tokens": list(alone.tokenizer("Größe")["input_ids"]), "count": 7, "max_model_len": 512}
    messages = [{"role": "user", "content": "x"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()
    text = alone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat["tokens"] == list(alone.tokenizer(text)["input_ids"])
    for wrong in ({}, {"prompt": "x", "messages": messages}):
        assert http.post("/tokenize", json=wrong).status_code == 400
    assert served.service.metrics.finished["abort"] == aborted


def test_the_page(http: httpx.Client) -> None:
    reply = http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == len(re.findall(r"<(?:script|style)\b", reply.text))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nosuch", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/other", 404), ("GET", "/docs", 404)],
)
def test_what_is_not_there(method: str, path: str, status: int, http: httpx.Client) -> None:
    reply = http.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_cors_is_off_unless_told(http: httpx.Client, serve: Any, model: Path) -> None:
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/completions", headers=headers).headers
    assert "access-control-allow-origin" not in http.get("/health", headers=headers).headers
    keys = {"a": make_key("a")[1].split(":")[1]}
    running = serve(lambda: moedge.load(model), access=Access(keys, origins=["https://page.example"]))
    with httpx.Client(base_url=running.url) as other:
        allowed = other.options("/v1/completions", headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        refused = other.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"  # a page can read why


def test_a_name_that_a_web_page_made_up_is_refused(serve: Any, model: Path) -> None:
    running = serve(lambda: moedge.load(model), access=Access(hosts=["localhost", "127.0.0.1"]))
    for host, status in (
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
    ):
        assert httpx.get(f"{running.url}/cache", headers={"host": host}).status_code == status


def test_keys(serve: Any, model: Path, tmp_path: Path) -> None:
    (key, line), (_, other) = make_key("laptop"), make_key("phone")
    (tmp_path / "keys.txt").write_text(f"# ours\n\n{other}\n{line}\n")
    running = serve(lambda: moedge.load(model), access=Access(read_keys(tmp_path / "keys.txt")))
    assert running.client(api_key=key).completions.create(**ASK).usage.completion_tokens == 8
    with pytest.raises(openai.AuthenticationError) as error:
        running.client(api_key="moedge-wrong").completions.create(**ASK)
    assert error.value.code == "invalid_api_key"
    with httpx.Client(base_url=running.url) as http:
        assert http.get("/").status_code == http.get("/health").status_code == 200
        for path in ("/v1/models", "/cache", "/metrics", "/openapi.json", "/nosuch"):
            assert http.get(path).status_code == 401
        for wrong in (key, f"Basic {key}", f"Bearer {key[:-1]}", "Bearer \xff"):
            found = http.get("/cache", headers={b"authorization": wrong.encode("latin-1")})
            assert found.status_code == 401
            assert found.headers["www-authenticate"] == "Bearer"
        assert http.get("/cache", headers={"authorization": f"bearer {key}"}).status_code == 200


# --- with a model whose steps are let pass one by one --------------------------------------------------------------


def lines(reply: httpx.Response) -> Iterator[Any]:
    for line in reply.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line[6:]


def test_a_full_queue(serve: Any, gate: Any) -> None:
    running = serve(lambda: gate, parallel=1, queue=1)
    engine = running.service.engine
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(httpx.post(f"{running.url}/v1/completions", json=ASK, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for count, thread in enumerate(threads):
        thread.start()
        running.wait(lambda: engine.running == 1 and engine.waiting == count)  # noqa: B023
    refused = httpx.post(f"{running.url}/v1/completions", json=ASK)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    with pytest.raises(openai.RateLimitError):
        running.client().completions.create(**ASK)
    gate.go(16)
    for thread in threads:
        thread.join(30)
    assert [reply.status_code for reply in replies] == [200, 200]
    assert replies[0].json()["choices"] == replies[1].json()["choices"]
    gate.go(8)
    assert httpx.post(f"{running.url}/v1/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_the_work_within_one_step(stream: bool, serve: Any, gate: Any) -> None:
    running = serve(lambda: gate, parallel=1)
    engine = running.service.engine
    with httpx.Client(base_url=running.url) as http:
        gate.go(3)
        if stream:
            with http.stream("POST", "/v1/completions", json=STREAM) as reply:
                events = lines(reply)  # kept: the connection ends with it
                assert next(events)
                running.wait(lambda: gate.steps == 3)
        else:
            with pytest.raises(httpx.TimeoutException):
                http.post("/v1/completions", json=ASK, timeout=1)
            running.wait(lambda: gate.steps == 3)
    running.wait(lambda: running.service.metrics.finished["abort"] == 1)
    gate.go(5)
    running.wait(lambda: engine.running == 0)
    assert gate.steps <= 4


def test_an_answer_that_takes_too_long(serve: Any, gate: Any) -> None:
    running = serve(lambda: gate, parallel=1, seconds=1)
    reply = httpx.post(f"{running.url}/v1/completions", json=ASK, timeout=30)
    assert reply.status_code == 504
    assert "1 s" in reply.json()["error"]["message"]
    gate.go(20)
    running.wait(lambda: running.service.engine.running == 0)
    assert gate.steps <= 1


@pytest.mark.parametrize("grace", [0, 30])
def test_the_end_of_the_server(grace: float, serve: Any, gate: Any) -> None:
    """With time to finish the stream is complete, without it says that it is not; what waits is told at once."""
    running = serve(lambda: gate, parallel=1, grace=grace)
    engine = running.service.engine
    waiting: list[httpx.Response] = []

    def wait_in_queue() -> None:
        waiting.append(httpx.post(f"{running.url}/v1/completions", json=ASK, timeout=60))

    gate.go(2)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=STREAM, timeout=60) as reply:
        events = lines(reply)
        next(events)
        thread = threading.Thread(target=wait_in_queue)
        thread.start()
        running.wait(lambda: engine.waiting == 1)
        running.server.should_exit = True
        running.wait(lambda: not engine._accepting)
        if not grace:
            running.wait(lambda: engine._ending)
        gate.go(30)
        rest = list(events)
    if grace:
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    else:
        assert json.loads(rest[-1])["error"]["code"] == "shutting_down"
        assert gate.steps < 8
    thread.join(30)
    assert waiting[0].status_code == 503
    running.end()
    running.service.join()
    assert running.service.failure is None


def test_a_failure_while_answering_is_told(serve: Any, gate: Any) -> None:
    def broken(*args: Any, **settings: Any) -> Iterator[Any]:
        steps = generate(gate, *args, **settings)

        def some() -> Iterator[Any]:
            yield next(steps)
            raise CheckpointError("model.safetensors changed while running: load it again")

        return some()

    gate.generate = broken
    running = serve(lambda: gate)
    with pytest.raises(openai.InternalServerError) as error:
        running.client().completions.create(**ASK)
    assert "model.safetensors changed" in str(error.value)
    stream = running.client().completions.create(stream=True, **ASK)
    with pytest.raises(openai.APIError) as broken_off:
        list(stream)
    assert "model.safetensors changed" in str(broken_off.value)
    running.wait(lambda: running.service.engine.running == 0)
