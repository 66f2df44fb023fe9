"""Time every kernel of the registry on this GPU, beside torch, torch.compile and Liger.

    python bench/kernels.py [--out FILE] [--kernel NAME ...] [--dtype bfloat16] [--samples 50]

For each shape and direction: the median of the samples (CUDA events, after warm-up, the L2 cache
flushed before each), GB/s or TFLOP/s against the kernel's floor, that as a share of the copy or
matrix-product rate measured on this GPU in the same run, and peak memory. The JSON holds device,
driver, versions, commit, clocks and every sample. Without a GPU: one line and exit code 2.
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

from peers import Forward, prepare  # noqa: E402

from fastllm.kernels._spec import Call, Kernel, kernels  # noqa: E402

CONTENDERS = ("ours", "torch eager", "torch.compile", "torch fused", "liger")


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


def measure(kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, option: str, clock: Clock,
            ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Every contender and direction for one shape and one of the kernel's bench options."""
    options = dict(kernel.bench_options.get(option, {}))
    results = []
    for name in CONTENDERS:
        # Arguments of its own: some contenders write into what they are given.
        call = kernel.inputs(shape, dtype, DEVICE, torch.Generator(DEVICE).manual_seed(0),
                             **options)
        row = {"kernel": kernel.name, "options": option, "dtype": str(dtype)[6:],
               "shape": dict(zip(kernel.axes, shape, strict=True)), "contender": name}
        try:
            forward = prepare(kernel, call, name)
            if forward is None:
                continue
            for direction, run in directions(kernel, forward, call).items():
                parts = ("forward", "backward") if direction == "both" else (direction,)
                floors = [sum(floor(shape, dtype, part, **options) for part in parts)
                          for floor in (kernel.floor_bytes, kernel.floor_flops)]
                results.append(row | {"direction": direction} | timed(
                    run, *floors, clock, ceilings["copy"], ceilings[str(dtype)[6:]]))
        except Exception as error:  # a peer that cannot take a shape is a result, not the end
            if name == "ours":
                raise
            results.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
        del call
        torch.cuda.empty_cache()
    return results


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


def table(results: list[dict[str, Any]]) -> None:
    for r in results:
        shape = "x".join(map(str, r["shape"].values()))
        op = f"{r['kernel']} {r['options']}"
        name = f"{op:34} {shape:22} {r['dtype']:9} {r['contender']:14}"
        if "error" in r:
            print(f"{name} failed: {r['error']}")
            continue
        rate = (f"{r['gigabytes_per_second']:8.0f} GB/s" if r["bound"] == "bytes"
                else f"{r['teraflops']:6.0f} TFLOP/s")
        print(f"{name} {r['direction']:9}{r['milliseconds']:9.3f} ms {rate:>15} "
              f"{100 * r['share_of_ceiling']:4.0f} % {r['peak_bytes'] / 1e6:9.1f} MB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    parser.add_argument("--kernel", nargs="*", help="only these")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"],
                        choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--samples", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/kernels.py times kernels on an NVIDIA GPU, and torch finds none here",
              file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(options.samples)
    ceilings = rates(clock)
    print(f"{torch.cuda.get_device_name()}: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
          f"bfloat16 product {ceilings['bfloat16'] / 1e12:.0f} TFLOP/s")
    results = []
    for kernel in kernels():
        if options.kernel and kernel.name not in options.kernel:
            continue
        for shape, dtype, option in itertools.product(
                kernel.bench_shapes, options.dtype, ("", *kernel.bench_options)):
            rows = measure(kernel, shape, getattr(torch, dtype), option, clock, ceilings)
            table(rows)
            results += rows
    facts = machine()
    slug = facts["device"].lower().replace("nvidia", "").strip().replace(" ", "-")
    out = options.out or ROOT / "bench" / "results" / slug / "kernels.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "ceilings": ceilings, "results": results},
                              indent=1) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
