"""The documentation names what there is: the generated page is current, the tables have the registries' keys."""

import re
import subprocess
import sys
from pathlib import Path

from moedge import cli
from moedge.compress.importance import METHODS
from moedge.measure.templates import TEMPLATES
from moedge.runtime.policy import POLICIES

ROOT = Path(__file__).resolve().parent.parent


def first_column(page: str, header: str) -> list[str]:
    """The code words in the first column of the table below `header`."""
    rows = page.split(header, 1)[1].split("\n\n", 1)[0].splitlines()
    return [match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \|", row))]


def test_the_command_line_reference_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_reference_has_every_verb() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert re.findall(r"^## moedge (\S+)$", page, re.MULTILINE) == [*cli.VERBS, "completion"]


def test_the_policies_are_those_of_the_registry() -> None:
    page = (ROOT / "docs" / "runtime.md").read_text()
    assert sorted(first_column(page, "| `--policy` | keeps |")) == sorted([*POLICIES, "oracle"])


def test_the_task_templates_are_those_of_the_registry() -> None:
    page = (ROOT / "docs" / "measure.md").read_text()
    assert first_column(page, "| `NAME` | what a record has |") == [*TEMPLATES]


def test_the_methods_are_those_of_the_registry() -> None:
    page = (ROOT / "docs" / "compress.md").read_text()
    assert first_column(page, "| `--method` | score | source |") == [*METHODS]


def test_every_benchmark_is_in_the_list() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    missing = {name for name in scripts if f"`{name}`" not in page}
    assert not missing - {"stock_disk.py"}


def test_every_package_has_a_page() -> None:
    packages = {path.name for path in (ROOT / "moedge").iterdir() if (path / "__init__.py").exists()}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert packages <= pages
