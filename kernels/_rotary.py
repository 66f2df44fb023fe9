"""What the kernels that rotate heads share: positions, the cos and sin of a token, pairs of a head.

q (B, S, Hq, D) and k (B, S, Hkv, D), or packed (T, H, D); cos and sin (P, R/2) or (B, S, R/2) with
R <= D: the first R elements of a head turn, in pairs (i, i + R/2) or, interleaved, (2i, 2i + 1).
A token's row of a (P, R/2) table is its place in the sequence, its position id, or its place in its
document. A position that the table does not have makes its token NaN: an exception would need the
host to wait for the device.
"""

import torch
from torch import Tensor

from fastllm.kernels._triton import jit, next_power_of_2, tl, warps_for

IN_ORDER, BY_ID, BY_DOCUMENT = 0, 1, 2
THREADS = 128


# ------------------------------------------------------------------------------ plain torch


def positions(q: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The position of every token of q by its id or by its place in its document."""
    if cu_seqlens is None:
        assert position_ids is not None
        return position_ids
    token = torch.arange(q.shape[:-2].numel(), device=q.device)
    document = torch.searchsorted(cu_seqlens.contiguous(), token, right=True)
    starts = torch.cat((cu_seqlens.new_zeros(1), cu_seqlens))
    return (token - starts[document]).view(q.shape[:-2])


def angles(q: Tensor, table: Tensor, position_ids: Tensor | None,
           cu_seqlens: Tensor | None) -> Tensor:
    """The table's row of each token of q, (..., 1, R/2), to be broadcast over its heads."""
    if position_ids is None and cu_seqlens is None:
        return (table if table.dim() == 3 else table[:q.shape[-3]]).unsqueeze(-2)
    position = positions(q, position_ids, cu_seqlens)
    inside = (position >= 0) & (position < len(table))
    rows = table[position.clamp(0, max(0, len(table) - 1))]
    return torch.where(inside[..., None], rows, float("nan")).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with its first R elements turned; cos and sin (..., 1, R/2) in x's type."""
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    x1, x2 = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.cat((torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1),
                      rest), -1)


def check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
          cu_seqlens: Tensor | None) -> None:
    """Raise for arguments that do not fit together, as far as shapes and types tell."""
    if q.dim() not in (3, 4) or k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or (
            k.shape[-1] != q.shape[-1] or k.dtype != q.dtype):
        raise ValueError(f"{op}: q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} "
                         "must be (B, S, heads, D) or (T, heads, D) of one type, alike but for "
                         "their heads")
    tokens, half = tuple(q.shape[:-2]), cos.shape[-1]
    given = position_ids is not None or cu_seqlens is not None
    by_row = cos.dim() == 3 and tuple(cos.shape[:-1]) in (tokens, (1, *tokens[1:]))
    if cos.shape != sin.shape or not (cos.dim() == 2 or by_row) or not 0 < 2 * half <= q.shape[-1]:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (P, R/2)"
                         f" or {(*tokens, 'R/2')}, with R at most {q.shape[-1]}")
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise TypeError(f"{op}: cos and sin must be floating-point, float32 at best, not "
                        f"{cos.dtype} and {sin.dtype}")
    if given and (by_row or None not in (position_ids, cu_seqlens)):
        raise ValueError(f"{op}: give one of position_ids, cu_seqlens and tables by row, not two")
    if not given and not by_row and len(cos) < tokens[-1]:
        raise ValueError(f"{op}: cos and sin have {len(cos)} positions, a row has {tokens[-1]}")
    for name, tensor in (("position_ids", position_ids), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, not {tensor.dtype}")
    if position_ids is not None and tuple(position_ids.shape) not in (tokens, (1, *tokens[1:])):
        raise ValueError(f"{op}: position_ids {tuple(position_ids.shape)} must be {tokens}")
    if cu_seqlens is not None and cu_seqlens.dim() != 1:
        raise ValueError(f"{op}: cu_seqlens {tuple(cu_seqlens.shape)} must be (N + 1,)")


# --------------------------------------------------------------------------------- launches


def places(q: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
           cu_seqlens: Tensor | None) -> tuple[tuple[Tensor | int, ...], int]:
    """The arguments `cos` to `steps` of `load_angles` for q (B, S, H, D), and its POSITIONS."""
    batch, sequence = q.shape[:2]
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    strides = [stride for table in (cos, sin)
               for stride in ((0, table.stride(0)) if table.dim() == 2
                              else table.expand(batch, -1, -1).stride()[:2])]
    if position_ids is not None:
        ids = position_ids.reshape(-1, sequence).expand(batch, sequence)
        return (cos, sin, ids, sequence, cos.shape[-2], *strides, *ids.stride(), 0), BY_ID
    if cu_seqlens is not None:
        bounds = cu_seqlens.contiguous()
        steps = bounds.numel().bit_length()
        return (cos, sin, bounds, sequence, cos.shape[-2], *strides, bounds.numel(), 0,
                steps), BY_DOCUMENT
    return (cos, sin, cos, sequence, cos.shape[-2], *strides, 0, 0, 0), IN_ORDER


def tiles(q: Tensor, k: Tensor, half: int) -> dict[str, int]:
    """Tokens of a program, heads of its tiles, and warps, for q, k (B, S, heads, D).

    A tile has 8 elements a thread in each half of a head, 16 bytes of a 16-bit type; of its tokens'
    cos and sin each thread then reads 16 bytes too, where k has two heads or more.
    """
    block, elements = next_power_of_2(half), 8 * THREADS
    heads = min(2, k.shape[2], max(1, elements // block))
    tokens = min(next_power_of_2(q.shape[1]), max(1, elements // (heads * block)))
    most = max(1, elements // (tokens * block))
    return {"TOKENS": tokens, "BLOCK": block, "Q_TILE": min(next_power_of_2(q.shape[2]), most),
            "K_TILE": min(next_power_of_2(k.shape[2]), most),
            "num_warps": warps_for(tokens * heads * block, most=THREADS // 32)}


# ---------------------------------------------------------------------------- device functions


@jit
def load_angles(cos, sin, where, sequence, rows, cos_batch, cos_row, sin_batch, sin_row, where_a,
                where_b, steps, batch, slot, HALF: tl.constexpr, BLOCK: tl.constexpr,
                POSITIONS: tl.constexpr, BACKWARD: tl.constexpr):
    """cos and sin (TOKENS, 1, BLOCK) of the tokens `slot` (TOKENS, 1, 1) of a row of the batch."""
    inside = slot < sequence
    position = slot
    if POSITIONS == 1:  # position ids, with the strides where_a, where_b
        position = tl.load(where + batch * where_a + slot * where_b, mask=inside, other=0)
        position = position.to(tl.int64)
    elif POSITIONS == 2:  # where_a sorted boundaries: the last one not after the token starts it
        token = batch * sequence + slot
        at = slot * 0 - 1
        start = slot * 0
        for i in range(steps):
            probe = at + (1 << (steps - 1 - i))
            within = inside & (probe < where_a)
            bound = tl.load(where + probe, mask=within, other=0).to(tl.int64)
            further = within & (bound <= token)
            at = tl.where(further, probe, at)
            start = tl.where(further, bound, start)
        position = token - start
    known = (position >= 0) & (position < rows)
    lane = tl.arange(0, BLOCK)[None, None, :]
    mask = inside & known & (lane < HALF)
    c = tl.load(cos + batch * cos_batch + position * cos_row + lane, mask=mask, other=0.0)
    s = tl.load(sin + batch * sin_batch + position * sin_row + lane, mask=mask, other=0.0)
    # A position that the tables lack must show; tokens past the end must stay numbers.
    c = tl.where(known | (slot >= sequence), c.to(tl.float32), float("nan"))
    s = s.to(tl.float32)
    if BACKWARD:
        s = -s
    return c, s


@jit
def turn(x1, x2, c, s):
    return x1 * c - x2 * s, x2 * c + x1 * s


@jit
def load_pairs(x, stride, mask, HALF: tl.constexpr, BLOCK: tl.constexpr,
               INTERLEAVED: tl.constexpr):
    """The two sides (A, B, BLOCK) of the pairs of heads at x (A, B, 1), in float32."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.load(x + lane * stride, mask=mask & (lane < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (x.shape[0], x.shape[1], BLOCK, 2)))
    else:
        lane = tl.arange(0, BLOCK)[None, None, :]
        inside = mask & (lane < HALF)
        first = tl.load(x + lane * stride, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + (HALF + lane) * stride, mask=inside, other=0.0).to(tl.float32)
    return first, second


@jit
def store_pairs(out, first, second, mask, HALF: tl.constexpr, BLOCK: tl.constexpr,
                INTERLEAVED: tl.constexpr):
    """As `load_pairs`, with unit stride."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * BLOCK))
        tl.store(out + lane, both.to(out.dtype.element_ty), mask=mask & (lane < 2 * HALF))
    else:
        lane = tl.arange(0, BLOCK)[None, None, :]
        inside = mask & (lane < HALF)
        tl.store(out + lane, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + HALF + lane, second.to(out.dtype.element_ty), mask=inside)
