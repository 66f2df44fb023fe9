"""Tile sizes of the attention kernels, by kernel, GPU architecture and head width."""

from dataclasses import dataclass, replace

from torch import Tensor

from fastllm.kernels._triton import architecture, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """One configuration of a kernel."""

    own: int
    """Rows of the tile that a program keeps: queries, or keys in the kernel of dk and dv."""
    other: int
    """Rows of each block that it runs over."""
    warps: int
    stages: int
    """Blocks in flight between memory and the products."""
    resident: int = 1
    """Programs of one multiprocessor."""


# (kernel, architecture, widest head): tiles.
TABLE: dict[tuple[str, int, int], Tiles] = {
    ("forward", 80, 64): Tiles(128, 64, 4, 3, 2),
    ("forward", 80, 128): Tiles(128, 64, 8, 2),
    ("forward", 80, 256): Tiles(64, 32, 4, 2),
    ("forward", 90, 64): Tiles(128, 128, 8, 3),
    ("forward", 90, 128): Tiles(128, 128, 8, 2),
    ("forward", 90, 256): Tiles(128, 64, 8, 2),
    ("forward", 100, 64): Tiles(128, 64, 8, 3),
    ("forward", 100, 128): Tiles(128, 64, 8, 3),
    ("forward", 100, 256): Tiles(128, 64, 8, 2),
    ("keys", 80, 64): Tiles(128, 64, 8, 2),
    ("keys", 80, 128): Tiles(64, 64, 8, 2),
    ("keys", 80, 256): Tiles(32, 32, 4, 1),
    ("keys", 90, 64): Tiles(128, 64, 8, 3),
    ("keys", 90, 128): Tiles(128, 64, 8, 2),
    ("keys", 90, 256): Tiles(64, 64, 8, 1),
    ("keys", 100, 64): Tiles(128, 64, 8, 2),
    ("keys", 100, 128): Tiles(128, 64, 8, 2),
    ("keys", 100, 256): Tiles(64, 64, 8, 1),
    ("queries", 80, 64): Tiles(128, 64, 8, 2),
    ("queries", 80, 128): Tiles(128, 32, 8, 2),
    ("queries", 80, 256): Tiles(32, 32, 4, 1),
    ("queries", 90, 64): Tiles(128, 64, 8, 3),
    ("queries", 90, 128): Tiles(128, 64, 8, 2),
    ("queries", 90, 256): Tiles(64, 64, 8, 1),
    ("queries", 100, 64): Tiles(128, 64, 8, 3),
    ("queries", 100, 128): Tiles(128, 64, 8, 2),
    ("queries", 100, 256): Tiles(64, 64, 8, 1),
}
OVERRIDES: dict[tuple[str, int, int], Tiles] = {}


def tiles_of(kernel: str, x: Tensor, own: int) -> Tiles:
    """The tiles of a kernel for x (..., D), whose own axis is at most `own` long."""
    arch, dim = architecture(x.device), x.shape[-1]
    known = max((a for _, a, _ in TABLE if a <= arch), default=80)
    key = kernel, known, next(width for width in (64, 128, 256) if dim <= width)
    found = OVERRIDES.get(key) or TABLE[key]
    if x.element_size() == 4:
        found = Tiles(max(16, found.own // 4), max(16, found.other // 4), 4, 1)
    if own < found.own:
        rows = max(16, next_power_of_2(own))
        found = replace(found, own=rows, warps=min(found.warps, 4))
    return found
