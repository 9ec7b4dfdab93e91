"""What every test gets: one thread, no network beyond this machine, tiny checkpoints made once per session."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background; tests send it to others
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models are quicker so, and two cores stay usable

import ctypes
import gc
import ipaddress
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DISK = 1 << 21  # bytes of the small disk
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """The libraries are imported: collecting garbage need not look at their objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Any connection that leaves this machine fails at once, with the address in the message."""
    patch = pytest.MonkeyPatch()
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_local(address[0]):
            raise OSError(f"a test tried to connect to {address}: tests use this machine only")
        real(self, address)

    patch.setattr(socket.socket, "connect", connect)
    yield
    patch.undo()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("qwen3_moe", num_experts=16)`: folder of a random checkpoint, made once per session; do not change it."""
    made: dict[str, Path] = {}

    def make(model_type: str = "qwen3_moe", **overrides: Any) -> Path:
        from moedge.models.tiny import make_tiny

        key = f"{model_type}{sorted(overrides.items(), key=str)}"
        if key not in made:
            made[key] = make_tiny(model_type, tmp_path_factory.mktemp(model_type) / "model", **overrides)
        return made[key]

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of DISK bytes; what needs it is skipped where mounting is not allowed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts a tmpfs, which only Linux has")
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={DISK}".encode()):
        pytest.skip(f"may not mount a small disk here (needs root): {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        assert libc.umount2(bytes(folder), 2) == 0  # MNT_DETACH


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def moedge_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`moedge_here("run", folder, ...)`: the command line in this process, for what needs no process of its own."""

    def call(*args: object) -> Outcome:
        from moedge import cli

        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(argument) for argument in args])
        out, err = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def moedge_command() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`moedge_command("run", folder, ...)`: the command line in a process of its own."""

    def call(*args: object, timeout: float = 90, **settings: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "moedge", *map(str, args)]
        settings = {"cwd": ROOT, "capture_output": True, "stdin": subprocess.DEVNULL} | settings
        return subprocess.run(command, text=True, timeout=timeout, check=False, **settings)

    return call
