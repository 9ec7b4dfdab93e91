"""What concurrent clients find out about a server that behaves, refuses, breaks off, or says nothing."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import count

import pytest
from fake_sse import Exchange, FakeServer, fake_server, stream

from moedge.errors import MoedgeError
from moedge.serve.load import Answer, Clients, Load, Server, events, figures, retry_after


def ask(behave: Callable[[Exchange], None], **settings: object) -> tuple[list[Answer], FakeServer]:
    """All answers of a load of one request at a time, unless `settings` say otherwise."""
    with fake_server(behave) as fake:
        load = replace(Load(fake.url, "mini", clients=1, requests=1, new_tokens=3), **settings)  # type: ignore[arg-type]
        return list(Clients(load).answers()), fake


def test_every_request_is_asked_once_and_timed() -> None:
    answers, fake = ask(stream, clients=3, requests=10)
    assert len(answers) == 10
    assert sorted(body["seed"] for body in fake.asked) == list(range(10))
    assert len({body["prompt"] for body in fake.asked}) == 10
    for answer in answers:
        assert answer.fault is None
        assert (answer.tokens, answer.prompt_tokens, answer.counted) == (3, 40, True)
        assert answer.first is not None
        assert len(answer.gaps) == 2
        assert answer.seconds >= answer.first + sum(answer.gaps)


def test_what_is_asked() -> None:
    _, fake = ask(stream, prompt_words=5, key="secret")
    (body,) = fake.asked
    assert len(body.pop("prompt").split()) == 5
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert body == {"model": "mini", "max_tokens": 3, "temperature": 1, "seed": 0} | options
    assert fake.headers["Authorization"] == "Bearer secret"
    assert fake.paths == ["/v1/completions"]


def test_chat() -> None:
    (answer,), fake = ask(stream, chat=True)
    assert fake.paths == ["/v1/chat/completions"]
    assert fake.asked[0]["messages"][0]["role"] == "user"
    assert (answer.fault, answer.tokens, len(answer.gaps)) == (None, 3, 2)


def test_clients_ask_at_the_same_time() -> None:
    """Each exchange waits until four are under way: fewer at once would break the barrier."""
    together = threading.Barrier(4)

    def behave(exchange: Exchange) -> None:
        together.wait(timeout=30)
        stream(exchange)

    answers, _ = ask(behave, clients=4, requests=8)
    assert [answer.fault for answer in answers] == [None] * 8


def test_without_usage_events_are_counted() -> None:
    def behave(exchange: Exchange) -> None:
        exchange.begin()
        for text in ("", "a", "b", ""):  # an empty text is no token that a client sees
            exchange.text(text)
        exchange.done()

    (answer,), _ = ask(behave)
    assert (answer.tokens, answer.counted, len(answer.gaps)) == (2, False, 1)


def refuse_first(times: int, **headers: str) -> Callable[[Exchange], None]:
    asked = count(1)

    def behave(exchange: Exchange) -> None:
        if next(asked) > times:
            stream(exchange)
        else:
            exchange.reply(429, b"{}", **headers)

    return behave


def test_a_refused_request_comes_again() -> None:
    (answer,), fake = ask(refuse_first(2, Retry_After="0.01"))
    assert len(fake.asked) == 3
    assert fake.asked[0] == fake.asked[2]
    assert (answer.fault, answer.refused, answer.waited, answer.tokens) == (None, 2, 0.02, 3)
    found = figures([answer], 2.0)
    assert (found["completed"], found["failed"], found["errors"]) == (1, 0, {"429": 2})


def test_a_refused_request_is_given_up_when_told() -> None:
    (answer,), fake = ask(refuse_first(2, Retry_After="0.01"), retry=False)
    assert len(fake.asked) == 1
    assert (answer.fault, answer.refused, answer.waited) == ("429", 1, 0)
    found = figures([answer], 2.0)
    assert (found["completed"], found["failed"], found["errors"]) == (0, 1, {"429": 1})


def test_nobody_waits_longer_than_the_timeout() -> None:
    (answer,), _ = ask(refuse_first(1, Retry_After="3600"))
    assert (answer.fault, answer.refused) == ("429", 1)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("2") == 2
    assert retry_after("-2") == 0
    assert retry_after(None) == 1
    soon = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert 3500 < soon <= 3600
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def cut(exchange: Exchange) -> None:
    exchange.begin()
    exchange.text("a")
    exchange.close_connection = True


def error_event(exchange: Exchange) -> None:
    exchange.begin()
    exchange.text("a")
    exchange.event({"error": {"message": "shutting down"}})
    exchange.done()


def not_json(exchange: Exchange) -> None:
    exchange.begin()
    exchange.raw(b"data: {oops\n\n")


def not_an_object(exchange: Exchange) -> None:
    exchange.begin()
    exchange.event([1])


def not_http(exchange: Exchange) -> None:
    exchange.wfile.write(b"hello\r\n\r\n")
    exchange.close_connection = True


def nothing(exchange: Exchange) -> None:
    exchange.close_connection = True


def bad_date(exchange: Exchange) -> None:
    exchange.reply(429, Retry_After="tomorrow")


@pytest.mark.parametrize(
    ("behave", "fault"),
    [
        (cut, "cut"),
        (error_event, "event"),
        (not_json, "protocol"),
        (not_an_object, "protocol"),
        (not_http, "protocol"),
        (nothing, "protocol"),
        (bad_date, "protocol"),
        (lambda exchange: exchange.reply(500, b"broken"), "500"),
        (lambda exchange: exchange.reply(307, Location="/elsewhere"), "307"),
    ],
)
def test_faults_have_names(behave: Callable[[Exchange], None], fault: str) -> None:
    """And the next request is asked all the same."""
    answers, fake = ask(behave, requests=2)
    assert [answer.fault for answer in answers] == [fault] * 2
    assert len(fake.asked) == 2
    assert figures(answers, 1.0)["errors"] == {fault: 2}
    assert figures(answers, 1.0)["tokens"] == 0


def test_silence_is_a_timeout() -> None:
    over = threading.Event()
    with fake_server(lambda exchange: over.wait(30) and None) as fake:
        load = Load(fake.url, "mini", clients=1, requests=1, timeout=0.1)
        assert [answer.fault for answer in Clients(load).answers()] == ["timeout"]
        over.set()


def test_no_server_is_a_fault_of_each_request() -> None:
    with fake_server() as fake:
        load = Load(fake.url, "mini", clients=2, requests=3)
    assert [answer.fault for answer in Clients(load).answers()] == ["connection"] * 3


def test_closing_hangs_up() -> None:
    """The server sees the connection end although its stream has not."""
    gone = threading.Event()

    def behave(exchange: Exchange) -> None:
        if exchange.body["seed"] == 0:
            return stream(exchange)
        exchange.begin()
        exchange.text("a")
        if exchange.connection.recv(1) == b"":
            gone.set()

    with fake_server(behave) as fake, closing(Clients(Load(fake.url, "mini", 1, 2)).answers()) as answers:
        assert next(answers).fault is None
        while len(fake.asked) < 2:
            gone.wait(0.01)
        answers.close()
        assert gone.wait(30)


def test_a_bug_is_not_counted_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Clients, number: int) -> Answer:
        raise ZeroDivisionError

    monkeypatch.setattr(Clients, "ask", broken)
    with pytest.raises(ZeroDivisionError):
        list(Clients(Load("http://127.0.0.1:1", "mini")).answers())


def test_events_of_several_lines() -> None:
    lines = [b": ping\n", b"\n", b"event: x\n", b"data: a\r\n", b"data:b\r\n", b"\r\n", b"data: cut off"]
    assert list(events(iter(lines))) == [b"a\nb"]


def test_figures() -> None:
    answers = [
        Answer(first=0.1 * number, gaps=[0.01, 0.03], seconds=1.0, prompt_tokens=10 * number, tokens=4, counted=True)
        for number in (1, 2, 3)
    ]
    answers.append(Answer(fault="cut", first=99.0, gaps=[99.0], seconds=99.0, tokens=99))
    found = figures(answers, 2.0)
    assert found["completed"] == 3
    assert found["failed"] == 1
    assert found["errors"] == {"cut": 1}
    assert found["tokens"] == 12
    assert found["tokens_per_second"] == 6
    assert found["requests_per_second"] == 1.5
    assert found["first_token_p50"] == pytest.approx(0.2)
    assert found["first_token_p99"] == pytest.approx(0.298)
    assert found["inter_token_p50"] == pytest.approx(0.02)
    assert found["inter_token_p99"] == pytest.approx(0.03)
    assert found["request_p99"] == 1.0
    assert found["prompt_tokens"] == 20
    assert found["tokens_counted_by"] == "usage"


def test_no_answers_have_no_latency() -> None:
    found = figures([Answer(fault="timeout")], 1.0)
    assert found["first_token_p50"] is found["inter_token_p99"] is found["prompt_tokens"] is None


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_models_of_a_server(ending: str) -> None:
    with fake_server() as fake:
        assert Server(fake.url + ending, None, 10).models() == ["mini", "other"]
        assert Server(fake.url.removeprefix("http://") + ending, None, 10).models() == ["mini", "other"]
        assert fake.paths == ["/v1/models"] * 2


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"{}", "MOEDGE_API_KEY"),
        (404, b"not here", "answers 404 .* not here"),
        (200, b"<html>", "names no models"),
        (200, b'{"data": []}', "names no models"),
        (200, b"[]", "names no models"),
    ],
)
def test_a_server_that_cannot_be_used(status: int, body: bytes, message: str) -> None:
    with fake_server() as fake:
        fake.models = status, body
        with pytest.raises(MoedgeError, match=message):
            Server(fake.url, None, 10).models()


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(MoedgeError, match="no URL of a server"):
        Server(url, None, 10)


def test_nobody_there() -> None:
    with fake_server() as fake:
        pass
    with pytest.raises(MoedgeError, match="no server answers"):
        Server(fake.url, None, 10).models()


def test_the_key_is_not_printed() -> None:
    assert "secret" not in repr(Load("http://127.0.0.1", "mini", key="secret"))
