"""Another method for one instance of a module; its class, parameters and hooks stay as they are.

The replacement is a function stored as a bound method in the instance's __dict__, under the name
of the method it stands for. So a deep copy of the module carries its own replacement, and a pickle
of it, which stores bound methods by name, is the plain module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

METHODS = ("forward", "_old_forward", "_apply_gate", "_create_attention_masks")
MARK = "_fastllm"


@dataclass(frozen=True)
class Replacement:
    """`function(self, ...)` in the place of a method, running `by`; others go with it."""

    function: Callable[..., Any]
    by: str
    method: str = "forward"
    others: tuple[tuple[nn.Module, "Replacement"], ...] = ()


def method_of(module: nn.Module) -> str:
    """Where the module's forward lies: accelerate's hooks keep it as _old_forward."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def own(module: nn.Module, method: str) -> Callable[..., Any]:
    """The class's method, bound to the module."""
    name = "forward" if method == "_old_forward" else method
    return MethodType(getattr(type(module), name), module)


def current(module: nn.Module) -> str:
    """The op that a replaced module runs; "" for one that is as its class made it."""
    return next((mark.by for method in METHODS if (mark := _mark(module, method)) and mark.by), "")


def _mark(module: nn.Module, method: str) -> "Replacement | None":
    """What `put` left at a method; wrappers of the function, which copy its attributes, are not
    it."""
    function = getattr(vars(module).get(method), "__func__", None)
    mark = getattr(function, MARK, None)
    return mark if mark is not None and mark.function is function else None


def foreign(module: nn.Module, method: str) -> bool:
    """Whether somebody else already replaced this instance's method."""
    return method in vars(module) and vars(module)[method] != own(module, method)


def put(module: Any, replacement: Replacement) -> None:
    setattr(replacement.function, MARK, replacement)
    replacement.function.__name__ = replacement.method
    setattr(module, replacement.method, MethodType(replacement.function, module))
    for other, its in replacement.others:
        put(other, its)


def take_back(module: Any) -> bool:
    """Undo `put`; whether there was an op to undo."""
    found = bool(current(module))
    for method in METHODS:
        if _mark(module, method):
            if method == "_old_forward":
                module._old_forward = own(module, method)
            else:
                delattr(module, method)
    return found
