"""Everything that only a GPU can say, in one command and within its minutes: `make gpu`.

    python bench/gpu.py [--part NAME ...] [--minutes 9] [--out DIR] [--dry-run]

Parts, in this order: build (the C++ extension, in place), tests (`pytest -m gpu`), sanitizer
(bench/sanitize.py), kernels and attention (bench/kernels.py). By name only: repeats (the bits of
attention, 1,000 times over), counters (bench/counters.py, under ncu), tune (bench/tune.py).

A part that is done early leaves its time to the later ones; one that overruns is stopped, and what
it had written stays. What the benchmarks will compile is compiled beside the first parts. DIR gets
a JSON file a benchmark, gpu.json (what ran, how it ended) and gpu.log (all that was printed).
Nothing is installed and no network is needed: the Python that runs this has torch with CUDA and
Triton, and what else is missing is said. Exit code 1 where a part failed or was stopped, 2 where
nothing can run. --dry-run: without a GPU, each part as far as a CPU goes (bench/pretend.py), on a
few kernels; its figures mean nothing.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402
from under_tool import stop, watch  # noqa: E402

GRACE, STOPPED, LOST = 10, 124, 3
AGAIN = 5
"""How often a benchmark whose CUDA context was lost goes on after the case that did it."""
COMPILING = 0.5
"""The share of a benchmark's time that it may wait for what is being compiled."""
LAST_TEST = 20
"""Seconds before a part's end at which no test is begun any more."""
DRY = ("rms_norm", "adamw")


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    out: Path
    minutes: float
    dry: bool
    cores: int

    def python(self, script: str, *arguments: str) -> list[str]:
        """A script of this folder; in a dry run, on a few kernels in the interpreter."""
        dry = ["--dry-run"] if self.dry else []
        return [sys.executable, str(ROOT / "bench" / script), *arguments, *dry]

    def few(self) -> list[str]:
        return ["--kernel", *DRY] if self.dry else []


@dataclass(frozen=True)
class Part:
    """One part; `command(run, seconds)` begins it."""

    share: float
    """Of the time, in the units of the other parts' shares."""
    command: Callable[[Run, float], list[str]]
    compiles: Callable[[Run], list[str]] | None = None
    """What can be compiled for it while other parts run."""
    by_default: bool = True


def build(run: Run, seconds: float) -> list[str]:
    if run.dry:  # in place, it would take that of another Python's torch away
        return ["echo", "a dry run leaves the extension as it is"]
    return [sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace"]


def tests(run: Run, seconds: float) -> list[str]:
    # Most of the time is the compiler's. A test that hangs is stopped with the part.
    workers = ["-n", str(max(1, run.cores // 2)), "--dist", "worksteal"]
    some = ["-p", "pretend", "-k", "rms_norm", "tests/kernels/test_norms.py"] if run.dry else []
    # -P: the checkout's own folder first on the path would shadow what is installed.
    return [sys.executable, "-P", "-m", "pytest", "-m", "gpu and not battery", *some,
            "-p", "deadline", "--deadline", f"{max(0, seconds - LAST_TEST):.0f}", "-rfE",
            "--durations", "15", *(workers if importlib.util.find_spec("xdist") else [])]


def sanitizer(run: Run, seconds: float) -> list[str]:
    return run.python("sanitize.py", "--limit", f"{seconds:.0f}", *run.few(),
                      "--out", str(run.out / "sanitizer.json"))


def timing(name: str, *arguments: str) -> Callable[[Run, float], list[str]]:
    def command(run: Run, seconds: float) -> list[str]:
        return run.python("kernels.py", *arguments, *("--limit", f"{seconds:.0f}"),
                          *([] if "--kernel" in arguments else run.few()),
                          *(["--options", "causal"] if run.dry and "--attention" in arguments
                            else []), "--out", str(run.out / f"{name}.json"))

    return command


def compiling(*arguments: str) -> Callable[[Run], list[str]]:
    return lambda run: run.python("kernels.py", *arguments, "--compile",
                                  str(max(1, run.cores // 4)))


def counters(run: Run, seconds: float) -> list[str]:
    return run.python("counters.py", "--limit", f"{seconds:.0f}", *run.few(),
                      "--out", str(run.out / "counters.json"))


def tune(run: Run, seconds: float) -> list[str]:
    return [*TUNE, "--limit", f"{seconds:.0f}", "--out", str(run.out / "attention_tiles.json")]


TUNE = (sys.executable, str(ROOT / "bench" / "tune.py"), "--width", "128", "64")
ATTENTION = ("--kernel", "attention", "--attention")
PARTS = {
    "build": Part(3, build),
    "tests": Part(5, tests),
    "sanitizer": Part(4, sanitizer),
    "kernels": Part(6, timing("kernels"), compiling()),
    "attention": Part(4, timing("attention", *ATTENTION), compiling(*ATTENTION)),
    "repeats": Part(2, timing("repeats", "--kernel", "attention", "--repeat-check", "1000"),
                    by_default=False),
    "counters": Part(4, counters, by_default=False),
    "tune": Part(4, tune, lambda run: [*TUNE, "--compile", str(max(1, run.cores - 4))],
                 by_default=False),
}


def environment() -> dict[str, str]:
    """What every command is given beside the environment."""
    return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (
                str(ROOT), str(ROOT / "bench"),  # it may not be installed
                os.environ.get("PYTHONPATH"))))}


def execute(command: list[str], log: TextIO, seconds: float) -> int:
    """The exit code, STOPPED after so many seconds; what it prints is shown and logged."""
    def feed(line: str) -> None:
        log.write(line)
        log.flush()
        print(line, end="", flush=True)

    code = watch(command, environment(), seconds, feed, GRACE)
    return STOPPED if code is None else code


def perform(name: str, part: Part, run: Run, log: TextIO, seconds: float) -> dict[str, Any]:
    """Run a part, again from where it was if it lost its CUDA context; what gpu.json says of it."""
    began = time.monotonic()
    command = part.command(run, seconds)
    print(f"\n== {name}: up to {seconds:.0f} s", flush=True)
    log.write(f"\n== {name}: {' '.join(command)}\n")
    code = execute(command, log, seconds)
    lost = 0
    while code == LOST and lost < AGAIN:
        lost += 1
        left = seconds - (time.monotonic() - began)
        code = execute([*part.command(run, left), "--resume"], log, left)
    ended = {0: "ok", STOPPED: "stopped at its limit"}.get(code, f"failed, exit code {code}")
    return {"part": name, "ended": ended, "exit_code": code, "contexts_lost": lost,
            "seconds": round(time.monotonic() - began, 1), "limit_seconds": round(seconds, 1),
            "command": [Path(word).name if "/" in word else word for word in command]}


def wait_for(compilers: dict[str, subprocess.Popen], name: str, seconds: float) -> str:
    """Let a part's compiler end, in that many seconds; how it ended."""
    process = compilers.pop(name)
    try:
        code = process.wait(seconds)
        return "compiled beforehand" if code == 0 else f"its compiler ended with {code}"
    except subprocess.TimeoutExpired:
        stop(process.pid)
        return "not all of it was compiled beforehand"


def run_parts(names: list[str], run: Run) -> list[dict[str, Any]]:
    """Every part in turn, each with its share of the time that is left."""
    began, found = time.monotonic(), []
    with (run.out / "gpu.log").open("w") as log, (run.out / "compile.log").open("w") as aside:
        compilers = {
            name: subprocess.Popen(part.compiles(run), cwd=ROOT, env=os.environ | environment(),
                                   stdout=aside, stderr=subprocess.STDOUT)
            for name, part in PARTS.items() if name in names and part.compiles and not run.dry}
        try:
            for place, name in enumerate(names):
                left = 60 * run.minutes - (time.monotonic() - began)
                shares = [PARTS[other].share for other in names[place:]]
                seconds = left * shares[0] / sum(shares)
                note = ""
                if name in compilers:
                    waited = time.monotonic()
                    note = wait_for(compilers, name, COMPILING * seconds)
                    seconds -= time.monotonic() - waited
                found.append(perform(name, PARTS[name], run, log, seconds - GRACE)
                             | ({"compiling": note} if note else {}))
        finally:
            for process in compilers.values():
                stop(process.pid)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [name for name, part in PARTS.items() if part.by_default]
    parser.add_argument("--part", nargs="*", choices=PARTS, default=default, metavar="NAME",
                        help=f"of {', '.join(PARTS)} (default: {', '.join(default)})")
    parser.add_argument("--minutes", type=float, default=9, help="for all of them")
    parser.add_argument("--out", type=Path, help="folder (default: that of this GPU's results)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    return parser.parse_args()


def refusal(options: argparse.Namespace) -> str:
    """Why nothing can run, in one line, or an empty string."""
    if options.dry_run:
        return "" if options.out else "--dry-run needs --out DIR, away from the results"
    if not torch.cuda.is_available():
        return (f"{sys.executable} has torch {torch.__version__}, which finds no NVIDIA GPU; "
                "PYTHON=... names another Python, and --dry-run runs what a CPU can")
    try:
        found = record.commit()
    except ValueError as error:
        return str(error)
    if not found:
        return ("results name the commit they measured, and there is no .git here: "
                "COMMIT=$(git rev-parse HEAD) make gpu, with the commit of where this came from")
    return ""


def main() -> int:
    options = parse()
    if reason := refusal(options):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    out = (options.out or record.place("gpu").parent).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.minutes, options.dry_run, os.cpu_count() or 1)
    began = time.monotonic()
    found = run_parts([name for name in PARTS if name in options.part], run)
    about = {"dry_run": run.dry, "seconds": round(time.monotonic() - began, 1)}
    record.write(out / "gpu.json", about | ({} if run.dry else {"machine": record.machine()}),
                 found)
    print(f"\n{'part':10} {'seconds':>8} {'limit':>6}  how it ended")
    for one in found:
        print(f"{one['part']:10} {one['seconds']:8.1f} {one['limit_seconds']:6.0f}  {one['ended']}"
              + (f"; {one['compiling']}" if "compiling" in one else "")
              + (f"; CUDA context lost {one['contexts_lost']} times" if one["contexts_lost"]
                 else ""))
    print(f"{about['seconds']:.0f} s in all; results in {out}")
    return 1 if any(one["exit_code"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
