"""`moedge run` and the chat: what is printed where, exit codes, Ctrl-C; on a fake model, and once in a process."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_lm import FakeLM, tiny_lm, without

from moedge.errors import ContextError, DataError
from moedge.runtime import opening, verb_run
from moedge.runtime.chat import Chat
from moedge.runtime.generate import Step, generate
from moedge.runtime.tally import Tally
from moedge.runtime.verb_run import command, converse


class Loaded(FakeLM):
    """A fake LM as `load` gives it."""

    closed = False
    options: dict[str, Any]

    def generate(self, prompt: Any, max_new_tokens: int = 64, **settings: Any) -> Iterator[Step]:
        return generate(self, prompt, max_new_tokens, **settings)

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    tiny = tiny_lm()
    tiny.model.generation_config.eos_token_id = None
    loaded = Loaded(tiny.model, tiny.tokenizer, tiny.store)

    def load(model: str, **options: Any) -> Loaded:
        loaded.options = {"model": model} | options
        return loaded

    monkeypatch.setattr("moedge.runtime.lm.load", load)
    return loaded


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(command, ["some/model", *args], input=stdin)


def text_of(lm: FakeLM, prompt: Any, count: int = 64, **settings: Any) -> str:
    return "".join(step.text for step in generate(lm, prompt, count, **settings))


def test_the_answer_is_on_stdout_and_what_it_took_on_stderr(lm: Loaded) -> None:
    result = run("-p", "The sea", "-n", "8")
    assert result.exit_code == 0
    assert result.stdout == text_of(lm, "The sea", 8) + "\n"
    assert "8 tokens, " in result.stderr
    assert "hit rate 33.3%, 20 B read per token, peak memory" in result.stderr
    assert lm.closed


def test_json_is_one_object_with_the_fixed_names(lm: Loaded) -> None:
    result = run("-p", "The sea", "-n", "8", "--json")
    found = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert found["text"] == text_of(lm, "The sea", 8)
    assert found["tokens"] == 8 == len(found["token_ids"])
    assert found["tokens_per_second"] == pytest.approx(8 / found["seconds"])
    assert 0 < found["first_token_seconds"] <= found["seconds"]
    assert found["hit_rate"] == pytest.approx(1 / 3)
    assert found["bytes_read"] == 160
    assert found["peak_memory"] > 50 << 20
    assert found["finish"] == "length"


def test_options_reach_the_model_and_the_sampling(lm: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(prompt: Any, **settings: Any) -> Iterator[Step]:
        seen.update(settings, prompt=prompt)
        return iter(())

    monkeypatch.setattr(lm, "generate", record)
    args = "--memory 600MiB --context 99 --parallel 2 --dtype bf16 --policy lru --prefill-chunk 64"
    fit = "--experts some/fit --fallback"
    more = "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.2 --seed 3 --stop a --stop b"
    assert run("-p", "x", "-n", "9", *args.split(), *more.split(), *fit.split()).exit_code == 0
    load = {"memory": 600 << 20, "context": 99, "parallel": 2, "dtype": "bf16", "policy": "lru", "prefill_chunk": 64}
    assert lm.options == {"model": "some/model", "experts": "some/fit", "fallback": True} | load
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3}
    assert seen == {"prompt": "x", "max_new_tokens": 9, "stop": ("a", "b")} | sampling


def test_the_prompt_comes_from_a_file_or_standard_input(lm: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The sea\n")
    expected = text_of(lm, "The sea", 8) + "\n"
    assert run("-f", str(file), "-n", "8").stdout == expected
    assert run("-n", "8", stdin="The sea\n").stdout == expected


@pytest.mark.parametrize("args", [["--chat"], ["--system", "Be brief."], ["--chat", "--system", "Be brief."]])
def test_the_chat_template_where_asked_for(lm: Loaded, args: list[str]) -> None:
    system = [{"role": "system", "content": "Be brief."}] if "--system" in args else []
    expected = text_of(lm, [*system, {"role": "user", "content": "sea"}], 6)
    assert run("-p", "sea", "-n", "6", *args).stdout == expected + "\n"


@pytest.mark.parametrize(
    "args",
    [
        ["-p", "a", "-f", "b"],
        ["-p", "a", "--stop", ""],
        ["-p", "a", "-n", "0"],
        ["-p", "a", "--top-p", "0"],
        ["-p", "a", "--policy", "nosuch"],
        ["-p", "a", "--memory", "much"],
    ],
)
def test_wrong_usage_is_exit_code_2(lm: Loaded, args: list[str]) -> None:
    assert run(*args).exit_code == 2


@pytest.mark.parametrize(("stdin", "part"), [("", "prompt is empty"), (None, "prompt is empty")])
def test_an_empty_prompt_is_an_error(lm: Loaded, stdin: str | None, part: str) -> None:
    result = run(stdin=stdin)
    assert isinstance(result.exception, DataError)
    assert part in str(result.exception)


def test_a_file_that_is_not_text_is_an_error(lm: Loaded, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc\xff")
    error = run("-f", str(tmp_path / "x")).exception
    assert isinstance(error, DataError)
    assert "not UTF-8 (invalid start byte at byte 3)" in str(error)


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_says_how_far_it_came(lm: Loaded, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def interrupted(prompt: Any, **settings: Any) -> Iterator[Step]:
        yield next(generate(lm, prompt, 5))
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "generate", interrupted)
    result = run("-p", "The sea", *(["--json"] if as_json else []))
    assert result.exit_code != 0
    assert "interrupted; until then 1 tokens" in result.stderr
    assert result.stdout == ("" if as_json else next(generate(lm, "The sea", 5)).text + "\n")


def test_a_tally_of_nothing_divides_by_nothing() -> None:
    tally = Tally()
    assert tally.hit_rate is None
    assert tally.tokens_per_second is None
    assert "no tokens" in tally.line()
    tally.add(Step(5, "a", 0, 0, 0, 0.5))
    assert "no experts asked for" in tally.line()
    assert tally.as_dict()["hit_rate"] is None


def say(lines: list[Any]) -> Callable[[str], str]:
    """What a user types: strings, or an exception."""
    waiting = iter([*lines, EOFError()])

    def read(_: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    return read


def told(lm: Any, lines: list[Any], capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    converse(Chat(lm, **({"max_new_tokens": 6} | settings)), say(lines))
    return capsys.readouterr().out


def test_a_chat_remembers_and_forgets(lm: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    first = text_of(lm, [{"role": "user", "content": "sea"}], 6)
    history = [{"role": "user", "content": "sea"}, {"role": "assistant", "content": first}]
    second = text_of(lm, [*history, {"role": "user", "content": "moon"}], 6)
    anew = text_of(lm, [{"role": "user", "content": "moon"}], 6)
    assert told(lm, ["sea", "", "moon", "/reset", "moon"], capsys) == f"{first}\n{second}\n{anew}\n"


def test_a_chat_has_a_system_prompt_that_reset_keeps(lm: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    system = {"role": "system", "content": "Be brief."}
    once = text_of(lm, [system, {"role": "user", "content": "sea"}], 6)
    assert told(lm, ["sea", "/reset", "sea"], capsys, system="Be brief.") == f"{once}\n{once}\n"


@pytest.mark.parametrize("leave", ["/quit", "/exit", EOFError()])
def test_leaving(lm: Loaded, capsys: pytest.CaptureFixture[str], leave: Any) -> None:
    assert told(lm, ["/help", "/what", leave, "sea"], capsys) == ""


def test_ctrl_c_at_the_prompt_leaves_the_second_time(lm: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    once = text_of(lm, [{"role": "user", "content": "sea"}], 6)
    stop = KeyboardInterrupt()
    assert told(lm, [stop, "sea", stop, stop, "sea"], capsys) == f"{once}\n"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    lm: Loaded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(lm, max_new_tokens=6)
    original = lm.model.forward
    calls = 0

    def forward(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the model is reading or writing when the key is pressed
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **given)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(lm.model, "forward", forward)
    converse(chat, say(["sea"]))
    assert signal.getsignal(signal.SIGINT) is before
    part = text_of(lm, [{"role": "user", "content": "sea"}], 6)[: len(chat.messages[1]["content"])]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == part
    assert capsys.readouterr().out == part + "\n"
    assert calls < 6 + 6


def test_the_second_ctrl_c_leaves() -> None:
    with verb_run._interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_goes_wrong_in_a_turn_is_said_and_forgotten(lm: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    lm.context = 20
    chat = Chat(lm, max_new_tokens=2)
    converse(chat, say(["a much longer question than the context will ever hold", "sea"]))
    assert len(chat.messages) == 2
    with pytest.raises(ContextError):
        list(chat.ask("word " * 30))
    assert len(chat.messages) == 2


@pytest.mark.parametrize("architecture", ["qwen3_moe", "switch_transformers"])
def test_models_without_a_conversation_continue_each_line(
    architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny_lm(architecture)
    if architecture == "qwen3_moe":
        lm.tokenizer = without(lm.tokenizer, chat_template=None)
    once = text_of(lm, "sea", 6)
    assert told(lm, ["sea", "sea"], capsys) == f"{once}\n{once}\n"


@pytest.mark.timeout(400)
def test_in_a_process_of_its_own(
    tiny: Callable[..., Path], moedge_command: Callable[..., "subprocess.CompletedProcess[str]"], moedge_here: Any
) -> None:
    folder = tiny("qwen3_moe", tokenizer=True)
    done = moedge_command("run", folder, "-p", "The sea", "-n", 4, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == 4
    assert 0 < found["hit_rate"] < 1
    assert found["bytes_read"] > 0
    empty = moedge_here("run", folder.parent / "nosuch", "-p", "x")
    assert (empty.status, empty.out) == (1, "")
    assert "Traceback" not in empty.err


def test_signals_are_only_for_the_main_thread() -> None:
    """Why `_interruptible` belongs to the terminal and not to the library."""
    failures: list[BaseException] = []

    def other() -> None:
        try:
            with verb_run._interruptible():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert failures


@pytest.mark.parametrize(
    ("memory", "modules", "spins"), [(1, {}, True), (None, {}, False), (1, {"torch": None}, False)]
)
def test_with_a_limit_torch_leaves_its_cores_to_reads(
    memory: int | None, modules: dict[str, None], spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "sys", SimpleNamespace(modules=modules))
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that what the call sets is taken back, too
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert opening._leave_cores(Any, Any, memory) == memory  # type: ignore[arg-type]
    assert ("GOMP_SPINCOUNT" in os.environ) == spins
