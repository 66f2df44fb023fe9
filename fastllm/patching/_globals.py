"""A function with other things under some of the global names that it calls.

transformers' models call functions of their modeling file. An instance gets a copy of its class's
method whose globals are the file's own, but for those names; class and file are untouched.
"""

from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any


def innermost(function: Callable[..., Any]) -> Any:
    """The function that decorators with functools.wraps stand around."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def names_in(function: Callable[..., Any]) -> frozenset[str]:
    """The globals and attributes that it names, functions inside it included; decorators not."""
    code = getattr(innermost(function), "__code__", None)
    return frozenset(_names(code)) if code is not None else frozenset()


def _names(code: CodeType) -> set[str]:
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inside))


def rebound(function: Any, names: dict[str, Any]) -> FunctionType:
    """A copy that finds `names` among its globals. A decorated function is copied with its
    decorators; ValueError where one does not keep what it decorates in a closure."""
    inner = getattr(function, "__wrapped__", None)
    closure, found = function.__closure__, function.__globals__
    if inner is None:
        # torch.compile would look a global up in the module of that name.
        found = {name: value for name, value in found.items() if name != "__name__"} | names
    else:
        cells = [cell.cell_contents is inner for cell in closure or ()]
        if not any(cells):
            raise ValueError(f"the decorator of its {function.__name__} cannot be copied")
        twin = rebound(inner, names)
        closure = tuple(CellType(twin) if its else cell
                        for cell, its in zip(closure, cells, strict=True))
    copy = FunctionType(function.__code__, found, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    if inner is not None:
        copy.__dict__["__wrapped__"] = twin
    copy.__doc__, copy.__module__ = function.__doc__, function.__module__
    copy.__annotations__ = dict(function.__annotations__)
    return copy
