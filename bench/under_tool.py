"""Calls made in a process of their own, under one of NVIDIA's tools and within a time.

A tool can take its process along, and so can a call. So the process that makes the calls is told by
a JSON file which ones, says in lines of JSON which it begins and what became of it, and is heard
from outside: what was under way when it ended is what it died of, and a new process goes on.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm.kernels._spec import Kernel, kernels

ROOT = Path(__file__).parents[1]
START = 15.0
"""Seconds that a process needs before its first call: with less left none is started."""
GRACE = 8.0
"""Seconds over its limit that a process has before it is killed."""
END = 5.0
"""Seconds of a script's limit that are kept for ending."""
SAYS = "@says "
"""What a line begins with that the process of calls says."""
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
"""The environment in which the calls are made without a GPU."""


# In the process of calls.

def say(**what: Any) -> None:
    """One line, whole, whatever else writes to the same pipe: begin=NUMBER and part=NAME; of=NUMBER
    with what became of that case (failed=WHY); end=True; or a fact of another name."""
    os.write(1, f"\n{SAYS}{json.dumps(what)}\n".encode())


def short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# Outside of it.

@dataclass
class Heard:
    """What the processes of calls have said, one after the other."""

    became: dict[int, dict[str, Any]] = field(default_factory=dict)
    under_way: tuple[int, str] | None = None
    begun: int = 0
    ended: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    last: list[str] = field(default_factory=list)

    def feed(self, line: str) -> None:
        line = line.rstrip("\n")
        if line.startswith(SAYS):
            self.said(json.loads(line[len(SAYS):]))
        elif line:
            self.last = [*self.last[-19:], line]
            self.printed(line)

    def said(self, what: dict[str, Any]) -> None:
        if "begin" in what:
            self.under_way = what["begin"], what["part"]
            self.begun += 1
        elif "of" in what:
            self.became[what.pop("of")] = what
            self.under_way = None
        elif "end" in what:
            self.ended = True
        else:
            self.facts |= what

    def printed(self, line: str) -> None:
        """A line that the process did not say: of the tool, or of whatever else prints."""

    def follow(self, script: str, told: dict[str, Any], limit: float, folder: Path,
               before: list[str], env: dict[str, str]) -> int | None:
        """Run `script --calls FILE` after the words of the tool, the file saying what is told.

        The exit code, None where it was killed. What was under way then has failed.
        """
        self.ended, self.under_way = False, None
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump(told | {"limit": limit}, file)
        code = watch([*before, sys.executable, str(Path(script).resolve()), "--calls", file.name],
                     {"OMP_NUM_THREADS": "1"} | env, limit, self.feed)
        if self.under_way is not None:
            number, part = self.under_way
            self.became[number] = {"failed": f"{part}: {how_ended(code)}"}
        return code


def how_ended(code: int | None) -> str:
    return "killed, over its time" if code is None else f"ended with exit code {code}"


def watch(words: list[str], env: dict[str, str], limit: float, feed: Callable[[str], None],
          grace: float = GRACE) -> int | None:
    """Run a command and hand on each line of its output; its exit code, None where it was killed
    for going `grace` over its limit."""
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, text=True, bufsize=1,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        stop(process.pid)

    timer = threading.Timer(limit + grace, kill)
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


# The script's command line, and the tool.

def parser(doc: str, dry_run: str) -> argparse.ArgumentParser:
    """The options that every script of a tool has."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--kernel", nargs="*", metavar="NAME", help="only these",
                       choices=[kernel.name for kernel in kernels()])
    found.add_argument("--limit", type=float, default=540, help="seconds for all of it")
    found.add_argument("--out", type=Path, help="JSON file (default: under bench/results/)")
    found.add_argument("--dry-run", action="store_true", help=dry_run)
    found.add_argument("--calls", type=Path, help=argparse.SUPPRESS)  # a process started here
    return found


def chosen(options: argparse.Namespace) -> list[Kernel]:
    """The kernels asked for."""
    return [kernel for kernel in kernels() if not options.kernel or kernel.name in options.kernel]


def find(name: str, *places: str) -> str | None:
    """A program of NVIDIA's on the PATH or in one of these folders."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def version(binary: str) -> str:
    """The line of a program's --version that says it."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if "ersion" in line]
    return lines[-1] if lines else done.stdout.strip()
