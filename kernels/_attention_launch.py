"""How the attention kernels are launched: their options, the list of tiles, tensor descriptors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._attention_tables import Name, Tiles
from fastllm.kernels._attention_tiles import plan_kernel
from fastllm.kernels._triton import TensorDescriptor, architecture, cdiv

LOG2E = 1.4426950408889634
CHUNK = 1024
L2_BYTES = 32 << 20  # for the keys and values of the heads in flight; A100 and later have 40 MB


@dataclass(frozen=True)
class Options:
    """What a call asks for beside q, k and v; -1: no bound, and a longest sequence not known."""

    q_bounds: Tensor | None
    k_bounds: Tensor | None
    max_queries: int
    max_keys: int
    left: int
    right: int
    scale: float
    softcap: float
    tf32: bool

    def flags(self, x: Tensor, tma: bool) -> dict[str, Any]:
        """What every kernel is specialised by."""
        precise = x.dtype == torch.float32
        return {"PACKED": self.q_bounds is not None, "LEFT": self.left >= 0,
                "RIGHT": self.right >= 0, "SOFTCAP": self.softcap > 0, "TMA": tma,
                "PRECISE": precise, "PRECISION": "ieee" if precise and not self.tf32 else "tf32"}

    @property
    def scores(self) -> tuple[int, int, float, float]:
        """(left, right, factor, inner): a score is factor * raw in base 2, with a softcap
        factor * tanh(inner * raw)."""
        if self.softcap > 0:
            return self.left, self.right, self.softcap * LOG2E, self.scale / self.softcap
        return self.left, self.right, self.scale * LOG2E, 1.0

    def strain(self, tma: bool, parts: bool = False) -> int:
        """What `tiles_of` goes by."""
        return 2 if self.softcap > 0 or parts else 0 if tma else 1

    def longest(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """The most queries and keys that a sequence has, as far as the host knows."""
        queries, keys = q.shape[-3], k.shape[-3]
        return (self.max_queries if 0 <= self.max_queries < queries else queries,
                self.max_keys if 0 <= self.max_keys < keys else keys)


def schedule(options: Options, q: Tensor, k: Tensor, tiles: Tiles,
             own: Name) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The grid of a launch over tiles of "queries" or "keys", and what `locate` takes of it."""
    batch = q.shape[0] if q.dim() == 4 else 1
    heads, kv_heads = q.shape[-2], k.shape[-2]
    longest = options.longest(q, k)
    row_bytes = 2 * q.shape[-1] * q.element_size()
    if own != "keys":  # the heads of a group share the keys and values that they read
        mine, theirs, tokens = options.q_bounds, options.k_bounds, (q.shape[-3], k.shape[-3])
        pairs, at_once = heads, heads // kv_heads
        sweep = longest[1] * row_bytes
    else:
        mine, theirs, tokens = options.k_bounds, options.q_bounds, (k.shape[-3], q.shape[-3])
        pairs, at_once = kv_heads, 1
        sweep = longest[0] * row_bytes * heads // kv_heads
    # Every packed sequence, and the tail, may end in a tile that is not full.
    rows = cdiv(tokens[0], tiles.own) + (0 if mine is None else mine.shape[0])
    span = min(batch * pairs, at_once * max(1, L2_BYTES // max(1, sweep)))
    sequences = 0 if mine is None else mine.shape[0] - 1
    starts = None if mine is None else plan(mine, tokens[0], tiles.own)
    where = (rows, batch * pairs, span, pairs, starts, mine, theirs, sequences,
             sequences.bit_length(), *tokens)
    return (rows * batch * pairs,), where


def plan(bounds: Tensor, tokens: int, block: int) -> Tensor:
    """(N + 2,) int32: tiles before each of the N sequences, before the tail, and in all.

    bounds: (N + 1,) int32, which no host waits for. tokens: where the tail ends.
    """
    starts = bounds.new_empty(bounds.shape[0] + 1)
    plan_kernel[(1,)](bounds, starts, bounds.shape[0] - 1, tokens, BLOCK=block, CHUNK=CHUNK)
    return starts


def strides(*tensors: Tensor) -> list[int]:
    """Strides (batch, token, head) of each tensor (B, S, heads, D) or packed (T, heads, D)."""
    return [stride for x in tensors for stride in (
        x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))]


def unit_stride(x: Tensor) -> Tensor:
    """x with the elements of a head next to each other: itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def describable(options: Options, *tensors: Tensor) -> bool:
    """Whether to load by tensor descriptors (TMA): Hopper and later have them.

    They give zeros beyond a tensor, and so beyond a sequence unless it is packed. There the next
    one would follow, and an infinity in it times a probability of 0 is not 0.
    """
    return architecture(tensors[0].device) >= 90 and options.q_bounds is None and all(
        x.element_size() == 2 and x.numel() > 0 and x.data_ptr() % 16 == 0
        and all(step > 0 and step % 8 == 0 for size, step in zip(
            x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
        for x in tensors)


def describe(x: Tensor, tma: bool, rows: int, width: int) -> Any:
    """A descriptor of x as (B, heads, tokens, D) that reads (rows, width) of a head; or None."""
    if not tma:
        return None
    tokens, heads, dim = x.shape[-3:]
    batch = x.shape[0] if x.dim() == 4 else 1
    # The stride along an axis of one element is never used, but must be a multiple of 16 bytes.
    by_batch, by_token, by_head = (step if size > 1 else 16 for step, size in zip(
        strides(x), (batch, tokens, heads), strict=True))
    return TensorDescriptor(x, [batch, heads, tokens, dim], [by_batch, by_head, by_token, 1],
                            [1, 1, rows, width])
