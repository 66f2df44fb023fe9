"""Time the tiles of the attention kernels on this GPU, for each kernel, head width and strain.

    python bench/tune.py [--kernel NAME ...] [--width 128 ...] [--strain 0 ...] [--tokens 4096]
                         [--keep] [--out FILE]

Strain: 0, rows by descriptors; 1, packed; 2, a softcap or, for the keys, atomics. Every tiling of
the grid that compiles, fits the GPU and gives the results of the table's is timed, bfloat16 and
causal, in rounds with the others (fastllm/ops/_tune.py). The JSON holds machine, versions and every
time and refusal. --keep has later processes on this machine use the winners. Compiling takes
minutes a kernel. Without a GPU: one line and exit code 2.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from fastllm.kernels._attention_tables import WIDTHS  # noqa: E402
from fastllm.monitor import environment  # noqa: E402
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


def write(results: list[Tuned], device: torch.device, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": environment(device),
                               "results": [tuned.row() for tuned in results]}, indent=1) + "\n",
                   encoding="utf-8")
    print(f"written to {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("forward", "queries", "keys")
    parser.add_argument("--kernel", nargs="*", default=names, choices=names, help="only these")
    parser.add_argument("--width", nargs="*", type=int, default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--strain", nargs="*", type=int, default=(0, 1, 2), choices=(0, 1, 2))
    parser.add_argument("--tokens", type=int, default=_tune.SHAPE[1], help="of each sequence")
    parser.add_argument("--keep", action="store_true", help="use the winners from now on")
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/tune.py times tiles on an NVIDIA GPU, and torch finds none here",
              file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    batch, _, *heads = _tune.SHAPE
    results = []
    for kernel, width, strain in itertools.product(options.kernel, options.width, options.strain):
        results.append(_tune.tune(kernel, width, strain, device,
                                  shape=(batch, options.tokens, *heads)))
        print(table(results[-1]), flush=True)
    slug = torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")
    write(results, device, options.out or ROOT / "bench" / "results" / slug
          / "attention_tiles.json")
    if options.keep:
        _tune.keep(results, device)
        print("kept: processes that start from now on use the winners")
    return 0


if __name__ == "__main__":
    sys.exit(main())
