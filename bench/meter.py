"""Counts exactly what a computation moves and multiplies, on a machine without a GPU.

    with Meter() as meter:
        y = rms_norm(x, weight)
    meter.requested, meter.unique, meter.aten_bytes, meter.flops, len(meter.launches)

Triton kernels are counted in Triton's interpreter: *requested* bytes are those of every lane that
is switched on in every load and store; *unique* bytes are a launch's distinct addresses, loads and
stores apart, which is what a cache that forgets nothing within a launch lets through to memory.
Operators of PyTorch around them are counted by what they read and write (a view costs nothing),
inside custom operators too. FLOPs are those of products: `tl.dot`, and what torch counts as such.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
PAGE = 1 << 22

# Operators that read nothing of what they are given but its shape; the first of each name decides.
WRITE_ONLY = ("zero", "ones", "full", "fill", "new_", "rand", "normal", "uniform", "bernoulli_",
              "exponential_", "arange", "scalar_tensor")
EMPTY = ("empty", "new_empty", "resize", "set_", "record_stream")
# Their first argument is touched only at the indices, in all as often as the given elements.
INDEXED = {"gather": 0, "index": 0, "index_select": 0, "embedding": 0, "take": 0,
           "scatter_": 1, "scatter_add_": 1, "index_add_": 1, "index_put_": 1, "index_copy_": 1}


class Touched:
    """The distinct bytes of a set of addresses, marked in pages of memory's own layout."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray] = {}

    def add(self, addresses: np.ndarray, size: int) -> None:
        """Mark the `size` bytes at each address, which must be a multiple of it, as on a GPU."""
        if int(np.bitwise_or.reduce(addresses)) % size:
            raise ValueError(f"an access of {size} bytes is not aligned to them")
        first, last = int(addresses.min()) // PAGE, int(addresses.max()) // PAGE
        numbers = [first] if first == last else np.unique(addresses // PAGE).tolist()
        for number in numbers:
            inside = addresses if len(numbers) == 1 else addresses[addresses // PAGE == number]
            if number not in self.pages:
                self.pages[number] = np.zeros(PAGE, np.uint8)
            marks = self.pages[number].view(f"u{size}")
            marks[(inside % PAGE) // size] = np.iinfo(marks.dtype).max

    def count(self) -> int:
        return sum(int(np.count_nonzero(page)) for page in self.pages.values())


@dataclass
class Launch:
    """One launch of a Triton kernel."""

    name: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    """Bytes requested; an atomic is both."""
    flops: int = 0
    reads: Touched | None = field(default_factory=Touched)
    writes: Touched | None = field(default_factory=Touched)
    unique: int = 0

    @property
    def requested(self) -> int:
        return self.loaded + self.stored

    def access(self, pointers: Any, mask: Any, *, load: bool, store: bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, active = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
        addresses = addresses[active].ravel()
        if not addresses.size:
            return
        if load:
            self.loaded += addresses.size * size
            self.reads.add(addresses, size)
        if store:
            self.stored += addresses.size * size
            self.writes.add(addresses, size)

    def finish(self) -> None:
        self.programs = int(np.prod(interpreter.interpreter_builder.grid_dim))
        self.unique = self.reads.count() + self.writes.count()
        self.reads = self.writes = None


def memory(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded one costs what lies in memory."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.element_size()


def distinct(values: Any) -> list[Tensor]:
    """The tensors among nested values, each place in memory once, whatever its order of axes."""
    found = {(t.data_ptr(), t.dtype, *sorted(zip(t.stride(), t.shape, strict=True))): t
             for t in tree_leaves(values) if isinstance(t, Tensor)}
    return list(found.values())


def aten_bytes(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What one operator of PyTorch must read and write, each tensor once."""
    name = function.overloadpacket.__name__
    values: dict[str, Any] = {}
    mutated = []
    for i, argument in enumerate(function._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutated.append(value)
            if argument.kwarg_only:  # out=
                continue
        values[argument.name] = value
    given = distinct(list(values.values()))
    if name.startswith(EMPTY) or torch.Tag.inplace_view in function.tags:
        return 0
    if not mutated:
        storages = {t.untyped_storage().data_ptr() for t in given}
        made = [t for t in distinct(result) if t.untyped_storage().data_ptr() not in storages]
        if not made and distinct(result):
            return 0  # a view, or a conversion to what it was
    else:
        made = distinct(mutated)
    if name.startswith(WRITE_ONLY):
        given = []
    elif name == "copy_":
        given = distinct(values["src"])
    elif name in INDEXED:
        first, *others = distinct([args[0]]) + distinct([args[1:], kwargs])
        touched = max((t.numel() for t in (others if mutated else made)), default=0)
        part = min(memory(first), touched * first.element_size())
        return part + sum(map(memory, others)) + (part if mutated else sum(map(memory, made)))
    return sum(map(memory, given)) + sum(map(memory, made))


class Meter(TorchDispatchMode):
    """While it is entered, counts the Triton launches and the operators of PyTorch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.aten: dict[str, list[int]] = {}
        """Calls and bytes of each operator that moved any."""
        self.aten_flops = 0
        self._launch: Launch | None = None
        self._stock: dict[tuple[Any, str], Any] = {}

    @property
    def requested(self) -> int:
        return sum(launch.requested for launch in self.launches)

    @property
    def unique(self) -> int:
        return sum(launch.unique for launch in self.launches)

    @property
    def aten_bytes(self) -> int:
        return sum(size for _, size in self.aten.values())

    @property
    def flops(self) -> int:
        return self.aten_flops + sum(launch.flops for launch in self.launches)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launch is not None:
            return function(*args, **kwargs)
        if function.namespace != "aten":
            # A custom operator is looked into: its implementation runs with the mode on again.
            with self._inside():
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
                                           *args, **kwargs)
        with self._inside():  # contiguous, to and their like are made of others, or do nothing
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        size = aten_bytes(function, args, kwargs, result)
        if size:
            entry = self.aten.setdefault(function.overloadpacket.__name__, [0, 0])
            entry[0] += 1
            entry[1] += size
        # addmm_ and its like are counted as what they are in place of.
        product = getattr(torch.ops.aten, function.overloadpacket.__name__.rstrip("_"), None)
        if product in flop_registry:
            self.aten_flops += flop_registry[product](*args, **kwargs, out_val=result)
        return result

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The mode alone, without the patches of the interpreter, which stay as they are."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __enter__(self) -> "Meter":
        for name, pointers, mask in (("create_masked_load", 0, 1), ("create_masked_store", 0, 2),
                                     ("create_atomic_rmw", 1, 3), ("create_atomic_cas", 0, None)):
            self._patch(Builder, name, self._counting(
                pointers, mask, load="store" not in name, store="load" not in name))
        self._patch(Builder, "create_dot", self._dot)
        self._patch(Executor, "__call__", self._run)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for (owner, name), stock in self._stock.items():
            setattr(owner, name, stock)
        self._stock.clear()

    def _patch(self, owner: Any, name: str, around: Any) -> None:
        stock = self._stock[owner, name] = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: around(stock, *args, **kwargs))

    def _counting(self, pointers: int, mask: int | None, **kinds: bool) -> Any:
        """Around a builder method; the places of the pointers and the mask in its arguments."""
        def method(stock: Any, builder: Any, *args: Any, **kwargs: Any) -> Any:
            self._launch.access(args[pointers], None if mask is None else args[mask], **kinds)
            return stock(builder, *args, **kwargs)
        return method

    def _dot(self, stock: Any, builder: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        self._launch.flops += 2 * a.data.size * b.data.shape[-1]
        return stock(builder, a, b, *args, **kwargs)

    def _run(self, stock: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._launch = Launch(executor.fn.__name__)
        try:
            result = stock(executor, *args, **kwargs)
            self._launch.finish()
            self.launches.append(self._launch)
        finally:
            self._launch = None
        return result
