"""Compile every launch of every kernel for sm_80, sm_90 and sm_100, without a GPU, and judge it.

    python bench/audit.py [--kernel NAME ...] [--arch 90 ...] [--peers] [--check]

The launches are recorded, not run: each kernel is called, plain and with each of its bench options,
at its audit shapes, in bfloat16, forward and backward, and its own launcher says what ships. Triton
then specialises as at a real launch (divisibility, ones, warps, stages) and compiles. Facts, from
the machine code: registers, stack, spills, shared memory, tensor-core instructions, widths of
global accesses, asynchronous copies, float64, and the occupancy that registers, shared memory and
warps leave. The gate: no spills, no stack, no float64; tensor-core instructions where there is a
product of 16-bit numbers, and on Hopper none that waits for itself; accesses of 128 bits where
tiles of 16-bit rows are loaded and stored, or an entry of `narrow_access` that says why not.

The golden file is bench/results/audit/triton-VERSION.json, in which kernels and architectures that
were not compiled keep theirs. --check writes nothing and fails where a launch is worse than the
file says, or is not in it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__.endswith("main__"):  # before Triton is imported, here and in the processes begun here
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is; 3.9 warns where it is unset
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from peers import prepare  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from fastllm.kernels import _triton  # noqa: E402
from fastllm.kernels._spec import Kernel, kernels  # noqa: E402

GOLDEN = ROOT / "bench" / "results" / "audit" / f"triton-{triton.__version__}.json"
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of each multiprocessor (CUDA C Programming Guide, compute capabilities).
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024

# The instructions of a generation that feed its tensor cores in full; older ones run at half.
NATIVE = {90: r"\b(?:HGMMA|IGMMA|QGMMA)\b", 100: r"\bUTC\w*MMA\b"}
TENSOR_CORE = r"\b(?:HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"
FLOAT64 = r"\bD(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b|\bMUFU\.\w*64H\b|\.F64\b"
TILE_16 = r"tensor<(?:\d+x)*(\d+)x!tt\.ptr<b?f16>"


@contextmanager
def recording(arch: int) -> Iterator[list[tuple[JITFunction, tuple, dict, Any]]]:
    """Inside, launches are for an architecture and are noted, with their grids, but not made."""
    recorded: list[tuple[JITFunction, tuple, dict, Any]] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((self, args, kwargs, grid))

    stock, JITFunction.run = JITFunction.run, record
    reason, _triton.why_not = _triton.why_not, lambda device: ""
    target, _triton.TARGET = _triton.TARGET, arch
    try:
        yield recorded
    finally:
        JITFunction.run, _triton.why_not, _triton.TARGET = stock, reason, target


def launches(kernel: Kernel, contender: str,
             arch: int) -> dict[str, tuple[JITFunction, tuple, dict]]:
    """What the launchers launch on an architecture, by "OPTIONS SHAPE FUNCTION"."""
    found, seen = {}, set()
    with recording(arch) as recorded:
        for options in ("", *kernel.bench_options):
            for shape in kernel.audit_shapes:
                recorded.clear()
                dtype = torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]
                call(kernel, kernel.bench_options.get(options, {}), shape, dtype, contender)
                label = f"{options} {'x'.join(map(str, shape))}".strip()
                for function, args, kwargs, _ in recorded:
                    same = identity(function, args, kwargs, arch)
                    name = f"{label} {function.__name__}"
                    if same not in seen:
                        seen.add(same)
                        times = sum(key.split(" #")[0] == name for key in found)
                        found[name + (f" #{times + 1}" if times else "")] = function, args, kwargs
    return found


def identity(function: JITFunction, args: tuple, kwargs: dict, arch: int) -> str:
    """The same for two launches that Triton compiles once."""
    source, choice = specialised(function, args, kwargs, arch)
    return source.hash() + str(sorted(choice.items()))


def call(kernel: Kernel, options: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype,
         contender: str) -> None:
    """A kernel forward and, where it has one, backward; options are those of its inputs."""
    made = kernel.inputs(shape, dtype, "cpu", torch.Generator().manual_seed(0), **options)
    forward = prepare(kernel, made, contender)
    if forward is None:
        return
    outputs = [x for x in tree_leaves(forward())
               if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and not kernel.mutates:
        torch.autograd.grad(outputs, made.differentiated(), [torch.ones_like(x) for x in outputs],
                            allow_unused=True)


def specialised(function: JITFunction, args: tuple, kwargs: dict,
                arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """The source and options that a launch with these arguments compiles, by Triton's own rules."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    chosen, signature, constants, hints = function._pack_args(backend, kwargs, bound,
                                                              specialization, options)
    return ASTSource(function, signature, constants, hints), dict(chosen.__dict__)


def width(access: str) -> int:
    """Bits of one global access of machine code, as in LDG.E.LTC128B.128.CONSTANT."""
    parts = access.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits
    if "U8" in parts or "S8" in parts:
        return 8
    return 16 if "U16" in parts or "S16" in parts else 32


def serialized(code: str) -> int:
    """Products of Hopper's that wait for themselves before the next onto the same sum begins.

    ptxas puts them into a row where it cannot prove that nobody touches a sum meanwhile, and the
    tensor cores then idle between them. A chain in order waits at its last product alone (gsb0).
    """
    found = list(re.finditer(r"\bHGMMA\.\S+ (R\d+),(.*?);", code))
    return sum(one[1] == after[1] and "gsb0" in one[2]
               and not re.search(r"\b(?:MUFU|F2FP|FFMA|FMUL|BRA)\b", code[one.end():after.start()])
               for one, after in itertools.pairwise(found))


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that can be resident at once."""
    by_registers = REGISTERS // (warps * 32 * -(-registers // 8) * 8)
    by_shared = SHARED[arch] // (shared + RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def examine(function: JITFunction, args: tuple, kwargs: dict, arch: int) -> dict[str, Any]:
    """Compile one launch; the facts of its machine code."""
    return facts_of(build(function, args, kwargs, arch), arch)


def build(function: JITFunction, args: tuple, kwargs: dict, arch: int) -> CompiledKernel:
    source, options = specialised(function, args, kwargs, arch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(compiled: CompiledKernel, tool: str, *flags: str) -> str:
    """What one of NVIDIA's tools prints of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True,
                              check=True).stdout


def usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers, and bytes of stack, of a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", inspect(compiled, "cuobjdump", "-res-usage"))
    return int(found[1]), int(found[2])


def facts_of(compiled: CompiledKernel, arch: int) -> dict[str, Any]:
    (registers, stack), code = usage(compiled), inspect(compiled, "nvdisasm", "-c", "-ndf")
    ttir, metadata = compiled.asm["ttir"], compiled.metadata

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    def widths(pattern: str) -> dict[str, int]:
        bits = Counter(width(access) for access in re.findall(pattern, code))
        return {str(size): bits[size] for size in sorted(bits, reverse=True)}

    def tiles(operation: str) -> bool:
        lines = re.findall(rf"tt\.{operation} .*", ttir)
        return any(int(n) >= 8 for line in lines for n in re.findall(TILE_16, line))

    return {"warps": metadata.num_warps, "registers": registers, "stack": stack,
            "spills": count(r"\b(?:LDL|STL)\b"), "shared": metadata.shared,
            "occupancy": occupancy(arch, registers, metadata.shared, metadata.num_warps),
            "tensor_core": count(TENSOR_CORE),
            "native": count(NATIVE[arch]) if arch in NATIVE else 0,
            "serialized": serialized(code), "float64": count(FLOAT64),
            "loads": widths(r"\bLDG(?:STS)?\.E\S*"), "stores": widths(r"\bSTG\.E\S*"),
            "async_copies": count(r"\bLDGSTS\b"), "tma": count(r"\bUTMA(?:LDG|STG|REDG)\b"),
            "dots": len(re.findall(r"tt\.dot .*(?:xb?f16>|xf8|xi8>|= tf32)", ttir)),
            "row_loads": tiles("load"), "row_stores": tiles("store")}


def audit(kernel_name: str, contender: str, arch: int) -> dict[str, dict[str, Any] | str]:
    """Facts by key, or a line in their place where compiling fails."""
    torch.set_num_threads(1)
    kernel = next(kernel for kernel in kernels() if kernel.name == kernel_name)
    results: dict[str, dict[str, Any] | str] = {}
    prefix = kernel.name if contender == "ours" else f"{contender} {kernel.name}"
    try:
        found = launches(kernel, contender, arch)
    except Exception as error:
        return {prefix: f"cannot be recorded: {type(error).__name__}: {error}".splitlines()[0]}
    for name, launch in found.items():
        try:
            results[f"{prefix} {name} sm_{arch}"] = examine(*launch, arch)
        except Exception as error:
            results[f"{prefix} {name} sm_{arch}"] = (
                f"does not compile: {type(error).__name__}: {error}".splitlines()[0])
    return results


def offences(facts: dict[str, Any], excused: bool) -> Iterator[str]:
    """What the gate refuses of one launch, whatever the golden file says."""
    for name in ("spills", "stack", "serialized", "float64"):
        if facts[name]:
            yield f"{name} {facts[name]}, must be 0"
    if facts["dots"] and not facts["tensor_core"]:
        yield "has products of 16-bit numbers but no tensor-core instruction"
    if not excused and not facts["tma"]:
        for operation in ("loads", "stores"):
            widest = max(map(int, facts[operation]), default=0)
            if facts[f"row_{operation}"] and widest < 128:
                yield (f"{operation} 16-bit rows {widest} bits at a time, not 128, and no entry of "
                       "narrow_access says why")


def worse(facts: dict[str, Any], golden: dict[str, Any]) -> Iterator[str]:
    """Where a launch falls behind the golden file; better is welcome."""
    for name, slack in (("registers", 16), ("stack", 0), ("spills", 0), ("shared", 4096),
                        ("float64", 0)):
        if facts[name] > golden[name] + slack:
            yield f"{name} {facts[name]}, was {golden[name]}"
    if facts["occupancy"] < golden["occupancy"]:
        yield f"occupancy {facts['occupancy']}, was {golden['occupancy']}"
    for name in ("tensor_core", "native", "async_copies", "tma"):
        if golden.get(name) and not facts[name]:  # files of before "native" lack it
            yield f"{name} gone, was {golden[name]}"
    for name in ("loads", "stores"):
        now, then = (max(map(int, f[name]), default=0) for f in (facts, golden))
        if now < then:
            yield f"{name} {now} bits wide, was {then}"


def judge(kernel: Kernel, results: dict[str, Any], golden: dict[str, Any],
          architectures: list[int], check: bool) -> Iterator[str]:
    """One line for each thing that the gate refuses of this kernel."""
    if not kernel.audit_shapes:
        yield f"{kernel.name}: has no audit_shapes"
    needed = set()
    for key, facts in results.items():
        if isinstance(facts, str):
            yield f"{key}: {facts}"
            continue
        function = key.split(" sm_")[0].split(" #")[0].rpartition(" ")[2]
        if list(offences(facts, False)) != list(offences(facts, True)):
            needed.add(function)
        for line in offences(facts, function in kernel.narrow_access):
            yield f"{key}: {line}"
        if check:
            for line in worse(facts, golden[key]) if key in golden else ["not in the golden file"]:
                yield f"{key}: {line}"
    for function in sorted(set(kernel.narrow_access) - needed):
        yield f"{kernel.name}: narrow_access[{function!r}] is not needed"
    if check:
        for key in golden:
            if mine(key, kernel.name) and key not in results and arch_of(key) in architectures:
                yield f"{key}: in the golden file, but no longer launched"


def mine(key: str, name: str) -> bool:
    return key.startswith(name + " ")


def arch_of(key: str) -> int:
    return int(key.rpartition("sm_")[2])


def show(results: dict[str, Any]) -> None:
    print(f"{'launch':84} {'warps':>5} {'regs':>5} {'stack':>5} {'spill':>5} {'smem':>6} "
          f"{'occ':>4} {'tensor':>6} {'f64':>3} {'tma':>3}  loads / stores by width")
    for key, facts in results.items():
        if isinstance(facts, dict):
            by_width = " / ".join(", ".join(f"{n}x{bits}" for bits, n in facts[name].items()) or "-"
                                  for name in ("loads", "stores"))
            print(f"{key:84} {facts['warps']:5} {facts['registers']:5} {facts['stack']:5} "
                  f"{facts['spills']:5} {facts['shared']:6} {facts['occupancy']:4.2f} "
                  f"{facts['tensor_core']:6} {facts['float64']:3} {facts['tma']:3}  {by_width}")


def run(names: list[str], contenders: list[str], architectures: list[int],
        processes: int) -> dict[str, Any]:
    """Facts of every launch; order is the registry's, whichever process is done first."""
    todo = [(name, contender, arch) for name in names for contender in contenders
            for arch in architectures]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(audit, *zip(*todo, strict=True)))
    return {key: facts for part in parts for key, facts in part.items()}


def write(golden: dict[str, Any], results: dict[str, Any], names: list[str],
          architectures: list[int], peers: bool) -> None:
    """The new facts in the place of the old ones of the same kernels and architectures."""
    def kept(key: str) -> bool:
        name = key.removeprefix("liger ")
        again = peers or name == key
        return not (again and any(mine(name, n) for n in names) and arch_of(key) in architectures)

    found = {key: facts for key, facts in results.items() if isinstance(facts, dict)}
    merged = {key: facts for key, facts in golden.items() if kept(key)} | found
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(merged[key])}" for key in sorted(merged))
    GOLDEN.write_text("{\n" + lines + "\n}\n")
    print(f"written to {GOLDEN.relative_to(ROOT)}")


def main() -> int:
    registry = {kernel.name: kernel for kernel in kernels()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", choices=registry, metavar="NAME", help="only these")
    parser.add_argument("--arch", nargs="*", type=int, choices=ARCHITECTURES, help="only these")
    parser.add_argument("--peers", action="store_true", help="compile Liger's launches too")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail where a launch is worse than the golden file")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    names = options.kernel or list(registry)
    architectures = options.arch or list(ARCHITECTURES)
    contenders = ["ours", *(["liger"] if options.peers else [])]
    results = run(names, contenders, architectures, options.processes)
    show(results)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    wrong = [line for name in names for line in judge(
        registry[name], {key: facts for key, facts in results.items() if mine(key, name)}, golden,
        architectures, options.check)]
    if not options.check:
        write(golden, results, names, architectures, options.peers)
    for line in wrong:
        print(f"audit: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
