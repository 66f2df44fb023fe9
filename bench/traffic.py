"""Count what every kernel of the registry moves, over the least it could, beside Liger-Kernel.

    python bench/traffic.py [--kernel NAME ...] [--peers] [--check]

Runs on any machine, in Triton's interpreter (see meter.py), the same to the byte every time. For
each kernel, plain and with each of its bench options, at its traffic shapes, in bfloat16: requested
and unique bytes of the launches plus the bytes of PyTorch's operators around them, both over
floor_bytes, launches, and FLOPs of products over floor_flops. The backward is counted alone, its
upstream gradients given; an op that does its backward's work in its forward is judged by the two
together. The gate, at the last traffic shape of kernels bound by bytes: unique <= 1.05 and
requested <= 1.10 times the floor, or an entry of `above_floor` that says why it cannot be.

Results go to bench/results/interpreter/traffic.json, where the kernels that were not run keep
theirs. --check writes nothing and fails where a kernel is worse than the file says; it counts
the gated shapes alone and, of ops made of products, the small one.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__.endswith("main__"):  # before Triton is imported, here and in the processes begun here
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from meter import Meter  # noqa: E402
from peers import prepare  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fastllm.kernels._spec import Kernel, kernels  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "interpreter" / "traffic.json"
UNIQUE, REQUESTED = 1.05, 1.10
BEATEN = 0.97  # a floor that is undercut by more is none


@dataclass(frozen=True)
class Case:
    """One thing to count: a kernel by name, options by their name ("" is the plain call)."""

    kernel: str
    options: str
    shape: tuple[int, ...]
    contender: str


def by_name() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels()}


def cases(kernel: Kernel, contenders: list[str], brief: bool = False) -> list[Case]:
    """Every case of a kernel; in brief the shape that is gated or, where none is, the small one."""
    shapes = kernel.traffic_shapes
    if brief:
        shapes = shapes[-1:] if kernel.bound == "bytes" else shapes[:1]
    return [Case(kernel.name, options, shape, contender)
            for options in ("", *kernel.bench_options) for shape in shapes
            for contender in contenders]


def counted(meter: Meter) -> dict[str, Any]:
    return {"launches": len(meter.launches), "programs": sum(x.programs for x in meter.launches),
            "requested": meter.requested, "unique": meter.unique, "aten_bytes": meter.aten_bytes,
            "flops": meter.flops, "aten": dict(sorted(meter.aten.items()))}


def measure(case: Case) -> list[dict[str, Any]] | str:
    """One row a direction; none where the contender has no such op; a line where it fails."""
    torch.set_num_threads(1)
    try:
        return list(directions(case))
    except Exception as error:  # one kernel's failure must not hide what the others move
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{case.kernel} {case.options}: {case.contender} fails at {case.shape}: {what}"


def directions(case: Case) -> Iterator[dict[str, Any]]:
    kernel = by_name()[case.kernel]
    options = dict(kernel.bench_options.get(case.options, {}))
    dtype = torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    call = kernel.inputs(case.shape, dtype, "cpu", torch.Generator().manual_seed(0), **options)
    forward = prepare(kernel, call, case.contender)
    if forward is None:
        return
    found = {}
    with Meter() as meter:
        outputs = forward()
    found["forward"] = counted(meter)
    outputs = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and not kernel.mutates:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) if x.dim()
                    else torch.ones_like(x) for x in outputs]
        with Meter() as meter:
            torch.autograd.grad(outputs, call.differentiated(), upstream, allow_unused=True)
        found["backward"] = counted(meter)
    for direction, counts in found.items():
        reasons = [kernel.above_floor.get(f"{case.options} {which}".strip(), "")
                   for which in (direction, "forward and backward")]
        yield {**asdict(case), "dtype": str(dtype)[6:], "direction": direction,
               "bound": kernel.bound, "above_floor": next(filter(None, reasons), ""), **counts,
               "floor_bytes": kernel.floor_bytes(case.shape, dtype, direction, **options),
               "floor_flops": kernel.floor_flops(case.shape, dtype, direction, **options)}


def run(todo: list[Case], processes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of every case, in their order, and a line for each that failed."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        # The large shapes start first, so that no process is left with one at the end.
        order = sorted(range(len(todo)), key=lambda i: -torch.Size(todo[i].shape).numel())
        done = dict(zip(order, pool.map(measure, [todo[i] for i in order]), strict=True))
    results = [done[i] for i in range(len(todo))]
    return ([row for rows in results if not isinstance(rows, str) for row in rows],
            [line for line in results if isinstance(line, str)])


def ratios(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(unique + aten) and (requested + aten) over the floor, for rows taken together."""
    floor = sum(row["floor_bytes"] for row in rows) or 1
    return (sum(row["unique"] + row["aten_bytes"] for row in rows) / floor,
            sum(row["requested"] + row["aten_bytes"] for row in rows) / floor)


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """The rows of each (kernel, options, shape, contender) by direction."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["kernel"], row["options"], tuple(row["shape"]), row["contender"])
        groups.setdefault(key, {})[row["direction"]] = row
    return groups


def judged(group: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What to hold to the floor: each direction, or both together where the backward moves less
    than its floor, its work having been done in the forward."""
    if "backward" in group and ratios([group["backward"]])[0] < BEATEN:
        return {"forward and backward": list(group.values())}
    return {direction: [row] for direction, row in group.items()}


def offenders(kernel: Kernel, rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each thing that the gate refuses; `rows` are ours, of this kernel."""
    if not kernel.traffic_shapes:
        yield f"{kernel.name}: has no traffic_shapes"
    needed = set()
    for (_, options, shape, _), group in grouped(rows).items():
        if shape != kernel.traffic_shapes[-1] or kernel.bound != "bytes":
            continue
        for direction, together in judged(group).items():
            key = f"{options} {direction}".strip()
            unique, requested = ratios(together)
            if unique < BEATEN:
                yield (f"{kernel.name}: {key} moves {unique:.3f}x its floor: floor_bytes counts "
                       "what need not be moved")
            if unique <= UNIQUE and requested <= REQUESTED:
                continue
            needed.add(key)
            if key not in kernel.above_floor:
                yield (f"{kernel.name}: {key} moves {unique:.3f}x its floor, {requested:.3f}x "
                       f"requested; allowed {UNIQUE}x and {REQUESTED}x, or a reason in "
                       f"above_floor[{key!r}]")
    for key in sorted(set(kernel.above_floor) - needed):
        yield (f"{kernel.name}: above_floor[{key!r}] is not needed: it is at its floor, or there "
               "is none of that name")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["options"], tuple(row["shape"]), row["direction"], row["contender"]


def stale(old: list[dict[str, Any]], new: list[dict[str, Any]],
          known: set[tuple[Any, ...]]) -> Iterator[str]:
    """Where ours are worse than the file says, or it holds other cases or floors; known are the
    registry's (kernel, options, shape). Peers are not counted again: their floors must be ours."""
    then, now = ({key_of(row): row for row in rows} for rows in (old, new))
    counted = {key[:3] for key in now}
    for key, row in now.items():
        name = " ".join(map(str, key[:-1]))
        if key not in then:
            yield f"{name}: not in {RESULTS.name}"
            continue
        for what in ("launches", "requested", "unique", "aten_bytes", "flops"):
            if row[what] > then[key][what]:
                yield f"{name}: {what} {row[what]}, {RESULTS.name} says {then[key][what]}"
    for key, row in then.items():
        ours = now.get((*key[:-1], "ours"))
        if key[:3] not in known or (key[:3] in counted and (ours is None or any(
                ours[floor] != row[floor] for floor in ("floor_bytes", "floor_flops")))):
            yield f"{' '.join(map(str, key))}: in {RESULTS.name} with another floor, or no longer"


def show(rows: list[dict[str, Any]]) -> None:
    """The table: a line a direction, contenders beside each other."""
    groups = grouped(rows)
    print(f"{'kernel':42} {'shape':>18} {'direction':20} | {'ours: launches unique requested':32}"
          f" {'aten':>6} {'FLOPs':>6} | liger: launches unique requested")

    def cells(together: list[dict[str, Any]]) -> str:
        unique, requested = ratios(together)
        return f"{sum(row['launches'] for row in together):8} {unique:9.3f} {requested:9.3f}"

    for (name, options, shape, contender), group in groups.items():
        if contender != "ours":
            continue
        peer = groups.get((name, options, shape, "liger"), {})
        both = {"forward and backward": list(group.values())} if len(group) > 1 else {}
        for direction, together in ({d: [r] for d, r in group.items()} | both).items():
            floor = sum(row["floor_bytes"] for row in together) or 1
            aten = sum(row["aten_bytes"] for row in together) / floor
            flops = sum(row["flops"] for row in together)
            least = sum(row["floor_flops"] for row in together) or 1
            other = [row for row in peer.values() if row["direction"] in direction]
            line = (f"{f'{name} {options}':42} {'x'.join(map(str, shape)):>18} {direction:20} | "
                    f"{cells(together):32} {aten:6.3f} {flops / least if flops else 0:6.2f} | "
                    f"{cells(other) if other else ''}")
            print(line.rstrip())
            for reason in sorted({row["above_floor"] for row in together} - {""}):
                print(f"    {reason}")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "triton")}


def main() -> int:
    registry = by_name()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", choices=registry, metavar="NAME", help="only these")
    parser.add_argument("--peers", action="store_true", help="count Liger's ops too")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail where a kernel is worse than the file says")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    names = options.kernel or list(registry)
    contenders = ["ours", *(["liger"] if options.peers else [])]
    todo = [case for name in names for case in cases(registry[name], contenders, options.check)]
    rows, wrong = run(todo, options.processes)
    show(rows)
    for name in names:
        wrong += offenders(registry[name], [row for row in rows if row["kernel"] == name
                                            and row["contender"] == "ours"])
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    before = [row for row in stored["rows"] if row["kernel"] in names]
    if options.check:
        known = {(case.kernel, case.options, case.shape)
                 for name in names for case in cases(registry[name], ["ours"])}
        wrong += stale(before, rows, known)
    else:
        write(stored["rows"], rows, names, list(registry), options.peers)
    for line in wrong:
        print(f"traffic: {line}", file=sys.stderr)
    return 1 if wrong else 0


def write(old: list[dict[str, Any]], new: list[dict[str, Any]], names: list[str],
          order: list[str], peers: bool) -> None:
    """The new rows in the place of the old ones of the same kernels, in the registry's order."""
    kept = [row for row in old if row["kernel"] in order and (
        row["kernel"] not in names or (row["contender"] != "ours" and not peers))]
    rows = sorted(kept + new, key=lambda row: order.index(row["kernel"]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"versions": {json.dumps(versions())},\n "rows": [\n{lines}\n]}}\n')
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
