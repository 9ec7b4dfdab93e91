"""How fast is decoding without a memory limit, against llama.cpp at the same bits, and where does its time go?

    moedge pack ~/.cache/moedge-benchmarks/olmoe ./int8 --bits 8 --backbone 8
    python benchmarks/decode.py ./int8 [--llama-bench BINARY --gguf FILE] [--pairs 3] [--threads 2] [--dtype fp32]

Runs are paired: moedge, llama-bench, moedge, ... each a fresh process. moedge holds every expert in memory and decodes
greedily after a prompt of 64 tokens; llama-bench decodes after an empty prompt (`-p 0 -n TOKENS`). The file for
llama.cpp comes from its own convert_hf_to_gguf.py (--outtype q8_0) and llama-quantize (Q4_0). The table of parts is
taken in a run of its own, with a clock around each function of the C library; `between` is Python and torch.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from report import publish

HERE = Path(__file__).resolve().parent
PROMPT = list(range(100, 164))
PARTS = {  # function of the C library -> what it is
    "layer": "experts",
    "attend_and_route": "norms, attention, router",
    "attend": "attention",
    "linear": "head, other products",
    "rms_norm": "norms",
}


def decode(folder: str, tokens: int, dtype: str, parts: bool) -> dict[str, Any]:
    """Median seconds per token in this process; with `parts`, the mean of each part instead."""
    import moedge

    with moedge.load(folder, dtype=dtype) as lm:
        for layer, count in enumerate(lm.plan.num_experts):
            for _ in lm.store.fetch(layer, range(count)):
                pass
        list(lm.generate(PROMPT, max_new_tokens=8, temperature=0))
        clock: dict[str, float] = defaultdict(float)
        if parts:
            _clock_library(clock)
        seconds: list[float] = []
        for step in lm.generate(PROMPT, max_new_tokens=tokens + 1, temperature=0):
            if not seconds:
                clock.clear()
            seconds.append(step.seconds)
    del seconds[0]  # the prompt
    result: dict[str, Any] = {"seconds": statistics.median(seconds)}
    if parts:
        each = {name: value / len(seconds) for name, value in clock.items()}
        whole = sum(seconds) / len(seconds)
        result["parts"] = each | {"between": whole - sum(each.values()), "all": whole}
    return result


def _clock_library(clock: dict[str, float]) -> None:
    from moedge.native.library import Library

    for name, part in PARTS.items():
        setattr(Library, name, _timed(getattr(Library, name), part, clock))


def _timed(forward: Callable[..., Any], part: str, clock: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            clock[part] += time.perf_counter() - start

    return run


def moedge_run(folder: str, tokens: int, dtype: str, threads: int, parts: bool) -> dict[str, Any]:
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(HERE.parent))
    command = [sys.executable, __file__, folder, "--tokens", str(tokens), "--dtype", dtype, "--one"]
    done = subprocess.run([*command, *(["--parts"] if parts else [])], env=env, capture_output=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def llama_run(binary: str, gguf: str, tokens: int, threads: int) -> float:
    """Tokens per second."""
    command = [binary, "-m", gguf, "-t", str(threads), "-p", "0", "-n", str(tokens), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


@click.command(help=__doc__)
@click.argument("folder")
@click.option("--llama-bench", "binary", type=click.Path(exists=True))
@click.option("--gguf", type=click.Path(exists=True))
@click.option("--pairs", default=3)
@click.option("--tokens", default=48)
@click.option("--threads", default=os.cpu_count() or 1)
@click.option("--dtype", default="fp32")
@click.option("--save", is_flag=True)
@click.option("--one", is_flag=True, hidden=True)
@click.option("--parts", is_flag=True, hidden=True)
def main(
    folder: str, binary: str | None, gguf: str | None, pairs: int, tokens: int, threads: int, dtype: str, **flags: bool
) -> None:
    if flags["one"]:
        print(json.dumps(decode(folder, tokens, dtype, flags["parts"])))
        return
    found = []
    for _ in range(pairs):
        own = 1 / moedge_run(folder, tokens, dtype, threads, parts=False)["seconds"]
        other = llama_run(binary, gguf, tokens, threads) if binary and gguf else None
        ratio = own / other if other else None
        found.append({"moedge tokens/s": own, "llama.cpp tokens/s": other, "ratio": ratio})
        click.echo(str(found[-1]))
    parts = moedge_run(folder, tokens, dtype, threads, parts=True)["parts"]
    rows = [{"part": name, "ms per token": 1e3 * seconds} for name, seconds in parts.items()]
    ratios = [pair["ratio"] for pair in found if pair["ratio"]]
    summary = {
        "pack": Path(folder).name,
        "threads": threads,
        "dtype": dtype,
        "tokens": tokens,
        "pairs": found,
        "ratio": statistics.median(ratios) if ratios else None,
        "ms_per_token": {row["part"]: row["ms per token"] for row in rows},
    }
    publish(f"decode-{Path(folder).name}-{threads}", rows, summary, save=flags["save"])


if __name__ == "__main__":
    main()
