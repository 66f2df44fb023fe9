"""Forks ranks from a process that has torch and fastllm imported: one starts in 30 ms, not in 4 s.

`python forge.py` is the forge itself; it reads a JSON order a line and answers with the process id,
and later with how it ended. The classes are for the tests.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def serve() -> None:
    """The forge: {"call": "module:function" or null, "args": [...], "env": {}, "log": path}."""
    import fastllm.cli  # what a rank would import first: torch, numpy, pydantic
    import fastllm.dist.zero_optimizer

    # The peak of this machine is measured anew by every run, which takes longer than these train.
    fastllm.run.session.peak_flops = lambda device, dtype: (1e12, "not measured in tests")

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    orders = sys.stdin.fileno()
    say({"ready": True})
    pending = b""
    while True:
        for ready in select.select([orders, reader], [], [])[0]:
            if ready == reader:
                os.read(reader, 4096)
                reap()
                continue
            block = os.read(orders, 1 << 16)
            if not block:
                return
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if order["call"]:  # once here, not in every child
                    importlib.import_module(order["call"].split(":")[0])
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os._exit(run(order))
                say({"pid": child})


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def say(value: object) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def run(order: dict) -> int:
    """The child's life: its exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["env"])
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        if order["call"] is None:
            from fastllm.cli import main

            code = main(order["args"])
        else:
            module, name = order["call"].split(":")
            value = getattr(importlib.import_module(module), name)(*order["args"])
            torch.save(value, order["log"] + ".value")
            code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


class Forge:
    """The tests' end of a forge."""

    def __init__(self) -> None:
        here = Path(__file__)
        env = {**os.environ, "OMP_NUM_THREADS": "1",
               "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[2])])}
        self.process = subprocess.Popen([sys.executable, str(here)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=env, text=True, bufsize=1)
        self._pids: queue.Queue[int] = queue.Queue()
        self._ended: dict[int, int] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            said = json.loads(line)
            if "pid" in said:
                self._pids.put(said["pid"])
            elif "ended" in said:
                with self._changed:
                    self._ended[said["ended"]] = said["code"]
                    self._changed.notify_all()

    def start(self, call: str | None, args: list, env: dict[str, str], log: Path) -> int:
        """A new process; its id."""
        order = {"call": call, "args": args, "env": env, "log": str(log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        return self._pids.get(timeout=60)

    def wait(self, pid: int, timeout: float) -> int | None:
        """The process's exit code (minus a signal), or None after the timeout."""
        with self._changed:
            if self._changed.wait_for(lambda: pid in self._ended, timeout):
                return self._ended[pid]
        return None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


class Job:
    """Ranks that run one function, or the command line where call is None."""

    def __init__(self, forge: Forge, world: int, call: str | None, args: list, folder: Path,
                 **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.forge = forge
        number = len(list(folder.glob("rank-0*.log")))
        self.logs = [folder / f"rank-{rank}-{number}.log" for rank in range(world)]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world),
                  **env}
        self.pids = [forge.start(call, args, {**common, "RANK": str(rank),
                                              "LOCAL_RANK": str(rank)}, self.logs[rank])
                     for rank in range(world)]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        for rank in range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                self.kill(rank, number)

    def codes(self, timeout: float = 90.0) -> list[int | None]:
        """Every rank's exit code. What has not ended by the timeout is None: it says in its log
        where it is, and is killed."""
        end = time.monotonic() + timeout
        found = [self.forge.wait(pid, max(end - time.monotonic(), 0.01)) for pid in self.pids]
        if None in found:
            self.kill_all(signal.SIGUSR1)
            time.sleep(0.5)
            self.kill_all()
        return found

    def text(self, rank: int = 0) -> str:
        """What a rank printed."""
        log = self.logs[rank]
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def values(self, timeout: float = 90.0) -> list:
        """What the ranks' functions returned; all must have."""
        import torch

        codes = self.codes(timeout)
        assert codes == [0] * len(codes), "\n".join(
            f"rank {rank} ended with {code}:\n{self.text(rank)[-2500:]}"
            for rank, code in enumerate(codes))
        return [torch.load(f"{log}.value", weights_only=False) for log in self.logs]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


if __name__ == "__main__":
    serve()
