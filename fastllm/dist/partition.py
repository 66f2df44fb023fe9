"""Which rank owns which elements: pure arithmetic over sizes.

The parameters of a bucket lie end to end in one flat tensor, each at a multiple of ALIGN elements,
and the whole is padded so that every rank owns one shard of equal size, in order of rank. A
parameter may lie in several shards, and a shard may hold nothing but padding. csrc/partition.cpp
is the same in C++.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 256
"""Elements. One block of the 8-bit optimizer states and of the int8 wire format: neither is ever
cut by a shard's edge, so their bits do not depend on the number of ranks."""


@dataclass(frozen=True)
class Layout:
    """Where parameters of `sizes` elements begin in a bucket, and the elements of one shard."""

    sizes: tuple[int, ...]
    begins: tuple[int, ...]
    shard: int
    world: int

    @property
    def padded(self) -> int:
        """Elements of the flat tensor, paddings included."""
        return self.shard * self.world


@dataclass(frozen=True)
class Run:
    """Elements that are consecutive in a parameter and in a buffer."""

    parameter: int
    offset: int
    """Of the first one in the parameter."""
    begin: int
    """Of the first one in the buffer."""
    size: int


def layout(sizes: Sequence[int], world: int) -> Layout:
    """The layout of one bucket over `world` ranks."""
    begins, at = [], 0
    for size in sizes:
        begins.append(at)
        at += -(-size // ALIGN) * ALIGN
    return Layout(tuple(sizes), tuple(begins), -(-at // (world * ALIGN)) * ALIGN, world)


def runs(layout: Layout, order: Sequence[int]) -> list[Run]:
    """Every element of a buffer that holds the shards `order` one after another.

    order: ranks. range(world) is the flat tensor itself, [rank] one rank's shard.
    """
    found = []
    for place, rank in enumerate(order):
        low, high = rank * layout.shard, (rank + 1) * layout.shard
        for i, (begin, size) in enumerate(zip(layout.begins, layout.sizes, strict=True)):
            first, last = max(begin, low), min(begin + size, high)
            if first < last:
                found.append(Run(i, first - begin, place * layout.shard + first - low,
                                 last - first))
    return found


def sent_order(world: int, rank: int) -> list[int]:
    """Shards in the order in which a rank sends them: its own, which stays here, comes last."""
    return [other for other in range(world) if other != rank] + [rank]


def fill(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive parameters to a bucket until it holds `limit` (bytes, elements) or more."""
    groups, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= limit:
            groups.append(range(first, i + 1))
            first, held = i + 1, 0
    if first < len(sizes):
        groups.append(range(first, len(sizes)))
    return groups
