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
import json
import math
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
from halves import halves, shape_of  # noqa: E402
from ncu_csv import METRICS, NEEDED, Launch, attributed, parse, summed  # noqa: E402
from peers import prepare  # noqa: E402
from under_tool import (  # noqa: E402
    END,
    INTERPRETED,
    START,
    Heard,
    chosen,
    find,
    parser,
    say,
    short,
    version,
)

from fastllm.kernels._spec import Kernel, kernels  # noqa: E402
from fastllm.kernels._triton import jit, tl  # noqa: E402

TRAFFIC = ROOT / "bench" / "results" / "interpreter" / "traffic.json"
CHUNK = 16
"""Cases of one process: ncu writes its figures at the end of it, and may not come to that."""
DENIED = "ERR_NVGPUCTRPERM"
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
    found = [((whose, turn), Case(kernel.name, name, contender))
             for kernel in registry for turn, name in enumerate(("", *kernel.bench_options))
             for whose, contender in enumerate(contenders) if options is None or name in options]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


# The process of calls.

@jit
def counters_marker(place):
    """Its launch says, by the size of its grid, whose launches come next."""
    tl.store(place, 0)


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


def once(kernel: Kernel, case: Case, shape: tuple[int, ...], number: int,
         profile: bool) -> list[str] | None:
    """Run a case; its directions, None where there is no such op."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.zeros(1, dtype=torch.int32, device=device)
    counters_marker[(1,)](place)  # compiled outside of what is profiled
    generator = torch.Generator(device).manual_seed(0)
    call = kernel.inputs(shape, dtype_of(kernel), device, generator,
                         **kernel.bench_options.get(case.options, {}))
    forward = prepare(kernel, call, case.contender)
    if forward is None:
        return None
    parts = []
    for part, run in halves(kernel, call, forward, generator):
        say(begin=number, part=part)
        with profiled(index_of(number, part), place) if profile else contextlib.nullcontext():
            run()
        parts.append(part)
    return parts


def index_of(number: int, part: str) -> int:
    """What the marker says before a direction of a case."""
    return 2 * number + (part == "backward")


def dtype_of(kernel: Kernel) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]


def shapes_of(kernel: Kernel, dry: bool) -> list[tuple[int, ...]]:
    """Shapes to try in turn, until there is memory enough."""
    return [shape_of(kernel)] if dry else list(reversed(kernel.bench_shapes))


def attempt(kernel: Kernel, case: Case, number: int) -> dict[str, Any]:
    """What became of a case: its shape and directions, or why there are none."""
    why = ""
    for shape in shapes_of(kernel, not torch.cuda.is_available()):
        try:
            once(kernel, case, shape, number, profile=False)
            parts = once(kernel, case, shape, number, profile=True)
        except torch.OutOfMemoryError as error:
            why = f"{'x'.join(map(str, shape))}: {error}".splitlines()[0][:200]
        except Exception as error:
            return {"failed": short(error)}
        else:
            if parts is None:
                return {"left_out": f"{case.contender} has no such op, or is not installed"}
            return {"shape": shape, "directions": parts} | ({"larger": why} if why else {})
        torch.cuda.empty_cache()  # here, where the error no longer holds what it had
    return {"failed": why}


def calls(told: dict[str, Any]) -> int:
    """Make the calls until the time is up."""
    until = time.monotonic() + told["limit"]
    torch.backends.cuda.matmul.allow_tf32 = False
    registry = {kernel.name: kernel for kernel in kernels()}
    for number, fields in told["cases"]:
        if time.monotonic() > until:
            break
        case = Case(**fields)
        say(begin=number, part="inputs")
        say(of=number, **attempt(registry[case.kernel], case, number))
        torch.cuda.empty_cache()
    say(end=True)
    return 0


# The process that hears of them.

def command(binary: str, metrics: Iterable[str], log: Path) -> list[str]:
    """ncu's own part of the command line."""
    return [binary, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
            "--target-processes", "application-only", "--profile-from-start", "off",
            "--clock-control", "none", "--cache-control", "all", "--metrics", ",".join(metrics)]


@dataclass
class Profile(Heard):
    """What is known of the cases so far."""

    launched: dict[int, list[Launch]] = field(default_factory=dict)
    problem: str = ""
    """Why there was no point in going on."""


def pursue(cases: list[Case], binary: str | None, until: float, folder: Path,
           heard: Profile) -> Iterator[None]:
    """Run the cases in processes of CHUNK each, under ncu unless there is none to use, until the
    time is up or there is a problem; yields after each."""
    metrics, todo = METRICS, list(range(len(cases)))
    while todo and (left := until - time.monotonic()) > START:
        numbers = todo[:CHUNK if binary else None]
        log = folder / f"ncu-{numbers[0]}-{len(metrics)}.csv"
        code = heard.follow(__file__, {"cases": [(n, asdict(cases[n])) for n in numbers]}, left,
                            folder, command(binary, metrics, log) if binary else [],
                            {} if binary else INTERPRETED)
        text = log.read_text(errors="replace") if log.exists() else ""
        heard.launched |= attributed(parse(text))
        printed = [*text.splitlines(), *heard.last]
        said = "\n".join(printed)
        if "Failed to find metric" in said and DENIED not in said and metrics != NEEDED:
            metrics = NEEDED
            heard.became = {n: what for n, what in heard.became.items() if n not in numbers}
            continue
        todo = [n for n in todo if n not in heard.became]
        if DENIED in said:
            heard.problem = f"reading the GPU's counters is not permitted here ({DENIED})"
        elif set(numbers) <= set(todo):
            heard.problem = f"no case was reached: exit code {code}: " + " | ".join(printed[-8:])
        yield
        if heard.problem:
            return


# What the figures say.

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
                for launch in launched.get(index_of(number, part), [])]
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


def report(cases: list[Case], heard: Profile,
           dry: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the JSON says beside the machine, and its rows."""
    registry = {kernel.name: kernel for kernel in kernels()}
    known = metered(json.loads(TRAFFIC.read_text())["rows"] if TRAFFIC.exists() else [])
    facts: dict[str, Any] = {"left_out": {}, "failed": {}, "not_reached": [
        str(case) for n, case in enumerate(cases) if n not in heard.became]}
    rows: list[dict[str, Any]] = []
    for n, what in sorted(heard.became.items()):
        case = cases[n]
        for kind in ("left_out", "failed"):
            if kind in what:
                facts[kind][str(case)] = what[kind]
        parts = what.get("directions", [])
        if not dry and any(index_of(n, part) not in heard.launched for part in parts):
            facts["failed"][str(case)] = "it ran, but ncu wrote nothing of it"
        elif parts:
            rows += rows_of(case, what, n, heard.launched, registry[case.kernel],
                            known.get((case.kernel, case.options, case.contender), {}))
    return facts, rows


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    found = parser(__doc__, "in the interpreter, without ncu")
    found.add_argument("--options", nargs="*", help='only these; "" is the plain call')
    found.add_argument("--peer", action="store_true", help="Liger's ops too")
    return found.parse_args(given)


def main(given: list[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    if options.calls:
        return calls(json.loads(options.calls.read_text()))
    cases = plan(chosen(options), options.options,
                 ["ours", *(["liger"] if options.peer else [])])
    binary, dry = None, options.dry_run
    if not dry:
        binary = find("ncu", "/usr/local/cuda/bin",
                      *map(str, Path("/opt/nvidia").glob("nsight-compute/*")))
        if binary is None or not torch.cuda.is_available():
            lacks = "an NVIDIA GPU" if binary else "Nsight Compute's ncu"
            print(f"bench/counters.py needs {lacks}, and there is none here", file=sys.stderr)
            return 2
        out = options.out or record.place("counters")
        head = {"machine": record.machine(), "ncu": version(binary), "metrics": METRICS}
    heard = Profile()
    facts, rows = report(cases, heard, dry)
    with tempfile.TemporaryDirectory(prefix="counters-") as folder:
        for _ in pursue(cases, binary, began + options.limit - END, Path(folder), heard):
            if DENIED in heard.problem:
                print(f"bench/counters.py: {heard.problem}", file=sys.stderr)
                return 2
            facts, rows = report(cases, heard, dry)
            facts["seconds"] = round(time.monotonic() - began, 1)
            if not dry:
                record.write(out, head | facts, rows)  # the next process may not end
    if not dry:
        print("\n".join(show(rows)))
    print(f"{len(rows)} rows of {len(cases)} cases, {time.monotonic() - began:.0f} s")
    for what in ("failed", "left_out"):
        for name, why in facts[what].items():
            print(f"{what.replace('_', ' ')}: {name}: {why}")
    if missing := facts["not_reached"]:
        print(f"not reached in time: {len(missing)}: {'; '.join(missing)}")
    if heard.problem:
        print(heard.problem)
    if not dry and "seconds" in facts:
        print(f"written to {out}")
    return int(bool(heard.problem or facts["failed"] or not rows))


if __name__ == "__main__":
    sys.exit(main())
