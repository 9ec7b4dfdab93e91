"""`moedge bench` as a user meets it: figures by name, formats, refusals, Ctrl-C, and a server that is measured."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from fake_sse import Exchange, FakeServer, fake_server, stream

from moedge.errors import DataError, MemoryLimitError, MoedgeError
from moedge.measure.bench import Spec
from moedge.serve import verb_bench
from moedge.serve.verb_bench import command

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["-p", 8, "-n", 4, "-r", 2, "--keep-caches"]


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", tokenizer=True)


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in args])


def row(name: str, speed: float) -> dict[str, Any]:
    figures = {"tokens_per_second": speed, "quartile_1": speed - 1, "quartile_3": speed + 1, "repetitions": [speed] * 5}
    memory = {"hit_rate": 0.5, "bytes_per_token": 2048.0, "peak_memory": 300 << 20, "resident_share": 0.25}
    process = {"dtype": "bfloat16", "threads": 1, "load_average": 0.5, "warm_up": True, "page_cache_dropped": True}
    return {"test": name} | figures | memory | process


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """What would have been measured. Limits below 1 MiB are refused; 3 MiB is interrupted; 5 MiB is a crash."""
    seen: list[Spec] = []

    def measured(spec: Spec, command: list[str]) -> Iterator[dict[str, Any]]:
        seen.append(spec)
        if spec.memory is not None and spec.memory < 1 << 20:
            raise MemoryLimitError("give at least 1 MiB")
        yield {"note": "pp512, 1 of 5"}
        yield {"row": row("pp512", 1234.5)}
        if spec.memory == 3 << 20:
            raise KeyboardInterrupt
        if spec.memory == 5 << 20:
            raise MoedgeError("the process ended")
        yield {"row": row("tg128", 12.34)}

    monkeypatch.setattr(verb_bench, "measure_apart", measured)
    return seen


def test_options_become_specs(model: Path, specs: list[Spec]) -> None:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    options = ["--no-warm-up", "--keep-caches", "--dtype", "fp32", "--policy", "lru", "--prefill-chunk", 64]
    result = run(model, "--memory", "50%,2MiB,none", "-p", "0,16,16,32", "-n", 0, "-r", 3, *options, "--json")
    assert result.exit_code == 0, result.exception
    assert [spec.memory for spec in specs] == [size // 2, 2 << 20, None]
    assert specs[2] == Spec(str(model), None, (16, 32), (), 3, False, False, "fp32", "lru", 64)


def test_defaults(model: Path, specs: list[Spec]) -> None:
    assert run(model).exit_code == 0
    assert specs == [Spec(str(model), None, (512,), (128,), 5, True, True, None, "default", 512)]


def test_json_has_rows_and_what_they_are_read_with(model: Path, specs: list[Spec]) -> None:
    found = json.loads(run(model, "--memory", "1%,2MiB", "-o", "json").stdout)
    assert found["model"] == str(model)
    assert found["checkpoint_bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert {"device", "commit", "readahead_kib", "reads_past_page_cache", "load_average", "command"} <= set(found)
    refused, reading, writing = found["rows"]
    limit = found["checkpoint_bytes"] // 100
    assert refused == {"memory": "1%", "limit": limit, "refused": "give at least 1 MiB"}
    assert reading == {"memory": "2MiB", "limit": 2 << 20} | row("pp512", 1234.5)
    assert writing["test"] == "tg128"


def test_markdown_and_the_table_say_the_same(model: Path, specs: list[Spec]) -> None:
    markdown = run(model, "--memory", "1%,2MiB", "-o", "md").stdout.splitlines()
    assert markdown[0].startswith("| memory | experts held | test | tokens/s |")
    assert markdown[3] == "| 2MiB | 25% | pp512 | 1234 | 1234-1236 | 50.0% | 2 KiB | 300 MiB |"
    assert markdown[4] == "| 2MiB | 25% | tg128 | 12.3 | 11.3-13.3 | 50.0% | 2 KiB | 300 MiB |"
    assert "refused" in markdown[2]
    table = run(model, "--memory", "1%,2MiB").stdout
    for text in ("1234-1236", "11.3-13.3", "300 MiB", "2 KiB"):
        assert text in table
    notes = [line.removeprefix("- ") for line in markdown[6:]]
    assert [note for note in notes if note not in table] == []
    assert notes[0].endswith("was refused: give at least 1 MiB")
    assert any("the page cache; it was dropped" in note for note in notes)
    assert any("expert cache warm" in note for note in notes)


def test_csv_has_a_line_for_each_row(model: Path, specs: list[Spec]) -> None:
    lines = list(csv.DictReader(run(model, "--memory", "1%,2MiB", "-o", "csv").stdout.splitlines()))
    assert [line["test"] for line in lines] == ["", "pp512", "tg128"]
    assert lines[0]["refused"] == "give at least 1 MiB"
    assert float(lines[2]["tokens_per_second"]) == 12.34
    assert json.loads(lines[2]["repetitions"]) == [12.34] * 5
    assert lines[0]["cpu"] == lines[2]["cpu"] != ""


def test_no_limit_that_is_enough_is_an_error(model: Path, specs: list[Spec]) -> None:
    result = run(model, "--memory", "1%,2%", "--json")
    assert isinstance(result.exception, MemoryLimitError)
    assert [line["refused"] for line in json.loads(result.stdout)["rows"]] == ["give at least 1 MiB"] * 2


@pytest.mark.parametrize(("limit", "kind"), [("3MiB", SystemExit), ("5MiB", MoedgeError)])
def test_what_was_measured_is_shown_when_the_rest_cannot_be(
    model: Path, specs: list[Spec], limit: str, kind: type[BaseException]
) -> None:
    result = run(model, "--memory", f"2MiB,{limit},2MiB")
    assert isinstance(result.exception, kind)
    assert result.stdout == ""
    assert "until then" in result.stderr
    assert result.stderr.count("1234") == 4, "two rows of pp512, speed and quartile"
    assert len(specs) == 2


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["m", "--memory", ""],
        ["m", "--memory", "25%,x"],
        ["m", "-p", "x"],
        ["m", "-p", "-1"],
        ["m", "-p", "0", "-n", "0"],
        ["m", "-r", "0"],
        ["m", "--clients", "2"],
        ["m", "--no-retry"],
        ["m", "--json", "-o", "csv"],
        ["--url", "http://127.0.0.1:1", "--memory", "25%"],
        ["--url", "http://127.0.0.1:1", "--keep-caches"],
        ["--url", "http://127.0.0.1:1", "-p", "1,2"],
        ["--url", "http://127.0.0.1:1", "--api-key-file", "nosuch"],
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str], specs: list[Spec]) -> None:
    assert run(*args).exit_code == 2
    assert not specs


# --- in processes of their own --------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_model_within_limits(model: Path, moedge_command: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = moedge_command("bench", model, "--memory", "8GiB,10%", *SMALL, "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    reading, writing, refused = json.loads(done.stdout)["rows"]
    assert [reading["test"], writing["test"]] == ["pp8", "tg4"]
    for line in (reading, writing):
        assert line["quartile_1"] <= line["tokens_per_second"] <= line["quartile_3"]
        assert 0 < line["peak_memory"] < line["limit"] == 8 << 30
        assert line["page_cache_dropped"] is False
    assert "give at least" in refused["refused"]


@pytest.mark.parametrize("library", ["", "libtorch_cpu"])
def test_ctrl_c_leaves_no_process(model: Path, library: str) -> None:
    """At once, and while the other process has come far enough to map a library."""
    args = [sys.executable, "-m", "moedge", "bench", str(model), "-p", "8", "-n", "400", "-r", "999", "--keep-caches"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, **pipes, text=True, cwd=ROOT) as bench:
        while not (children := [child for child in psutil.Process(bench.pid).children() if maps(child, library)]):
            assert bench.poll() is None
            time.sleep(0.02)
        bench.send_signal(signal.SIGINT)
        _, err = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=30)[1]


def maps(process: psutil.Process, library: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(library in part.path for part in process.memory_maps())
    return False


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def test_a_server(server: FakeServer) -> None:
    result = run("--url", server.url, "--clients", 3, "--requests", 7, "-n", 5, "-p", 9, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert (found["model"], found["url"], found["path"]) == ("mini", server.url, "/v1/completions")
    (line,) = found["rows"]
    assert (line["clients"], line["requests"], line["completed"], line["tokens"]) == (3, 7, 7, 35)
    assert line["errors"] == {}
    assert 0 < line["first_token_p50"] <= line["first_token_p99"]
    assert 0 < line["inter_token_p50"] <= line["inter_token_p99"]
    assert line["tokens_per_second"] == pytest.approx(35 / line["seconds"])
    assert {len(body["prompt"].split()) for body in server.asked} == {9}


@pytest.mark.parametrize("output", ["table", "md", "csv"])
def test_a_server_in_every_format(server: FakeServer, output: str) -> None:
    def behave(exchange: Exchange) -> None:
        exchange.reply(500) if exchange.body["seed"] == 0 else stream(exchange)

    server.behave = behave
    result = run("--url", server.url, "--requests", 4, "-o", output)
    assert result.exit_code == 0, result.exception
    if output == "csv":
        (line,) = csv.DictReader(result.stdout.splitlines())
        assert (line["completed"], json.loads(line["errors"])) == ("3", {"500": 1})
    else:
        assert "3 of 4" in result.stdout
        assert "1 x 500" in result.stdout
        assert "waits for Retry-After" in result.stdout


def test_the_model_and_the_path_may_be_chosen(server: FakeServer) -> None:
    run("other", "--url", server.url, "--requests", 1, "--chat")
    assert server.asked[0]["model"] == "other"
    assert server.paths == ["/v1/models", "/v1/chat/completions"]


def test_refusals_are_final_when_told(server: FakeServer) -> None:
    server.behave = lambda exchange: exchange.reply(429, Retry_After="3600")
    result = run("--url", server.url, "--requests", 3, "--no-retry", "--json")
    assert isinstance(result.exception, DataError)
    assert "answered none of 3 requests: 3 x 429" in str(result.exception)
    assert json.loads(result.stdout)["rows"][0]["errors"] == {"429": 3}


@pytest.mark.parametrize("source", ["file", "environment"])
def test_the_key_comes_from_a_file_or_the_environment(
    server: FakeServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEDGE_API_KEY", "from-environment")
    (tmp_path / "key").write_text("from-file\n")
    more = ["--api-key-file", tmp_path / "key"] if source == "file" else []
    result = run("--url", server.url, "--requests", 1, *more, "--json")
    assert server.headers["Authorization"] == f"Bearer from-{source}"
    assert "from-" not in result.stdout.replace(str(tmp_path), "")


@pytest.mark.parametrize("text", ["", "two\nlines", "schlüssel"])
def test_a_file_that_holds_no_key(server: FakeServer, text: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(text, encoding="utf-8")
    result = run("--url", server.url, "--api-key-file", tmp_path / "key")
    assert isinstance(result.exception, DataError)
    assert text not in str(result.exception) or not text


def test_ctrl_c_shows_what_the_server_did_until_then(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = threading.Event()  # the first answer, which the second request may overtake
    monkeypatch.setattr(verb_bench, "listed", lambda *_: counted.set() or "")

    def behave(exchange: Exchange) -> None:
        if exchange.body["seed"] == 1:
            assert counted.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            exchange.connection.recv(1)
        stream(exchange)

    server.behave = behave
    result = run("--url", server.url, "--clients", 1, "--requests", 3)
    assert result.exit_code != 0
    assert result.stdout == ""
    assert "1 of 3" in result.stderr
