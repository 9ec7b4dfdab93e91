"""The load benchmark, short: 15 clients and a hostile one on the mini model, without a look at the clock."""

import asyncio

from serve_load import Crowd, press, questions, server, solo_answers


def test_fifteen_clients() -> None:
    asked = questions()
    with server("1GiB", "--queue", 4, "--parallel", 2) as (url, pid):
        crowd = Crowd(url, asked, solo_answers(asked), seed=1, hostile=("vanishes", "no UTF-8", "wrong types"))
        figures = asyncio.run(press(url, pid, crowd, clients=15, seconds=2))
    assert set(figures["answers"]) <= {"200", "429"}
    assert figures["answers"]["200"] > 0
    assert figures["wrong_answers"] == []
    assert figures["hung"] == figures["left_running"] == figures["left_waiting"] == 0
