"""The rules of the house, held by walking the source: import order, sizes, names, docstrings, forbidden text."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moedge"
LAYERS = (
    *("native", "models", "runtime", "measure", "train", "compress", "tune"),
    *("api", "fleet", "library", "federate", "serve"),
)
BASE = ("errors", "units", "terminal")  # each may import those before it, and every layer may import them
TOP = ("cli", "__main__", "__init__")  # may import anything
MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 60, 8
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc", "inspect", "select", "queue", "http"}
FORBIDDEN_TEXT = re.compile(r"(?<![\w.])/(?:work|root|home|opt|Users)/\w")  # paths of somebody's machine
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(
    path
    for folder in ("moedge", "tests", "benchmarks", "examples", "recipes", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".sh", ""} and path.is_file()
) + [path for path in ROOT.glob("*") if path.suffix in {".md", ".toml", ".txt"} or path.name == "Makefile"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of moedge in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write imports in full"
            module = node.module or ""
            found += [(node.lineno, f"moedge.{alias.name}") for alias in node.names if module == "moedge"]
            found += [(node.lineno, module)]
    return [(line, module) for line, module in found if module.split(".")[0] == "moedge"]


def rank(unit: str) -> int:
    """Place of a package or base module in the order of the house."""
    order = (*BASE, *LAYERS)
    return order.index(unit) if unit in order else -1


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_left_only(path: Path) -> None:
    unit = unit_of(path)
    if unit in TOP:
        return
    assert rank(unit) >= 0, f"moedge/{unit} has no place in the order of the house"
    for line, module in imports(path):
        parts = module.split(".")
        if len(parts) == 1:
            continue
        assert parts[1] not in TOP, f"{name_of(path)}:{line}: {module} is at the far right of the house"
        target = rank(parts[1])
        assert target >= 0, f"{name_of(path)}:{line}: the name {module} is not a module of the house; import the module"
        assert target <= rank(unit), f"{name_of(path)}:{line}: {unit} must not import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < MAX_LINES, f"{name_of(path)} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < MAX_FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if not any(isinstance(d, ast.Call) for d in node.decorator_list):  # a verb's arguments are its options
                assert count <= MAX_ARGUMENTS, f"{name_of(path)}:{node.lineno}: {node.name} takes {count} arguments"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_say_what_they_do(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


def test_no_module_has_a_forbidden_name() -> None:
    for path in SOURCES:
        assert path.stem not in FORBIDDEN_NAMES, f"{name_of(path)}: name it after what it does"
    top = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not (top - {"__init__", "__main__", "__pycache__"}) & set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (broad and silent), f"{name_of(path)}:{node.lineno}: hides every fault"
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: bare except"


def test_no_file_names_somebodys_machine() -> None:
    for path in TEXTS:
        if "__pycache__" in path.parts:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            assert not FORBIDDEN_TEXT.search(line), f"{name_of(path)}:{number}: {line.strip()[:100]}"


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    """The test tests itself: a forbidden import is found wherever it hides."""
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from moedge.serve import app\n    import moedge.cli\n    from moedge import load\n")
    assert imports(path) == [(2, "moedge.serve"), (3, "moedge.cli"), (4, "moedge.load"), (4, "moedge")]
