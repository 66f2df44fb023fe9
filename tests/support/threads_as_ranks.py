"""Ranks of a pretended job, each a thread of this process."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fastllm.dist.mesh import World

WAIT = 60.0


class Table:
    """Where the ranks lay down what they say to each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.said: list[Any] = [None] * size


@dataclass(frozen=True)
class Ranks(World):
    """A world whose ranks are threads; what they exchange goes through JSON, as it really does."""

    table: Any = None

    def gather(self, value):
        self.table.said[self.rank] = json.dumps(value)
        self.table.barrier.wait(WAIT)
        said = [json.loads(text) for text in self.table.said]
        self.table.barrier.wait(WAIT)
        return said

    def gather_numbers(self, values):
        return torch.tensor(self.gather(list(values)), dtype=torch.float64)


def everywhere(size, work):
    """[work(world)] of every rank, in order. Where a rank raises, its error comes in its place."""
    table = Table(size)

    def one(rank):
        try:
            return work(Ranks(rank, size, rank, table=table))
        except threading.BrokenBarrierError as error:
            return error
        except Exception as error:
            # Only what every rank raises may be raised: else the others wait for this one.
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def must(results):
    """The results, if no rank raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
