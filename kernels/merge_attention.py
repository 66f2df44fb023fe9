"""Two partial results of attention over different keys as one, by their log-sum-exps.

out_a, out_b (B, S, H, D) or packed (T, H, D), lse_a, lse_b (B, H, S) or (H, T), as `attention`
returns them:
    lse = log(e^lse_a + e^lse_b),  out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
in float32. Exact: attention over all the keys, if no sink is in both parts. Ring attention and
prefill in chunks add up their parts with it. With w_a, w_b the two weights and s = rowsum(dout *
(out_a - out_b)), dout_a = w_a dout, dlse_a = w_a dlse + w_a w_b s, and b's likewise with -s.
Floor, e bytes an element, N elements in R rows: forward 3eN + 12R, backward 5eN + 20R.
Sources: Rabe and Staats, arXiv:2112.05682; Liu et al., "Ring Attention", arXiv:2310.01889.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._attention_launch import strides, unit_stride
from fastllm.kernels._attention_tiles import load_tile
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, tl

TILE = 4096  # elements of each tensor that a program holds


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor,
              lse_b: Tensor) -> tuple[Tensor, Tensor]:
    check(out_a, lse_a, out_b, lse_b)
    wide = compute_dtype(out_a, lse_a)
    blind_a, blind_b = lse_a == -torch.inf, lse_b == -torch.inf
    empty = blind_a & blind_b
    out_a, out_b = (x.masked_fill(blind.transpose(-1, -2)[..., None], 0.0)
                    for x, blind in ((out_a, blind_a), (out_b, blind_b)))
    # Where there are no keys at all, numbers that have gradients, and then nothing of them.
    lse_a, lse_b = lse_a.masked_fill(empty, 0.0), lse_b.masked_fill(empty, 0.0)
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (torch.exp(x - lse).masked_fill(empty, 0.0).transpose(-1, -2)[..., None].to(wide)
            for x in (lse_a, lse_b))
    out = a * out_a.to(wide) + b * out_b.to(wide)
    out = out.to(torch.promote_types(out_a.dtype, out_b.dtype))
    return out, lse.masked_fill(empty, -torch.inf)


@jit
def _weights(lse_a, lse_b):
    """(e^(lse_a - lse), e^(lse_b - lse), lse): 0, 0 and -inf where there are no keys at all."""
    top = tl.maximum(lse_a, lse_b)
    zero = tl.where(top == -float("inf"), 0.0, top)
    a, b = tl.exp(lse_a - zero), tl.exp(lse_b - zero)
    total = a + b
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    return a * scale, b * scale, zero + tl.log(total)


@jit
def _place(tokens, heads, blocks, ROWS: tl.constexpr):
    """(batch, head, first row, rows left, row numbers) of this program."""
    # int64: offsets of batches, heads and tokens pass 2^31 in real runs.
    program = tl.program_id(0).to(tl.int64)
    pair, first = program // blocks, program % blocks * ROWS
    return pair // heads, pair % heads, first, tokens - first, first + tl.arange(0, ROWS)


@jit
def _part(base, lse, left, stride, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a part in float32: 0 in those that saw no key, whatever is there."""
    value = load_tile(base, left, stride, DIM, ROWS, WIDTH).to(tl.float32)
    return tl.where((lse == -float("inf"))[:, None], 0.0, value)


@jit
def _forward_kernel(a, lse_a, b, lse_b, out, lse, tokens, heads, a_batch, a_token, a_head, b_batch,
                    b_token, b_head, la_batch, la_head, la_token, lb_batch, lb_head, lb_token,
                    blocks, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One program ROWS tokens of a head; out and lse are contiguous."""
    batch, head, first, left, row = _place(tokens, heads, blocks, ROWS)
    inside = row < tokens
    x = tl.load(lse_a + batch * la_batch + head * la_head + row * la_token, mask=inside, other=0.0)
    y = tl.load(lse_b + batch * lb_batch + head * lb_head + row * lb_token, mask=inside, other=0.0)
    wa, wb, whole = _weights(x, y)
    tl.store(lse + (batch * heads + head) * tokens + row, whole, mask=inside)
    va = _part(a + batch * a_batch + head * a_head + first * a_token, x, left, a_token, DIM,
               ROWS, WIDTH)
    vb = _part(b + batch * b_batch + head * b_head + first * b_token, y, left, b_token, DIM,
               ROWS, WIDTH)
    value = wa[:, None] * va + wb[:, None] * vb
    lane = tl.arange(0, WIDTH)
    to = out + ((batch * tokens + row[:, None]) * heads + head) * DIM + lane[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside[:, None] & (lane < DIM)[None, :])


@jit
def _backward_kernel(a, lse_a, b, lse_b, dout, dlse, da, dlse_a, db, dlse_b, tokens, heads,
                     a_batch, a_token, a_head, b_batch, b_token, b_head, d_batch, d_token, d_head,
                     la_batch, la_head, la_token, lb_batch, lb_head, lb_token, ld_batch, ld_head,
                     ld_token, blocks, DIM: tl.constexpr, ROWS: tl.constexpr,
                     WIDTH: tl.constexpr):
    """One program ROWS tokens of a head; the gradients are contiguous."""
    batch, head, first, left, row = _place(tokens, heads, blocks, ROWS)
    inside = row < tokens
    x = tl.load(lse_a + batch * la_batch + head * la_head + row * la_token, mask=inside, other=0.0)
    y = tl.load(lse_b + batch * lb_batch + head * lb_head + row * lb_token, mask=inside, other=0.0)
    wa, wb, _ = _weights(x, y)
    va = _part(a + batch * a_batch + head * a_head + first * a_token, x, left, a_token, DIM,
               ROWS, WIDTH)
    vb = _part(b + batch * b_batch + head * b_head + first * b_token, y, left, b_token, DIM,
               ROWS, WIDTH)
    g = load_tile(dout + batch * d_batch + head * d_head + first * d_token, left, d_token, DIM,
                  ROWS, WIDTH).to(tl.float32)
    swing = wa * wb * tl.sum(g * (va - vb), 1)
    whole = tl.load(dlse + batch * ld_batch + head * ld_head + row * ld_token, mask=inside,
                    other=0.0)
    at = (batch * heads + head) * tokens + row
    tl.store(dlse_a + at, wa * whole + swing, mask=inside)
    tl.store(dlse_b + at, wb * whole - swing, mask=inside)
    lane = tl.arange(0, WIDTH)
    to = ((batch * tokens + row[:, None]) * heads + head) * DIM + lane[None, :]
    mask = inside[:, None] & (lane < DIM)[None, :]
    tl.store(da + to, (wa[:, None] * g).to(da.dtype.element_ty), mask=mask)
    tl.store(db + to, (wb[:, None] * g).to(db.dtype.element_ty), mask=mask)


def _launch(kernel: Any, values: tuple[Tensor, ...], numbers: tuple[Tensor, ...],
            arguments: tuple[Tensor, ...]) -> None:
    """values (.., S, H, D) and numbers (.., H, S) give their strides, in this order."""
    tokens, heads, dim = values[0].shape[-3:]
    width = max(1, next_power_of_2(dim))
    rows = max(1, min(TILE // width, next_power_of_2(tokens)))
    blocks = cdiv(tokens, rows)
    steps = [step for x in numbers for step in (
        x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x.stride(-1))]
    with torch.cuda.device_of(values[0]):
        kernel[(numbers[0].numel() // tokens * blocks,)](
            *arguments, tokens, heads, *strides(*values), *steps, blocks, DIM=dim, ROWS=rows,
            WIDTH=width, num_warps=4)


@torch.library.custom_op("fastllm::merge_attention", mutates_args=())
def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor,
           lse_b: Tensor) -> tuple[Tensor, Tensor]:
    require("merge_attention", out_a, lse_a, out_b, lse_b)
    out = out_a.new_empty(out_a.shape, dtype=torch.promote_types(out_a.dtype, out_b.dtype))
    lse = lse_a.new_empty(lse_a.shape)
    if out.numel():
        a, b = unit_stride(out_a), unit_stride(out_b)
        _launch(_forward_kernel, (a, b), (lse_a, lse_b), (a, lse_a, b, lse_b, out, lse))
    return out, lse


@_merge.register_fake
def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(out_a.dtype, out_b.dtype)
    return out_a.new_empty(out_a.shape, dtype=dtype), lse_a.new_empty(lse_a.shape)


@torch.library.custom_op("fastllm::merge_attention_backward", mutates_args=())
def _merge_backward(dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor,
                    lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = tuple(x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))
    if dout.numel():
        a, b, d = unit_stride(out_a), unit_stride(out_b), unit_stride(dout)
        _launch(_backward_kernel, (a, b, d), (lse_a, lse_b, dlse),
                (a, lse_a, b, lse_b, d, dlse, *results))
    da, dlse_a, db, dlse_b = results
    return da, dlse_a, db, dlse_b


@_merge_backward.register_fake
def _merge_backward_fake(dout: Tensor, dlse: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in given)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout: Tensor, dlse: Tensor):
    return _merge_backward(dout, dlse, *ctx.saved_tensors)


_merge.register_autograd(_autograd, setup_context=_setup)


def check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Raise ValueError or TypeError where the arguments do not fit each other."""
    rows = (*out_a.shape[:-3], *out_a.shape[-3:-1][::-1])
    if out_a.dim() not in (3, 4) or out_b.shape != out_a.shape or (
            lse_a.shape != rows or lse_b.shape != rows):
        raise ValueError(
            f"merge_attention: out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse "
            f"{tuple(lse_a.shape)} and {tuple(lse_b.shape)} are not twice (B, S, H, D) with "
            "(B, H, S), or (T, H, D) with (H, T)")
    if lse_a.dtype != lse_b.dtype or lse_a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"merge_attention: lse {lse_a.dtype} and {lse_b.dtype} must be float32")


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor,
                    lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both parts, from `attention(..., return_lse=True)` over each.

    out_a, out_b (B, S, H, D) or packed (T, H, D), of floating types that may differ: the result
    has the wider one, float32 for many parts; lse_a, lse_b (B, H, S) or (H, T) float32. A part in
    which a query sees no key has lse -inf and counts for nothing, whatever its out is. Sinks belong
    into one part alone. Differentiable in all four. Raises ValueError or TypeError where shapes or
    types do not fit.
    """
    check(out_a, lse_a, out_b, lse_b)
    return _merge(out_a, lse_a, out_b, lse_b)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, packed: bool = False,
           wide: bool = False, empty: bool = False) -> Call:
    """wide: one part in float32; empty: rows that see no key in one part, or in the other."""
    batch, tokens, heads, dim = shape
    parts = []
    for i in range(2):
        kind = torch.float32 if wide and i else dtype
        out = normal((batch, tokens, heads, dim), kind, device, generator, grad=False)
        lse = normal((batch, heads, tokens), torch.float32, device, generator, grad=False)
        if empty:
            blind = torch.arange(tokens, device=device) % 3 == i
            out = out.masked_fill(blind[:, None, None], 0.0)
            lse = lse.masked_fill(blind, -torch.inf)
        if packed:
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        parts += [out.requires_grad_(), lse.requires_grad_()]
    return Call(tuple(parts))


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    batch, tokens, heads, dim = shape
    rows = batch * tokens * heads
    elements = 3 if direction == "forward" else 5
    return rows * (elements * dtype.itemsize * dim + (12 if direction == "forward" else 20))


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return torch.Size(shape).numel() * (3 if direction == "forward" else 5)


KERNEL = Kernel(
    name="merge_attention", public=merge_attention, reference=reference, inputs=inputs,
    axes=("batch", "tokens", "heads", "head_dim"),
    test_shapes=((1, 1, 1, 1), (2, 5, 3, 7), (2, 33, 2, 64), (1, 9, 3, 80)),
    empty_shapes=((0, 4, 2, 8), (2, 0, 2, 8)),
    bench_shapes=((4, 4096, 32, 64), (4, 4096, 32, 128)),
    traffic_shapes=((1, 256, 8, 64), (2, 2048, 8, 64)),
    audit_shapes=((1, 256, 8, 64), (1, 256, 32, 128)),
    variants={"packed": {"packed": True}, "one wide": {"wide": True}, "no keys": {"empty": True}},
    overflow_shape=(3, 2, 2, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
