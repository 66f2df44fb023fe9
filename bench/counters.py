"""What Nsight Compute counts of our kernels on this GPU, beside what bench/traffic.py counted.

    python bench/counters.py [--kernel NAME ...] [--options NAME ...] [--limit SECONDS] [--peer]
                             [--out FILE] [--dry-run]

Each kernel, plain and with each of its bench options, forward and backward, in bfloat16, at its
last bench shape (the one before where memory is short): once unprofiled, so that everything is
compiled, then once under `ncu`, which leaves the clocks alone and empties the caches before each
launch. Bytes between L2 and memory, over the kernel's floor, stand beside the same ratio of
bench/results/interpreter/traffic.json, counted at another shape; --peer: Liger's too. An op that
does its backward's work in its forward is judged by the two together, as there. Only launches are
counted here: what torch does with cudaMemset and cudaMemcpy is not, and what a launch leaves in L2
reaches memory after it.

Prints a table, the furthest apart first, and writes bench/results/<GPU>/counters.json: the machine,
a row for each direction with its launches, and what failed, was left out or not reached in time.
--dry-run: no GPU and no ncu, but the same calls at test shapes in Triton's interpreter. Without a
GPU, ncu or the right to read its counters: one line and exit code 2.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402
from peers import prepare  # noqa: E402
from sanitize import END, SAYS, START, about, find, say, shape_of, version, watch  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fastllm.kernels._spec import Kernel, kernels  # noqa: E402
from fastllm.kernels._triton import jit, tl  # noqa: E402

TRAFFIC = ROOT / "bench" / "results" / "interpreter" / "traffic.json"
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
REGISTERS, GRID = "launch__registers_per_thread", "launch__grid_size"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
METRICS = (READ, WRITTEN, TIME, REGISTERS, GRID, WARPS)
NEEDED = (READ, WRITTEN, TIME)
"""What is asked for where a GPU has not all of the others."""
CHUNK = 16
"""Cases of one process: ncu writes its figures at the end of it, and may not come to that."""
DENIED = "ERR_NVGPUCTRPERM"
MARKER = "counters_marker"
ELSEWHERE = 0.97
"""Below this share of a backward's floor, its work was done in the forward (as bench/traffic.py)"""


@dataclass(frozen=True)
class Case:
    """A kernel by name, options by their name ("" is the plain call), and whose op."""

    kernel: str
    options: str
    contender: str

    def __str__(self) -> str:
        return " ".join(filter(None, (
            self.contender if self.contender != "ours" else "", self.kernel, self.options)))


def plan(registry: Iterable[Kernel], options: list[str] | None,
         contenders: list[str]) -> list[Case]:
    """Every case: ours before others', each kernel's plain call before its options."""
    rounds: dict[tuple[int, int], list[Case]] = {}
    for kernel in registry:
        for place, name in enumerate(("", *kernel.bench_options)):
            for turn, contender in enumerate(contenders):
                if options is None or name in options:
                    rounds.setdefault((turn, place), []).append(
                        Case(kernel.name, name, contender))
    return [case for key in sorted(rounds) for case in rounds[key]]


@jit
def counters_marker(place):
    """Its launch says, by the size of its grid, whose launches come next."""
    tl.store(place, 0)


# The process of calls: the only part that touches a GPU.

@contextlib.contextmanager
def profiled(index: int, place: torch.Tensor) -> Iterator[None]:
    """What is launched inside is profiled, after a marker of index + 1 programs."""
    gpu = place.is_cuda
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    try:
        counters_marker[(index + 1,)](place)
        yield
    finally:
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def once(kernel: Kernel, case: Case, shape: tuple[int, ...], number: int | None,
         device: str) -> list[str] | None:
    """Run a case, profiled if it is numbered; its directions, None where there is no such op."""
    place = torch.zeros(1, dtype=torch.int32, device=device)

    def around(part: int) -> Any:
        return contextlib.nullcontext() if number is None else profiled(2 * number + part, place)

    counters_marker[(1,)](place)  # compiled outside of what is profiled
    generator = torch.Generator(device).manual_seed(0)
    call = kernel.inputs(shape, dtype_of(kernel), device, generator,
                         **kernel.bench_options.get(case.options, {}))
    forward = prepare(kernel, call, case.contender)
    if forward is None:
        return None
    with around(0):
        returned = forward()
    outputs = [x for x in tree_leaves(returned)
               if isinstance(x, torch.Tensor) and x.requires_grad]
    if kernel.mutates or not outputs:
        return ["forward"]
    upstream = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) if x.dim()
                else torch.ones_like(x) for x in outputs]
    with around(1):
        torch.autograd.grad(outputs, call.differentiated(), upstream, allow_unused=True)
    return ["forward", "backward"]


def dtype_of(kernel: Kernel) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]


def shapes_of(kernel: Kernel, dry: bool) -> list[tuple[int, ...]]:
    """Shapes to try in turn, until there is memory enough."""
    return [shape_of(kernel)] if dry else list(reversed(kernel.bench_shapes))


def attempt(kernel: Kernel, case: Case, number: int, device: str) -> dict[str, Any]:
    """What became of a case: its shape and directions, or why there are none."""
    why = ""
    for shape in shapes_of(kernel, device == "cpu"):
        try:
            once(kernel, case, shape, None, device)
            parts = once(kernel, case, shape, number, device)
        except torch.OutOfMemoryError as error:
            why = f"{'x'.join(map(str, shape))}: {error}".splitlines()[0][:200]
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        else:
            if parts is None:
                return {"left_out": f"{case.contender} has no such op, or is not installed"}
            return {"shape": shape, "directions": parts} | ({"larger": why} if why else {})
        if device == "cuda":  # here, where the error no longer holds what it had
            torch.cuda.empty_cache()
    return {"failed": why}


def calls(file: Path, limit: float) -> int:
    """Make the calls that a file lists, until they are all made or the time is up."""
    until = time.monotonic() + limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    registry = {kernel.name: kernel for kernel in kernels()}
    for number, fields in json.loads(file.read_text())["cases"]:
        if time.monotonic() > until:
            break
        case = Case(**fields)
        say(begin=number)
        say(number=number, **attempt(registry[case.kernel], case, number, device))
        if device == "cuda":
            torch.cuda.empty_cache()
    say(end=True)
    return 0


# What ncu writes, and what is read of it.

UNITS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9,
         "second": 1e9,
         **{f"{prefix}byte": 1000**power for power, prefix in enumerate(" KMGT")},
         **{f"{prefix}ibyte": 1024**power for power, prefix in enumerate(" KMGT")}, "byte": 1}
"""In nanoseconds and bytes; others are left as they are."""


@dataclass
class Launch:
    """One launch that ncu profiled: bytes, nanoseconds and so on by metric."""

    name: str
    grid: int
    metrics: dict[str, float] = field(default_factory=dict)


def number_of(text: str, unit: str) -> float | None:
    """A figure of ncu's in bytes or nanoseconds; None where it is none ("n/a")."""
    try:
        return float(text.replace(",", "").replace(" ", "")) * UNITS.get(unit, 1)
    except ValueError:
        return None


def size(text: str) -> int:
    """Programs of a grid written as "(4, 2, 1)"."""
    return math.prod(map(int, re.findall(r"\d+", text)))


def parse(text: str) -> list[Launch]:
    """The launches of ncu's CSV, in their order: a column a metric (--page raw), with a row of
    units below the names, or a row a metric; whatever stands before and between."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    table = list(csv.reader(io.StringIO("\n".join(lines[head:]))))
    names, units = table[0], {}
    found: dict[tuple[str, str], Launch] = {}
    for cells in table[1:]:
        if cells == names or len(cells) != len(names):
            continue
        row = dict(zip(names, cells, strict=True))
        if not row["ID"]:
            units = row
            continue
        launch = found.setdefault((row.get("Process ID", ""), row["ID"]), Launch(
            row["Kernel Name"], size(row.get("Grid Size", "") or "1")))
        if "Metric Name" in row:
            pairs = [(row["Metric Name"], row["Metric Value"], row.get("Metric Unit", ""))]
        else:
            pairs = [(name, row[name], units.get(name, "")) for name in names if "__" in name]
        for name, value, unit in pairs:
            figure = number_of(value, unit)
            if figure is not None:
                launch.metrics[name] = figure
    for launch in found.values():
        launch.grid = round(launch.metrics.get(GRID, launch.grid))
    return list(found.values())


def attributed(launches: list[Launch]) -> dict[int, list[Launch]]:
    """The launches after each marker, by the index that it says."""
    found: dict[int, list[Launch]] = {}
    mine = None
    for launch in launches:
        if MARKER in launch.name:
            mine = found[launch.grid - 1] = []
        elif mine is not None:
            mine.append(launch)
    return found


def command(binary: str, metrics: Iterable[str], log: Path) -> list[str]:
    """ncu's own part of the command line."""
    return [binary, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
            "--target-processes", "application-only", "--profile-from-start", "off",
            "--clock-control", "none", "--cache-control", "all", "--metrics", ",".join(metrics)]


def summed(launches: list[Launch]) -> list[dict[str, Any]]:
    """Launches of one name together: how many, their nanoseconds and bytes, and of the longest of
    them the registers, the share of warps that were active, and the grid."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    found = []
    for name, them in groups.items():
        longest = max(them, key=lambda launch: launch.metrics.get(TIME, 0.0))
        found.append({"name": name[:120], "launches": len(them), **{
            key: sum(launch.metrics.get(metric, 0.0) for launch in them)
            for key, metric in (("nanoseconds", TIME), ("read", READ), ("written", WRITTEN))},
            "registers": longest.metrics.get(REGISTERS),
            "warps_percent": longest.metrics.get(WARPS), "grid": longest.grid})
    return found


def metered(traffic: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Of bench/traffic.py's rows, those at the last shape: (op, options, whose) -> direction."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in traffic:  # a later shape takes the place of an earlier one
        key = row["kernel"], row["options"], row["contender"]
        found.setdefault(key, {})[row["direction"]] = row
    return found


def counted(rows: list[dict[str, Any]]) -> float:
    """What the meter counted of these directions over their floor."""
    return (sum(row["unique"] + row["aten_bytes"] for row in rows)
            / (sum(row["floor_bytes"] for row in rows) or 1))


def rows_of(case: Case, told: dict[str, Any], number: int, launched: dict[int, list[Launch]],
            kernel: Kernel, known: dict[str, dict]) -> list[dict[str, Any]]:
    """A row a direction of a case that was profiled, or one of both where they belong together."""
    options, shape = dict(kernel.bench_options.get(case.options, {})), tuple(told["shape"])
    groups = [[part] for part in told["directions"]]
    if len(groups) > 1 and "backward" in known and counted([known["backward"]]) < ELSEWHERE:
        groups = [["forward", "backward"]]
    found = []
    for parts in groups:
        mine = [launch for part in parts
                for launch in launched.get(2 * number + (part == "backward"), [])]
        floors = [sum(floor(shape, dtype_of(kernel), part, **options) for part in parts)
                  for floor in (kernel.floor_bytes, kernel.floor_flops)]
        by_name = summed(mine)
        moved = sum(one["read"] + one["written"] for one in by_name)
        over = moved / floors[0] if floors[0] else None
        meter = [known[part] for part in parts if part in known]
        theirs = counted(meter) if len(meter) == len(parts) else None
        found.append({
            **asdict(case), "shape": dict(zip(kernel.axes, shape, strict=True)),
            "direction": " and ".join(parts), "launches": len(mine),
            "nanoseconds": sum(one["nanoseconds"] for one in by_name),
            "read": sum(one["read"] for one in by_name),
            "written": sum(one["written"] for one in by_name), "bytes": moved,
            "floor_bytes": floors[0], "floor_flops": floors[1], "over_floor": over,
            "metered_over_floor": theirs,
            "metered_launches": sum(row["launches"] for row in meter) if meter else None,
            "metered_aten": sorted({name for row in meter for name in row["aten"]}),
            "measured_over_metered": over / theirs if over and theirs else None,
            "by_name": by_name} | ({"larger": told["larger"]} if "larger" in told else {}))
    return found


def apart(row: dict[str, Any]) -> float:
    """How far measured and metered are apart, as a factor; rows that lack one come last."""
    ratio = row["measured_over_metered"]
    return abs(math.log(ratio)) if ratio else -1.0


def show(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table, the furthest apart first."""
    yield (f"{'':40} {'shape':>22} {'direction':20} {'launches':>8} {'ms':>9} {'GB':>8} "
           f"{'GB/s':>6} {'over floor':>10} {'metered':>8} {'ratio':>6}")

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for row in sorted(rows, key=apart, reverse=True):
        name = str(Case(row["kernel"], row["options"], row["contender"]))
        rate = row["bytes"] / row["nanoseconds"] if row["nanoseconds"] else 0.0
        yield (f"{name:40} {'x'.join(map(str, row['shape'].values())):>22} {row['direction']:20} "
               f"{row['launches']:8} {row['nanoseconds'] / 1e6:9.3f} {row['bytes'] / 1e9:8.3f} "
               f"{rate:6.0f} {ratio(row['over_floor']):>10} {ratio(row['metered_over_floor']):>8} "
               f"{ratio(row['measured_over_metered']):>6}")


@dataclass
class Outcome:
    """What is known of the cases so far."""

    told: dict[int, dict[str, Any]] = field(default_factory=dict)
    launched: dict[int, list[Launch]] = field(default_factory=dict)
    begun: int | None = None
    ended: bool = False
    log: str = ""
    last: list[str] = field(default_factory=list)

    def feed(self, line: str) -> None:
        line = line.rstrip("\n")
        if line.startswith(SAYS):
            what = json.loads(line[len(SAYS):])
            if "number" in what:
                self.told[what.pop("number")], self.begun = what, None
            self.begun = what.get("begin", self.begun)
            self.ended |= "end" in what
        elif line:
            self.last = [*self.last[-19:], line]


def start(cases: list[Case], numbers: list[int], before: list[str], log: Path, left: float,
          folder: Path, env: dict[str, str], found: Outcome) -> int | None:
    """One process for these cases; its exit code."""
    found.begun, found.ended = None, False
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump({"cases": [(n, asdict(cases[n])) for n in numbers]}, file)
    code = watch([*before, sys.executable, str(Path(__file__).resolve()), "--run", file.name,
                  "--limit", f"{left:.1f}"], env, left, found.feed)
    found.log = log.read_text(errors="replace") if log.exists() else ""
    found.launched |= attributed(parse(found.log))
    if found.begun is not None:
        how = "killed, over its time" if code is None else f"its process ended with {code}"
        found.told[found.begun] = {"failed": how}
    return code


def chunks(cases: list[Case], binary: str | None, until: float,
           folder: Path) -> Iterator[tuple[Outcome, str]]:
    """Run the cases in processes of CHUNK each, under ncu unless there is none to use; after each
    the outcome so far, and why there is no point in going on, if so."""
    found, metrics = Outcome(), METRICS
    todo = list(range(len(cases)))
    env = {} if binary else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
                             "OMP_NUM_THREADS": "1"}
    while todo and (left := until - time.monotonic()) > START:
        numbers = todo[:CHUNK if binary else None]
        log = folder / f"ncu-{numbers[0]}-{len(metrics)}.csv"
        before = command(binary, metrics, log) if binary else []
        code = start(cases, numbers, before, log, left, folder, env, found)
        said = found.log + "\n".join(found.last)
        if DENIED in said:
            yield found, "reading the GPU's counters is not permitted here (" + DENIED + ")"
            return
        if "Failed to find metric" in said and metrics != NEEDED:
            metrics = NEEDED
            found.told = {n: what for n, what in found.told.items() if n not in numbers}
            continue
        reached = [n for n in numbers if n in found.told]
        todo = [n for n in todo if n not in found.told]
        if not reached:
            yield found, (f"no case was reached: exit code {code}: "
                          + " | ".join([*said.splitlines()[-8:]]))
            return
        yield found, ""


def unseen(told: dict[str, Any], number: int, launched: dict[int, list[Launch]]) -> bool:
    """Whether a case ran, but ncu wrote nothing of one of its directions."""
    return any(2 * number + (part == "backward") not in launched
               for part in told.get("directions", []))


def report(cases: list[Case], found: Outcome,
           dry: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the JSON says beside the machine, and its rows."""
    registry = {kernel.name: kernel for kernel in kernels()}
    known = metered(json.loads(TRAFFIC.read_text())["rows"] if TRAFFIC.exists() else [])
    failed = {str(cases[n]): what["failed"] for n, what in found.told.items() if "failed" in what}
    rows: list[dict[str, Any]] = []
    for n, what in sorted(found.told.items()):
        if "shape" not in what:
            continue
        if not dry and unseen(what, n, found.launched):
            failed[str(cases[n])] = "it ran, but ncu wrote nothing of it"
            continue
        case = cases[n]
        rows += rows_of(case, what, n, found.launched, registry[case.kernel],
                        known.get((case.kernel, case.options, case.contender), {}))
    facts = {"left_out": {str(cases[n]): what["left_out"] for n, what in found.told.items()
                          if "left_out" in what}, "failed": failed,
             "not_reached": [str(case) for n, case in enumerate(cases) if n not in found.told]}
    return facts, rows


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", metavar="NAME", help="only these",
                        choices=[kernel.name for kernel in kernels()])
    parser.add_argument("--options", nargs="*", help='only these; "" is the plain call')
    parser.add_argument("--limit", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--peer", action="store_true", help="Liger's ops too")
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    parser.add_argument("--dry-run", action="store_true", help="in the interpreter, without ncu")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what is started of itself
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    if options.run:
        return calls(options.run, options.limit)
    cases = plan([k for k in kernels() if not options.kernel or k.name in options.kernel],
                 options.options, ["ours", *(["liger"] if options.peer else [])])
    binary = find("ncu", "/usr/local/cuda/bin", *map(str, Path("/opt/nvidia").glob(
        "nsight-compute/*")))
    if not options.dry_run and (binary is None or not torch.cuda.is_available()):
        lacks = "an NVIDIA GPU" if binary else "Nsight Compute's ncu"
        print(f"bench/counters.py needs {lacks}, and there is none here", file=sys.stderr)
        return 2
    until, problem, facts, rows = began + options.limit - END, "", {}, []
    with tempfile.TemporaryDirectory(prefix="counters-") as place:
        folder, out, head = Path(place), options.out, {}
        if not options.dry_run:
            found = about(folder)
            head = {"machine": found["machine"], "ncu": version(binary), "metrics": METRICS}
            out = out or record.RESULTS / record.slug(found["gpu"]) / "counters.json"
        for outcome, problem in chunks(cases, None if options.dry_run else binary, until, folder):
            if DENIED in problem:
                print(f"bench/counters.py: {problem}", file=sys.stderr)
                return 2
            facts, rows = report(cases, outcome, options.dry_run)
            facts["seconds"] = round(time.monotonic() - began, 1)
            if out is not None and not options.dry_run:
                record.write(out, head | facts, rows)  # the next process may not end
    if not options.dry_run:
        print("\n".join(show(rows)))
    print(f"{len(rows)} rows of {len(cases)} cases, {time.monotonic() - began:.0f} s")
    for what in ("failed", "left_out"):
        for name, why in facts.get(what, {}).items():
            print(f"{what.replace('_', ' ')}: {name}: {why}")
    if missing := facts.get("not_reached", [] if facts else list(map(str, cases))):
        print(f"not reached in time: {len(missing)}: {'; '.join(missing)}")
    if problem:
        print(problem)
    if out is not None and facts and not options.dry_run:
        print(f"written to {out}")
    return int(bool(problem or facts.get("failed") or not rows))


if __name__ == "__main__":
    sys.exit(main())
