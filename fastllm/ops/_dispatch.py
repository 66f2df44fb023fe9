"""Which implementation of an op runs: by device, by what was asked for, by what was built.

`face` gives an op its public function; `pick` chooses for a call; `dispatch` says what that comes
to and why.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastllm import cpu
from fastllm.kernels import _triton

BACKENDS = ("triton", "cpp", "reference")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Op:
    """What can run an op."""

    name: str
    backends: dict[str, Callable[..., Any]]
    cpp_lacks: dict[str, Any]
    """Options that the C++ implementation does not have, with their defaults."""
    on_cuda: str
    """What the reference comes to on CUDA, where there is no kernel."""
    compiled: bool
    """Whether the C++ implementation needs the extension."""
    measured: Callable[..., Any] | None = None
    """What runs on CUDA where nothing was asked for: it picks among Triton and others by time."""
    summary: Callable[[torch.device], str] = str
    """What `measured` has picked, in words."""


TABLE: dict[str, Op] = {}
_asked: dict[str, str] = {}


def register(prototype: Callable[..., Any], *, triton: Callable[..., Any] | None = None,
             cpp: Callable[..., Any] | None = None, reference: Callable[..., Any],
             cpp_lacks: Sequence[str] = (), on_cuda: str = "no Triton kernel yet",
             compiled: bool = True, **more: Any) -> Op:
    """Enter an op, named and with the signature of `prototype`, into the table; more: of `Op`."""
    name = prototype.__name__
    parameters = inspect.signature(prototype).parameters
    lacks = {option: parameters[option].default for option in cpp_lacks}
    if cpp is not None and lacks:
        cpp = _without(cpp, frozenset(lacks))
    given = {"triton": triton, "cpp": cpp, "reference": reference}
    TABLE[name] = Op(name, {key: function for key, function in given.items() if function},
                     lacks, on_cuda, compiled, **more)
    return TABLE[name]


def _without(function: Callable[..., Any], options: frozenset[str]) -> Callable[..., Any]:
    """The function, for calls that spell out options it lacks at their defaults."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in options})

    return call


def face(kernel: Callable[P, R], *, triton: Callable[..., Any] | None = None,
         cpp: Callable[..., Any] | None = None, reference: Callable[..., Any],
         cpp_lacks: Sequence[str] = (), **more: Any) -> Callable[P, R]:
    """The public function of a kernel's op: its signature and docstring, any backend.

    cpp_lacks: options that the C++ implementation does not have. A call that uses one runs the
    reference where nothing was asked for, and raises where "cpp" was. triton: what to call in the
    kernel's place; more: of `Op`.
    """
    op = register(kernel, triton=triton or kernel, cpp=cpp, reference=reference,
                  cpp_lacks=cpp_lacks, **more)

    @functools.wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return pick(op, args, kwargs)(*args, **kwargs)

    return call


def why_not(op: str, backend: str, device: torch.device) -> str:
    """Why the backend cannot run the op on this device; an empty string where it can."""
    if backend not in TABLE[op].backends:
        return f"{op} has no {backend} implementation"
    if backend == "triton":
        return _triton.why_not(device)
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ ops take CPU tensors, not {device.type} ones"
        return cpu.why_not() if TABLE[op].compiled else ""
    return ""


def _automatic(op: Op, device: torch.device) -> tuple[str, str]:
    """What "auto" means for an op on a device, and why."""
    if device.type == "cuda":
        return ("triton", "CUDA tensors") if "triton" in op.backends else ("reference", op.on_cuda)
    if device.type == "cpu":
        reason = why_not(op.name, "cpp", device)
        if reason:
            return "reference", reason
        if op.name == "linear":
            return "cpp", cpu.matmul_backend()[1]
        lacks = ", ".join(op.cpp_lacks)
        return "cpp", f"CPU tensors; reference with {lacks}" if lacks else "CPU tensors"
    return "reference", f"plain torch is what runs on {device.type} tensors"


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose device and type choose the backend: the first of floating point, or the
    first of all where none is; the first of a list counts."""
    first = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, Tensor):
            if value.is_floating_point():
                return value
            first = value if first is None else first
    return first


def beyond_cpp(op: Op, kwargs: Mapping[str, Any]) -> list[str]:
    """The options of a call that the C++ implementation does not have."""
    return [name for name, default in op.cpp_lacks.items()
            if name in kwargs and kwargs[name] is not default and (
                isinstance(kwargs[name], Tensor) or kwargs[name] != default)]


def pick(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The implementation that a call runs. Raises RuntimeError where the one asked for cannot."""
    tensor = _first_tensor(args, kwargs)
    if tensor is None:
        return op.backends["reference"]
    backend = _asked.get(op.name, "auto")
    beyond = beyond_cpp(op, kwargs) if op.cpp_lacks else []
    if backend == "auto":
        if tensor.dtype == torch.float64:
            return op.backends["reference"]
        backend = _automatic(op, tensor.device)[0]
        if backend == "cpp" and beyond:
            backend = "reference"
    reason = why_not(op.name, backend, tensor.device)
    if not reason and backend == "cpp" and beyond:
        reason = f"it has no {', '.join(beyond)}"
    if reason:
        raise RuntimeError(
            f"{op.name}: the {backend} backend cannot run on {tensor.device}: {reason}")
    if backend == "triton" and op.measured is not None and op.name not in _asked:
        return op.measured
    return op.backends[backend]


def set_backend(op: str, backend: str) -> None:
    """Make every later call of `op` use a backend; "auto" undoes it. Unknown names: ValueError."""
    if op not in TABLE:
        raise ValueError(f"no op {op!r}; the ops are {', '.join(TABLE)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; the backends are auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        _asked.pop(op, None)
    else:
        _asked[op] = backend


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Within the block, the named ops (every op where none is named) use the backend.

    An op without that backend raises when it is called, so name the ops that should change.
    """
    before = dict(_asked)
    try:
        for op in ops or TABLE:
            set_backend(op, backend)
        yield
    finally:
        _asked.clear()
        _asked.update(before)


def dispatch(device: torch.device | str) -> dict[str, tuple[str, str]]:
    """{op: (backend, reason)} for floating-point tensors (but float64) on a device, as set now."""
    device = torch.device(device)
    found = {}
    for name, op in TABLE.items():
        backend, reason = _automatic(op, device)
        if name in _asked:
            backend, reason = _asked[name], "asked for"
        elif backend == "triton" and op.measured is not None:
            reason = f"{reason}; {op.summary(device)}"
        found[name] = backend, reason
    return found
