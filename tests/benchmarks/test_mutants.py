"""Every mutant is valid Python, differs from its source, is the same for the same seed, and leaves words alone."""

import ast

import pytest
from mutants import candidates, choose, mutate

SOURCE = '''"""Words 1 < 2."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


def f(a: int, b: int) -> int:
    """More words."""
    total = 0
    for i in range(a, b):
        if i > 3 and not a == b:
            continue
        total += min(i, 2)
    if total < 0:
        raise ValueError(f"{total + 1} is below {0}")
    return total
'''


def test_every_candidate_is_valid_and_different() -> None:
    plain = ast.unparse(ast.parse(SOURCE))
    made = [mutate(SOURCE, position, kind) for position, _, kind, _ in candidates(SOURCE)]
    assert len(made) > 15
    assert len(set(made)) == len(made)
    for source in made:
        compile(source, "mutant", "exec")
        assert source != plain


def test_words_are_left_alone() -> None:
    kinds = {(line, kind) for _, line, kind, _ in candidates(SOURCE)}
    assert not {line for line, _ in kinds} & {1, 2, 4, 5, 9}
    assert {kind for line, kind in kinds if line == 16} == {"statement"}
    for position, _, kind, _ in candidates(SOURCE):
        assert "Words 1 < 2." in mutate(SOURCE, position, kind)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_gives_the_same_mutants(seed: int) -> None:
    sources = {"a.py": SOURCE, "b.py": SOURCE.replace("f(", "g(")}
    chosen = choose(sources, 12, seed)
    assert chosen == choose(sources, 12, seed)
    assert len({(m.path, m.source) for m in chosen}) == 12
    assert chosen != choose(sources, 12, seed + 1)


def test_asking_for_more_than_there_are_gives_all() -> None:
    assert len(choose({"a.py": "x = 1 < 2\n"}, 50, 0)) == len(candidates("x = 1 < 2\n")) == 5
