"""What every verb that runs a model shares: the options of loading it, and loading it with progress shown."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moedge.runtime.policy import POLICIES
from moedge.terminal import SIZE, console

if TYPE_CHECKING:
    from moedge.runtime.lm import LM

F = TypeVar("F", bound=Callable[..., Any])
SPINS = "2000"  # of a thread of torch that waits for the next product, by default 300,000


def _leave_cores(context: click.Context, option: click.Parameter, memory: int | None) -> int | None:
    """With a limit, the threads that read experts need the cores on which torch's would wait; before it is imported."""
    if memory is not None and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    return memory


_OPTIONS = (
    click.option(
        "--memory",
        type=SIZE,
        callback=_leave_cores,
        help="Limit for the whole process, such as 600MiB. Without it: no limit.",
    ),
    click.option("--context", type=click.IntRange(1), help="Tokens reserved. Default: 2048; one answer: its own need."),
    click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."),
    click.option("--dtype", help="fp32, bf16 or fp16; by default the checkpoint's own."),
    click.option("--policy", type=click.Choice(list(POLICIES)), default="default", help="What the cache keeps."),
    click.option("--prefill-chunk", type=click.IntRange(1), default=512, show_default=True, help="Read at once."),
    click.option("--experts", metavar="FIT", help="Only the experts that `moedge fit` kept, in the folder FIT."),
    click.option("--fallback", is_flag=True, help="With --experts: all experts, those of FIT stay in memory."),
)  # fmt: skip
NAMES = ("memory", "context", "parallel", "dtype", "policy", "prefill_chunk", "experts", "fallback")


def load_options(command: F) -> F:
    """Adds the options of `moedge.load` to a verb; their values come under NAMES."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextmanager
def opened(model: str, options: dict[str, Any]) -> Iterator["LM"]:
    """The loaded model, closed at the end. Takes NAMES from `options`, what else is there it leaves alone."""
    with console.status(f"loading {model}"):
        from moedge.runtime.lm import load

        lm = load(model, **{name: options[name] for name in NAMES})
    with lm:
        yield lm
