"""How sums over ranks are made, and which engine makes them.

NCCL reduces natively. Gloo's reduce-scatter is an all-reduce in disguise, which sends everything
twice: on Gloo, and wherever the wire is narrower than fp32, ranks exchange their shards all-to-all
and each sums its own in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fastllm import cpu
from fastllm.config import UserError
from fastllm.dist.mesh import World
from fastllm.dist.python_engine import Options, PythonEngine


def is_native(world: World) -> bool:
    """Whether the process group has a reduce-scatter worth using."""
    return world.size > 1 and "nccl" in str(dist.get_backend_config(world.group))


def engine(backend: str, world: World, options: Options,
           watch: Callable[[str | None], None], *, new_group: bool) -> Any:
    """The engine by name; "auto": C++ where the extension was built.

    new_group: reduce in a process group of its own, so that gathers and reductions need no common
    order.
    """
    built = _cpp()
    if "int8" in (options.wire, options.param_wire) and is_native(world):
        built = None  # its int8 is for CPUs; the one in PyTorch runs on a GPU
    if backend not in ("auto", "cpp", "python"):
        raise UserError(f"zero: backend is {backend!r}, use auto, cpp or python")
    if backend == "cpp" and built is None:
        raise UserError("zero: backend cpp needs the C++ extension (fastllm-train info says what "
                        "is missing), and on GPUs no int8")
    reduce_group = world.group
    if new_group and world.size > 1:
        ranks = dist.get_process_group_ranks(world.group)
        reduce_group = dist.new_group(ranks)
    kind = PythonEngine if backend == "python" or built is None else built
    return kind(world.rank, world.size, world.group, reduce_group, options, watch)


def _cpp() -> Any:
    """The engine of the C++ extension, or None where there is none."""
    if not cpu.available():
        return None
    from fastllm import _C

    return _C.Engine
