"""Bounds of every access in Triton's interpreter: what compute-sanitizer's memcheck is to a GPU.

A lane that is switched on must lie inside a tensor that the launch was given, or inside one whose
address it reads from a table, which `expose` makes known. Any other load, store or atomic raises an
IndexError that names the kernel, the program and the nearest tensor, before memory is touched; on
a GPU it would corrupt another tensor in silence, or end the process.

A tensor's extent runs from its first element to its last: a view that is not contiguous covers
what lies between its elements, too.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor


class Extent(NamedTuple):
    """Addresses [first, end) of a tensor."""

    first: int
    end: int
    name: str


def _extent(tensor: Tensor, name: str) -> Extent:
    if not tensor.numel():
        return Extent(tensor.data_ptr(), tensor.data_ptr(), name)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Extent(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(),
                  f"{name} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}")


class _Launch:
    """What one launch may touch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.extents: list[Extent] = []

    def give(self, name: str, argument: Any) -> None:
        """Adds the tensors of an argument."""
        if isinstance(argument, tuple):
            for i, part in enumerate(argument):
                self.give(f"{name}[{i}]", part)
        elif isinstance(argument, interpreter.TensorDescriptor):
            self.give(name, argument.base)
        elif hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            self.extents.append(_extent(tensor, name))
            if tensor.dtype == torch.int64 and _exposed:
                held = set(tensor.flatten().tolist())
                self.extents += [extent for extent in _exposed if extent.first in held]

    def check(self, pointers: Any, mask: Any, kind: str) -> None:
        addresses = pointers.data
        active = True if mask is None else mask.data
        low = int(np.min(addresses, initial=np.iinfo(np.uint64).max, where=active))
        high = int(np.max(addresses, initial=0, where=active))
        if low > high:  # every lane is off
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if any(first <= low and high + size <= end for first, end, _ in self.extents):
            return
        for address in addresses[np.broadcast_to(active, addresses.shape)].ravel().tolist():
            if not any(first <= address and address + size <= end
                       for first, end, _ in self.extents):
                self._refuse(address, size, kind)

    def _refuse(self, address: int, size: int, kind: str) -> None:
        where = f"{self.kernel}, program {tuple(interpreter.interpreter_builder.grid_idx)}: " \
            f"{kind} of {size} bytes outside of every tensor"
        if not self.extents:
            raise IndexError(f"{where}: the kernel was given none")
        near = min(self.extents, key=lambda extent: min(abs(address - extent.first),
                                                        abs(address + size - extent.end)))
        beside = f"{near.first - address} bytes before the first element" \
            if address < near.first else f"{address - near.end} bytes past the last element"
        raise IndexError(f"{where}, {beside} of {near.name}; is a mask missing?")


_launch = _Launch("no launch")
_exposed: list[Extent] = []


def expose(tensors: Iterable[Tensor]) -> None:
    """Lets launches touch tensors whose addresses stand in an int64 tensor that they are given.

    What an earlier call made known is forgotten: its tensors may be gone.
    """
    _exposed[:] = [_extent(tensor, "a tensor in a table") for tensor in tensors]


def _checked(name: str, pointers: int, mask: int | None, kind: str) -> None:
    """Wraps a builder method; the places of the pointers and the mask in its arguments."""
    stock = getattr(Builder, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _launch.check(args[pointers], None if mask is None else args[mask], kind)
        return stock(self, *args, **kwargs)

    setattr(Builder, name, method)


def install() -> None:
    """Check every access of every launch from now on. Call it once a process."""
    stock = Executor._init_args_hst

    def init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        global _launch
        given, named = stock(self, args, kwargs)
        _launch = _Launch(self.fn.__name__)
        for name, argument in [*zip(self.arg_names, given, strict=False), *named.items()]:
            _launch.give(name, argument)
        return given, named

    Executor._init_args_hst = init_args_hst
    _checked("create_masked_load", 0, 1, "a load")
    _checked("create_masked_store", 0, 2, "a store")
    _checked("create_atomic_rmw", 1, 3, "an atomic")
    _checked("create_atomic_cas", 0, None, "an atomic")
