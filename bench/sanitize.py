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
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fastllm.kernels._spec import Kernel, kernels  # noqa: E402
from fastllm.kernels._triton import jit, tl  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ELEMENTS = 100
FOUND = 9
"""Exit code that compute-sanitizer is told to end with where it found something."""
SPOILT = 3
"""Exit code of a process of calls whose CUDA context an error took along."""
START = 15.0
"""Seconds that a process needs before its first call: with less left none is started."""
GRACE = 8.0
"""Seconds over its limit that a process has before it is killed."""
END = 5.0
"""Seconds of the limit that are kept for ending."""
SAYS = "@says "
"""What a line begins with by which the process of calls tells where it is."""
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


def shape_of(kernel: Kernel, large: bool = False) -> tuple[int, ...]:
    """The test shape that a kernel is called at."""
    ordered = sorted(kernel.test_shapes, key=lambda shape: torch.Size(shape).numel())
    useful = [shape for shape in ordered
              if shape[0] > 1 and torch.Size(shape).numel() > ELEMENTS]
    return ordered[-1] if large or not useful else useful[0]


def plan(registry: Iterable[Kernel], large: bool = False) -> list[Case]:
    """Every case: each kernel's plain calls, then each one's first options, and so on."""
    rounds: dict[int, list[Case]] = {}
    for kernel in registry:
        for place, name in enumerate(options_of(kernel)):
            rounds.setdefault(place, []).extend(
                Case(kernel.name, name, str(dtype)[6:], shape_of(kernel, large))
                for dtype in (torch.bfloat16, torch.float32) if dtype in kernel.dtypes)
    return [case for place in sorted(rounds) for case in rounds[place]]


def functions() -> dict[str, str]:
    """The Triton functions of our kernels' modules: name -> files that have one of that name."""
    import triton

    found: dict[str, set[str]] = {}
    kernels()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastllm.kernels."):
            for value in vars(module).values():
                if isinstance(value, triton.runtime.jit.KernelInterface):
                    inner = value.fn
                    if inner.__module__.startswith("fastllm.kernels."):
                        file = Path(inner.__code__.co_filename).name
                        found.setdefault(inner.__name__, set()).add(file)
    return {name: ", ".join(sorted(files)) for name, files in sorted(found.items())}


# The faults. Names of their own, so that nobody takes a control's report for a finding.

@jit
def planted_store(x, n, BLOCK: tl.constexpr):
    """Writes one number beyond the n that there are."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 1.0, mask=at < n + 1)


@jit
def planted_load(x, y, n, BLOCK: tl.constexpr):
    """Reads n numbers, which nobody wrote."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


# In Triton every barrier is the compiler's: what lacks one is CUDA C++, compiled at run time.
RACE = """extern "C" __global__ void planted_race(int *out) {
    __shared__ volatile int place[64];
    place[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = place[63 - threadIdx.x];
}
"""
DIVERGENCE = """extern "C" __global__ void planted_divergence(int *out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = threadIdx.x;
}
"""
PLANTED = {"memcheck": "planted_store", "racecheck": "planted_race", "initcheck": "planted_load",
           "synccheck": "planted_divergence"}


def plant(tool: str) -> None:
    """Launch the kernel whose fault a tool is to see. Raises where it cannot be compiled."""
    out = torch.zeros(100, device="cuda")
    if tool == "memcheck":
        planted_store[(1,)](out, out.numel(), BLOCK=128)
    elif tool == "initcheck":
        planted_load[(1,)](torch.empty_like(out), out, out.numel(), BLOCK=128)
    else:
        source = RACE if tool == "racecheck" else DIVERGENCE
        compiled = torch.cuda._compile_kernel(source, PLANTED[tool])
        threads = 64 if tool == "racecheck" else 32
        compiled(grid=(1, 1, 1), block=(threads, 1, 1), args=[out.int()])
    torch.cuda.synchronize()


# The process of calls: the only part that touches a GPU.

def say(**what: Any) -> None:
    """One line for the process that watches, whole, whatever else writes to the same pipe."""
    os.write(1, f"\n{SAYS}{json.dumps(what)}\n".encode())


def perform(kernel: Kernel, case: Case, device: str, at: Callable[[str], None]) -> None:
    """A case's forward and, where there is one, its backward."""
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
            time.sleep(FLUSH)

    generator = torch.Generator(device).manual_seed(0)
    call = kernel.inputs(case.shape, getattr(torch, case.dtype), device, generator,
                         **options_of(kernel)[case.options])
    at("forward")
    returned = kernel.public(*call.args, **call.kwargs)
    wait()
    outputs = [x for x in tree_leaves(returned)
               if isinstance(x, torch.Tensor) and x.requires_grad]
    if kernel.mutates or not outputs:
        return
    upstream = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) if x.dim()
                else torch.ones_like(x) for x in outputs]
    at("backward")
    torch.autograd.grad(outputs, call.differentiated(), upstream, allow_unused=True)
    wait()


def machine() -> dict[str, Any]:
    """What the results are of, or why that is not known: it is no reason to have none."""
    try:
        return record.machine()
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def calls(file: Path, limit: float) -> int:
    """Make the calls that a file lists, until they are all made or the time is up."""
    until = time.monotonic() + limit
    told = json.loads(file.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if told.get("machine"):
        say(machine=machine(), gpu=torch.cuda.get_device_name() if device == "cuda" else "")
    if told.get("control"):
        problem = ""
        try:
            plant(told["control"])
        except Exception as error:  # under the tool this may well be what it reports
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        time.sleep(FLUSH)
        say(control=problem)
        if problem and device == "cuda" and not alive():
            return SPOILT
    registry = {kernel.name: kernel for kernel in kernels()}
    for number, fields in told["cases"]:
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        if time.monotonic() > until:
            break
        try:
            perform(registry[case.kernel], case, device,
                    lambda part, number=number: say(begin=number, part=part))
        except Exception as error:
            say(failed=number, why=f"{type(error).__name__}: {error}".splitlines()[0][:300])
            if device == "cuda" and not alive():
                return SPOILT
        else:
            say(done=number)
    say(end=True)
    return 0


def alive() -> bool:
    """Whether the CUDA context outlived an error."""
    try:
        return float(torch.ones(1, device="cuda").sum()) == 1.0
    except Exception:
        return False


# What compute-sanitizer writes, and what is read of it.

# "at NAME+0x70 in FILE:LINE" as of 2024; "at 0x70 in FILE:LINE:NAME" or "at 0x70 in NAME" before.
PLACE = re.compile(r"\bat (?P<name>\S.*?)\+0x(?P<offset>[0-9a-f]+)"
                   r"(?: in (?P<file>[^\s:]+)(?::(?P<line>\d+))?)?|"
                   r"\bat 0x(?P<old_offset>[0-9a-f]+) in "
                   r"(?:(?P<old_file>[^\s:]+):(?P<old_line>\d+):)?(?P<old_name>.+)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# Titles that are no finding; and those by which the tool says that it could not work.
CHATTER = re.compile(r"COMPUTE-SANITIZER|(?:ERROR|RACECHECK|LEAK) SUMMARY|Target application|"
                     r"Tracking kernels|WARNING: \d+ errors were not|$")
TROUBLE = re.compile(r"Internal Sanitizer|Internal error|Error: (?!Race|Potential|\(Warp)|"
                     r"Device not supported|Target application terminated before|"
                     r"Maximum number of hazards")


@dataclass
class Finding:
    """One report of the sanitizer."""

    title: str
    text: list[str] = field(default_factory=list)
    function: str = ""
    file: str = ""
    line: int = 0
    under_way: str = ""

    def add(self, line: str) -> None:
        self.text.append(line)
        if not self.function and (found := PLACE.search(line)):
            self.function = (found["name"] or found["old_name"]).strip()
            self.file = Path(found["file"] or found["old_file"] or "").name
            self.line = int(found["line"] or found["old_line"] or 0)

    def kind(self) -> str:
        """The title without its numbers, so that reports of one fault are counted together.

        A race of one instruction with itself is a kind of its own: Triton's reductions let several
        threads write what should be the same number.
        """
        kind = re.sub(r"0x[0-9a-f]+|\d+", "N", PLACE.sub("", self.title)).strip(" :.")
        places = [(m["name"], m["offset"] or m["old_offset"])
                  for line in self.text for m in PLACE.finditer(line)]
        if "Race reported" in self.title and len(set(places)) == 1 < len(places):
            kind += ", by one instruction"
        return kind


@dataclass
class Reader:
    """Reads the lines of the sanitizer and of the process of calls as they come."""

    cases: list[Case]
    findings: list[Finding] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    calls: int = 0
    under_way: tuple[int, str] | None = None
    ended: bool = False
    summary: int | None = None
    trouble: list[str] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    last: list[str] = field(default_factory=list)
    _open: Finding | None = None

    def feed(self, line: str) -> None:
        line = line.rstrip("\n")
        if line.startswith(SAYS):
            self._said(json.loads(line[len(SAYS):]))
        elif line.startswith("====="):
            self._report(line.lstrip("="))
        elif not line:
            return
        else:
            self._open = None
        self.last = [*self.last[-39:], line]

    def _said(self, what: dict[str, Any]) -> None:
        if "begin" in what:
            self.under_way = what["begin"], what["part"]
            self.calls += 1
        elif "done" in what:
            self.done.append(what["done"])
            self.under_way = None
        elif "failed" in what:
            self.failed[what["failed"]] = what["why"]
            self.under_way = None
        elif "end" in what:
            self.ended = True
        else:
            self.said |= what

    def _report(self, text: str) -> None:
        if found := SUMMARY.search(text):
            self.summary = (self.summary or 0) + int(found[1])
        if text.startswith("  ") and self._open is not None:
            # Host frames tell how Python came there, at length.
            if len(self._open.text) < 20 and "Host Frame" not in text:
                self._open.add(text.strip())
            return
        self._open, text = None, text.strip()
        if TROUBLE.match(text):
            self.trouble.append(text)
        elif not CHATTER.match(text):
            self._open = Finding(text)
            self._open.add(text)
            if self.under_way is not None:
                number, part = self.under_way
                self._open.under_way = f"{self.cases[number]} {part}"
            self.findings.append(self._open)


def grouped(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings of one function, file and kind together: how many, when, and the first report."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.function, one.file, one.kind()), []).append(one)
    return [{"function": function, "file": file, "kind": kind, "reports": len(them),
             "lines": sorted({one.line for one in them if one.line}),
             "under_way": sorted({one.under_way for one in them if one.under_way}),
             "report": them[0].text} for (function, file, kind), them in groups.items()]


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


def child(told: dict[str, Any], limit: float, folder: Path) -> list[str]:
    """The command of a process of calls; what it is told goes to a file in the folder."""
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump(told, file)
    return [sys.executable, str(Path(__file__).resolve()), "--run", file.name,
            "--limit", f"{limit:.1f}"]


def stop(pid: int) -> None:
    """Kill a process with all that it started: a tool has the calls made in another process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    for child in children.get(pid, []):
        stop(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def watch(words: list[str], env: dict[str, str], limit: float,
          feed: Callable[[str], None]) -> int | None:
    """Run a command and hand on each line of its output; its exit code, None where it was killed
    for going GRACE over its limit."""
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, text=True, bufsize=1,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        stop(process.pid)

    timer = threading.Timer(limit + GRACE, kill)
    timer.start()
    try:
        for line in process.stdout:
            feed(line)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            kill()
            process.wait()
    return None if killed.is_set() else code


def numbered(cases: list[Case], numbers: Iterable[int]) -> list[Any]:
    return [(number, asdict(cases[number])) for number in numbers]


def pursue(cases: list[Case], numbers: list[int], before: list[str], env: dict[str, str],
           until: float, folder: Path, control: str = "") -> tuple[Reader, dict[int, str],
                                                                  list[str]]:
    """Make calls until they are made or the time is up, with a new process after one that died;
    before them that of the control, if a tool is named.

    Returns what was read, the cases that a process died of and how, and what was not understood.
    """
    reader, died, odd = Reader(cases), {}, []
    while numbers and (left := until - time.monotonic()) > START:
        reader.ended, reader.under_way, reader.summary = False, None, None
        known, made = len(reader.findings), len(reader.done) + len(reader.failed)
        told = {"cases": numbered(cases, numbers),
                "control": "" if "control" in reader.said else control}
        code = watch(before + child(told, left, folder), env, left, reader.feed)
        if (code == FOUND or reader.summary) and len(reader.findings) == known:
            odd.append(f"exit code {code}, {reader.summary} errors by the tool's own count, but no "
                       "report was understood: " + " | ".join(reader.last[-8:]))
        if reader.ended:
            break
        how = "killed, over its time" if code is None else f"ended with exit code {code}"
        if reader.under_way is not None:
            died[reader.under_way[0]] = f"{reader.under_way[1]}: {how}"
        numbers = [n for n in numbers
                   if n not in died and n not in reader.failed and n not in set(reader.done)]
        stuck = len(reader.done) + len(reader.failed) == made and reader.under_way is None
        if stuck and not (told["control"] and "control" in reader.said):
            odd.append(f"no call was made: {how}: " + " | ".join(reader.last[-8:]))
            break
    return reader, died, odd


def judged(tool: str, reader: Reader) -> tuple[str, list[str]]:
    """Of the control: "seen", "not seen", "not reached" or "left out: WHY"; and its report."""
    for one in reader.findings:
        if one.function.split("(")[0] == PLANTED[tool]:
            return "seen", one.text
    if "control" not in reader.said:
        return "not reached", reader.last[-12:]
    # A fault that cannot be compiled here says nothing of the tool; one in Triton always can.
    if reader.said["control"] and tool in ("racecheck", "synccheck"):
        return f"left out: {reader.said['control']}", []
    return "not seen", [reader.said["control"] or "it ran", *reader.last[-12:]]


def check(tool: str, binary: str, cases: list[Case], ours: dict[str, str], until: float,
          folder: Path) -> dict[str, Any]:
    """A tool's row: its control, then all the calls until the time is up."""
    began = time.monotonic()
    before = command(tool, binary, [*ours, *PLANTED.values()])
    home = Path(binary).parents[1]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if (home / "include").is_dir():  # where torch's compiler of CUDA C++ finds headers
        env["CUDA_HOME"] = os.environ.get("CUDA_HOME", str(home))
    reader, died, odd = pursue(cases, list(range(len(cases))), before, env, until, folder, tool)
    seen, report = judged(tool, reader)
    mine, others = split([one for one in reader.findings
                          if one.function.split("(")[0] not in PLANTED.values()], ours)
    reached = {*reader.done, *reader.failed, *died}
    return {"control": seen, "control_report": report, "calls": reader.calls,
            "cases": len(cases), "done": len(reader.done), "errors": len(mine),
            "errors_of_other_code": len(others), "findings": grouped(mine),
            "of_other_code": grouped(others),
            "failed": {str(cases[n]): why for n, why in (reader.failed | died).items()},
            "not_understood": odd, "trouble": sorted(set(reader.trouble)),
            "not_reached": [str(case) for n, case in enumerate(cases) if n not in reached],
            "seconds": round(time.monotonic() - began, 1)}


def split(findings: list[Finding],
          ours: Iterable[str]) -> tuple[list[Finding], list[Finding]]:
    """Those in kernels of ours, and those of other code."""
    names = set(ours)

    def mine(one: Finding) -> bool:
        return one.function.split("(")[0] in names

    return [x for x in findings if mine(x)], [x for x in findings if not mine(x)]


def wrong(row: dict[str, Any]) -> bool:
    return bool(row["errors"] or row["failed"] or row["not_understood"]
                or row["control"] == "not seen")


def show(tool: str, row: dict[str, Any]) -> Iterator[str]:
    """A tool's row for people."""
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
    for name, why in row["failed"].items():
        yield f"    failed: {name}: {why}"
    for line in [*row["not_understood"], *row["trouble"]]:
        yield f"    {line}"
    if row["not_reached"]:
        yield f"    not reached in time: {len(row['not_reached'])}: {'; '.join(row['not_reached'])}"


def alone(cases: list[Case], processes: int, env: dict[str, str], until: float,
          folder: Path) -> dict[str, Any]:
    """The calls without a tool, shared out among processes: whether each works by itself."""
    began = time.monotonic()
    parts = [list(range(len(cases)))[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda part: pursue(cases, part, [], env, until, folder), parts))
    failed = {n: why for reader, died, _ in found for n, why in (reader.failed | died).items()}
    done = {n for reader, *_ in found for n in reader.done}
    return {"calls": sum(reader.calls for reader, *_ in found), "cases": len(cases),
            "done": len(done), "failed": {str(cases[n]): failed[n] for n in sorted(failed)},
            "not_understood": [line for *_, odd in found for line in odd],
            "not_reached": [str(case) for n, case in enumerate(cases)
                            if n not in done and n not in failed],
            "processes": processes, "seconds": round(time.monotonic() - began, 1)}


def show_alone(row: dict[str, Any]) -> Iterator[str]:
    yield (f"without a tool: {row['calls']} calls of {row['done']} cases of {row['cases']}, "
           f"{len(row['failed'])} failed, {row['seconds']:.0f} s in {row['processes']} processes")
    yield from (f"    failed: {name}: {why}" for name, why in row["failed"].items())
    yield from (f"    {line}" for line in row["not_understood"])
    if row["not_reached"]:
        yield f"    not reached in time: {len(row['not_reached'])}: {'; '.join(row['not_reached'])}"


def find(name: str, *places: str) -> str | None:
    """A program of NVIDIA's on the PATH or in one of these folders."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def version(binary: str) -> str:
    """The line of a program's --version that says it."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if "ersion" in line]
    return lines[-1] if lines else done.stdout.strip()


def about(folder: Path) -> dict[str, Any]:
    """{"machine": facts, "gpu": name}, asked of a process of its own: this one needs no context."""
    reader = Reader([])
    code = watch(child({"machine": True, "cases": []}, 60, folder), {}, 60, reader.feed)
    return reader.said or {"machine": {"unknown": f"exit code {code}: {reader.last[-3:]}"},
                           "gpu": ""}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="*", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--kernel", nargs="*", metavar="NAME", help="only these",
                        choices=[kernel.name for kernel in kernels()])
    parser.add_argument("--limit", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--large", action="store_true", help="each kernel's largest test shape")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", default=os.cpu_count() or 1,
                        help="for the calls without a tool; 0: none")
    parser.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    parser.add_argument("--dry-run", action="store_true", help="in the interpreter, no tool")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what is started of itself
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    began = time.monotonic()
    options = arguments(given)
    if options.run:
        return calls(options.run, options.limit)
    cases = plan([k for k in kernels() if not options.kernel or k.name in options.kernel],
                 options.large)
    until = began + options.limit - END
    with tempfile.TemporaryDirectory(prefix="sanitize-") as place:
        folder = Path(place)
        if options.dry_run:
            env = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            row = alone(cases, max(1, options.compile), env, until, folder)
            print("\n".join(show_alone(row)))
            return int(bool(row["failed"] or row["not_understood"]))
        binary = find("compute-sanitizer", "/usr/local/cuda/bin",
                      "/usr/local/cuda/compute-sanitizer")
        if binary is None or not torch.cuda.is_available():
            lacks = "an NVIDIA GPU" if binary else "compute-sanitizer"
            print(f"bench/sanitize.py needs {lacks}, and there is none here", file=sys.stderr)
            return 2
        found = about(folder)
        result: dict[str, Any] = {"machine": found["machine"], "sanitizer": version(binary),
                                  "shapes": "largest" if options.large else "smallest useful",
                                  "limit": options.limit, "tools": {}}
        print(f"{found['gpu']}; {result['sanitizer']}; {len(cases)} cases")
        out = options.out or record.RESULTS / record.slug(found["gpu"]) / "sanitizer.json"
        if options.compile:
            # A third of the time at most: a tool that has to compile as well is slow, but works.
            row = alone(cases, options.compile, {}, began + options.limit / 3, folder)
            result["without_a_tool"] = row
            print("\n".join(show_alone(row)), flush=True)
        ours = functions()
        for place_of, tool in enumerate(options.tool):
            now = time.monotonic()
            share = (until - now) / (len(options.tool) - place_of)
            row = result["tools"][tool] = check(tool, binary, cases, ours, now + share, folder)
            print("\n".join(show(tool, row)), flush=True)
            result["seconds"] = round(time.monotonic() - began, 1)
            write(out, result)  # after each tool: what comes next may not end
        print(f"written to {out}")
    alone_failed = result.get("without_a_tool", {}).get("failed")
    return int(bool(alone_failed) or any(map(wrong, result["tools"].values())))


def write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
