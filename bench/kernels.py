"""Time every kernel of the registry on this GPU, beside torch, torch.compile, Liger and others.

    python bench/kernels.py [--out FILE] [--kernel NAME ...] [--options NAME ...]
                            [--contender NAME ...] [--dtype bfloat16] [--samples 50]
                            [--attention] [--limit SECONDS] [--resume] [--dry-run]
                            [--compile PROCESSES] [--repeat-check RUNS]

For each shape and direction: the median of the samples (CUDA events, after warm-up, the L2 cache
flushed before each, the GPU kept busy until the host has launched), GB/s or TFLOP/s against the
kernel's floor, that as a share of the copy or matrix-product rate measured on this GPU in the same
run, peak memory, and the host's time. The JSON holds device, driver, versions, commit, clocks and
every sample, and why a contender was left out; it is written anew after each case. Our results are
held to torch's at these shapes, others' attention to ours: a relative difference above DIFFERENCE
is an error in its row. Exit code 1 where ours fails, LOST where an error took the CUDA context
along: --resume goes on with the cases that the file has not.

--attention: many lengths (SWEEPS) beside the other attentions, in place of the kernels' own shapes.
--limit: cases that are not reached by then are listed. --compile: times nothing, but fills the
caches of Triton and Inductor with what the same command will time. --repeat-check: times nothing,
but makes each call so many times, on inputs made anew; exit code 1 where the bits of a result or a
gradient change and the options do not say that they may. --dry-run: no GPU, small shapes, Triton's
interpreter: whether the command would run; its figures mean nothing. Without a GPU: one line and
exit code 2.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cuda"
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__ == "__main__" and "--dry-run" in sys.argv:  # before Triton is imported
    import pretend
    pretend.install()

import record  # noqa: E402
from gpu_clock import Clock, rates, timed  # noqa: E402
from halves import shape_of  # noqa: E402
from peers import PEERS, Forward, Lacks, prepare, results  # noqa: E402

from fastllm.kernels._spec import Call, Kernel, Shape, kernels  # noqa: E402

Case = tuple[Kernel, Shape, str, str]
"""Kernel, shape, type, and the name of one of its bench options."""
CONTENDERS = ("ours", "torch eager", "torch.compile", *PEERS)
DIFFERENCE = 0.05
LOST = 3
OTHER_ATTENTION = ("ours", *(name for name, ops in PEERS.items() if "attention" in ops))
# 16,384 tokens of 2,048 elements in sequences of one length, what matters most first. "packed" is
# the same for all lengths.
SWEEPS: dict[str, list[tuple[Shape, str]]] = {"attention": [
    ((16384 // length, length, length, 2048 // width // group, group, width), option)
    for option, width, group, length in itertools.product(
        ("causal", "packed", "window", "", "causal, atomics"), (128, 64), (1, 4),
        (8192, 4096, 2048, 16384, 1024))
    if option != "packed" or length == 8192]}


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
    backward()
    try:
        backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        del found["backward"]  # its forward's result was used up: it runs once a forward
    return found


def make(case: Case) -> Call:
    """The arguments of a case, the same each time."""
    kernel, shape, dtype, option = case
    return kernel.inputs(shape, getattr(torch, dtype), DEVICE,
                         torch.Generator(DEVICE).manual_seed(0),
                         **kernel.bench_options.get(option, {}))


def facts(case: Case) -> dict[str, Any]:
    """What a row says of its case."""
    kernel, shape, dtype, option = case
    return {"kernel": kernel.name, "options": option, "dtype": dtype,
            "shape": dict(zip(kernel.axes, shape, strict=True))}


def measure(case: Case, contenders: list[str], clock: Clock,
            ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of every contender and direction; the last is what took the CUDA context along."""
    kernel, shape, dtype, option = case
    options = dict(kernel.bench_options.get(option, {}))
    rows = []
    for name in contenders:
        # Arguments of its own: some contenders write into what they are given.
        call = make(case)
        row = facts(case) | {"contender": name}
        try:
            forward = prepare(kernel, call, name)
            if forward is None:
                continue
            if name == "torch eager" or (name in PEERS and kernel.name == "attention"):
                row["difference"] = difference(case, name)
            for direction, run in directions(kernel, forward, call).items():
                parts = ("forward", "backward") if direction == "both" else (direction,)
                floors = [sum(floor(shape, getattr(torch, dtype), part, **options)
                              for part in parts)
                          for floor in (kernel.floor_bytes, kernel.floor_flops)]
                rows.append(row | {"direction": direction} | timed(
                    run, *floors, clock, ceilings["copy"], ceilings[dtype]))
        except Lacks as reason:
            rows.append(row | {"left_out": str(reason)})
        except Exception as error:  # who cannot take a shape is a result, not the end
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
            if lost():
                break
        forward = run = call = None
        tidy()
    return rows


def tidy() -> None:
    """As if nothing had run before: or the next shapes run into the limit of recompilations."""
    torch.compiler.reset()
    torch.cuda.empty_cache()


def lost() -> bool:
    """Whether an error, as of an illegal access, took the CUDA context along."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def difference(case: Case, name: str) -> float:
    """The largest of a contender's results to ours, in the norm. Raises ValueError above
    DIFFERENCE, or where other numbers are finite."""
    found = 0.0
    ours, theirs = ([x.detach() for x in results(case[0], prepare(case[0], call, contender), call)]
                    for contender in ("ours", name) for call in [make(case)])
    for a, b in zip(ours, theirs, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            raise ValueError("other numbers of its results than of ours are finite")
        a, b = (torch.where(finite, x, 0).float() for x in (a, b))
        found = max(found, float((b - a).norm() / a.norm().clamp_min(1e-30)))
    if not found <= DIFFERENCE:
        raise ValueError(f"its results differ from ours by {found:.1e}")
    return found


def changes(case: Case, runs: int) -> int:
    """How many of so many runs of our forward and backward give other bits than the first."""
    first, changed = None, 0
    for _ in range(runs):
        call = make(case)
        found = [x.detach().flatten().view(torch.uint8)
                 for x in results(case[0], prepare(case[0], call, "ours"), call)]
        first = first or found
        changed += not all(map(torch.equal, first, found))
    return changed


def repeat_check(case: Case, runs: int) -> dict[str, Any]:
    """A row of how many of the runs changed."""
    promised = case[0].bench_options.get(case[3], {}).get("deterministic", True)
    row = facts(case) | {"runs": runs, "deterministic": promised, "changed": changes(case, runs)}
    print(f"{title(row)} {row['changed']} of {runs} runs changed"
          + ("" if promised else ", as they may"), flush=True)
    return row


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


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything that was asked for: plain calls and the largest shapes first."""
    found = []
    for kernel in kernels():
        if options.kernel and kernel.name not in options.kernel:
            continue
        pairs = SWEEPS.get(kernel.name, []) if options.attention else itertools.product(
            reversed(kernel.bench_shapes), ("", *kernel.bench_options))
        found += [(place, (kernel, shape_of(kernel) if options.dry_run else shape, dtype, option))
                  for place, (shape, option) in enumerate(pairs) for dtype in options.dtype
                  if options.options is None or option in options.options]
    if not options.attention:
        found.sort(key=lambda one: (bool(one[1][3]), one[0]))
    # A dry run meets the same small shape more than once.
    return list({title(facts(case)): case for _, case in found}.values())


def missing() -> dict[str, str]:
    """Contenders that are not on this machine, and the line that mends it."""
    found = {}
    for name, package, line in (("liger", "liger_kernel", "pip install liger-kernel"),
                                ("flash-attn 3", "flash_attn_interface",
                                 "build Dao-AILab/flash-attention, folder hopper")):
        if importlib.util.find_spec(package) is None:
            found[name] = f"{package} is not installed ({line}): left out"
            print(f"{name}: {found[name]}")
    return found


def compile_cases(todo: list[Case], contenders: list[str]) -> None:
    """Run whatever compiles once, so that a later process finds it in the caches on disk."""
    for case in todo:
        for name in contenders:
            if name in ("torch eager", "torch fused") or name.startswith("sdpa"):
                continue
            call = make(case)
            try:
                forward = prepare(case[0], call, name)
                if forward is not None:
                    for run in directions(case[0], forward, call).values():
                        run()
            except Exception as error:  # it is the timing's to report; here it costs time only
                print(f"{title(facts(case))} {name}: {error}".splitlines()[0], flush=True)
            forward = run = call = None
            tidy()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    parser.add_argument("--kernel", nargs="*", help="only these")
    parser.add_argument("--options", nargs="*", help='only these; "" is the plain call')
    parser.add_argument("--contender", nargs="*", choices=CONTENDERS)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"],
                        choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.2, help="for the samples of one call")
    parser.add_argument("--attention", action="store_true", help="at the shapes of SWEEPS")
    parser.add_argument("--limit", type=float, help="seconds after which no case is begun")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--dry-run", action="store_true", help="on no GPU, small")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", help="fill caches only")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--repeat-check", type=int, metavar="RUNS", help="compare bits only")
    options = parser.parse_args()
    options.contender = options.contender or list(
        OTHER_ATTENTION if options.attention else CONTENDERS)
    return options


def kept(out: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same commit. Raises ValueError where it is another's."""
    if not out.exists():
        return []
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["machine"]["commit"] != record.commit():
        raise ValueError(f"--resume: {out} is of another commit; remove it or give another --out")
    return list(found["results"])


def failed(row: dict[str, Any]) -> bool:
    """Whether a row says that ours is wrong: it, or torch's beside it, or bits that must not."""
    if "changed" in row:
        return bool(row["deterministic"] and row["changed"])
    return "error" in row and (row["contender"] == "ours" or "differ" in row["error"])


def runner(options: argparse.Namespace,
           about: dict[str, Any]) -> Callable[[Case], list[dict[str, Any]]]:
    """What makes the rows of a case; this GPU's rates go into `about`."""
    if options.repeat_check:
        return lambda case: [repeat_check(case, options.repeat_check)]
    clock = Clock(options.samples, options.seconds, *([1 << 10] if options.dry_run else []))
    ceilings = about["ceilings"] = rates(clock, *([1 << 10, 16] if options.dry_run else []))
    print(f"{torch.cuda.get_device_name()}: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
          f"bfloat16 product {ceilings['bfloat16'] / 1e12:.0f} TFLOP/s")
    return functools.partial(measure, contenders=options.contender, clock=clock,
                             ceilings=ceilings)


def go(options: argparse.Namespace, todo: list[Case], out: Path) -> int:
    """Every case that the file has not, the file written after each; the exit code."""
    began = time.monotonic()
    try:
        rows = kept(out) if options.resume else []
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    done = {title(row) for row in rows}
    about: dict[str, Any] = {
        "machine": record.machine(), "command": ["bench/kernels.py", *sys.argv[1:]],
        "dry_run": options.dry_run, "missing": missing()}
    run = runner(options, about)
    todo = [case for case in todo if title(facts(case)) not in done]
    about["not_reached"] = [" ".join(title(facts(case)).split()) for case in todo]
    for case in todo:
        if options.limit and time.monotonic() - began > options.limit:
            print(f"not reached in {options.limit:.0f} s: {len(about['not_reached'])} cases")
            break
        made = run(case)
        if not options.repeat_check:
            table(made)
        rows += made
        del about["not_reached"][0]
        record.write(out, about, rows)
        if lost():
            print(f"{title(facts(case))} took the CUDA context along; --resume goes on after it")
            return LOST
    record.write(out, about, rows)
    print(f"written to {out}")
    return 1 if any(map(failed, rows)) else 0


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("bench/kernels.py times kernels on an NVIDIA GPU, and torch finds none here",
              file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    todo = cases(options)
    if options.share:
        torch.cuda.set_per_process_memory_fraction(0.4 / options.compile)
        compile_cases(record.shared(todo, options.share), options.contender)
        return 0
    if options.compile:
        return record.in_processes(__file__, options.compile)
    if options.dry_run and not options.out:
        print("--dry-run: its figures mean nothing; say --out FILE, away from the results",
              file=sys.stderr)
        return 2
    name = "repeats" if options.repeat_check else "attention" if options.attention else "kernels"
    return go(options, todo, options.out or record.place(name))


if __name__ == "__main__":
    sys.exit(main())
