"""A pretended GPU: finds mistakes of devices in tests and benchmarks where there is no GPU.

    PYTHONPATH=bench pytest -p pretend tests/kernels/test_rope.py
    python -c "import pretend; pretend.install(); ..."      (before anything imports triton)

torch then reports one CUDA device. Its tensors lie in the CPU's memory under a tag on their
storage, so that views keep it; copies to and from the CPU are real copies. A function mode answers
for their device and refuses what CUDA refuses: tensors of both devices in one call, numpy, a
generator of the other device, waiting inside of a CUDA graph's capture. Triton kernels run in the
interpreter and refuse CPU tensors. A captured graph keeps the calls and makes them again.

What it cannot find: faults of machine code, of shared memory, of registers and of timing; races
between programs, streams or host and device; what other sums a GPU's own products and reductions
give; what CUDA's operators lack. torch.compile runs eagerly, for Inductor cannot make CUDA code
here, and opcheck and torch.export see CPU tensors. C++ that makes tensors for Python without a call
from Python, such as hooks on gradients, may give them without a tag where autograd did not start
from a tagged tensor. Threads and processes that a program starts see no GPU.
"""

import contextlib
import functools
import os
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch._library.custom_ops as custom_ops
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import graph as autograd_graph
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME, MEMORY = "pretended GPU", 80 << 30
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, is_integrated=0, is_multi_gpu_board=0)
# Two tensors of any devices may meet in these.
ACROSS = {Tensor.copy_, Tensor.set_, Tensor.data.__set__, Tensor.fill_, torch._foreach_copy_,
          torch._has_compatible_shallow_copy_type}
# 0-dimensional CPU tensors join in with CUDA ones, but not here.
STRICT = {"cat", "stack", "equal", "allclose", "__set__", "concatenate", "index_add_", "dot"}
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal",
         "masked_select", "unique", "cpu", "tensor", "as_tensor"}
LIKE = {"tensor", "as_tensor", "asarray"}
on = SimpleNamespace(suspended=0, depth=0, backward=False, graph=None, installed=False)


def is_gpu(device: Any) -> bool:
    """Whether what stands for a device is CUDA; a bare number is."""
    if isinstance(device, int):
        return True
    return device is not None and torch.device(device).type == "cuda"


def tagged(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    with torch._C.DisableTorchFunction():
        try:
            return "on_gpu" in vars(leaf.untyped_storage())
        except (RuntimeError, NotImplementedError):  # it has no storage
            return False


def tag(tree: Any) -> Any:
    """The same, with every tensor in it on the GPU."""
    with torch._C.DisableTorchFunction():
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device == CPU:
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    # Python's object of a storage lives as long as the storage itself.
                    leaf.untyped_storage().on_gpu = True
    return tree


def moved(tree: Any, gpu: bool) -> Any:
    """Results of a call that named a device; those that lie in memory of the other are copied."""
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_meta or tagged(leaf) == gpu:
            return leaf
        return tag(leaf.clone()) if gpu else leaf.clone()

    return tree_map(move, tree)


class Generator(torch._C.Generator):
    """A CPU generator that says which device it is for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, CPU)
        made.on_gpu = is_gpu(device)
        return made

    @property
    def device(self) -> torch.device:
        return GPU if self.on_gpu else CPU


@contextlib.contextmanager
def suspended():
    on.suspended += 1
    try:
        yield
    finally:
        on.suspended -= 1


@contextlib.contextmanager
def autocast_of_the_gpu():
    """CPU operators are cast as CUDA's autocast would cast them."""
    before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    try:
        torch.set_autocast_enabled("cpu", torch.is_autocast_enabled("cuda"))
        torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))
        yield
    finally:
        torch.set_autocast_enabled("cpu", before[0])
        torch.set_autocast_dtype("cpu", before[1])


def refuse_mixing(name: str, function: Any, args: Any, tensors: list[Tensor],
                  gpu: list[bool]) -> None:
    if all(gpu) or not any(gpu) or function in ACROSS:
        return
    if name == "__getitem__" and gpu[0]:
        return
    others = tensors[1:] if name == "__setitem__" and not gpu[0] else [
        t for t, there in zip(tensors, gpu, strict=True) if not there]
    if name == "__getitem__":
        others = [t for t, there in zip(tensors, gpu, strict=True) if there and (
            t.dim() or t.dtype == torch.bool)]  # one number is read and used as such
        message = "indices should be either on cpu or on the same device as the indexed tensor"
        if others:
            raise RuntimeError(f"{message} (cpu)")
        return
    if name == "__setitem__":
        index, value = args[1], args[2]
        wrong = [t for t in tree_leaves(index) if isinstance(t, Tensor) and t.dim()
                 and tagged(t) and not gpu[0]]
        by_tensor = any(isinstance(t, Tensor) and t.dim() for t in tree_leaves(index))
        apart = isinstance(value, Tensor) and value.dim() and tagged(value) != gpu[0] and by_tensor
        if not wrong and not apart:
            return
    elif name not in STRICT and all(t.dim() == 0 for t in others) and not (
            name.endswith("_") and not name.endswith("__") and not gpu[0]):
        return
    raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                       f"devices, cuda:0 and cpu! (in {name})")


class Pretence(TorchFunctionMode):
    """Every call of torch's passes through here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if on.suspended:
            return function(*args, **kwargs)
        special = SPECIAL.get(function)
        name = getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gpu = [tagged(x) for x in tensors]
        if on.graph is not None and any(gpu) and name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if special is not None:
            return special(function, *args, **kwargs)
        device, where = kwargs.get("device"), None
        if device is not None:
            where = is_gpu(device)
            kwargs = {**kwargs, "device": CPU} if where else kwargs
            if where and on.graph is not None and name in LIKE:
                raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if any(gpu) and "out_dtype" in kwargs:  # a product with wider sums: CUDA alone has it
            kwargs, wide = {**kwargs}, kwargs["out_dtype"]
            del kwargs["out_dtype"]
            args = tree_map(lambda x: x.to(wide) if isinstance(x, Tensor) else x, args)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        self.refuse_generator(args, kwargs, any(gpu) if where is None else where)
        operator = isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        ours = operator and not str(function).startswith("aten.")  # it looks for itself
        if where is None and not ours:
            refuse_mixing(name, function, args, tensors, gpu)
        cast = any(gpu) and (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))
        on.depth += 1
        try:
            with autocast_of_the_gpu() if cast else contextlib.nullcontext():
                result = function(*args, **kwargs)
        finally:
            on.depth -= 1
        if where is not None:
            result = moved(result, where) if name in LIKE else tag(result) if where else result
        elif any(gpu) and not ours and function not in ACROSS and not (
                name in ("__getitem__", "__setitem__") and not gpu[0]):
            tag(result)
        if on.graph is not None and on.depth == 0:
            on.graph.calls.append((function, args, kwargs, result))
        return result

    @staticmethod
    def refuse_generator(args: Any, kwargs: Any, gpu: bool) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, torch._C.Generator) and getattr(given, "on_gpu", False) != gpu:
                found = "cuda" if getattr(given, "on_gpu", False) else "cpu"
                raise RuntimeError(f"Expected a '{'cuda' if gpu else 'cpu'}' device type for "
                                   f"generator but found '{found}'")


MODE = Pretence()


def entered(function: Any) -> Any:
    """The function under the mode, which torch leaves while it handles a call."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with entry():
            return function(*args, **kwargs)

    return call


def entry() -> Any:
    stack = torch.overrides._get_current_function_mode_stack()
    return contextlib.nullcontext() if MODE in stack or on.suspended else MODE


def as_cpu(function: Any) -> Any:
    """The function on tensors that it takes for the CPU's; results are tagged where inputs were."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            result = function(*args, **kwargs)
        return tag(result) if any(map(tagged, tree_leaves((args, kwargs)))) else result

    return call


# ------------------------------------------------------------ functions that know of a device


def _device(_: Any, x: Tensor) -> torch.device:
    return GPU if tagged(x) else x.device


def _to(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    args, other = list(args), kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other = args.pop(0)
    if other is not None:
        kwargs["dtype"] = other.dtype
        place: Any = GPU if tagged(other) else other.device
    elif args and isinstance(args[0], (str, int, torch.device)) and not isinstance(args[0], bool):
        place = args.pop(0)
    else:
        place = kwargs.pop("device", None)
        if args and args[0] is None:
            args.pop(0)
    if place is None:
        result = function(x, *args, **kwargs)
        return tag(result) if tagged(x) else result
    gpu = is_gpu(place)
    if on.graph is not None and gpu != tagged(x) and not kwargs.get("non_blocking"):
        raise RuntimeError("operation not permitted when stream is capturing: to")
    return moved(function(x, CPU if gpu else place, *args, **kwargs), gpu)


def _cuda(_: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _to(Tensor.to, x, GPU)


def _cpu(_: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _to(Tensor.to, x, CPU)


def _numpy(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tagged(x):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")
    return function(x, *args, **kwargs)


def _gradients(function: Any, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad: each gradient lies where its input does."""
    upstream = kwargs.get("grad_outputs", args[0] if args else None)
    pairs = zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (outputs, upstream)),
                strict=False)
    refuse_upstream(*zip(*pairs, strict=True))
    result = function(outputs, inputs, *args, **kwargs)
    for x, gradient in zip([inputs] if isinstance(inputs, Tensor) else inputs, result, strict=True):
        if tagged(x):
            tag(gradient)
    return result


def refuse_upstream(outputs: Any, gradients: Any) -> None:
    for i, (output, gradient) in enumerate(zip(outputs, gradients, strict=False)):
        if gradient is not None and tagged(output) != tagged(gradient):
            raise RuntimeError(f"invalid gradient at index {i} - expected device "
                               f"{_device(None, output)} but got {_device(None, gradient)}")


SPECIAL = {
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: lambda _, x: tagged(x),
    Tensor.is_cpu.__get__: lambda function, x: not tagged(x) and function(x),
    Tensor.get_device: lambda function, x: 0 if tagged(x) else function(x),
    Tensor.to: _to, Tensor.cuda: _cuda, Tensor.cpu: _cpu, Tensor.numpy: _numpy,
    Tensor.__array__: _numpy, Tensor.pin_memory: lambda _, x, *args: x.clone(),
    Tensor.is_pinned: lambda _, x, *args: False, torch.autograd.grad: _gradients,
}


# ------------------------------------------------------------------------------- torch.cuda


class Ready:
    """A stream or a device: everything is done when it is asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.device_index, self.cuda_stream = GPU, 0, 0

    def __enter__(self) -> "Ready":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def synchronize(self, *args: Any) -> None:
        return None

    wait_stream = wait_event = synchronize

    def record_event(self, event: Any = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


class Event(Ready):
    """The host's clock."""

    at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


class Graph:
    """The calls of a capture, with their results."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.data.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


@contextlib.contextmanager
def capturing(graph: Graph, *args: Any, **kwargs: Any):
    on.graph = graph
    try:
        yield
    finally:
        on.graph = None


def _cuda_functions() -> dict[str, Any]:
    values = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
              "get_device_name": NAME, "get_device_capability": (9, 0), "memory_allocated": 0,
              "get_device_properties": PROPERTIES, "max_memory_allocated": 0,
              "memory_reserved": 0, "max_memory_reserved": 0, "mem_get_info": (MEMORY, MEMORY),
              "is_bf16_supported": True, "initial_seed": 0, "current_stream": Ready(),
              "default_stream": Ready()}
    found = {name: lambda *args, value=value, **kwargs: value for name, value in values.items()}
    for name in ("init", "_lazy_init", "synchronize", "reset_peak_memory_stats", "empty_cache",
                 "manual_seed", "manual_seed_all", "seed", "set_device", "set_rng_state", "_sleep",
                 "set_per_process_memory_fraction"):
        found[name] = lambda *args, **kwargs: None  # Dynamo wants each to be a function of its own
    found["get_rng_state"] = lambda *args: torch.get_rng_state()
    found["is_current_stream_capturing"] = lambda: on.graph is not None
    for name in ("Stream", "stream", "device", "device_of"):
        found[name] = type(name, (Ready,), {})
    return found | {"Event": Event, "CUDAGraph": Graph, "graph": capturing}


# ---------------------------------------------------------------- where Python is called back


def _patch_callbacks() -> None:
    """Bodies of operators and of backwards run under the mode, and gradients come tagged."""
    operator = custom_ops.CustomOpDef
    stock_kernel, stock_autograd = operator.register_kernel, operator.register_autograd

    def register_kernel(self: Any, device_types: Any, fn: Any = None, /) -> Any:
        register = stock_kernel(self, device_types)
        return register(entered(fn)) if fn else lambda fn: register(entered(fn))

    def register_autograd(self: Any, backward: Any, /, *, setup_context: Any = None) -> None:
        stock_autograd(self, backward, setup_context=setup_context and entered(setup_context))

    operator.register_kernel, operator.register_autograd = register_kernel, register_autograd
    stock_engine, stock_apply = autograd_graph._engine_run_backward, BackwardCFunction.apply

    def engine(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        before, on.backward = on.backward, any(map(tagged, outputs))
        inside = entry()
        if inside is MODE:  # torch's own, made since the call was looked at
            tag([g for x, g in zip(outputs, args[0], strict=True) if tagged(x)])
        elif not on.suspended:
            refuse_upstream(outputs, args[0])
        try:
            with inside:
                return stock_engine(outputs, *args, **kwargs)
        finally:
            on.backward = before

    def apply(self: Any, *gradients: Any) -> Any:
        if not on.suspended and on.backward:
            tag(gradients)
        with entry():
            return stock_apply(self, *gradients)

    autograd_graph._engine_run_backward = torch.autograd._engine_run_backward = engine
    BackwardCFunction.apply = apply


def _patch_launches() -> None:
    try:
        import triton.runtime.interpreter as interpreter
    except ImportError:
        return
    stock = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [getattr(x, "base", x) for x in tree_leaves((args, kwargs))]
        for i, x in enumerate(given):
            if isinstance(x, Tensor) and not on.suspended and not tagged(x) and x.data_ptr():
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton "
                                 "(cpu tensor?)")
        with suspended():
            return stock(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch


def install() -> None:
    """Pretend from now on, in this thread. Once a process, before anything imports fastllm."""
    if on.installed:
        return
    on.installed = True
    torch.Generator = Generator
    for name, value in _cuda_functions().items():
        setattr(torch.cuda, name, value)
    _patch_callbacks()
    _patch_launches()
    torch.compile = lambda model=None, **options: model if model is not None else lambda f: f
    torch.library.opcheck = as_cpu(torch.library.opcheck)
    torch.export.export = as_cpu(torch.export.export)
    # It is asked inside of calls, where the mode is off, and beside backwards, where it is on.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks |= {name: as_cpu(check) for name, check in checks.items()}
    module = torch.export.ExportedProgram.module
    torch.export.ExportedProgram.module = lambda self, **options: as_cpu(module(self, **options))
    MODE.__enter__()


def pytest_configure(config: Any) -> None:
    """pytest -p pretend."""
    install()


def pytest_collection_modifyitems(items: Any) -> None:
    for item in items:
        if item.name == "test_it_is_on_where_there_is_no_gpu":
            item.add_marker(pytest.mark.skip(reason="both are on here"))
