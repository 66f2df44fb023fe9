"""Who the others wait for: a rank that hangs, dies or is cut off is named, and the job ends.

A collective waits for every rank. Where one does not come, the others would wait for the backend's
timeout and then speak of sockets. So every rank says, about twice a second and through the store
that the process group met in, how far it is; who has waited longer than the timeout reads what the
others said last, names those behind or silent, and ends its process: the main thread sits in a wait
in C++ which nothing softer ends.

Two threads beside the main one: `_talk` speaks with the store, which may block for ever where its
host hangs; `_guard` looks at the clock and at what `_talk` has heard, and never blocks. Both need
the GIL: waits on other ranks must release it, as torch's do.

The timeout of the process group itself must be longer than this one, or the backend speaks first.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch.distributed import PrefixStore

from fastllm.config import RunError, environment
from fastllm.dist import last_words

BEAT = 0.4
LINGER = 1.0
"""A rank that holds the store ends up to so much later: the others must read the last words."""
SILENT = 5
"""Beats without news after which a rank counts as silent."""
BLAME = 3.0
FINAL, READ = "final", "read"
# Of what torch, Gloo and NCCL say where a connection is lost.
LOST = ("gloo", "connection closed", "connection reset", "connection refused", "broken pipe",
        "nccl", "socket", "timed out")


class Peers(Protocol):
    """What a watchdog needs of World."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Report(NamedTuple):
    """What a rank says of itself."""

    sequence: int
    """Waits that it has entered so far; every rank enters the same ones."""
    step: int | None
    what: str
    """The last wait entered."""
    waiting: bool
    beat: int
    clock: float
    """time.time() of its host: for words only, since clocks differ."""


class Watchdog:
    """Watches one rank's waits for the others; a context manager around what ranks do together.

    store: the process group's. timeout: seconds that a wait may last. step: the optimizer step that
    is being done; set it freely. Every rank must enter the same waits in the same order.

    An exception that leaves the context is told to the other ranks; one that means a lost
    connection becomes RunError, naming the rank that is gone. In a world of one it does nothing.
    """

    def __init__(self, world: Peers, store: Any, timeout: float) -> None:
        self.rank, self.size, self.timeout = world.rank, world.size, timeout
        self.step: int | None = None
        self._sequence = 0
        self._what, self._patient = "the start", False
        self._since: float | None = None
        self._beat_every = min(BEAT, timeout / 10)
        self._silent = SILENT * self._beat_every
        self._closed = threading.Event()
        self._final: str | None = None
        self._final_at = 0.0
        self._look = False
        self._heard: dict[int, tuple[Report | None, float]] = {}
        self._answered = time.monotonic()
        self._speaking = self._gone = False
        self._unconfirmed = threading.Lock()
        if self.size == 1:
            return
        self._holder, self._where = _holder(store)
        # A connection of its own: who waits for a key keeps the store's to himself.
        clone = getattr(store, "clone", None)
        self._store = PrefixStore("fastllm/watchdog", clone() if clone else store)
        self._store.set_timeout(timedelta(seconds=max(1.0, 2 * self._silent)))
        self._beat = 0
        self._say()
        for work in (self._talk, self._guard):
            threading.Thread(target=work, daemon=True, name=f"watchdog{work.__name__}").start()

    def enter(self, what: str, *, patient: bool = False) -> None:
        """The main thread is about to wait for others.

        what: as in "all-gather of layers.2". patient: the wait may last as long as every rank gives
        signs of life; it ends the job where one has been silent for the timeout.
        """
        self._sequence += 1
        self._what, self._patient = what, patient
        self._since = time.monotonic()

    def leave(self) -> None:
        """The wait is over."""
        self._since = None

    def __call__(self, what: str | None) -> None:
        """`enter`, or with None `leave`: what an engine takes as its `watch`."""
        if what is None:
            self._since = None
        else:
            self.enter(what)

    @contextmanager
    def waiting(self, what: str, *, patient: bool = False) -> Iterator[None]:
        """Within: a wait, as in `enter`. A lost connection becomes RunError, as in `blame`."""
        self.enter(what, patient=patient)
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not lost(error):
                raise
            raise self.blame(error) from error
        self._since = None

    def blame(self, error: Exception) -> RunError:
        """The error to raise for a lost connection, naming the rank that is gone.

        Takes up to BLAME seconds: a rank is known to be gone by its silence.
        """
        self._speaking = True
        self._heard, self._look = {}, True
        start = time.monotonic()
        words = f"{self._place()} failed: {str(error).splitlines()[0]}"
        while time.monotonic() - start < BLAME and self._final is None:
            silent = self._silent_ranks()
            if silent:
                words = (f"{_ranks(silent)} {'is' if len(silent) == 1 else 'are'} gone: "
                         f"{self._place()} cannot end ({self._signs(silent)})")
                break
            if self._gone or time.monotonic() - self._answered > self._silent:
                words = self._without_store("is gone")
                break
            time.sleep(0.02)
        return RunError(self._agree(words))

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            if self.size > 1 and isinstance(error, Exception):
                if isinstance(error, RuntimeError) and lost(error):
                    raise self.blame(error) from error
                if not self._speaking:
                    self._speaking = True
                    self._agree(f"rank {self.rank}: {' '.join(str(error).split())}")
        finally:
            self._closed.set()

    # The thread that speaks with the store.

    def _talk(self) -> None:
        """Every beat: say how far this rank is, and hear the last words and, if asked, the rest."""
        try:
            while not self._closed.wait(self._beat_every):
                self._say()
                if self._final is None and self._store.check([FINAL]):
                    self._final_at = time.monotonic()
                    self._final = self._store.get(FINAL).decode()
                    self._confirm()
                if self._look:
                    self._listen()
                self._answered = time.monotonic()
        except Exception:
            self._gone = True

    def _say(self) -> None:
        self._beat += 1
        report = Report(self._sequence, self.step, self._what, self._since is not None, self._beat,
                        time.time())
        self._store.set(str(self.rank), json.dumps(report))

    def _listen(self) -> None:
        """Note what every other rank said last, and since when it says no more."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        keys = [str(rank) for rank in ranks]
        if self._store.check(keys):
            said = self._store.multi_get(keys)  # one request, however many ranks
        else:  # to ask for what is not there would wait for it
            said = [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        for rank, text in zip(ranks, said, strict=True):
            report = Report(*json.loads(text)) if text else None
            before = self._heard.get(rank)
            if before is None or before[0] != report:
                self._heard[rank] = report, time.monotonic()

    # The thread that watches the clock.

    def _guard(self) -> None:
        tick = min(0.1, self.timeout / 20)
        spoken = 0.0
        while not self._closed.wait(tick):
            since, now = self._since, time.monotonic()
            if self._speaking:  # the main thread has an error to report, if only it gets there
                spoken = spoken or now
                if now - spoken > BLAME + 10:
                    os._exit(1)
                continue
            if self._final is not None and (since is not None or now - self._final_at > 10):
                self._end(self._final)
            waited = 0.0 if since is None else now - since
            # A rank is silent that says nothing new from here to the timeout.
            self._look = waited > self.timeout - 1.5 * self._silent
            if waited > self.timeout and not (self._patient and self._signs_of_life(now)):
                self._end(self._agree(self._explain()))

    def _signs_of_life(self, now: float) -> bool:
        """Whether store and ranks have all said something within the timeout."""
        last = [since for _, since in self._heard.copy().values()]
        return not self._gone and now - min([self._answered, *last]) < self.timeout

    def _explain(self) -> str:
        """Who the wait is for."""
        if self._gone or time.monotonic() - self._answered > self._silent:
            return self._without_store(None)
        within = f"within {self.timeout:g} s"
        silent = self._silent_ranks()
        if silent:
            return (f"{_ranks(silent)} did not come through {self._place()} {within} "
                    f"({self._signs(silent)})")
        reports = {rank: report for rank, (report, _) in self._heard.items() if report}
        least = min((report.sequence for report in reports.values()), default=self._sequence)
        if least < self._sequence:
            behind = [rank for rank, report in reports.items() if report.sequence == least]
            return (f"{_ranks(behind)} did not come to {self._place()} {within} "
                    f"({self._signs(behind)})")
        for rank, report in sorted(reports.items()):
            if report.sequence == self._sequence and report.what != self._what:
                return (f"{self._place()} did not end {within}: rank {rank} is in {report.what} "
                        "instead")
        return (f"{self._place()} did not end {within} on rank {self.rank}, though every rank is "
                "alive and came to it: does the network drop what they send?")

    def _without_store(self, gone: str | None) -> str:
        """The store's host says nothing: gone, or it hangs, or the way to it is cut."""
        ago = f"has not answered for {time.monotonic() - self._answered:.0f} s"
        if self._holder is not None:
            verdict = gone or f"did not come through {self._place()} within {self.timeout:g} s"
            more = f" in {self._place()}" if gone else ""
            return (f"rank {self._holder} {verdict}{more} (the store that it holds at "
                    f"{self._where} {ago})")
        end = "cannot end" if gone else f"did not end within {self.timeout:g} s"
        return (f"{self._place()} {end}, and the store at {self._where} {ago}: that host or the "
                "network to it is down")

    def _silent_ranks(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self._heard.copy().items())
                if now - since > self._silent]

    def _signs(self, ranks: list[int]) -> str:
        """When and where each of these ranks was last heard of."""
        said = []
        for rank in ranks[:4]:
            report = self._heard[rank][0]
            if report is None:
                said.append("nothing was ever heard of it")
                continue
            where = "in" if report.waiting else "after"
            step = "" if report.step is None else f" of step {report.step}"
            said.append(f"its last sign of life was {max(0, time.time() - report.clock):.0f} s "
                        f"ago, {where} {report.what}{step}")
        return "; ".join(said if len(ranks) == 1 else [
            f"rank {rank}: {words}" for rank, words in zip(ranks, said, strict=False)])

    def _place(self) -> str:
        return self._what + ("" if self.step is None else f" of step {self.step}")

    def _agree(self, words: str) -> str:
        """Make these the last words of the job, unless another rank had some first: return those.

        The store may be gone, and then no call to it returns.
        """
        won = [self._final or words]
        if self._gone:
            return won[0]
        readers = self.size - 1 - len(self._silent_ranks()) if self._holder == self.rank else 0

        def write() -> None:
            try:
                won[0] = self._store.compare_set(FINAL, "", won[0]).decode()
                self._confirm()
                while readers and self._store.add(READ, 0) < readers:
                    time.sleep(0.02)
            except Exception:
                return

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(LINGER if readers else LINGER / 2)
        return won[0]

    def _confirm(self) -> None:
        """Once: this rank knows the last words, and needs the store no more."""
        if self._holder != self.rank and self._unconfirmed.acquire(blocking=False):
            self._store.add(READ, 1)

    def _end(self, words: str) -> None:
        last_words.say(f"the run failed: {words}", stuck=True)
        os._exit(1)


class _Single(NamedTuple):
    rank: int = 0
    size: int = 1


IDLE = Watchdog(_Single(), None, float("inf"))
"""Of a world of one."""


def lost(error: Exception) -> bool:
    """Whether an error of torch's means that the connection to another rank is lost."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in LOST)


def _holder(store: Any) -> tuple[int | None, str]:
    """(the rank that holds the store, None where a launcher does; its HOST:PORT)."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    where = f"{store.host}:{store.port}" if hasattr(store, "host") else "its place"
    return (None if environment("TORCHELASTIC_USE_AGENT_STORE") == str(True) else 0), where


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
