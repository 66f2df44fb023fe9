"""What RMSNorm and LayerNorm share: one family of kernels, with the mean (CENTER) or without.

    h = x + residual,  c = h - mean(h),  y = c / sqrt(mean(c^2) + eps) * (weight + offset) + bias

h is kept in the residual's type and y is formed from what was kept. Short rows are held in
registers, several to a tile; a program walks many tiles, so that the weight is read once for all of
them and the next tiles arrive while one is worked on. The gradient of x is that of the residual
too: it is written once unless their types differ. Weight and bias gradients leave each program as
one row of partial sums, which a second small kernel adds up in a fixed order.
"""

import torch
from torch import Tensor

from fastllm.kernels._spec import Direction
from fastllm.kernels._triton import (
    cdiv,
    jit,
    multiprocessors,
    next_power_of_2,
    require,
    rows_of,
    tl,
    warps_for,
)

FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements of a tile of several rows
WHOLE = 8192  # longest row that is held in registers, of odd lengths half of it
LONG_BLOCK = 4096
FORWARD_PROGRAMS = 4  # on each multiprocessor; half as many where each reads a bias too
# Programs of a backward that gathers gradients: a function of shapes alone, never of the GPU, since
# it decides the order of summation and so the bits. 256 are two for each multiprocessor of an H100.
PARTIALS = 256
ROWS_A_PARTIAL = 32  # with fewer, a program's partial sums would be over 5 % of what it streams
SHARED = 1 << 16  # bytes of shared memory for tiles on their way: within any GPU's since 2020
NARROW = {"_gather_kernel": "a program writes a few elements of a vector's gradient, one a thread"}


@jit
def _forward_kernel(x, residual, weight, bias, y, h, statistics, rows, hidden, x_stride,
                    residual_stride, eps, offset, CENTER: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Each program walks every num_programs-th tile of ROWS whole rows; y and h are contiguous."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    if weight is not None:
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        # int64: row * stride passes 2^31 at 2^31 elements, a size that training reaches.
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
            kept = value.to(h.dtype.element_ty)
            tl.store(h + row * hidden + column, kept, mask=mask)
            value = kept.to(tl.float32)
        if CENTER:
            mean = tl.sum(value, axis=1, keep_dims=True) / hidden
            value = tl.where(inside, value - mean, 0.0)
            tl.store(statistics + rows + row, mean, mask=row < rows)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / hidden + eps)
        tl.store(statistics + row, scale, mask=row < rows)
        value *= scale
        if weight is not None:
            value *= gain
        if bias is not None:
            value += shift
        tl.store(y + row * hidden + column, value.to(y.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(dy, dh, h, weight, statistics, dx, dresidual, partial, rows, hidden, dy_stride,
                     dh_stride, h_stride, offset, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
                     BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                     STAGES: tl.constexpr):
    """Each program walks every num_programs-th tile of ROWS whole rows.

    Gradients of weight and bias are gathered in registers and leave once, as this program's row
    of `partial`, which needs no zeroing because every program writes all of it.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    # The widest rows leave no registers to hold the weight as well.
    HELD: tl.constexpr = (WEIGHT + BIAS) * BLOCK <= 8192
    if weight is not None and HELD:
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    if WEIGHT:
        to_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if BIAS:
        to_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(h + row * h_stride + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(statistics + row, mask=row < rows, other=0.0)
        if CENTER:
            normed -= tl.load(statistics + rows + row, mask=row < rows, other=0.0)
            normed = tl.where(inside, normed, 0.0)
        normed *= scale
        if BIAS:
            to_bias += upstream
        if WEIGHT:
            to_weight += upstream * normed
        if weight is not None:
            if not HELD:
                gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
            upstream *= gain
        value = upstream - normed * (tl.sum(upstream * normed, axis=1, keep_dims=True) / hidden)
        if CENTER:
            value -= tl.sum(upstream, axis=1, keep_dims=True) / hidden
        value *= scale
        if dh is not None:
            value += tl.load(dh + row * dh_stride + column, mask=mask, other=0.0)
        tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            tl.store(dresidual + row * hidden + column, value.to(dresidual.dtype.element_ty),
                     mask=mask)
    columns = tl.arange(0, BLOCK)
    to = partial + tl.program_id(0).to(tl.int64) * (WEIGHT + BIAS) * hidden + columns
    if WEIGHT:
        tl.store(to, tl.sum(to_weight, axis=0), mask=columns < hidden)
    if BIAS:
        tl.store(to + WEIGHT * hidden, tl.sum(to_bias, axis=0), mask=columns < hidden)


@jit
def _gather_kernel(partial, dweight, dbias, programs, hidden, WEIGHT: tl.constexpr,
                   BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of dweight and dbias, from the partial sums (programs, WEIGHT + BIAS, hidden)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    to_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    to_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < programs) & (column < hidden)[None, :]
        here = partial + row * (WEIGHT + BIAS) * hidden + column[None, :]
        if WEIGHT:
            to_weight += tl.load(here, mask=mask, other=0.0)
        if BIAS:
            to_bias += tl.load(here + WEIGHT * hidden, mask=mask, other=0.0)
    if WEIGHT:
        total = tl.sum(to_weight, axis=0).to(dweight.dtype.element_ty)
        tl.store(dweight + column, total, mask=column < hidden)
    if BIAS:
        total = tl.sum(to_bias, axis=0).to(dbias.dtype.element_ty)
        tl.store(dbias + column, total, mask=column < hidden)


@jit
def _forward_long_kernel(x, residual, weight, bias, y, h, statistics, rows, hidden, x_stride,
                         residual_stride, eps, offset, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row too long for registers: its second pass finds the row in the caches."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + lane
        mask = column < hidden
        value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
            kept = value.to(h.dtype.element_ty)
            tl.store(h + row * hidden + column, kept, mask=mask)
            value = kept.to(tl.float32)
        if CENTER:
            # Chan et al. (1979): the block's own mean and squares join those of the blocks before.
            end = tl.minimum(start + BLOCK, hidden)
            apart = tl.sum(value, axis=0) / (end - start) - mean
            value = tl.where(mask, value - (mean + apart), 0.0)
            mean += apart * ((end - start) / end)
            squares += tl.where(lane == 0, apart * apart * (end - start) * (start / end), 0.0)
        squares += value * value
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / hidden + eps)
    tl.store(statistics + row, scale)
    if CENTER:
        tl.store(statistics + rows + row, mean)
    tl.debug_barrier()  # what other threads wrote of h is read below
    for start in range(0, hidden, BLOCK):
        column = start + lane
        mask = column < hidden
        if residual is not None:
            value = tl.load(h + row * hidden + column, mask=mask, other=0.0).to(tl.float32)
        else:
            value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            value -= mean
        value *= scale
        if weight is not None:
            value *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) + offset
        if bias is not None:
            value += tl.load(bias + column, mask=mask, other=0.0)
        tl.store(y + row * hidden + column, value.to(y.dtype.element_ty), mask=mask)


@jit
def _backward_long_kernel(dy, dh, h, weight, statistics, dx, dresidual, partial, rows, hidden,
                          dy_stride, dh_stride, h_stride, offset, CENTER: tl.constexpr,
                          WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """As `_backward_kernel`, a row at a time in blocks; weight and bias gradients are gathered in
    this program's row of `partial`, whose first visit writes rather than adds."""
    lane = tl.arange(0, BLOCK)
    here = partial + tl.program_id(0).to(tl.int64) * (WEIGHT + BIAS) * hidden
    mean = 0.0
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        written = tl.where(row < tl.num_programs(0), 0, hidden)  # columns of `here` so far
        scale = tl.load(statistics + row)
        if CENTER:
            mean = tl.load(statistics + rows + row)
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, hidden, BLOCK):
            column = start + lane
            mask = column < hidden
            upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
            normed = tl.load(h + row * h_stride + column, mask=mask, other=0.0).to(tl.float32)
            normed = (normed - mean) * scale
            if weight is not None:
                upstream *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) + offset
            products += upstream * normed
            sums += upstream
        along = tl.sum(products, axis=0) / hidden
        level = tl.sum(sums, axis=0) / hidden
        for start in range(0, hidden, BLOCK):
            column = start + lane
            mask = column < hidden
            upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
            normed = tl.load(h + row * h_stride + column, mask=mask, other=0.0).to(tl.float32)
            normed = (normed - mean) * scale
            if WEIGHT:
                before = tl.load(here + column, mask=column < written, other=0.0)
                tl.store(here + column, before + upstream * normed, mask=mask)
            if BIAS:
                before = tl.load(here + WEIGHT * hidden + column, mask=column < written, other=0.0)
                tl.store(here + WEIGHT * hidden + column, before + upstream, mask=mask)
            if weight is not None:
                upstream *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) + offset
            value = upstream - normed * along
            if CENTER:
                value -= level
            value *= scale
            if dh is not None:
                value += tl.load(dh + row * dh_stride + column, mask=mask, other=0.0)
            tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)
            if dresidual is not None:
                tl.store(dresidual + row * hidden + column, value.to(dresidual.dtype.element_ty),
                         mask=mask)


def _whole(hidden: int) -> bool:
    """Whether rows are held in registers. Those of odd lengths are read in pieces of one element,
    whose addresses need registers too."""
    return hidden <= WHOLE and (hidden % 16 == 0 or hidden <= WHOLE // 2)


def _tile(elements: int, hidden: int, *streams: Tensor | None) -> dict[str, int]:
    """The constants of a launch that walks tiles of about so many elements, read from `streams`."""
    block = next_power_of_2(hidden)
    rows = max(1, min(32, elements // block))
    size = rows * block * sum(t.element_size() for t in streams if t is not None)
    return {"ROWS": rows, "BLOCK": block, "STAGES": 1 + min(2, SHARED // size),
            "num_warps": warps_for(rows * block, per_thread=16)}


def _partials(rows: int, hidden: int, gathered: int) -> int:
    """Rows of partial sums, and programs, of a backward that gathers one or two gradients.

    Wide rows, whose sums take most of the registers, are left one program a multiprocessor.
    """
    most = PARTIALS if gathered * hidden <= 4096 or not _whole(hidden) else PARTIALS // 2
    return min(most, max(16, rows // ROWS_A_PARTIAL) // gathered)


@torch.library.custom_op("fastllm::norm", mutates_args=())
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
             eps: float, offset: float, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; h like the residual (empty without one); 1/rms and the mean, float32 (2, rows).

    Without `center` there is no mean, and 1/rms is (1, rows).
    """
    op = "layer_norm" if center else "rms_norm"
    require(op, *(t for t in (x, residual, weight, bias) if t is not None))
    y, h, statistics = _forward_fake(x, residual, weight, bias, eps, offset, center)
    flat, added = rows_of(x), None if residual is None else rows_of(residual)
    gain, shift = (None if t is None else t.contiguous() for t in (weight, bias))
    rows, hidden = flat.shape
    arguments = (flat, added, gain, shift, y, h, statistics, rows, hidden, flat.stride(0),
                 0 if added is None else added.stride(0), eps, offset, center)
    with torch.cuda.device_of(x):
        if rows and not _whole(hidden):
            _forward_long_kernel[(rows,)](*arguments, BLOCK=LONG_BLOCK, num_warps=8)
        elif rows:
            tile = _tile(FORWARD_TILE, hidden, flat, added)
            most = multiprocessors(x.device) * FORWARD_PROGRAMS // (1 if bias is None else 2)
            _forward_kernel[(min(most, cdiv(rows, tile["ROWS"])),)](*arguments, **tile)
    return y, h, statistics


@_forward.register_fake
def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                  eps: float, offset: float, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), h, x.new_empty((2 if center else 1, rows), dtype=torch.float32)


@torch.library.custom_op("fastllm::norm_backward", mutates_args=())
def _backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
              statistics: Tensor, offset: float, weight_gradient: bool, bias_gradient: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like dy, dresidual like h, dweight and dbias; empty what is not wanted.

    dresidual is empty where h has dx's type: it is dx then.
    """
    dx, dresidual, dweight, dbias = outputs = _backward_fake(
        dy, dh, h, weight, bias, statistics, offset, weight_gradient, bias_gradient)
    upstream, flat = rows_of(dy), rows_of(h)
    added = None if dh is None else rows_of(dh)
    rows, hidden = flat.shape
    if not rows:
        dweight.zero_(), dbias.zero_()
        return outputs
    gathered = weight_gradient + bias_gradient
    whole, tile = _whole(hidden), _tile(BACKWARD_TILE, hidden, upstream, flat, added)
    most = (_partials(rows, hidden, gathered) if gathered
            else FORWARD_PROGRAMS * multiprocessors(dy.device))
    programs = min(most, cdiv(rows, tile["ROWS"]) if whole else rows)
    partial = dy.new_empty((programs, gathered, hidden), dtype=torch.float32)
    arguments = (upstream, added, flat, None if weight is None else weight.contiguous(), statistics,
                 dx, None if dx.dtype == flat.dtype else dresidual, partial, rows, hidden,
                 upstream.stride(0), 0 if added is None else added.stride(0), flat.stride(0),
                 offset, statistics.shape[0] == 2, int(weight_gradient), int(bias_gradient))
    with torch.cuda.device_of(dy):
        if whole:
            _backward_kernel[(programs,)](*arguments, **tile)
        else:
            _backward_long_kernel[(programs,)](*arguments, BLOCK=LONG_BLOCK, num_warps=8)
        if gathered:
            block = max(32, next_power_of_2(hidden) // 128)
            _gather_kernel[(cdiv(hidden, block),)](
                partial, dweight, dbias, programs, hidden, int(weight_gradient), int(bias_gradient),
                ROWS=max(1, 2048 // block), BLOCK=block, num_warps=4)
    return outputs


@_backward.register_fake
def _backward_fake(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None,
                   bias: Tensor | None, statistics: Tensor, offset: float, weight_gradient: bool,
                   bias_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = h.new_empty(h.shape if h.dtype != dy.dtype else 0)
    dweight, dbias = (like.new_empty(like.shape) if like is not None and wanted else dy.new_empty(0)
                      for like, wanted in ((weight, weight_gradient), (bias, bias_gradient)))
    return dy.new_empty(dy.shape), dresidual, dweight, dbias


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, offset, _ = inputs
    _, h, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, *(() if residual is not None else (h,)))
    ctx.save_for_backward(x if residual is None else h, weight, bias, statistics)
    ctx.offset, ctx.x_dtype = offset, x.dtype


def _autograd(ctx, dy: Tensor | None, dh: Tensor | None, _: Tensor | None):
    h, weight, bias, statistics = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if dy is None:  # only h was used
        dy = torch.zeros_like(h, dtype=ctx.x_dtype)
    dx, dresidual, dweight, dbias = _backward(dy, dh, h, weight, bias, statistics, ctx.offset,
                                              wanted[2], wanted[3])
    return (dx, (dx if dx.dtype == h.dtype else dresidual) if wanted[1] else None,
            dweight if wanted[2] else None, dbias if wanted[3] else None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup)


def norm(op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float, offset: float, center: bool, prenorm: bool) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, h) with prenorm; ValueError in the name of `op` where the shapes do not fit."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual {tuple(residual.shape)} is not of x's shape "
                         f"{tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} does not fit x {tuple(x.shape)}")
    y, h, _ = _forward(x, residual, weight, bias, eps, offset, center)
    return (y, x if residual is None else h) if prenorm else y


def floor_bytes(rows: int, hidden: int, direction: Direction, dtype: torch.dtype,
                residual: torch.dtype | None, prenorm: bool, vectors: int) -> int:
    """The fewest bytes; `vectors` are those of one element of weight and bias together."""
    if direction == "forward":
        streams = 2 * dtype.itemsize + (2 * residual.itemsize if residual else 0)  # x, y; x + r, h
        return rows * hidden * streams + hidden * vectors
    streams = 2 * dtype.itemsize + (residual or dtype).itemsize  # dy, dx; h
    if residual:  # its gradient comes in, and leaves apart from dx where the types differ
        streams += residual.itemsize * (prenorm + (residual != dtype))
    return rows * hidden * streams + 2 * hidden * vectors
