"""`fastllm-train launch [--nproc N] [--nnodes M --rdzv-endpoint HOST:PORT] VERB ...`.

Starts N ranks of `python -m fastllm VERB ...` on this node with the environment that torchrun would
give them, and stays until the last has ended. Nodes find each other through torch's rendezvous.

The ranks are started and watched here, not by torch's elastic agent, because the agent
* kills ranks 30 s after it has passed a signal on (saving a checkpoint may take minutes), and then
  fails with a traceback where ours has ended a run as asked;
* sends a rank's failure to the log as a page, and hides which exit code it was.
What the agent has and this has not are restarts and nodes that come and go; for those there is
`torchrun ... -m fastllm VERB ...`, with TORCH_ELASTIC_SHUTDOWN_TIMEOUT raised for the 30 s.

The launcher also holds the store through which ranks meet, so that one which hangs or dies, be it
rank 0, leaves the others able to say who it was.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from fastllm import config
from fastllm.config import UserError, environment
from fastllm.dist import last_words
from fastllm.dist.nodes import Alone, Nodes, join

# Ranks that are left when one has failed have this long to end by themselves.
GRACE = 5.0
TICK = 0.05
STDERR_LINES = 40
PROGRAM = (sys.executable, "-m", "fastllm")
PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True)
class LaunchConfig:
    nproc: Annotated[int, Field(gt=0)] | None = None
    """Ranks on this node; none: one for each GPU."""
    nnodes: Annotated[int, Field(gt=0)] = 1
    """Nodes of the job; the command is started once on each."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """This node's number, 0 on the one that --rdzv-endpoint names; none: torch hands them out."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where the nodes meet: an address of one of them, and a free port there."""
    rdzv_id: str = "fastllm"
    """Tells jobs apart that meet at the same endpoint."""
    rdzv_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for the other nodes."""

    def validate(self) -> None:
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT: an address "
                             "of one of the nodes and a free port there, the same on each")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(f"--node-rank {self.node_rank} of --nnodes {self.nnodes}: they count "
                             "from 0")


def parse(arguments: Sequence[str]) -> tuple[LaunchConfig, list[str]]:
    """(settings, the ranks' own command): options of one value each, up to the first other word."""
    own: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("--"):
        take = 1 if "=" in rest[0] else 2
        if len(rest) < take or (take == 2 and rest[1].startswith("--")):
            raise UserError(f"launch: {rest[0]} needs a value")
        own, rest = own + rest[:take], rest[take:]
    return config.build(LaunchConfig, config.from_arguments(own)), rest


def launch(settings: LaunchConfig, command: Sequence[str],
           program: Sequence[str] = PROGRAM) -> int:
    """Run the command on every rank; returns the exit code of the whole.

    0 if every rank ended with 0. Else that of the first to fail where it is 1 or 2, and 1 for any
    other end; after one line on stderr. 128 + n if signal n ended ranks that could not save yet.
    """
    ranks = settings.nproc or _gpus()
    with _quiet(settings.nnodes > 1) as stderr:
        failure = _run(settings, ranks, [*program, *command], stderr)
    if failure is None:
        return 0
    code, line = failure
    if line:
        print(line, file=sys.stderr)
    return code


def _run(settings: LaunchConfig, ranks: int, command: Sequence[str],
         stderr: int | None) -> tuple[int, str] | None:
    """Meet the other nodes, start the ranks, stay until their end: None, or what failed first."""
    nodes = join(settings, ranks) if settings.nnodes > 1 else Alone(ranks)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastllm-launch-")))
        signals = _Signals()
        stack.callback(signals.restore)
        started: list[_Rank] = []
        # However this ends, no rank is left behind.
        stack.callback(_end_all, started)
        for local in range(ranks):
            started.append(_Rank(local, nodes, command, folder, stderr))
        failure = _watch(started, signals, nodes)
        last = failure[1].splitlines()[-1:] if failure else []
        nodes.leave((failure[0], last[0]) if failure and last else None)
        return failure


class _Rank:
    """One process. The first rank of all has this terminal; the others' stdout is dropped and
    their stderr kept, to be shown if they fail without a word of their own."""

    def __init__(self, local: int, nodes: Nodes | Alone, command: Sequence[str],
                 folder: Path, stderr: int | None) -> None:
        self.number = nodes.base + local
        self.host = nodes.host
        self.words = folder / f"{self.number}.words"
        self.sent: set[int] = set()
        threads = max(1, len(os.sched_getaffinity(0)) // nodes.local_size)
        variables = {
            "OMP_NUM_THREADS": environment("OMP_NUM_THREADS") or str(threads),
            # Without it, torch logs a page of C++ frames for each connection that is lost.
            "TORCH_CPP_LOG_LEVEL": environment("TORCH_CPP_LOG_LEVEL") or "ERROR",
            # A hostname may mean an address that other nodes, or even this one, cannot reach.
            **({} if environment("GLOO_SOCKET_IFNAME") or not nodes.interface
               else {"GLOO_SOCKET_IFNAME": nodes.interface}),
            "RANK": str(self.number), "LOCAL_RANK": str(local), "WORLD_SIZE": str(nodes.size),
            "LOCAL_WORLD_SIZE": str(nodes.local_size), "GROUP_RANK": str(nodes.node),
            "GROUP_WORLD_SIZE": str(nodes.count),
            "MASTER_ADDR": nodes.address, "MASTER_PORT": str(nodes.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True), "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": nodes.run_id,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING":
                environment("TORCH_NCCL_ASYNC_ERROR_HANDLING") or "1",
            last_words.VARIABLE: str(self.words),
        }
        self.stderr: IO[bytes] | None = None
        if self.number:
            self.stderr = (folder / f"{self.number}.stderr").open("w+b")
        # A session of its own: Ctrl-C reaches a terminal's whole process group, and a rank that
        # gets it twice ends without saving.
        self.process = subprocess.Popen(
            command, env=config.environment_with(variables), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if self.number else None,
            stderr=self.stderr or stderr, preexec_fn=_dies_with(os.getpid()))
        self.debug = "--debug" in command

    def end(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.process.poll() is None:
            self.sent.add(number)
            self.process.send_signal(number)

    def explain(self) -> str:
        """Its line; after what it wrote to stderr where it has none, or to debug."""
        said, code = last_words.heard(self.words), self.process.returncode
        lines = []
        if self.stderr and (said is None or self.debug) and code > 0:
            self.stderr.seek(0)
            written = self.stderr.read().decode(errors="replace").splitlines()[-STDERR_LINES:]
            lines = [f"rank {self.number}: {line}" for line in written]
        lines.append(said or f"{last_words.PROGRAM}: the run failed: rank {self.number}"
                             f"{f' on {self.host}' if self.host else ''} {ending(code)}")
        return "\n".join(lines)


@contextmanager
def _quiet(on: bool) -> Iterator[int | None]:
    """Within: nothing that this process writes to stderr is seen; yields a descriptor for ranks.

    On several nodes torch's C++ logs hosts without a name, and a page of frames for each lost
    connection; its log level was set when torch was imported.
    """
    if not on:
        yield None
        return
    sys.stderr.flush()
    seen = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield seen
    finally:
        os.dup2(seen, 2)
        os.close(seen)
        os.close(null)


def _end_all(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        rank.end(signal.SIGKILL)


class _Signals:
    """SIGTERM, SIGINT and SIGHUP to the launcher, kept for the loop that passes each on once."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.passed: list[int] = []
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, lambda n, _: self.waiting.append(n))

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self, ranks: Sequence[_Rank]) -> None:
        """To every rank what has come since the last call; a closed terminal is a SIGTERM."""
        while self.waiting:
            number = self.waiting.pop(0)
            number = signal.SIGTERM if number == signal.SIGHUP else number
            self.passed.append(number)
            for rank in ranks:
                rank.end(number)


def _watch(ranks: Sequence[_Rank], signals: _Signals,
           nodes: Nodes | Alone) -> tuple[int, str] | None:
    """Wait for the end of every rank; None, or (exit code, line) of what failed first."""
    failed: list[_Rank] = []
    deadline = None
    while True:
        signals.pass_on(ranks)
        codes = {rank: rank.process.poll() for rank in ranks}
        new = [(rank, code) for rank, code in codes.items() if code and rank not in failed]
        # Within one look, a rank that was killed is the reason, one that saw it go the outcome.
        failed += [rank for rank, _ in sorted(new, key=lambda pair: (pair[1] > 0, -pair[1]))]
        alive = [rank for rank, code in codes.items() if code is None]
        if not alive:
            break
        elsewhere = nodes.failure()
        if (failed or elsewhere) and deadline is None:
            deadline = time.monotonic() + GRACE
            if not signals.passed:  # a second one would say: now, whatever is being saved
                for rank in alive:
                    rank.end(signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for rank in alive:
                rank.end(signal.SIGKILL)
        time.sleep(TICK)
    elsewhere = nodes.failure()
    # What is killed for want of memory lets go of its connections long before it has ended.
    killed = [rank for rank in failed if codes[rank] == -signal.SIGKILL
              and signal.SIGKILL not in rank.sent]
    if not killed and elsewhere:
        return elsewhere
    if not failed:
        return None
    first = (killed or failed)[0]
    code = codes[first] or 0
    for number in signals.passed:
        if code in (-number, 128 + number):
            return 128 + number, ""
    return code if code in (1, 2) else 1, first.explain()


def ending(code: int) -> str:
    """How a process ended, in words, by subprocess's code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    more = " (the kernel does that where memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{more}"


def _gpus() -> int:
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise UserError("launch: torch sees no GPU here, so say how many ranks to start: --nproc N")
    return found


def _dies_with(launcher: int) -> Callable[[], None]:
    """For a child before its exec: SIGKILL when the launcher dies, however it does."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    return prepare
