"""The public names: few, lazy, documented, and the same at run time as for the type checker."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moedge


def typed_names() -> dict[str, str]:
    """Name -> module of the imports that only the type checker sees."""
    tree = ast.parse(Path(str(moedge.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_about_fifteen_names() -> None:
    assert 9 <= len(moedge.__all__) <= 16
    assert len(set(moedge.__all__)) == len(moedge.__all__)
    assert dir(moedge) == sorted(moedge.__all__)


def test_the_type_checker_sees_the_same_names() -> None:
    assert typed_names() == moedge._EXPORTS


@pytest.mark.parametrize("name", moedge.__all__)
def test_each_name_exists_and_says_what_it_is(name: str) -> None:
    value = getattr(moedge, name)
    assert name == "POLICIES" or (value.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nosuch'"):
        moedge.nosuch  # noqa: B018


def test_importing_moedge_imports_no_torch() -> None:
    code = "import sys, moedge; moedge.MoedgeError; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
