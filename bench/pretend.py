"""A pretended GPU: finds mistakes of devices in tests and benchmarks where there is no GPU.

    PYTHONPATH=bench pytest -p pretend tests/kernels/test_rope.py
    python -c "import pretend; pretend.install(); ..."      (before anything imports triton)

torch then reports one CUDA device. Its tensors lie in the CPU's memory under a tag on their
storage, so that views keep it; copies to and from the CPU are real copies. A function mode answers
for their device and refuses what CUDA refuses: tensors of both devices in one call, numpy, a
generator of the other device, waiting while a CUDA graph is captured. Triton kernels run in the
interpreter and refuse CPU tensors. A captured graph keeps its calls and makes them again.

What it cannot find: faults of machine code, of shared memory, of registers and of timing; races
between programs, streams or host and device; what other sums a GPU's own products and reductions
give; what CUDA's operators lack. torch.compile runs eagerly, for Inductor cannot make CUDA code
here; opcheck, torch.export and make_fx see CPU tensors, and fake tensors of it do not work. Threads
and processes that a program starts see no GPU, and tensors that C++ hands to a hook on gradients
may have no tag.
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
import torch.utils.checkpoint
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import graph as autograd_graph
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU, MEMORY = torch.device("cuda", 0), torch.device("cpu"), 80 << 30
PROPERTIES = SimpleNamespace(
    name="pretended GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132,
    warp_size=32, regs_per_multiprocessor=65536, L2_cache_size=50 << 20, is_integrated=0,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, max_threads_per_multi_processor=2048)
# Tensors of both devices may meet in these.
ACROSS = {Tensor.copy_, Tensor.set_, Tensor.data.__set__, Tensor.fill_, torch._foreach_copy_,
          torch._has_compatible_shallow_copy_type}
# A CPU tensor of no dimension joins in with CUDA ones, but not here.
STRICT = {"cat", "concat", "concatenate", "stack", "equal", "allclose", "__set__"}
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal",
         "masked_select", "unique", "cpu"}
FROM_HOST = {"tensor", "as_tensor", "asarray"}
# Tests of what is not pretended: no interpreter, torch.compile, fake tensors, other processes.
LEFT_OUT = {"test_it_is_on_where_there_is_no_gpu", "test_a_new_process_takes_what_was_chosen",
            "test_sizes_that_are_symbols_take_what_is_remembered_or_ours",
            "test_nothing_is_timed_under_fake_tensors_or_another_mode",
            "test_compiled_calls_take_what_is_remembered_or_ours",
            "test_one_that_cannot_be_traced_gives_way_in_a_graph",
            "test_what_is_remembered_is_traced_if_it_can_be",
            "test_the_real_ones_can_be_traced_with_dynamic_lengths"}
state = SimpleNamespace(installed=False, suspended=0, depth=0, backward=False, graph=None)


def is_gpu(device: Any) -> bool:
    """Whether what stands for a device is CUDA; a bare number is."""
    return isinstance(device, int) or torch.device(device).type == "cuda"


def tagged(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    with torch._C.DisableTorchFunction(), contextlib.suppress(RuntimeError, NotImplementedError):
        return "on_gpu" in vars(bare(leaf).untyped_storage())
    return False  # it has no storage


def bare(tensor: Tensor) -> Tensor:
    """What vmap and its like have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def tag(tree: Any) -> Any:
    """The same, with every tensor in it on the GPU."""
    with torch._C.DisableTorchFunction():
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device == CPU:
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    # Python's object of a storage lives as long as the storage itself.
                    bare(leaf).untyped_storage().on_gpu = True
    return tree


def moved(tensor: Tensor, gpu: bool) -> Tensor:
    """The tensor on a device: copied if it lies in memory of the other."""
    if tensor.is_meta or tagged(tensor) == gpu:
        return tensor
    return tag(tensor.clone()) if gpu else tensor.clone()


def place(tensor: Tensor) -> torch.device:
    return GPU if tagged(tensor) else tensor.device


class Generator(torch._C.Generator):
    """A CPU generator that says which device it is for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, CPU)
        made.on_gpu = is_gpu(device)
        return made

    @property
    def device(self) -> torch.device:
        return GPU if self.on_gpu else CPU


# ------------------------------------------------------------------------------------ refusals


def refuse_mixing(name: str, args: Any, tensors: list[Tensor], gpu: list[bool]) -> None:
    """Raises where a call takes tensors of both devices, as far as CUDA does."""
    if name == "__getitem__":
        # A single number is read and used as such.
        if not gpu[0] and any(x.dim() or x.dtype == torch.bool for x in tensors[1:] if tagged(x)):
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               "indexed tensor (cpu)")
        return
    if name == "__setitem__":
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dim()]
        values = [x for x in args[2:] if isinstance(x, Tensor) and x.dim() and indices]
        wrong = any(tagged(x) for x in indices if not gpu[0]) or any(
            tagged(x) != gpu[0] for x in values)
    else:
        in_place = name.endswith("_") and not name.endswith("__")
        wrong = name in STRICT or (in_place and not gpu[0]) or any(
            x.dim() for x, there in zip(tensors, gpu, strict=True) if not there)
    if wrong:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, cuda:0 and cpu! (in {name})")


def refuse_generator(given: Any, gpu: bool) -> None:
    for one in given:
        if isinstance(one, torch._C.Generator) and getattr(one, "on_gpu", False) != gpu:
            wanted, found = ("cuda", "cpu") if gpu else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found "
                               f"'{found}'")


def refuse_upstream(outputs: Any, gradients: Any) -> None:
    for i, (output, gradient) in enumerate(zip(outputs, gradients, strict=False)):
        if gradient is not None and tagged(output) != tagged(gradient):
            raise RuntimeError(f"invalid gradient at index {i} - expected device {place(output)} "
                               f"but got {place(gradient)}")


def refuse_waiting(name: str, waits: bool) -> None:
    if waits and state.graph is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing ({name})")


# ------------------------------------------------------------------------------------- the mode


class Pretence(TorchFunctionMode):
    """Every call of torch's passes through here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if state.suspended:
            return function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gpu, name = [tagged(x) for x in tensors], getattr(function, "__name__", "")
        refuse_waiting(name, any(gpu) and name in WAITS)
        if function in SPECIAL:
            return SPECIAL[function](function, *args, **kwargs)
        where = None if kwargs.get("device") is None else is_gpu(kwargs["device"])
        refuse_waiting(name, bool(where) and name in FROM_HOST)
        refuse_generator((*args, *kwargs.values()), any(gpu) if where is None else where)
        # An operator of somebody's own looks for itself.
        known = not isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) \
            or str(function).startswith("aten.")
        if where is None and known and any(gpu) and not all(gpu) and function not in ACROSS:
            refuse_mixing(name, args, tensors, gpu)
        if where:
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if any(gpu) and "out_dtype" in kwargs:  # a product with wider sums: CUDA alone has it
            wide = kwargs.pop("out_dtype")
            args = tree_map(lambda x: x.to(wide) if isinstance(x, Tensor) else x, args)
        with self.inside(any(gpu)):
            result = function(*args, **kwargs)
        if where is not None:
            result = moved(result, where) if name in FROM_HOST else tag(result) if where else result
        elif any(gpu) and known and function not in ACROSS and (
                gpu[0] or name not in ("__getitem__", "__setitem__")):
            tag(result)
        if state.graph is not None and not state.depth:
            state.graph.calls.append((function, args, kwargs, result))
        return result

    @contextlib.contextmanager
    def inside(self, gpu: bool):
        """A call that torch makes; on the GPU, CPU operators are cast as CUDA's autocast would."""
        before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        cast = gpu and (before[0] or torch.is_autocast_enabled("cuda"))
        state.depth += 1
        try:
            if cast:
                torch.set_autocast_enabled("cpu", torch.is_autocast_enabled("cuda"))
                torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))
            yield
        finally:
            state.depth -= 1
            if cast:
                torch.set_autocast_enabled("cpu", before[0])
                torch.set_autocast_dtype("cpu", before[1])


MODE = Pretence()


def entry() -> Any:
    """The mode, which torch leaves while it handles a call, for Python that is called back."""
    left = not state.suspended and MODE not in _get_current_function_mode_stack()
    return MODE if left else contextlib.nullcontext()


def entered(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with entry():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def suspended():
    state.suspended += 1
    try:
        yield
    finally:
        state.suspended -= 1


def as_cpu(function: Any) -> Any:
    """The function on tensors that it takes for the CPU's; results are tagged where inputs were."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            result = function(*args, **kwargs)
        return tag(result) if any(map(tagged, tree_leaves((args, kwargs)))) else result

    return call


# ---------------------------------------------------------------- calls that know of a device


def _to(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given, device = list(args), kwargs.pop("device", None)
    other = kwargs.pop("other", given.pop(0) if given and isinstance(given[0], Tensor) else None)
    if other is not None:
        device, kwargs["dtype"] = place(other), other.dtype
    elif given and (given[0] is None or isinstance(given[0], (str, int, torch.device))):
        device = given.pop(0)
    device = place(x) if device is None else device
    gpu = is_gpu(device)
    refuse_waiting("to", gpu != tagged(x) and not kwargs.get("non_blocking"))
    return moved(function(x, CPU if gpu else device, *given, **kwargs), gpu)


def _numpy(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tagged(x):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")
    return function(x, *args, **kwargs)


def _grad(function: Any, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Each gradient lies where its input does."""
    upstream = kwargs.get("grad_outputs", args[0] if args else None)
    refuse_upstream(*([x] if x is None or isinstance(x, Tensor) else x
                      for x in (outputs, upstream)))
    result = function(outputs, inputs, *args, **kwargs)
    for x, gradient in zip([inputs] if isinstance(inputs, Tensor) else inputs, result, strict=True):
        tag(gradient if tagged(x) else None)
    return result


SPECIAL = {
    Tensor.device.__get__: lambda function, x: place(x),
    Tensor.is_cuda.__get__: lambda function, x: tagged(x),
    Tensor.is_cpu.__get__: lambda function, x: place(x) == CPU,
    Tensor.get_device: lambda function, x: 0 if tagged(x) else function(x),
    Tensor.cuda: lambda function, x, *args, **kwargs: _to(Tensor.to, x, GPU),
    Tensor.cpu: lambda function, x, *args, **kwargs: _to(Tensor.to, x, CPU),
    Tensor.pin_memory: lambda function, x, *args: x.clone(),
    Tensor.to: _to, Tensor.numpy: _numpy, Tensor.__array__: _numpy, torch.autograd.grad: _grad,
}


# ----------------------------------------------------------------------------------- torch.cuda


class Ready:
    """A stream, an event, a device: everything is done when it is asked."""

    at = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.device_index, self.cuda_stream = GPU, 0, 0

    def __enter__(self) -> "Ready":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def record(self, *stream: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Ready") -> float:
        return 1e3 * (other.at - self.at)

    def synchronize(self, *others: Any) -> None:
        return None

    wait = wait_event = wait_stream = synchronize


class Graph:
    """The calls of a capture, with their results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Any] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(result), again, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any):
    state.graph = graph
    try:
        yield
    finally:
        state.graph = None


def cuda_functions() -> dict[str, Any]:
    values = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
              "get_device_name": PROPERTIES.name, "get_device_capability": (9, 0),
              "get_device_properties": PROPERTIES, "mem_get_info": (MEMORY, MEMORY),
              "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
              "max_memory_reserved": 0, "is_bf16_supported": True, "initial_seed": 0,
              "current_stream": Ready(), "default_stream": Ready()}
    values |= dict.fromkeys(("init", "_lazy_init", "synchronize", "reset_peak_memory_stats", "seed",
                             "empty_cache", "manual_seed", "manual_seed_all", "set_device",
                             "set_rng_state", "_sleep"))
    # A function each: Dynamo knows them by what they are.
    found = {name: lambda *args, value=value, **kwargs: value for name, value in values.items()}
    found |= {name: type(name, (Ready,), {}) for name in (
        "Stream", "stream", "Event", "device", "device_of")}
    return found | {"CUDAGraph": Graph, "graph": capture,
                    "get_rng_state": lambda *args: torch.get_rng_state(),
                    "is_current_stream_capturing": lambda: state.graph is not None}


# ------------------------------------------------------------------------------------ installing


def patch_callbacks() -> None:
    """Bodies of operators and of backwards run under the mode, and gradients come tagged."""
    kernel, autograd = CustomOpDef.register_kernel, CustomOpDef.register_autograd
    engine, apply = autograd_graph._engine_run_backward, BackwardCFunction.apply

    def register_kernel(self: Any, device_types: Any, fn: Any = None, /) -> Any:
        register = kernel(self, device_types)
        return register(entered(fn)) if fn else lambda fn: register(entered(fn))

    def register_autograd(self: Any, backward: Any, /, *, setup_context: Any = None) -> None:
        autograd(self, backward, setup_context=setup_context and entered(setup_context))

    def run_backward(outputs: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        before, state.backward = state.backward, any(map(tagged, outputs))
        inside = entry()
        if inside is MODE:  # torch's own gradients, made since the call was looked at
            tag([g for x, g in zip(outputs, gradients, strict=True) if tagged(x)])
        elif not state.suspended:
            refuse_upstream(outputs, gradients)
        try:
            with inside:
                return engine(outputs, gradients, *args, **kwargs)
        finally:
            state.backward = before

    def apply_backward(self: Any, *gradients: Any) -> Any:
        with entry():
            return apply(self, *(tag(gradients) if state.backward else gradients))

    CustomOpDef.register_kernel, CustomOpDef.register_autograd = register_kernel, register_autograd
    autograd_graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward
    BackwardCFunction.apply = apply_backward


def patch_launches() -> None:
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    stock = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        for i, x in enumerate(getattr(x, "base", x) for x in tree_leaves((args, kwargs))):
            if isinstance(x, Tensor) and x.data_ptr() and not tagged(x) and not state.suspended:
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton "
                                 "(cpu tensor?)")
        with suspended():
            return stock(self, *args, **kwargs)

    GridExecutor.__call__ = launch


def install() -> None:
    """Pretend from now on, in this thread; before anything imports fastllm."""
    if state.installed:
        return
    state.installed = True
    torch.Generator = Generator
    for name, value in cuda_functions().items():
        setattr(torch.cuda, name, value)
    patch_callbacks()
    patch_launches()
    torch.compile = lambda model=None, **options: model if model is not None else lambda f: f
    torch.library.opcheck = as_cpu(torch.library.opcheck)
    torch.export.export = as_cpu(torch.export.export)
    make_fx, module = proxy_tensor.make_fx, torch.export.ExportedProgram.module
    proxy_tensor.make_fx = lambda f, **options: as_cpu(make_fx(f, **options))
    torch.export.ExportedProgram.module = lambda self, **options: as_cpu(module(self, **options))
    # It looks at tensors inside of calls, where the mode is off, and in a backward, where it is on.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks |= {name: as_cpu(check) for name, check in checks.items()}
    MODE.__enter__()


def pytest_configure(config: Any) -> None:
    """pytest -p pretend."""
    install()


def pytest_collection_modifyitems(items: Any) -> None:
    for item in items:
        if item.name.partition("[")[0] in LEFT_OUT:
            item.add_marker(pytest.mark.skip(reason="a pretended GPU cannot show it"))
