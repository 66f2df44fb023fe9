"""Tile sizes of the attention kernels, by kernel, GPU architecture, head width and strain.

The entries are the largest of those tried that compile without spills and without products that
wait for each other (bench/audit.py) on Triton 3.6 and 3.9, but for two registers of packed keys of
width 64 on sm_80 with 3.6; where smaller ones let two programs share a multiprocessor of Hopper's
without more reads, those, for the exponentials of one run beside the products of the other. No time
is behind them yet: `override` puts measured ones in their place.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fastllm.kernels._triton import architecture, next_power_of_2

Name = Literal["forward", "queries", "keys"]
Key = tuple[Name, int, int, int]


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
    registers: int = 0
    """The most that a thread may take, so that more programs share a multiprocessor; 0: any."""

    def options(self) -> dict[str, int | None]:
        """What a launch compiles with."""
        return {"num_warps": self.warps, "num_stages": self.stages,
                "maxnreg": self.registers or None}


# (kernel, architecture, widest head, strain). Strain is what a call asks of registers beside the
# plain one: 1, rows by pointers, as of packed sequences; 2, a softcap, or parts of dq. An entry
# serves for higher strain too, where there is no other.
TABLE: dict[Key, Tiles] = {
    ("forward", 80, 64, 0): Tiles(128, 64, 4, 3),
    ("forward", 80, 128, 0): Tiles(128, 64, 8, 3),
    ("forward", 80, 256, 0): Tiles(64, 64, 8, 2),
    ("forward", 90, 64, 0): Tiles(128, 64, 4, 3),
    ("forward", 90, 128, 0): Tiles(128, 128, 8, 2),
    ("forward", 90, 256, 0): Tiles(128, 64, 8, 2),
    ("forward", 100, 64, 0): Tiles(128, 128, 8, 2),
    ("forward", 100, 128, 0): Tiles(128, 128, 8, 2),
    ("forward", 100, 128, 1): Tiles(128, 64, 8, 3),
    ("forward", 100, 256, 0): Tiles(128, 32, 8, 2),
    ("queries", 80, 64, 0): Tiles(128, 32, 8, 3),
    ("queries", 80, 128, 0): Tiles(64, 64, 8, 2),
    ("queries", 80, 256, 0): Tiles(64, 32, 8, 2),
    ("queries", 90, 64, 0): Tiles(128, 64, 8, 3),
    ("queries", 90, 128, 0): Tiles(128, 64, 8, 2),
    ("queries", 90, 256, 0): Tiles(128, 32, 8, 2),
    ("queries", 100, 64, 0): Tiles(128, 64, 8, 3),
    ("queries", 100, 128, 0): Tiles(128, 64, 8, 2),
    ("queries", 100, 256, 0): Tiles(128, 32, 8, 2),
    ("keys", 80, 64, 0): Tiles(128, 32, 8, 3),
    ("keys", 80, 128, 0): Tiles(64, 64, 8, 2),
    ("keys", 80, 128, 2): Tiles(64, 32, 8, 2),
    ("keys", 80, 256, 0): Tiles(64, 16, 8, 2),
    ("keys", 90, 64, 0): Tiles(128, 64, 8, 3),
    ("keys", 90, 128, 0): Tiles(128, 64, 8, 2),
    ("keys", 90, 128, 2): Tiles(64, 64, 8, 2),
    ("keys", 90, 256, 0): Tiles(64, 32, 8, 2),
    ("keys", 90, 256, 1): Tiles(32, 32, 8, 1),
    ("keys", 100, 64, 0): Tiles(128, 64, 8, 3),
    ("keys", 100, 128, 0): Tiles(128, 64, 8, 2),
    ("keys", 100, 128, 2): Tiles(128, 32, 8, 2),
    ("keys", 100, 256, 0): Tiles(64, 32, 8, 2),
    ("keys", 100, 256, 2): Tiles(64, 16, 8, 1),
}
WIDTHS = (64, 128, 256)
_measured: dict[Key, Tiles] = {}


def override(entries: dict[Key, Tiles]) -> dict[Key, Tiles]:
    """Use these entries before the table's, from the next launch on; returns those in use before.

    A key must be one of the table's but for its strain; an empty dict takes all back.
    """
    for kernel, arch, width, strain in entries:
        if (kernel, arch, width, 0) not in TABLE or strain not in (0, 1, 2):
            raise ValueError(f"attention: no tiles are kept for {(kernel, arch, width, strain)}")
    before = dict(_measured)
    _measured.clear()
    _measured.update(entries)
    return before


def key_of(kernel: Name, x: Tensor, strain: int) -> Key:
    """The entry for x (..., D), of its architecture or the next older one that is known."""
    arch, dim = architecture(x.device), x.shape[-1]
    known = max((a for _, a, _, _ in TABLE if a <= arch), default=80)
    return kernel, known, next(width for width in WIDTHS if dim <= width), strain


def tiles_of(kernel: Name, x: Tensor, strain: int, own: int) -> Tiles:
    """The tiles of a kernel for x (..., D) whose own axis is at most `own` long."""
    *place, strain = key_of(kernel, x, strain)
    found = next(table[key] for table in (_measured, TABLE) for level in range(strain, -1, -1)
                 if (key := (*place, level)) in table)
    if x.element_size() == 4:  # no tensor cores, and twice the bytes
        found = Tiles(max(16, found.own // 4), max(16, found.other // 4), 4, 1)
    if own < found.own:
        rows = max(16, next_power_of_2(own))
        found = replace(found, own=rows, warps=min(found.warps, 4), registers=0)
    return found
