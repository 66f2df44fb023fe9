"""Time the tiles of the attention kernels on this GPU, for each kernel, head width and strain.

    python bench/tune.py [--kernel NAME ...] [--width 128 ...] [--strain 0 ...] [--tokens 4096]
                         [--limit SECONDS] [--compile PROCESSES] [--keep] [--out FILE]

Strain: 0, rows by descriptors; 1, packed; 2, a softcap or, for the keys, atomics. Every tiling of
the grid that compiles, fits the GPU and gives the results of the table's is timed, bfloat16 and
causal, in rounds with the others (fastllm/ops/_tune.py). The JSON holds machine, versions and every
time and refusal, and is written after each kernel; none is begun after --limit. Compiling takes
minutes a kernel: --compile fills Triton's cache in so many processes, and times nothing that
counts. --keep has later processes on this machine use the winners. Without a GPU: one line and exit
code 2.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

from fastllm.kernels._attention_tables import WIDTHS  # noqa: E402
from fastllm.ops import _tune  # noqa: E402
from fastllm.ops._tune import Tuned  # noqa: E402


def table(tuned: Tuned) -> str:
    """Lines for people: the table's time, the winner and what it gains, then every other."""
    times = tuned.milliseconds
    best = times.get(_tune.name_of(tuned.best), times.get(_tune.SHIPPED, float("nan")))
    old = times.get(_tune.SHIPPED, float("nan"))
    lines = [f"{tuned.kernel} width {tuned.width} strain {tuned.strain}: "
             f"{_tune.name_of(tuned.best)} {best:.3f} ms; table {_tune.name_of(tuned.table)} "
             f"{old:.3f} ms"]
    lines += [f"    {name:30} {taken:9.3f} ms" for name, taken in sorted(
        times.items(), key=lambda item: item[1])]
    lines += [f"    {name:30} out: {why}" for name, why in tuned.out.items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("forward", "queries", "keys")
    parser.add_argument("--kernel", nargs="*", default=names, choices=names, help="only these")
    parser.add_argument("--width", nargs="*", type=int, default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--strain", nargs="*", type=int, default=(0, 1, 2), choices=(0, 1, 2))
    parser.add_argument("--tokens", type=int, default=_tune.SHAPE[1], help="of each sequence")
    parser.add_argument("--limit", type=float, help="seconds after which no kernel is begun")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", help="fill the cache only")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="use the winners from now on")
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("bench/tune.py times tiles on an NVIDIA GPU, and torch finds none here",
              file=sys.stderr)
        return 2
    if options.compile and not options.share:
        return record.in_processes(__file__, options.compile)
    device = torch.device("cuda", torch.cuda.current_device())
    out = options.out or record.place("attention_tiles")
    batch, _, *heads = _tune.SHAPE
    shape = batch, options.tokens, *heads
    began, results = time.monotonic(), []
    todo = list(itertools.product(options.kernel, options.width, options.strain))
    for number, one in enumerate(todo):
        if options.share:
            _tune.tune(*one, device, grid=record.shared(_tune.GRID, options.share), shape=shape)
            continue
        if options.limit and time.monotonic() - began > options.limit:
            print(f"not reached in {options.limit:.0f} s: {todo[number:]}")
            break
        results.append(_tune.tune(*one, device, shape=shape))
        print(table(results[-1]), flush=True)
        write(results, out, todo[number + 1:])
    if options.keep and results:
        _tune.keep(results, device)
        print("kept: processes that start from now on use the winners")
    return 0


def write(results: list[Tuned], out: Path, left: Sequence[tuple]) -> None:
    """What was tuned, and what of the kernels, widths and strains was not yet."""
    record.write(out, {"machine": record.machine(), "not_reached": [list(one) for one in left]},
                 [tuned.row() for tuned in results])


if __name__ == "__main__":
    sys.exit(main())
