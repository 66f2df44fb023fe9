"""Time every kernel of the registry on this GPU, beside torch, torch.compile, Liger and others.

    python bench/kernels.py [--out FILE] [--kernel NAME ...] [--options NAME ...]
                            [--contender NAME ...] [--dtype bfloat16] [--samples 50]
                            [--sweep] [--repeat-check RUNS]

For each shape and direction: the median of the samples (CUDA events, after warm-up, the L2 cache
flushed before each), GB/s or TFLOP/s against the kernel's floor, that as a share of the copy or
matrix-product rate measured on this GPU in the same run, and peak memory. The JSON holds device,
driver, versions, commit, clocks and every sample, and why a contender was left out. Others'
attention is first held to ours: a relative difference above DIFFERENCE is an error in its row.
--sweep: at the shapes of SWEEPS in place of the kernels' own. --repeat-check: times nothing, but
makes each call so many times, on inputs made anew; exit code 1 where the bits of a result or a
gradient change and the options do not say that they may. Without a GPU: one line and exit code 2.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cuda"
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from peers import PEERS, Forward, Lacks, prepare, results  # noqa: E402

from fastllm.kernels._spec import Call, Kernel, Shape, kernels  # noqa: E402

CONTENDERS = ("ours", "torch eager", "torch.compile", *PEERS)
DIFFERENCE = 0.05
# 16,384 tokens of 2,048 elements in sequences of one length. "packed" is the same for all lengths.
SWEEPS: dict[str, list[tuple[Shape, str]]] = {"attention": [
    ((16384 // length, length, length, 2048 // width // group, group, width), option)
    for width, group, length in itertools.product((64, 128), (1, 4),
                                                  (1024, 2048, 4096, 8192, 16384))
    for option in ("", "causal", "causal, atomics", "window", "packed")
    if option != "packed" or length == 1024]}


class Clock:
    """Times calls with CUDA events, the L2 cache flushed before each."""

    def __init__(self, samples: int):
        self.samples = samples
        # Several times the largest L2 cache there is, so that nothing of the last call is left.
        self.flush = torch.empty(512 << 20, dtype=torch.int8, device=DEVICE)

    def __call__(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of each sample."""
        for _ in range(5):
            call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)]
                  for _ in range(self.samples)]
        for start, stop in events:
            self.flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]


def rates(clock: Clock) -> dict[str, float]:
    """This GPU's own ceilings: bytes a second of a large copy, FLOP a second of large products."""
    source = torch.empty(2 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    taken = statistics.median(clock(lambda: target.copy_(source))) * 1e-3
    found = {"copy": 2 * source.numel() / taken}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(8192, 8192, device=DEVICE).to(dtype) for _ in range(2))
        taken = statistics.median(clock(lambda a=a, b=b: a @ b)) * 1e-3
        found[str(dtype)[6:]] = 2 * 8192**3 / taken
    return found


def directions(kernel: Kernel, forward: Forward, call: Call) -> dict[str, Callable[[], Any]]:
    """What to time: the forward, and where there is one the backward of a kept graph."""
    if kernel.mutates or not call.differentiated():
        return {"forward": forward}

    def made() -> list[torch.Tensor]:
        return [x for x in torch.utils._pytree.tree_leaves(forward())
                if isinstance(x, torch.Tensor) and x.requires_grad]

    outputs = made()
    upstream = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, call.differentiated(), upstream, retain_graph=True,
                                   allow_unused=True)

    def both() -> Any:
        return torch.autograd.grad(made(), call.differentiated(), upstream, allow_unused=True)

    # An op may do its backward's work in its forward: only the two together compare fairly.
    found = {"forward": forward, "backward": backward, "both": both}
    try:
        backward(), backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        del found["backward"]  # its forward's result was used up: it runs once a forward
    return found


def make(kernel: Kernel, shape: Shape, dtype: torch.dtype, option: str) -> Call:
    """The arguments of a case, the same each time."""
    return kernel.inputs(shape, dtype, DEVICE, torch.Generator(DEVICE).manual_seed(0),
                         **kernel.bench_options.get(option, {}))


def measure(kernel: Kernel, shape: Shape, dtype: torch.dtype, option: str,
            contenders: list[str], clock: Clock,
            ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Every contender and direction for one shape and one of the kernel's bench options."""
    options = dict(kernel.bench_options.get(option, {}))
    rows = []
    for name in contenders:
        # Arguments of its own: some contenders write into what they are given.
        call = make(kernel, shape, dtype, option)
        row = {"kernel": kernel.name, "options": option, "dtype": str(dtype)[6:],
               "shape": dict(zip(kernel.axes, shape, strict=True)), "contender": name}
        try:
            forward = prepare(kernel, call, name)
            if forward is None:
                continue
            if name in PEERS and kernel.name == "attention":
                row["difference"] = difference(kernel, forward, call)
            for direction, run in directions(kernel, forward, call).items():
                parts = ("forward", "backward") if direction == "both" else (direction,)
                floors = [sum(floor(shape, dtype, part, **options) for part in parts)
                          for floor in (kernel.floor_bytes, kernel.floor_flops)]
                rows.append(row | {"direction": direction} | timed(
                    run, *floors, clock, ceilings["copy"], ceilings[str(dtype)[6:]]))
        except Lacks as reason:
            rows.append(row | {"left_out": str(reason)})
        except Exception as error:  # a peer that cannot take a shape is a result, not the end
            if name == "ours":
                raise
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
        del call
        torch.compiler.reset()  # or the next shapes run into the limit of recompilations
        torch.cuda.empty_cache()
    return rows


def difference(kernel: Kernel, forward: Forward, call: Call) -> float:
    """The largest of a contender's results to ours. Raises ValueError above DIFFERENCE."""
    ours, theirs = ([x.detach().float() for x in results(kernel, run, call)]
                    for run in (prepare(kernel, call, "ours"), forward))
    found = max(float((b - a).norm() / a.norm()) for a, b in zip(ours, theirs, strict=True))
    if not found <= DIFFERENCE:
        raise ValueError(f"its results differ from ours by {found:.1e}")
    return found


def changes(kernel: Kernel, shape: Shape, dtype: torch.dtype, option: str, runs: int) -> int:
    """How many of so many runs of our forward and backward give other bits than the first."""
    first, changed = None, 0
    for _ in range(runs):
        call = make(kernel, shape, dtype, option)
        found = [x.detach().flatten().view(torch.uint8)
                 for x in results(kernel, prepare(kernel, call, "ours"), call)]
        first = first or found
        changed += not all(map(torch.equal, first, found))
    return changed


def repeat_check(cases: list[tuple[Kernel, Shape, str, str]],
                 runs: int) -> tuple[list[dict[str, Any]], bool]:
    """Rows of how many of the runs changed, and whether none did that may not."""
    rows, steady = [], True
    for kernel, shape, dtype, option in cases:
        promised = kernel.bench_options.get(option, {}).get("deterministic", True)
        row = {"kernel": kernel.name, "options": option, "dtype": dtype, "runs": runs,
               "shape": dict(zip(kernel.axes, shape, strict=True)), "deterministic": promised,
               "changed": changes(kernel, shape, getattr(torch, dtype), option, runs)}
        steady &= not (promised and row["changed"])
        rows.append(row)
        print(f"{title(row)} {row['changed']} of {runs} runs changed"
              + ("" if promised else ", as they may"), flush=True)
    return rows, steady


def timed(run: Callable[[], Any], size: int, work: int, clock: Clock, copy: float,
          product: float) -> dict[str, Any]:
    """Time and memory of a call that must move `size` bytes and do `work` FLOPs, on a GPU that
    copies and multiplies at these rates a second."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    samples = clock(run)
    seconds = statistics.median(samples) / 1e3
    # An op is bound by whichever of its floors takes longer at this GPU's own rates.
    return {"milliseconds": seconds * 1e3, "gigabytes_per_second": size / seconds / 1e9,
            "teraflops": work / seconds / 1e12,
            "bound": "bytes" if size / copy >= work / product else "flops",
            "share_of_ceiling": max(size / copy, work / product) / seconds,
            "peak_bytes": peak, "samples_milliseconds": samples}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return f"{command[0]} not found"
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"device": torch.cuda.get_device_name(), "python": platform.python_version(),
            "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda,
            "driver": output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem",
                             "--format=csv,noheader"),
            "versions": {name: version(name) for name in ("torch", "triton", "liger-kernel")},
            "commit": output("git", "rev-parse", "HEAD"),
            "changed": bool(output("git", "status", "--porcelain")),
            "when": datetime.now(UTC).isoformat(timespec="seconds")}


def title(row: dict[str, Any]) -> str:
    shape, op = "x".join(map(str, row["shape"].values())), f"{row['kernel']} {row['options']}"
    return f"{op:34} {shape:22} {row['dtype']:9}"


def table(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        name = f"{title(r)} {r['contender']:14}"
        if "error" in r or "left_out" in r:
            print(f"{name} failed: {r['error']}" if "error" in r
                  else f"{name} left out: {r['left_out']}")
            continue
        rate = (f"{r['gigabytes_per_second']:8.0f} GB/s" if r["bound"] == "bytes"
                else f"{r['teraflops']:6.0f} TFLOP/s")
        print(f"{name} {r['direction']:9}{r['milliseconds']:9.3f} ms {rate:>15} "
              f"{100 * r['share_of_ceiling']:4.0f} % {r['peak_bytes'] / 1e6:9.1f} MB", flush=True)


def cases(options: argparse.Namespace) -> list[tuple[Kernel, Shape, str, str]]:
    """Kernel, shape, type and options of everything that was asked for."""
    found = []
    for kernel in kernels():
        if options.kernel and kernel.name not in options.kernel:
            continue
        pairs = SWEEPS.get(kernel.name, []) if options.sweep else itertools.product(
            kernel.bench_shapes, ("", *kernel.bench_options))
        found += [(kernel, shape, dtype, option) for shape, option in pairs
                  for dtype in options.dtype
                  if options.options is None or option in options.options]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    parser.add_argument("--kernel", nargs="*", help="only these")
    parser.add_argument("--options", nargs="*", help='only these; "" is the plain call')
    parser.add_argument("--contender", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"],
                        choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="at the shapes of SWEEPS")
    parser.add_argument("--repeat-check", type=int, metavar="RUNS", help="compare bits only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/kernels.py times kernels on an NVIDIA GPU, and torch finds none here",
              file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    todo, record, steady = cases(options), {}, True
    if options.repeat_check:
        name = "repeats"
        rows, steady = repeat_check(todo, options.repeat_check)
    else:
        name, rows = "sweep" if options.sweep else "kernels", []
        clock = Clock(options.samples)
        ceilings = record["ceilings"] = rates(clock)
        print(f"{torch.cuda.get_device_name()}: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
              f"bfloat16 product {ceilings['bfloat16'] / 1e12:.0f} TFLOP/s")
        for kernel, shape, dtype, option in todo:
            made = measure(kernel, shape, getattr(torch, dtype), option, options.contender, clock,
                           ceilings)
            table(made)
            rows += made
    facts = machine()
    slug = facts["device"].lower().replace("nvidia", "").strip().replace(" ", "-")
    out = options.out or ROOT / "bench" / "results" / slug / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, **record, "results": rows}, indent=1) + "\n")
    print(f"written to {out}")
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main())
