"""Tiles of the attention kernels by time, on this GPU: tried only where `tune` is called.

`keep` puts winners into the user's cache (`_memory`), from where the first call of attention on
this GPU takes them, before the table in `kernels/_attention_tables.py`. bench/tune.py runs it.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._attention_tables import (
    TABLE,
    Key,
    Name,
    Tiles,
    key_of,
    override,
    tiles_of,
)
from fastllm.kernels.attention import attention
from fastllm.ops import _memory
from fastllm.ops._timing import fastest, line, measure

# Without those whose scores take more than 64 registers of a thread, which spill, and those that
# give a warp fewer than 16 rows, whose products wait for each other (bench/audit.py).
GRID = tuple(Tiles(own, other, warps, stages, registers)
             for own in (64, 128) for other in (32, 64, 128) for warps in (4, 8)
             if own * other <= 64 * 32 * warps and own >= 16 * warps
             for stages in (1, 2, 3, 4) for registers in ((0, 128) if warps == 8 else (0,)))
SHAPE = (2, 4096, 2, 4)
"""Batch, tokens, key heads, query heads of each."""
SHIPPED = "table"
ROUNDING = 4.0
"""How far results may be from those of the table's tiles, in rounding units of the largest."""


@dataclass(frozen=True)
class Tuned:
    """What came of one kernel, width and strain."""

    kernel: Name
    width: int
    strain: int
    key: Key
    """The entry of the table that it is about."""
    table: Tiles
    best: Tiles
    """The table's where no other is clearly faster."""
    milliseconds: dict[str, float]
    """By tiles, of the whole direction that the kernel is part of; SHIPPED is the table's."""
    out: dict[str, str]
    """Why the others are out, by tiles."""

    def row(self) -> dict[str, Any]:
        """What JSON holds."""
        return {"kernel": self.kernel, "width": self.width, "strain": self.strain,
                "key": list(self.key), "table": list(astuple(self.table)),
                "best": list(astuple(self.best)), "milliseconds": self.milliseconds,
                "out": self.out}


def name_of(tiles: Tiles) -> str:
    capped = f" {tiles.registers} registers" if tiles.registers else ""
    return f"{tiles.own}x{tiles.other} {tiles.warps} warps {tiles.stages} stages{capped}"


def tune(kernel: Name, width: int, strain: int, device: torch.device | str, *,
         grid: Iterable[Tiles] = GRID, shape: tuple[int, int, int, int] = SHAPE,
         dtype: torch.dtype = torch.bfloat16) -> Tuned:
    """Time every tiling of the grid that compiles, fits and gives the table's results.

    The call is causal; strain 1 packs it, strain 2 gives it a softcap, or, for the keys, parts of
    dq by atomics. What is timed is the kernel's whole direction, the others' tiles as the table
    has them. A tiling that the compiler or the GPU refuses is out, with its reason.
    """
    device = torch.device(device)
    with _tiles({}), torch.random.fork_rng([device] if device.type == "cuda" else []):
        run, q = _direction(kernel, width, strain, device, shape, dtype)
        key, table = key_of(kernel, q, strain), tiles_of(kernel, q, strain, shape[1])
        right = run()
        candidates = {name_of(tiles): tiles for tiles in grid if tiles != table}

        def checked(tiles: Tiles) -> str:
            try:
                with _tiles({key: tiles}):
                    return _wrong(run(), right)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's, of its compiler or of the GPU's limits
                return line(error)

        def timed(tiles: Tiles) -> None:
            with _tiles({key: tiles}):
                run()

        out = {name: why for name, tiles in candidates.items() if (why := checked(tiles))}
        times, failed = measure(
            {SHIPPED: functools.partial(timed, table),
             **{name: functools.partial(timed, tiles) for name, tiles in candidates.items()
                if name not in out}}, device)
    best = candidates.get(fastest(times, SHIPPED), table)
    return Tuned(kernel, width, strain, key, table, best, times, out | failed)


def keep(tuned: Iterable[Tuned], device: torch.device | str) -> None:
    """Store the winners for later processes; choices that were timed with other tiles are void."""
    place = _memory.machine(str(device))
    _memory.remember(place, "tiles", {" ".join(map(str, one.key)): list(astuple(one.best))
                                      for one in tuned}, forget="choices")


@torch.compiler.assume_constant_result
def use_kept(device: str) -> None:
    """Have the kernels use the tiles kept for a device, once; what `override` was given stays."""
    _use_kept(device)


@functools.lru_cache(64)
def _use_kept(device: str) -> None:
    kept: dict[Key, Tiles] = {}
    for words, numbers in _memory.recall(_memory.machine(device), "tiles").items():
        try:
            kernel, *others = words.split()
            entry: Any = {(kernel, *map(int, others)): Tiles(*map(int, numbers))}
            with _tiles(entry):
                kept |= entry
        except (TypeError, ValueError) as error:
            warnings.warn(f"attention: the tiles kept as {words!r} are not used: {error}",
                          stacklevel=2)
    # An entry serves higher strains too, where the table may have tiles of their own for a reason.
    kept = {key: tiles for key, tiles in TABLE.items() if any(
        (*key[:3], level) in kept for level in range(key[3]))} | kept
    override(kept | override({}))


@contextmanager
def _tiles(entries: Mapping[Key, Tiles]) -> Iterator[None]:
    before = override(dict(entries))
    try:
        yield
    finally:
        override(before)


def _direction(kernel: Name, width: int, strain: int, device: torch.device,
               shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Any, Tensor]:
    """(a call that returns the results of the kernel's direction, q)."""
    batch, tokens, kv_heads, group = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(batch, tokens, heads, width, dtype=dtype, device=device, generator=generator)
        for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group))
    options: dict[str, Any] = {"causal": True}
    if strain == 1:
        q, k, v, upstream = (x.flatten(0, 1) for x in (q, k, v, upstream))
        ends = torch.tensor([0, *(tokens * n for n in range(1, batch + 1))], dtype=torch.int32,
                            device=device)
        options |= {"cu_seqlens_q": ends, "max_seqlen_q": tokens, "max_seqlen_k": tokens}
    elif strain == 2:
        options |= {"deterministic": False} if kernel == "keys" else {"softcap": 30.0}
    if kernel == "forward":
        return lambda: (attention(q, k, v, **options),), q
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, **options)
    return lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True), q


def _wrong(results: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> str:
    """How far results are off, where that is too far for a rounding; NaN is."""
    for ours, theirs in zip(results, right, strict=True):
        scale = theirs.abs().max().item() * torch.finfo(theirs.dtype).eps
        off = (ours.float() - theirs.float()).abs().max().item()
        if not off <= ROUNDING * scale:
            return f"wrong by {off:.3g}, {off / scale if scale else torch.inf:.0f} rounding units"
    return ""
