"""The nodes of a job: how launchers on several machines find each other, and what they tell.

Torch's rendezvous makes the acquaintance: "static" where every node was given its number, "c10d"
where not. Over its store the launchers agree on the ranks and pass a failure on.
"""

import fcntl
import json
import logging
import socket
import struct
import threading
import time
from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from fastllm.config import RunError, UserError

PORT = 29400  # torchrun's
SIOCGIFADDR = 0x8915
LOOPBACK = "lo"
FAILED, FINISHED = "fastllm/failed", "fastllm/finished"
# Who holds the store waits so long for the last words of the others.
PARTING, PARTING_FAILED = 60.0, 3.0

Failure = tuple[int, str]


class Settings(Protocol):
    """What `join` needs of LaunchConfig."""

    nnodes: int
    node_rank: int | None
    rdzv_endpoint: str | None
    rdzv_id: str
    rdzv_timeout: float


class Alone:
    """One node: its launcher holds the store that ranks meet in."""

    node, count, base, host, run_id = 0, 1, 0, "", "fastllm"
    address = "127.0.0.1"

    def __init__(self, ranks: int) -> None:
        self.size = self.local_size = ranks
        self._store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
        self.port = self._store.port
        names = [name for _, name in socket.if_nameindex()]
        self.interface = LOOPBACK if LOOPBACK in names else ""

    def failure(self) -> Failure | None:
        """What failed on another node."""
        return None

    def leave(self, failure: Failure | None) -> None:
        """Say how it ended here."""


class Nodes:
    """This node among several. A thread of its own talks to the store: a lost network blocks."""

    def __init__(self, info: Any, ranks: int, settings: Settings, handler: Any) -> None:
        self.node, self.count, self.local_size = info.rank, info.world_size, ranks
        self.run_id, self._handler = settings.rdzv_id, handler
        self.address = info.bootstrap_store_info.master_addr
        self.port = info.bootstrap_store_info.master_port
        here = address_towards(self.address, self.port)
        self.interface = interface_of(here)
        self.host = socket.gethostname()
        self._store = info.store
        self._store.set_timeout(timedelta(seconds=settings.rdzv_timeout))
        self._store.set(f"fastllm/node/{self.node}", str(ranks))
        keys = [f"fastllm/node/{node}" for node in range(self.count)]
        everyone = [int(self._store.get(key)) for key in keys]
        self.size, self.base = sum(everyone), sum(everyone[:self.node])
        self._failure: Failure | None = None
        self._mine: Failure | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def failure(self) -> Failure | None:
        """(exit code, line) of what failed first on another node."""
        return self._failure

    def leave(self, failure: Failure | None) -> None:
        """Say how it ended here, and stay a little for those who have not heard it yet."""
        self._mine = failure
        self._leaving.set()
        self._thread.join(PARTING if failure is None else PARTING_FAILED + 1)

    def _talk(self) -> None:
        try:
            while not self._leaving.wait(0.5):
                self._look()
            if self._mine:
                self._store.compare_set(FAILED, "", json.dumps(self._mine))
            self._store.add(FINISHED, 1)
            deadline = time.monotonic() + (PARTING_FAILED if self._mine else PARTING)
            while self._store.add(FINISHED, 0) < self.count and time.monotonic() < deadline:
                time.sleep(0.1)
            self._handler.shutdown()
        except Exception:
            return  # the store is gone; what that means to the ranks, they say themselves

    def _look(self) -> None:
        if self._failure is None and self._store.check([FAILED]):
            code, line = json.loads(self._store.get(FAILED))
            self._failure = code, line


def join(settings: Settings, ranks: int) -> Nodes:
    """Meet the other nodes. Raises RunError where they do not come in time, UserError for an
    endpoint that cannot be."""
    host, port = endpoint(settings.rdzv_endpoint or "")
    try:
        here = address_towards(host, port)
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {host}:{port}: {error.strerror or error}") from None
    # Its reports are of no use to who started the command: what fails is said in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    seconds = max(1, int(settings.rdzv_timeout))
    static = settings.node_rank is not None
    more: dict[str, Any] = {"rank": settings.node_rank, "timeout": seconds} if static else {
        "join_timeout": seconds, "read_timeout": seconds, "is_host": here == resolve(host)}
    try:
        handler = get_rendezvous_handler(RendezvousParameters(
            backend="static" if static else "c10d", endpoint=f"{host}:{port}",
            run_id=settings.rdzv_id, min_nodes=settings.nnodes, max_nodes=settings.nnodes,
            local_addr=here, **more))
        return Nodes(handler.next_rendezvous(), ranks, settings, handler)
    except (RendezvousError, RuntimeError, OSError):
        raise RunError(f"the {settings.nnodes} nodes did not all meet at {host}:{port} within "
                       f"{seconds} s: start the same command on each, with an --rdzv-endpoint "
                       "that each can reach") from None


def endpoint(text: str) -> tuple[str, int]:
    """(host, port) of HOST or HOST:PORT."""
    host, _, port = text.partition(":")
    if not host or (port and not port.isdecimal()):
        raise UserError(f"--rdzv-endpoint '{text}' is not HOST:PORT")
    return host, int(port or PORT)


def resolve(host: str) -> str:
    """The IPv4 address of a host."""
    return socket.gethostbyname(host)


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to a host; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((resolve(host), port))
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address, "" where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
