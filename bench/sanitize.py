"""NVIDIA's compute-sanitizer over every Triton kernel of the registry, on this GPU.

    python bench/sanitize.py [--tool memcheck racecheck initcheck synccheck] [--kernel NAME ...]
                             [--limit SECONDS] [--large] [--compile PROCESSES] [--out FILE]
                             [--dry-run]

Each kernel is called plain and with each of its variants and bench options, forward and backward,
in bfloat16 and float32, at the smallest of its test shapes that has more than ELEMENTS elements
and more than one of its first axis; --large: at the largest. First without a tool, in several
processes, which fills Triton's cache; then once a tool, PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that
each tensor ends where memcheck thinks that it does. Only kernels of ours are instrumented, and
what else is reported is counted apart. --limit is shared out among the tools, plain calls come
before options, and what is not reached is listed.

Before its calls each tool is given a kernel with a fault planted. A tool that does not report it
sees nothing here, and is said to: exit code 1, as where a kernel of ours has a finding or fails.
Results go to bench/results/<GPU>/sanitizer.json: the machine, the tool's version, and for each tool
its control, calls, findings with the first report of each kind, seconds and what was not reached.
--dry-run: no GPU and no tool, but the same calls in Triton's interpreter. Without a GPU or without
compute-sanitizer: one line and exit code 2.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402
from halves import halves, shape_of  # noqa: E402
from planted_faults import CUDA, FAULTS, plant  # noqa: E402
from sanitizer_report import Reader, grouped  # noqa: E402
from under_tool import (  # noqa: E402
    END,
    INTERPRETED,
    START,
    chosen,
    find,
    how_ended,
    parser,
    say,
    short,
    version,
)

from fastllm.kernels._spec import Kernel, kernels  # noqa: E402

FOUND = 9
"""Exit code that compute-sanitizer is told to end with where it found something."""
SPOILT = 3
"""Exit code of a process of calls whose CUDA context an error took along."""
FLUSH = 0.01
"""Seconds after a call in which the sanitizer, another process, writes what it found in it."""


@dataclass(frozen=True)
class Case:
    """One call: a kernel by name, options by their name ("" is the plain call)."""

    kernel: str
    options: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return (f"{f'{self.kernel} {self.options}'.strip()} {'x'.join(map(str, self.shape))} "
                f"{self.dtype}")


def options_of(kernel: Kernel) -> dict[str, dict[str, Any]]:
    """Every set of options of a kernel by name: none, its variants, and its bench options."""
    found = {"": {}} | {name: dict(given) for name, given in kernel.variants.items()}
    for name, given in kernel.bench_options.items():
        if dict(given) != found.get(name):
            found[f"{name} (bench)" if name in found else name] = dict(given)
    return found


def plan(registry: Iterable[Kernel], large: bool = False) -> list[Case]:
    """Every case: each kernel's plain calls, then each one's first options, and so on."""
    found = [(turn, Case(kernel.name, name, str(dtype)[6:], shape_of(kernel, large)))
             for kernel in registry for turn, name in enumerate(options_of(kernel))
             for dtype in (torch.bfloat16, torch.float32) if dtype in kernel.dtypes]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def functions() -> list[str]:
    """The names of the Triton functions of our kernels' modules."""
    from triton.runtime.jit import KernelInterface

    kernels()
    ours = "fastllm.kernels."
    return sorted({value.fn.__name__ for module in list(sys.modules)
                   if module.startswith(ours) for value in vars(sys.modules[module]).values()
                   if isinstance(value, KernelInterface)
                   and value.fn.__module__.startswith(ours)})


# The process of calls.

def calls(told: dict[str, Any]) -> int:
    """Plant the fault of a tool, if one is named, and make the calls until the time is up."""
    until = time.monotonic() + told["limit"]
    registry = {kernel.name: kernel for kernel in kernels()}
    if told["control"]:
        problem = ""
        try:
            plant(told["control"])
        except Exception as error:  # under the tool this may well be what it reports
            problem = short(error)
        time.sleep(FLUSH)
        say(control=problem)
        if problem and not alive():
            return SPOILT
    for number, fields in told["cases"]:
        if time.monotonic() > until:
            break
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        try:
            perform(registry[case.kernel], case, number)
        except Exception as error:
            say(of=number, failed=short(error))
            if not alive():
                return SPOILT
        else:
            say(of=number)
    say(end=True)
    return 0


def perform(kernel: Kernel, case: Case, number: int) -> None:
    """A case's forward and, where there is one, its backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    call = kernel.inputs(case.shape, getattr(torch, case.dtype), device, generator,
                         **options_of(kernel)[case.options])
    for part, run in halves(kernel, call, lambda: kernel.public(*call.args, **call.kwargs),
                            generator):
        say(begin=number, part=part)
        run()
        if device == "cuda":
            torch.cuda.synchronize()
            time.sleep(FLUSH)


def alive() -> bool:
    """Whether the CUDA context, if there is a GPU, outlived an error."""
    try:
        return not torch.cuda.is_available() or float(torch.ones(1, device="cuda").sum()) == 1.0
    except Exception:
        return False


# The process that hears of them.

def command(tool: str, binary: str, names: Iterable[str]) -> list[str]:
    """compute-sanitizer's own part of the command line (its options as of 2025.3)."""
    return [binary, "--tool", tool, "--error-exitcode", str(FOUND),
            # Torch's kernels are many and slow under a tool, and not what is in question.
            "--kernel-name", f"regex=^({'|'.join(map(re.escape, names))})$",
            # A kernel that fails must not take those after it along.
            "--destroy-on-device-error", "kernel", "--target-processes", "application-only",
            "--print-limit", "0", "--show-backtrace", "device", "--check-exit-code", "no",
            # The default of 10 seconds may pass before Python has imported torch.
            "--launch-timeout", "120",
            *(["--report-api-errors", "no"] if tool == "memcheck" else [])]


def pursue(cases: list[Case], numbers: list[int], until: float, folder: Path,
           before: Iterable[str] = (), env: dict[str, str] | None = None,
           control: str = "") -> Reader:
    """Make calls until they are made or the time is up, with a new process after one that died;
    before them that of the control, if a tool is named."""
    heard = Reader(cases=cases)
    while numbers and (left := until - time.monotonic()) > START:
        heard.summary, reports, made = None, len(heard.findings), len(heard.became)
        planted = "" if "control" in heard.facts else control
        told = {"cases": [(n, asdict(cases[n])) for n in numbers], "control": planted}
        code = heard.follow(__file__, told, left, folder, list(before), env or {})
        tail = " | ".join(heard.last[-8:])
        if (code == FOUND or heard.summary) and len(heard.findings) == reports:
            heard.not_understood.append(
                f"exit code {code}, {heard.summary} errors by the tool's own count, but no report "
                f"was understood: {tail}")
        if heard.ended:
            break
        numbers = [n for n in numbers if n not in heard.became]
        if len(heard.became) == made and not (planted and "control" in heard.facts):
            heard.not_understood.append(f"no call was made: {how_ended(code)}: {tail}")
            break
    return heard


def progress(cases: list[Case], readers: list[Reader]) -> dict[str, Any]:
    """How far the calls came, over all processes."""
    became = dict(sorted(pair for heard in readers for pair in heard.became.items()))
    failed = {str(cases[n]): what["failed"] for n, what in became.items() if "failed" in what}
    return {"calls": sum(heard.begun for heard in readers), "cases": len(cases),
            "done": len(became) - len(failed), "failed": failed,
            "not_understood": [line for heard in readers for line in heard.not_understood],
            "not_reached": [str(case) for n, case in enumerate(cases) if n not in became]}


def alone(cases: list[Case], processes: int, until: float, folder: Path,
          env: dict[str, str] | None = None) -> dict[str, Any]:
    """The calls without a tool, shared out among processes: whether each works by itself."""
    began = time.monotonic()
    parts = [list(range(len(cases)))[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        readers = list(pool.map(lambda part: pursue(cases, part, until, folder, env=env), parts))
    return progress(cases, readers) | {"processes": processes,
                                       "seconds": round(time.monotonic() - began, 1)}


def check(tool: str, binary: str, cases: list[Case], ours: list[str], until: float,
          folder: Path) -> dict[str, Any]:
    """A tool's row: its control, then all the calls until the time is up."""
    began = time.monotonic()
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    home = Path(binary).parents[1]
    if (home / "include").is_dir():  # where torch's compiler of CUDA C++ finds headers
        env["CUDA_HOME"] = os.environ.get("CUDA_HOME", str(home))
    planted = FAULTS.values()
    heard = pursue(cases, list(range(len(cases))), until, folder,
                   command(tool, binary, [*ours, *planted]), env, tool)
    seen, report = judged(tool, heard)
    mine = [one for one in heard.findings if one.name in ours]
    others = [one for one in heard.findings if one.name not in (*ours, *planted)]
    return {"control": seen, "control_report": report, **progress(cases, [heard]),
            "errors": len(mine), "errors_of_other_code": len(others), "findings": grouped(mine),
            "of_other_code": grouped(others), "trouble": sorted(set(heard.trouble)),
            "seconds": round(time.monotonic() - began, 1)}


def judged(tool: str, heard: Reader) -> tuple[str, list[str]]:
    """Of the control: "seen", "not seen", "not reached" or "left out: WHY"; and its report."""
    for one in heard.findings:
        if one.name == FAULTS[tool]:
            return "seen", one.text
    if "control" not in heard.facts:
        return "not reached", heard.last[-12:]
    problem = heard.facts["control"]
    # A fault that cannot be compiled here says nothing of the tool; one in Triton always can.
    if problem and tool in CUDA:
        return f"left out: {problem}", []
    return "not seen", [problem or "it ran", *heard.last[-12:]]


def wrong(row: dict[str, Any]) -> bool:
    return bool(row["failed"] or row["not_understood"] or row.get("errors")
                or row.get("control") == "not seen")


# For people.

def show(tool: str, row: dict[str, Any]) -> Iterator[str]:
    """The row of a tool."""
    sees = {"seen": "the planted fault is reported",
            "not reached": "the control was not reached",
            "not seen": "SEES NOTHING HERE: the planted fault is not reported"}
    yield (f"{tool}: {row['calls']} calls of {row['done']} cases of {row['cases']}, "
           f"{row['errors']} errors, {row['errors_of_other_code']} of other code, "
           f"{row['seconds']:.0f} s; {sees.get(row['control'], 'control ' + row['control'])}")
    if row["control"] in ("not seen", "not reached"):
        yield from (f"        {line}" for line in row["control_report"])
    for one in row["findings"]:
        yield (f"    {one['function']} in {one['file'] or '?'}: {one['kind']}, {one['reports']} "
               f"times, first in: {(one['under_way'] or ['?'])[0]}")
        yield from (f"        {line}" for line in one["report"])
    for one in row["of_other_code"]:
        yield (f"    of other code: {one['function'] or one['kind']}, {one['reports']} times: "
               f"{one['report'][0]}")
    yield from lacking(row)


def show_alone(row: dict[str, Any]) -> Iterator[str]:
    """The row of the calls without a tool."""
    yield (f"without a tool: {row['calls']} calls of {row['done']} cases of {row['cases']}, "
           f"{len(row['failed'])} failed, {row['seconds']:.0f} s in {row['processes']} processes")
    yield from lacking(row)


def lacking(row: dict[str, Any]) -> Iterator[str]:
    """What failed, was not understood or was not reached."""
    yield from (f"    failed: {name}: {why}" for name, why in row["failed"].items())
    yield from (f"    {line}" for line in [*row["not_understood"], *row.get("trouble", [])])
    if row["not_reached"]:
        yield f"    not reached in time: {len(row['not_reached'])}: {'; '.join(row['not_reached'])}"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    found = parser(__doc__, "in the interpreter, no tool")
    found.add_argument("--tool", nargs="*", choices=list(FAULTS),
                       default=["memcheck", "racecheck"])
    found.add_argument("--large", action="store_true", help="each kernel's largest test shape")
    found.add_argument("--compile", type=int, metavar="PROCESSES", default=os.cpu_count() or 1,
                       help="for the calls without a tool; 0: none")
    return found.parse_args(given)


def main(given: list[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    if options.calls:
        return calls(json.loads(options.calls.read_text()))
    cases = plan(chosen(options), options.large)
    until = began + options.limit - END
    binary = find("compute-sanitizer", "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    if not options.dry_run and (binary is None or not torch.cuda.is_available()):
        lacks = "an NVIDIA GPU" if binary else "compute-sanitizer"
        print(f"bench/sanitize.py needs {lacks}, and there is none here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="sanitize-") as place:
        folder = Path(place)
        if options.dry_run:
            row = alone(cases, max(1, options.compile), until, folder, INTERPRETED)
            print("\n".join(show_alone(row)))
            return int(wrong(row))
        return go(options, cases, binary, began, until, folder)


def go(options: argparse.Namespace, cases: list[Case], binary: str, began: float, until: float,
       folder: Path) -> int:
    """All of it on a GPU."""
    out = options.out or record.place("sanitizer")
    result: dict[str, Any] = {"machine": record.machine(), "sanitizer": version(binary),
                              "shapes": "largest" if options.large else "smallest useful",
                              "limit": options.limit, "tools": {}}
    print(f"{result['machine']['gpu']}; {result['sanitizer']}; {len(cases)} cases")
    if options.compile:
        # A third of the time at most: a tool that has to compile as well is slow, but works.
        row = alone(cases, options.compile, began + options.limit / 3, folder)
        result["without_a_tool"] = row
        print("\n".join(show_alone(row)), flush=True)
    ours = functions()
    for turn, tool in enumerate(options.tool):
        now = time.monotonic()
        share = (until - now) / (len(options.tool) - turn)
        row = result["tools"][tool] = check(tool, binary, cases, ours, now + share, folder)
        print("\n".join(show(tool, row)), flush=True)
        result["seconds"] = round(time.monotonic() - began, 1)
        record.write(out, result, [])  # after each tool: what comes next may not end
    print(f"written to {out}")
    alone_failed = result.get("without_a_tool", {}).get("failed")
    return int(bool(alone_failed) or any(map(wrong, result["tools"].values())))


if __name__ == "__main__":
    sys.exit(main())
