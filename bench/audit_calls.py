"""Compile, without a GPU, the launches of all that tests and benchmarks call, and say what fails.

    python bench/audit_calls.py [--kernel NAME ...] [--arch 90] [--every] [--count]

The audit (bench/audit.py) looks closely at what ships, in bfloat16 at a few shapes. This asks of
far more launches only whether a GPU would take them: each kernel is called at its bench shapes and
those of the sweeps, with each of its bench options, in bfloat16, and in each of its types at its
test shapes and, with each variant, at the shapes that tests/kernels/test_all.py tries variants on;
forward and backward. Launches that Triton tells apart are compiled once each. Exit code 1: one does
not compile, needs more shared memory than a block can have, or has a grid larger than a GPU's.
Stack, which is what spills take, is told, not judged. No file is written.

--every: variants at each test shape. --count: only says how many launches there are to compile.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__.endswith("main__"):  # before Triton is imported, here and in the processes begun here
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is; 3.9 warns where it is unset
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import audit  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

from fastllm.kernels._spec import Kernel, Shape, kernels  # noqa: E402

GRID = (2**31 - 1, 65535, 65535)
SMALL = 1 << 20
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Untouched(TorchDispatchMode):
    """Large tensors get memory that nothing is written to, and so none: the system hands out pages
    when they are touched. Small ones are computed, for what a launch depends on is in them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastllm":
            with self:  # an operator of ours, seen from the inside
                return function.redispatch(CPU, *args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        large = any(x.numel() > SMALL for x in given)
        if function.is_view or (given and not large and function._schema.is_mutable):
            return function(*args, **kwargs)
        if function._schema.is_mutable:
            return args[0] if function._schema.returns else None
        try:
            shapes = _meta(function, args, kwargs)
        except (RuntimeError, NotImplementedError):  # what depends on numbers
            return function(*args, **kwargs)
        made = [x for x in tree_leaves(shapes) if isinstance(x, torch.Tensor)]
        if not large and all(x.numel() <= SMALL for x in made):
            return function(*args, **kwargs)
        return tree_map_only(torch.Tensor, _untouched, shapes)


def _meta(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator makes, without memory."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: torch.empty_strided(
        x.shape, x.stride(), dtype=x.dtype, device="meta"), (args, kwargs))
    names = {argument.name for argument in function._schema.arguments}
    changed = {"device": torch.device("meta"), "generator": None}
    return function(*args, **kwargs | {name: value for name, value in changed.items()
                                       if name in names and (name in kwargs or name == "device")})


def _untouched(shape: torch.Tensor) -> torch.Tensor:
    found = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
    return found.zero_() if found.numel() <= SMALL else found


def calls(kernel: Kernel, every: bool) -> Iterator[tuple[str, Shape, torch.dtype,
                                                        Mapping[str, Any]]]:
    """Name, shape, type and options of every call."""
    bfloat16 = torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    pairs = itertools.product(kernel.bench_shapes, ("", *kernel.bench_options))
    for shape, name in dict.fromkeys([*pairs, *sweeps().get(kernel.name, [])]):
        yield f"bench {name}".strip(), shape, bfloat16, kernel.bench_options.get(name, {})
    shapes = kernel.test_shapes
    for dtype, (name, options) in itertools.product(kernel.dtypes,
                                                    {"": {}, **kernel.variants}.items()):
        for shape in shapes if every or not name else {shapes[1], shapes[len(shapes) // 2]}:
            yield name, shape, dtype, options


def sweeps() -> dict[str, list[tuple[Shape, str]]]:
    """SWEEPS of bench/kernels.py, a name that the package of the kernels has, too."""
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "kernels.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SWEEPS


@dataclass
class Found:
    """What came of a part of a kernel's launches."""

    launches: int = 0
    stacks: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of one core, for each launch's compilation."""
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        for name in ("launches", "stacks", "seconds", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        return (f"{self.launches:5} launches, {len(self.wrong)} wrong, {self.stacks} with a stack, "
                f"{sum(self.seconds):6.1f} s to compile, the longest "
                f"{max(self.seconds, default=0.0):4.1f} s")


def record(kernel: Kernel, arch: int, every: bool,
           found: Found) -> dict[str, tuple[Any, tuple, dict]]:
    """The launches to compile, by "OPTIONS TYPE SHAPE FUNCTION"; what cannot be goes to `found`."""
    unlike: dict[str, tuple[str, tuple[Any, tuple, dict]]] = {}
    for name, shape, dtype, options in calls(kernel, every):
        label = f"{name} {str(dtype)[6:]} {'x'.join(map(str, shape))}".strip()
        with audit.recording(arch) as recorded:
            try:
                with Untouched():
                    audit.call(kernel, options, shape, dtype, "ours")
            except Exception as error:
                found.wrong.append(f"{label}: cannot be recorded: {brief(error)}")
        for function, args, kwargs, grid in recorded:
            at = f"{label} {function.__name__}"
            if any(n > most for n, most in zip(grid, GRID, strict=False)):
                found.wrong.append(f"{at}: its grid is {grid}, beyond {GRID}")
            try:
                unlike.setdefault(audit.identity(function, args, kwargs, arch),
                                  (at, (function, args, kwargs)))
            except Exception as error:
                found.wrong.append(f"{at}: cannot be specialised: {brief(error)}")
    return {f"{at} #{i}": launch for i, (at, launch) in enumerate(unlike.values(), 1)}


def brief(error: Exception) -> str:
    """The type and the last two lines, which say what the compiler had against it."""
    lines = [line.strip() for line in str(error).strip().splitlines()[-2:]]
    return f"{type(error).__name__}: {' / '.join(lines)}"[:500]


def processor() -> float:
    """Seconds of a core that this process and those it waited for, as ptxas, have used."""
    return sum(os.times()[:4])


def examine(kernel_name: str, part: int, options: argparse.Namespace) -> Found:
    """A part of a kernel's launches; a line for each that is wrong or has a stack, at once."""
    torch.set_num_threads(1)
    found, arch = Found(), options.arch
    kernel = next(kernel for kernel in kernels() if kernel.name == kernel_name)
    mine = dict(list(record(kernel, arch, options.every, found).items())[part::options.processes])
    found.launches = len(mine)
    if part:  # each part records all
        found.wrong.clear()
    for line in found.wrong:
        print(f"WRONG {kernel_name} {line}", flush=True)
    for at, launch in ({} if options.count else mine).items():
        began = processor()
        try:
            compiled = audit.build(*launch, arch)
            found.seconds.append(processor() - began)
            _, stack = audit.usage(compiled)
        except Exception as error:
            found.wrong.append(f"{at}: does not compile: {brief(error)}")
        else:
            shared, limit = compiled.metadata.shared, audit.SHARED[arch] - audit.RESERVED
            if shared > limit:
                found.wrong.append(f"{at}: {shared} bytes of shared memory, above {limit}")
            elif stack:
                found.stacks += 1
                print(f"stack {kernel_name} {at}: {stack} bytes", flush=True)
                continue
            else:
                continue
        print(f"WRONG {kernel_name} {found.wrong[-1]}", flush=True)
    return found


def main() -> int:
    names = [kernel.name for kernel in kernels()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", choices=names, metavar="NAME", help="only these")
    parser.add_argument("--arch", type=int, choices=audit.ARCHITECTURES, default=90)
    parser.add_argument("--every", action="store_true", help="variants at each test shape")
    parser.add_argument("--count", action="store_true", help="compile nothing")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    total = Found()
    todo = [(name, part, options) for name in options.kernel or names
            for part in range(options.processes)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            for (name, part, _), found in zip(todo, pool.map(examine, *zip(*todo, strict=True)),
                                              strict=True):
                print(f"{name:20} {part + 1}/{options.processes} {found}", flush=True)
                total.add(found)
    print(f"sm_{options.arch}: {total}")
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
