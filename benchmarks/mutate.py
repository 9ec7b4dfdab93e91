"""Do the tests notice? Makes seeded wrong changes to moedge/runtime and moedge/models, runs the tests that reach them.

    python benchmarks/mutate.py [--count 30] [--seed 0] [--jobs 2] [--state mutations] [--quick] [--save]

Works on a copy of the tree. First the whole suite runs once with coverage that remembers which test reached which
line; then each mutant is met by the tests that reach its line, those of its mirror file first. Prints caught and
survived. Stopped, it continues: finished work is kept under --state, as long as the sources are the same. `--quick`
runs 6 mutants.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from queue import Queue
from typing import Any

import click
from mutants import Mutant, choose
from report import ROOT, publish

PARTS = ("moedge/runtime", "moedge/models")
COPIED = ("moedge", "tests", "benchmarks", "recipes", "examples", "docs", "checkpoints")
MOST_TESTS = 60  # per mutant: those of the mirror file, then one of each other file in turn
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header")


def copy_tree(target: Path) -> Path:
    """The project without its environment and history."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target / path.name)
    return target


def fingerprint() -> str:
    """Changes when a source or a test does."""
    digest = hashlib.sha256()
    for folder in ("moedge", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment(tree: Path) -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")


def reach(tree: Path, data: Path, timeout: float, tests: Sequence[str]) -> None:
    """Run the tests once; `data` then knows which test reached which line."""
    command = [*PYTEST, *tests, "--cov=moedge", "--cov-context=test", "--cov-report="]
    command.remove("-x")
    env = dict(environment(tree), COVERAGE_FILE=str(tree / ".coverage"))
    done = subprocess.run(command, cwd=tree, env=env, timeout=timeout, capture_output=True, text=True, check=False)
    click.echo(done.stdout[-400:], err=True)
    if done.returncode not in (0, 1):
        raise click.ClickException(f"the suite did not run: exit code {done.returncode}\n{done.stdout[-2000:]}")
    shutil.copy2(tree / ".coverage", data)


def tests_by_line(data: Path) -> dict[str, dict[int, list[str]]]:
    """moedge/... path -> line -> test ids, in the suite's order."""
    from coverage import CoverageData

    covered = CoverageData(basename=str(data))
    covered.read()
    found: dict[str, dict[int, list[str]]] = {}
    for name in covered.measured_files():
        lines = covered.contexts_by_lineno(name)
        path = name[name.index("moedge/", name.rindex("/moedge/")) :] if "/moedge/" in name else name
        found[path] = {line: [c.split("|")[0] for c in contexts if c] for line, contexts in lines.items()}
    return found


def mirror(path: str) -> str:
    """tests/runtime/test_store.py for moedge/runtime/store.py."""
    parts = Path(path).parts
    return str(Path("tests", *parts[1:-1], f"test_{parts[-1]}"))


def relevant(mutant: Mutant, reached: dict[str, dict[int, list[str]]]) -> list[str]:
    """The tests to run: those that reach the line, else the mirror file and those that reach the file nearby."""
    lines, mine = reached.get(mutant.path, {}), mirror(mutant.path)
    near = sorted(lines, key=lambda line: abs(line - mutant.line))
    tests: list[str] = list(lines.get(mutant.line, []))
    for line in near[:6] if not tests else []:
        tests += lines[line]
    tests = list(dict.fromkeys(tests))
    own = [test for test in tests if test.startswith(mine)]
    others = [test for test in tests if not test.startswith(mine)]
    if mutant.line not in lines and (ROOT / mine).exists():
        own = [mine]  # whole: what its tests run in processes of their own is not in `reached`
    return (own + in_turn(others))[:MOST_TESTS] or [str(Path(mine).parent)]


def in_turn(tests: Sequence[str]) -> list[str]:
    """The first of each file, then the second of each: the files' subjects differ more than a file's tests do."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    return [test for row in zip_longest(*files.values()) for test in row if test is not None]


def identity(mutant: Mutant) -> str:
    return hashlib.sha256(f"{mutant.path}\n{mutant.source}".encode()).hexdigest()[:12]


def judge(mutant: Mutant, tests: list[str], tree: Path, timeout: float) -> dict[str, Any]:
    """Put the mutant into `tree`, run the tests, put the file back."""
    path = tree / mutant.path
    original = path.read_text()
    started = time.perf_counter()
    try:
        path.write_text(mutant.source)
        command = [*PYTEST, *tests]
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), timeout=timeout, capture_output=True, text=True, check=False
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        caught, by = done.returncode not in (0, 5), failed[0][:150] if failed else ""
    except subprocess.TimeoutExpired:
        caught, by = True, "time limit"
    finally:
        path.write_text(original)
    return {
        "id": identity(mutant),
        "place": f"{mutant.path}:{mutant.line}",
        "kind": mutant.kind,
        "change": mutant.change,
        "result": "caught" if caught else "survived",
        "by": by,
        "tests": len(tests),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run_all(
    mutants: Sequence[Mutant], reached: dict[str, dict[int, list[str]]], state: Path, jobs: int, timeout: float
) -> list[dict[str, Any]]:
    """Judge each mutant in one of `jobs` copies; results are kept in `state` as they come."""
    log = state / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {item["id"] for item in done}
    trees: Queue[Path] = Queue()
    for number in range(jobs):
        trees.put(copy_tree(state / f"tree{number}"))

    def one(mutant: Mutant) -> dict[str, Any]:
        tree = trees.get()
        try:
            result = judge(mutant, relevant(mutant, reached), tree, timeout)
        finally:
            trees.put(tree)
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        click.echo(f"{result['result']:8} {result['place']} {result['change']} ({result['seconds']} s)", err=True)
        return result

    left = [mutant for mutant in mutants if identity(mutant) not in known]
    with ThreadPoolExecutor(jobs) as pool:
        return done + list(pool.map(one, left))


@click.command()
@click.option("--count", default=30)
@click.option("--seed", default=0)
@click.option("--jobs", default=2, help="Mutants at once.")
@click.option("--timeout", default=300.0, help="Seconds for one mutant's tests; longer counts as caught.")
@click.option("--suite-timeout", default=3600.0, help="Seconds for the run with coverage.")
@click.option("--tests", multiple=True, default=["tests"], help="What the run with coverage runs.")
@click.option("--state", type=click.Path(path_type=Path), default=Path("/tmp/moedge-mutate"), help="Unfinished work.")
@click.option("--quick", is_flag=True, help="6 mutants, with the tests of models and runtime only.")
@click.option("--save", is_flag=True, help="Also write benchmarks/results/mutate.json.")
def main(
    count: int,
    seed: int,
    jobs: int,
    timeout: float,
    suite_timeout: float,
    tests: Sequence[str],
    state: Path,
    quick: bool,
    save: bool,
) -> None:
    """Make wrong changes and see whether the tests notice."""
    if quick:
        count, tests = 6, ["tests/models", "tests/runtime"]
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for part in PARTS
        for path in sorted((ROOT / part).rglob("*.py"))
    }
    state = state / f"{fingerprint()}-{seed}"
    state.mkdir(parents=True, exist_ok=True)
    data = state / "coverage.db"
    if not data.exists():
        reach(copy_tree(state / "tree0"), data, suite_timeout, tests)
    results = run_all(choose(sources, count, seed), tests_by_line(data), state, jobs, timeout)
    caught = sum(item["result"] == "caught" for item in results)
    columns = ("place", "change", "result", "tests", "seconds")
    figures = {"seed": seed, "mutants": len(results), "caught": caught, "share": caught / len(results)}
    publish("mutate", [{c: item[c] for c in columns} for item in results], {**figures, "results": results}, save)


if __name__ == "__main__":
    main()
