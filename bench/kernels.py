"""Time every kernel of the registry on this GPU, beside torch, torch.compile and Liger.

    python bench/kernels.py [--out FILE] [--kernel NAME ...] [--dtype bfloat16] [--samples 50]

For each shape and direction: the median of the samples (CUDA events, after warm-up, the L2 cache
flushed before each), GB/s or TFLOP/s against the kernel's floor, that as a share of the copy or
matrix-product rate measured on this GPU in the same run, and peak memory. The JSON holds device,
driver, versions, commit, clocks and every sample. Without a GPU: one line and exit code 2.
"""

import argparse
import importlib
import importlib.metadata
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
sys.path.insert(0, str(ROOT))

from fastllm.kernels._spec import Call, Kernel, kernels  # noqa: E402

Contender = Callable[..., Any]


def fused_adamw(params: Any, grads: Any, m: Any, v: Any, masters: Any, *, step: int,
                grad_scale: torch.Tensor, **scalars: Any) -> None:
    """torch's fused AdamW, with the casts around it that weights with float32 masters need."""
    wide = [p if master is None else master for p, master in zip(params, masters, strict=True)]
    steps = [torch.full((), float(step - 1), device=p.device) for p in wide]
    torch._foreach_add_(steps, 1)
    # torch divides by the scale that was multiplied in.
    torch._fused_adamw_(wide, [g.float() for g in grads], m, v, [], steps, lr=scalars["lr"],
                        beta1=scalars["beta1"], beta2=scalars["beta2"], eps=scalars["eps"],
                        weight_decay=scalars["weight_decay"], amsgrad=False, maximize=False,
                        grad_scale=grad_scale.reciprocal(),
                        found_inf=torch.zeros((), device=grad_scale.device))
    if masters and masters[0] is not None:
        torch._foreach_copy_(params, masters)


def liger(kernel: Kernel) -> Contender | None:
    """Liger's op of the same meaning with our arguments, where it is installed and has one."""
    try:
        ops = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None

    def rope(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        # Liger's layout is Hugging Face's: heads before tokens, full-width tables with a batch.
        tables = [torch.cat((t, t), -1).unsqueeze(0).to(q.dtype) for t in (cos, sin)]
        return ops.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tables)

    peers = {
        "rms_norm": lambda x, weight, eps: ops.liger_rms_norm(x, weight, eps),
        "swiglu": lambda gate, up: ops.liger_swiglu(gate, up),
        "rope": rope,
        "cross_entropy": lambda logits, labels: ops.liger_cross_entropy(
            logits, labels, reduction="sum"),
        "linear_cross_entropy": lambda hidden, weight, labels: (
            ops.liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")),
    }
    return peers.get(kernel.name)


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


def directions(kernel: Kernel, function: Contender, call: Call) -> dict[str, Callable[[], Any]]:
    """What to time: the forward, and where there is one the backward of a kept graph."""
    def forward() -> Any:
        return function(*call.args, **call.kwargs)

    if kernel.mutates or not call.differentiated():
        return {"forward": forward}
    outputs = [x for x in torch.utils._pytree.tree_leaves(forward()) if x.requires_grad]
    upstream = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, call.differentiated(), upstream, retain_graph=True)

    def both() -> Any:
        made = [x for x in torch.utils._pytree.tree_leaves(forward()) if x.requires_grad]
        return torch.autograd.grad(made, call.differentiated(), upstream)

    # An op may do its backward's work in its forward: only the two together compare fairly.
    return {"forward": forward, "backward": backward, "both": both}


def measure(kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, clock: Clock,
            ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Every contender and direction for one shape."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    call = kernel.inputs(shape, dtype, DEVICE, generator)
    contenders: dict[str, Contender | None] = {
        "ours": kernel.public, "torch eager": kernel.reference,
        "torch.compile": torch.compile(kernel.reference), "liger": liger(kernel),
        "torch fused": fused_adamw if kernel.name == "adamw" else None}
    results = []
    for name, function in contenders.items():
        if function is None:
            continue
        row = {"kernel": kernel.name, "shape": dict(zip(kernel.axes, shape, strict=True)),
               "dtype": str(dtype)[6:], "contender": name}
        try:
            for direction, run in directions(kernel, function, call).items():
                results.append(row | {"direction": direction} | timed(
                    kernel, shape, dtype, direction, run, clock, ceilings))
        except Exception as error:  # a peer that cannot take a shape is a result, not the end
            if name == "ours":
                raise
            results.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
        torch.cuda.empty_cache()
    return results


def timed(kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, direction: str,
          run: Callable[[], Any], clock: Clock, ceilings: dict[str, float]) -> dict[str, Any]:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    samples = clock(run)
    seconds = statistics.median(samples) / 1e3
    parts = ("forward", "backward") if direction == "both" else (direction,)
    size = sum(kernel.floor_bytes(shape, dtype, part) for part in parts)  # type: ignore[arg-type]
    work = sum(kernel.floor_flops(shape, dtype, part) for part in parts)  # type: ignore[arg-type]
    ceiling = ceilings[str(dtype)[6:]]
    # An op is bound by whichever of its floors takes longer at this GPU's own rates.
    by_bytes = size / ceilings["copy"] >= work / ceiling
    return {"milliseconds": seconds * 1e3, "gigabytes_per_second": size / seconds / 1e9,
            "teraflops": work / seconds / 1e12, "bound": "bytes" if by_bytes else "flops",
            "share_of_ceiling": max(size / ceilings["copy"], work / ceiling) / seconds,
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
        name = f"{r['kernel']:22} {shape:22} {r['dtype']:9} {r['contender']:14}"
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
        for shape in kernel.bench_shapes:
            for dtype in options.dtype:
                rows = measure(kernel, shape, getattr(torch, dtype), clock, ceilings)
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
