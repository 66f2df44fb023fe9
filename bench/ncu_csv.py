"""What Nsight Compute writes, read: launches with their figures, and whose each launch is.

ncu profiles launches without knowing of calls. So a marker is launched before what is profiled, and
the size of its grid says whose launches come next.
"""

import csv
import io
import math
import re
from dataclasses import dataclass, field
from typing import Any

MARKER = "counters_marker"
"""The name of the kernel that is the marker."""
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
REGISTERS, GRID = "launch__registers_per_thread", "launch__grid_size"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
METRICS = (READ, WRITTEN, TIME, REGISTERS, GRID, WARPS)
NEEDED = (READ, WRITTEN, TIME)
"""What is asked for where a GPU has not all of the others."""
UNITS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9,
         "second": 1e9, "byte": 1,
         **{f"{prefix}byte": 1000**power for power, prefix in enumerate("KMGT", 1)},
         **{f"{prefix}ibyte": 1024**power for power, prefix in enumerate("KMGT", 1)}}
"""In nanoseconds and bytes; others are left as they are."""


@dataclass
class Launch:
    """One launch that ncu profiled: bytes, nanoseconds and so on by metric."""

    name: str
    grid: int
    metrics: dict[str, float] = field(default_factory=dict)


def number_of(text: str, unit: str) -> float | None:
    """A figure of ncu's in bytes or nanoseconds; None where it is none ("n/a")."""
    try:
        return float(text.replace(",", "").replace(" ", "")) * UNITS.get(unit, 1)
    except ValueError:
        return None


def size(text: str) -> int:
    """Programs of a grid written as "(4, 2, 1)"."""
    return math.prod(map(int, re.findall(r"\d+", text)))


def parse(text: str) -> list[Launch]:
    """The launches of ncu's CSV, in their order: a column a metric (--page raw), with a row of
    units below the names, or a row a metric; whatever stands before and between."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    table = list(csv.reader(io.StringIO("\n".join(lines[head:]))))
    names, units = table[0], {}
    found: dict[tuple[str, str], Launch] = {}
    for cells in table[1:]:
        if cells == names or len(cells) != len(names):
            continue
        row = dict(zip(names, cells, strict=True))
        if not row["ID"]:
            units = row
            continue
        launch = found.setdefault((row.get("Process ID", ""), row["ID"]), Launch(
            row["Kernel Name"], size(row.get("Grid Size", "") or "1")))
        if "Metric Name" in row:
            pairs = [(row["Metric Name"], row["Metric Value"], row.get("Metric Unit", ""))]
        else:
            pairs = [(name, row[name], units.get(name, "")) for name in names if "__" in name]
        for name, value, unit in pairs:
            figure = number_of(value, unit)
            if figure is not None:
                launch.metrics[name] = figure
    for launch in found.values():
        launch.grid = round(launch.metrics.get(GRID, launch.grid))
    return list(found.values())


def attributed(launches: list[Launch]) -> dict[int, list[Launch]]:
    """The launches after each marker, by the index that it says."""
    found: dict[int, list[Launch]] = {}
    mine = None
    for launch in launches:
        if MARKER in launch.name:
            mine = found[launch.grid - 1] = []
        elif mine is not None:
            mine.append(launch)
    return found


def summed(launches: list[Launch]) -> list[dict[str, Any]]:
    """Launches of one name together: how many, their nanoseconds and bytes, and of the longest of
    them the registers, the share of warps that were active, and the grid."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    found = []
    for name, them in groups.items():
        longest = max(them, key=lambda launch: launch.metrics.get(TIME, 0.0))
        found.append({"name": name[:120], "launches": len(them), **{
            key: sum(launch.metrics.get(metric, 0.0) for launch in them)
            for key, metric in (("nanoseconds", TIME), ("read", READ), ("written", WRITTEN))},
            "registers": longest.metrics.get(REGISTERS),
            "warps_percent": longest.metrics.get(WARPS), "grid": longest.grid})
    return found
