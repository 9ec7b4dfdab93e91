"""Small wrong changes to Python source, one at a time, chosen by a seed. Pure functions of source text; runs nothing.

What is only words or declarations is left alone: docstrings, annotations, messages of errors, decorators (the options
of a verb), imports for the type checker.
"""

import ast
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One changed file, whole, and what was changed."""

    path: str
    line: int
    kind: str
    change: str
    source: str


def _skip(node: ast.AST) -> bool:
    """Whether a whole statement is words or declarations."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return text or typing or isinstance(node, ast.Import | ast.ImportFrom)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that may be changed, parents first."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "exc", "cause") or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _skip(child):
                yield from _walk(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, words) of each way to make `node` wrong; `_apply` does it."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield "comparison", f"{type(node.ops[0]).__name__} to {COMPARISONS[type(node.ops[0])].__name__}"
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", f"{type(node.op).__name__} to {OPERATORS[type(node.op)].__name__}"
    if isinstance(node, ast.BoolOp):
        yield "boolean", "and to or" if isinstance(node.op, ast.And) else "or to and"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "negation", "not removed"
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "condition", "condition negated"
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", f"{node.value} to {not node.value}"
        elif isinstance(node.value, int):
            yield "constant+1", f"{node.value} to {node.value + 1}"
            yield "constant-1", f"{node.value} to {node.value - 1}"
    if isinstance(node, ast.Call):
        if len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
            yield "arguments", "first two arguments swapped"
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield "function", f"{node.func.id} to {NAMES[node.func.id]}"
    removable = ast.Expr | ast.AugAssign | ast.Raise | ast.Delete
    if isinstance(node, removable) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield)):
        yield "statement", "statement removed"
    if isinstance(node, ast.Break | ast.Continue):
        yield "loop", "break and continue swapped"


def _apply(node: ast.AST, kind: str) -> ast.AST:
    """What stands in `node`'s place; `node` may be changed on the way."""
    if isinstance(node, ast.Compare) and kind == "comparison":
        node.ops = [COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.BinOp | ast.AugAssign) and kind == "operator":
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        return node.operand
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        step = 1 if kind == "constant+1" else -1
        node.value = not node.value if isinstance(node.value, bool) else node.value + step
    elif isinstance(node, ast.Call) and kind == "arguments":
        node.args[:2] = node.args[1::-1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        node.func.id = NAMES[node.func.id]
    elif kind == "statement":
        return ast.Pass()
    elif kind == "loop":
        return ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    return node


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, kind: str) -> None:
        self.target, self.kind = target, kind

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.target:
            return ast.copy_location(_apply(node, self.kind), node)
        return self.generic_visit(node)


def candidates(source: str) -> list[tuple[int, int, str, str]]:
    """(position in the walk, line, kind, words) of every possible change of a file."""
    return [
        (position, getattr(node, "lineno", 0), kind, words)
        for position, node in enumerate(_walk(ast.parse(source)))
        for kind, words in _changes(node)
    ]


def mutate(source: str, position: int, kind: str) -> str:
    """The source with that one change."""
    tree = copy.deepcopy(ast.parse(source))
    target = list(_walk(tree))[position]
    return ast.unparse(ast.fix_missing_locations(_Replace(target, kind).visit(tree)))


def choose(sources: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """`count` different mutants of the files; a kind of change is drawn first, so that rare kinds have their turn."""
    by_kind: dict[str, list[tuple[str, int, int, str]]] = {}
    for path, source in sorted(sources.items()):
        for position, line, kind, words in candidates(source):
            by_kind.setdefault(kind, []).append((path, position, line, words))
    draw = random.Random(seed)
    chosen: list[Mutant] = []
    while len(chosen) < count and by_kind:
        kind = draw.choice(sorted(by_kind))
        places = by_kind[kind]
        path, position, line, words = places.pop(draw.randrange(len(places)))
        if not places:
            del by_kind[kind]
        chosen.append(Mutant(path, line, kind, words, mutate(sources[path], position, kind)))
    return chosen
