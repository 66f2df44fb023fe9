"""The ranks of a job: their number, their process group, and small talk between their hosts.

torchrun (or `fastllm-train launch`) starts a process a rank and says so in the environment: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A process started alone is a world of one.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fastllm.config import RunError, UserError, environment
from fastllm.dist.watchdog import IDLE, Watchdog

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
FOREVER = timedelta(days=30)
GATHER_TAG = 7771
"""Of messages between two ranks: one that programs of their own are unlikely to use."""
T = TypeVar("T")


@dataclass
class Gather:
    """An all-gather under way; it keeps what is sent alive."""

    works: list[Any]
    sent: Tensor

    def wait(self) -> None:
        """Until all parts have come and this rank's have gone."""
        for work in self.works:
            work.wait()


def start_gather(full: Tensor, part: Tensor, rank: int, world: int, group: Any, *,
                 native: bool) -> Gather:
    """As all_gather, under way; `part` may be this rank's part of `full` (csrc/collective.cpp).

    native: in the process group. Else as messages: Gloo's own gathers into a buffer and copies it.
    """
    if not part.numel():
        return Gather([], part)
    if native and world > 1:
        return Gather([all_gather(full, part, group, async_op=True)], part)
    # Messages between two ranks arrive in the order they are sent in: one tag does for all.
    works = []
    for source, slot in enumerate(full.chunk(world)):
        if source != rank:
            works.append(dist.irecv(slot, group=group, group_src=source, tag=GATHER_TAG))
        elif slot.data_ptr() != part.data_ptr():
            slot.copy_(part)
    works += [dist.isend(part, group=group, group_dst=target, tag=GATHER_TAG)
              for target in range(world) if target != rank]
    return Gather(works, part)


def all_gather(full: Tensor, part: Tensor, group: Any, *, async_op: bool = False) -> Any:
    """full: (ranks * n,) becomes every rank's (n,) part, in order of rank."""
    # torch 2.13 renamed it and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(full, part, group=group, async_op=async_op)


def reduce_scatter(part: Tensor, full: Tensor, group: Any, *, async_op: bool = False) -> Any:
    """part: (n,) becomes this rank's part of the sum of every rank's (ranks * n,) full."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce(part, full, group=group, async_op=async_op)


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job.

    group: carries tensors of the training device; host: carries CPU tensors. Both None in a world
    of one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    host: Any = None
    watch: Watchdog = IDLE

    @property
    def first(self) -> bool:
        """Whether this rank writes what only one may write, and speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank. value: anything JSON can say."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gather_numbers([text.numel()])[:, 0].tolist()]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[:text.numel()] = text
        everyone = torch.empty(self.size * max(lengths), dtype=torch.uint8)
        with self.watch.waiting("an exchange of words"):
            all_gather(everyone, padded, self.host)
        rows = everyone.view(self.size, -1)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def gather_numbers(self, values: Sequence[float]) -> Tensor:
        """(size, len(values)) fp64 on the CPU: every rank's numbers, in order of rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        everyone = torch.empty(self.size * len(values), dtype=torch.float64)
        with self.watch.waiting("an exchange of numbers"):
            all_gather(everyone, mine, self.host)
        return everyone.view(self.size, -1)

    def sum(self, value: int) -> int:
        """The sum of every rank's value, which must be below 2**53."""
        return int(self.gather_numbers([value]).sum())

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.gather_numbers([0])

    def first_alone(self, key: str, work: Callable[[], T]) -> T | None:
        """The first rank does something, however long it takes; the others wait for its end.

        Returns what it made, there, and None on the others.  key: a name that is used once. If it fails, its error is raised there, and RunError with the
        same words (UserError for one) on every other rank.
        """
        if self.size == 1:
            return work()
        store = distributed_c10d._get_default_store()
        what = f"what the first rank does alone ({key})"
        if self.first:
            with self.watch.waiting(what):
                pass  # so that all ranks count the same waits
            said = ""
            try:
                return work()
            except Exception as error:
                said = json.dumps([isinstance(error, UserError), str(error)])
                raise
            finally:
                store.set(f"fastllm/alone/{key}", said)
        with self.watch.waiting(what, patient=True):
            store.wait([f"fastllm/alone/{key}"], FOREVER)
        said = store.get(f"fastllm/alone/{key}").decode()
        if said:
            user, text = json.loads(said)
            raise UserError(text) if user else RunError(f"rank 0: {text}")
        return None

    def together(self, error: Exception | None = None) -> None:
        """Every rank says whether its part went well; if one did not, every rank raises.

        error: this rank's failure. Raises UserError if each failing rank's was one (bad input, a
        full disk), else RunError, with the first failing rank's words; it comes here too.
        """
        words = None if error is None else [isinstance(error, UserError), str(error)]
        failed = [(rank, said) for rank, said in enumerate(self.gather(words)) if said]
        if not failed:
            return
        rank, (_, text) = failed[0]
        kind = UserError if all(said[0] for _, said in failed) else RunError
        everyones = len(failed) == self.size and all(said[1] == text for _, said in failed)
        raise kind(text if everyones else f"rank {rank}: {text}") from error


ALONE = World()


def from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun says them; (0, 1, 0) for a process alone.

    Raises UserError for a variable that is missing beside others, or makes no sense.
    """
    given = {name: environment(name) for name in VARIABLES}
    if given["WORLD_SIZE"] is None:
        return 0, 1, 0
    try:
        rank, size, local = (int(given[name] or "") for name in VARIABLES)
    except ValueError:
        raise UserError("the environment says " + ", ".join(f"{k}={v}" for k, v in given.items())
                        + ": start the ranks with torchrun or fastllm-train launch") from None
    if not (0 <= rank < size and 0 <= local):
        raise UserError(f"the environment says RANK={rank} of WORLD_SIZE={size} and "
                        f"LOCAL_RANK={local}, which cannot be")
    return rank, size, local


@contextmanager
def world(device_type: str, *, timeout: float = 600.0) -> Iterator[World]:
    """Within: the ranks of this job, connected; NCCL between GPUs and Gloo between CPUs.

    timeout: seconds after which a rank that waits for another gives up.
    """
    rank, size, local = from_environment()
    if size == 1:
        yield ALONE
        return
    if device_type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"local rank {local} has no GPU of its own: this machine has "
                            f"{torch.cuda.device_count()}; start that many ranks")
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    # The watchdog speaks first, and names who is missing.
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * timeout + 60))
    group = dist.group.WORLD
    try:
        me = World(rank, size, local, group, group)
        with Watchdog(me, distributed_c10d._get_default_store(), timeout) as watch:
            yield replace(me, watch=watch)
    finally:
        dist.destroy_process_group()


def of_group(group: Any = None) -> World:
    """The world of a process group, a DeviceMesh of one dimension, a World, or, by default,
    torch.distributed's default group (a world of one where there is none)."""
    if isinstance(group, World):
        return group
    if group is not None and hasattr(group, "get_group"):
        group = group.get_group()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        group = dist.group.WORLD
    size = dist.get_world_size(group)
    if size == 1:
        return ALONE
    local = int(environment("LOCAL_RANK") or 0)
    if "gloo" in dist.get_backend_config(group) or dist.get_backend(group) == "gloo":
        return World(dist.get_rank(group), size, local, group, group)
    ranks = dist.get_process_group_ranks(group)
    return World(dist.get_rank(group), size, local, group, dist.new_group(ranks, backend="gloo"))
