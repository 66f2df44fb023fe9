"""What bench/zero.py races: jobs of a few processes that sleep between orders, and quiet rounds."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim import processor_seconds

from fastllm.config import cache_folder

ROOT = Path(__file__).parents[1]
RANK = ROOT / "bench" / "zero_rank.py"
DEEPSPEED = "deepspeed==0.19.8"
PATIENCE = 300.0  # seconds for an answer
QUIET = 0.03  # others' share of the processors


class Missing(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Task:
    """What bench/zero_rank.py builds on each of `world` ranks, in which environment."""

    build: dict[str, Any]
    python: Path = Path(sys.executable)
    imports: tuple[str, ...] = ()


class Job:
    """The ranks of one contestant: one thread each, blocked on a read between two orders."""

    def __init__(self, build: dict[str, Any], store: Path) -> None:
        self._errors = [store.with_suffix(f".{rank}.txt") for rank in range(build["world"])]
        self._orders, self._answers, self.specs = [], [], []
        for rank, errors in enumerate(self._errors):
            (orders, give), (take, answers) = os.pipe(), os.pipe()
            self._orders.append(os.fdopen(give, "w"))
            self._answers.append(os.fdopen(take))
            self.specs.append({"task": build, "rank": rank, "store": str(store),
                               "errors": str(errors), "orders": orders, "answers": answers})
        self._pids: list[int] = []

    def come_up(self) -> None:
        """Wait until every rank is built. Raises Missing where one is not."""
        self._pids = [one["pid"] for one in self._hear()]

    def ask(self, order: str) -> list[dict[str, Any]]:
        """Every rank's answer. Raises Missing with a rank's last words where one dies."""
        for orders in self._orders:
            with suppress(BrokenPipeError):
                print(order, file=orders, flush=True)
        return self._hear()

    def _hear(self) -> list[dict[str, Any]]:
        found = []
        for answers, errors in zip(self._answers, self._errors, strict=True):
            # Each order has one line for an answer, so that none waits in the buffer unseen.
            ready = select.select([answers], [], [], PATIENCE)[0]
            said = answers.readline() if ready else ""
            if not said:
                raise Missing(last_words(errors) if ready else f"no answer in {PATIENCE:.0f} s")
            found.append(json.loads(said))
        return found

    def cpu_seconds(self) -> float:
        """Processor time of all ranks so far."""
        ticks = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")")[-1]
            ticks += sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Take the pipes away."""
        for end in [*self._orders, *self._answers]:
            with suppress(BrokenPipeError):
                end.close()


@contextmanager
def crew(tasks: dict[str, Task]) -> Iterator[tuple[dict[str, Job], dict[str, str]]]:
    """Within: the jobs that came up, and why the others did not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    jobs: dict[str, Job] = {}
    leaders: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for python in dict.fromkeys(task.python for task in tasks.values()):
                chosen = {name: task for name, task in tasks.items() if task.python == python}
                specs: list[dict[str, Any]] = []
                for name, task in chosen.items():
                    jobs[name] = Job(task.build, Path(folder) / f"{len(jobs)}")
                    specs += jobs[name].specs
                ends = [spec[end] for spec in specs for end in ("orders", "answers")]
                imports = dict.fromkeys(name for task in chosen.values() for name in task.imports)
                with (Path(folder) / f"leader{len(leaders)}.txt").open("wb") as sink:
                    leaders.append(subprocess.Popen(
                        [str(python), str(RANK), json.dumps(specs), *imports], pass_fds=ends,
                        stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment,
                        start_new_session=True))
                for end in ends:
                    os.close(end)
            up, missing = {}, {}
            for name in tasks:
                try:
                    jobs[name].come_up()
                    up[name] = jobs[name]
                except Missing as error:
                    missing[name] = str(error)
            yield up, missing
        finally:
            for leader in leaders:
                os.killpg(leader.pid, signal.SIGKILL)
                leader.wait()
            for job in jobs.values():
                job.close()


def last_words(errors: Path) -> str:
    """The error that a rank died of, in one line."""
    said = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
    lines = [text.strip() for text in said.splitlines() if text and not text[0].isspace()]
    named = [text for text in lines if text.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or ["it ended without a word"])[-1][:300]


class Quiet:
    """Rounds, of which the quietest count; up to twice as many are made where others are busy."""

    def __init__(self, jobs: list[Job], rounds: int) -> None:
        self._jobs, self._rounds = jobs, rounds
        self._made: list[tuple[float, dict[str, Any]]] = []

    def wanted(self) -> bool:
        quiet = sum(share <= QUIET for share, _ in self._made)
        return quiet < self._rounds and len(self._made) < 2 * self._rounds

    @contextmanager
    def round(self) -> Iterator[dict[str, Any]]:
        """A dictionary for the round's samples; what others take meanwhile is measured."""
        samples: dict[str, Any] = {}
        wall, before = time.perf_counter(), self._others()
        yield samples
        # The kernel counts in steps of 10 ms, two of which are forgiven.
        others = max(self._others() - before - 0.02, 0.0)
        wall = time.perf_counter() - wall
        self._made.append((others / wall / (os.cpu_count() or 1), samples))

    def _others(self) -> float:
        busy, own = processor_seconds()
        return busy - own - sum(job.cpu_seconds() for job in self._jobs)

    def _quietest(self) -> list[tuple[float, dict[str, Any]]]:
        return sorted(self._made, key=lambda one: one[0])[:self._rounds]

    def kept(self) -> list[dict[str, Any]]:
        return [samples for _, samples in self._quietest()]

    def summary(self) -> dict[str, Any]:
        return {"discarded_rounds": len(self._made) - len(self._quietest()),
                "others_share": round(self._quietest()[-1][0], 3)}


def deepspeed_python() -> Path:
    """The interpreter of an environment with DeepSpeed and our torch, made where there is none.

    Raises Missing where it cannot be made.
    """
    folder = cache_folder() / "bench" / DEEPSPEED.replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "installed"
    if stamp.exists():
        return python
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    base = [pin for pin in pins if pin.startswith(("torch==", "numpy==", "setuptools==", "wheel==",
                                                   "ninja==", "psutil=="))]
    print(f"making an environment for {DEEPSPEED}", flush=True)
    # Two installs: DeepSpeed's own setup imports torch. DS_BUILD_OPS=0: none of its C++.
    for command in ([sys.executable, "-m", "venv", str(folder)],
                    [str(python), "-m", "pip", "install", "--quiet", *base],
                    [str(python), "-m", "pip", "install", "--quiet", "--no-build-isolation",
                     *base, DEEPSPEED]):
        made = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "DS_BUILD_OPS": "0"})
        if made.returncode:
            said = [text for text in made.stderr.splitlines() if text.startswith("ERROR")]
            raise Missing(f"{DEEPSPEED} cannot be installed: {(said or ['no reason given'])[-1]}")
    stamp.touch()
    return python
