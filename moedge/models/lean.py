"""Imports transformers without what running a model never calls: sympy, scipy, dynamo, distributed tensors.

That is 100 MiB of a process. Only for those of the command line, which are moedge's own: there, torch looks like a
build without distributed and compiler, until something asks for more of them. A library must not do that to its
caller's torch, so `moedge.load` does not; a program that wants it calls `lean_imports` before it imports transformers.
Results do not change: what is left out are imports, and decorators that speak to a compiler that does not run.
The code that importing torch has run is given back to the system too.
"""

import ctypes
import importlib
import importlib.util
import operator
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_MADV_DONTNEED = 4
_COMPILER = "torch._dynamo"
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
_CONCRETE: dict[str, Any] = {  # what its questions answer for plain numbers
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
    "statically_known_true": bool,
    "has_guarding_hint": lambda size: True,
    "guarding_hint_or_throw": lambda size: size,
    "is_nested_int": lambda size: False,
    "sym_eq": operator.eq,
    "sym_and": lambda *conditions: all(conditions),
    "sym_or": lambda *conditions: any(conditions),
}


def lean_imports() -> None:
    """From now on, torch is prepared just before transformers is first imported. Too late, it does nothing."""
    if "transformers" not in sys.modules and _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _BeforeTransformers())


def forget_code() -> None:
    """Give back the memory of machine code and constants that starting has used; what is needed again is read again.

    Of torch and its libraries that is some 50 MiB that only importing needs. Linux only; mappings with pages that were
    written to (a debugger's) are left alone.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    begin = end = 0
    for line in smaps.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping: addresses, permissions, offset, device, inode, file
            fixed = len(rest) == 5 and rest[0] in ("r-xp", "r--p") and rest[4].startswith("/")
            begin, end = (int(address, 16) for address in first.split("-")) if fixed else (0, 0)
        elif first == "Anonymous:" and rest[0] == "0" and end:
            libc.madvise(begin, end - begin, _MADV_DONTNEED)


class _BeforeTransformers(MetaPathFinder):
    """Finds nothing itself: it sees the first import of transformers, prepares torch and leaves."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "transformers" and self in sys.meta_path:
            sys.meta_path.remove(self)
            _prepare()


def _prepare() -> None:
    import torch

    forget_code()  # else starting takes more memory than running, and no limit could be less than that
    torch.distributed.is_available = lambda: False
    torch.compiler.disable = _disable
    torch.compiler.allow_in_graph = torch.compiler.assume_constant_result = _unmarked
    marks = {"disable": _disable, "allow_in_graph": _unmarked, "assume_constant_result": _unmarked}
    torch._dynamo = _defer(_COMPILER, marks)
    if "sympy" not in sys.modules:  # torch asks of sizes whether they are symbols: none is one without a compiler
        _defer("sympy", {"Basic": type("Basic", (), {})})
        _defer(_SYMBOLS, _CONCRETE)
    _hide_scipy()


def _defer(name: str, attributes: dict[str, Any]) -> ModuleType:
    """Module `name` not executed: it has `attributes`, its submodules can be imported, asking for more executes it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = _Deferred(name)
    module.__spec__, module.__file__ = spec, spec.origin
    module.__path__ = list(spec.submodule_search_locations or ())
    vars(module).update(attributes)
    return module


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _hide_scipy() -> None:
    """transformers asks once whether scipy is there, for a loss of object detection. moedge itself may use it later."""
    if "scipy" in sys.modules:
        return
    sys.modules["scipy"] = None  # type: ignore[assignment]  # this makes it missing
    try:
        from transformers.utils.import_utils import is_scipy_available

        is_scipy_available()
    finally:
        del sys.modules["scipy"]


def _unmarked(function: Any) -> Any:
    return function


def _disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True) -> Any:
    return _unmarked if fn is None else fn
