"""Matrix products in Triton for weights that a vendor's library cannot read, and what follows them.

One kernel family computes x @ w (+ bias) (+ alpha t @ b), w dense or block-quantised and either way
up: forward the weight (N, K) is read as its transpose, backward as it lies. The low-rank term and
the bias are added to the accumulators, so the result is written once and read never.
"""

import torch
from torch import Tensor

from fastllm.kernels._triton import cdiv, jit, next_power_of_2, rows_of, tl

GROUP = 8  # row tiles that share their columns of the weight while those are in L2


@jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of the result, programs in groups of GROUP row tiles."""
    program = tl.program_id(0).to(tl.int64)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@jit
def _begin(row, column, t, b, bias, t_row, b_column, b_rank, rank, alpha, rows, columns,
           RANK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr):
    """alpha t @ b + bias for the given rows and columns, which the products then add to.

    After them it would make ptxas put every product in a row (bench/audit.py, "serialized").
    """
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if RANK:
        lane = tl.arange(0, RANK)
        left = tl.load(t + row[:, None] * t_row + lane[None, :],
                       mask=(row < rows)[:, None] & (lane < rank)[None, :], other=0.0)
        right = tl.load(b + lane[:, None] * b_rank + column[None, :] * b_column,
                        mask=(lane < rank)[:, None] & (column < columns)[None, :], other=0.0)
        total = alpha * tl.dot(left, right, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return total


@jit
def _product_kernel(x, w, absmax, t, b, bias, out, rows, columns, inner, x_row, w_column, w_inner,
                    scale_column, scale_inner, t_row, b_column, b_rank, rank, alpha,
                    INT8: tl.constexpr, TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
                    BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
    """One program a tile of out = x @ w + ...; w dense, or int8 with an absmax a block.

    A tile of the weight lies inside one block along the direction that blocks run: INNER is the
    block as the weight is read transposed, COLUMNS as it lies.
    """
    down, across = _tile(rows, columns, ROWS, COLUMNS, GROUP)
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    total = _begin(row, column, t, b, bias, t_row, b_column, b_rank, rank, alpha, rows, columns,
                   RANK, BIAS, PRECISION, ROWS, COLUMNS)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        left = tl.load(x + row[:, None] * x_row + k[None, :],
                       mask=(row < rows)[:, None] & (k < inner)[None, :], other=0.0)
        # int64: a vocabulary times a width passes 2^31.
        right = tl.load(w + k.to(tl.int64)[:, None] * w_inner + column[None, :] * w_column,
                        mask=(k < inner)[:, None] & (column < columns)[None, :], other=0)
        if INT8:
            if TRANSPOSED:
                scale = tl.load(absmax + column * scale_column + start // INNER * scale_inner,
                                mask=column < columns, other=0.0)[None, :]
            else:
                scale = tl.load(absmax + k * scale_inner + across * scale_column,
                                mask=k < inner, other=0.0)[:, None]
            right = (right.to(tl.float32) * (scale * (1.0 / 127.0))).to(left.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(out + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty),
             mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit
def nf4_value(code):
    """The NF4 code book's entry of each code (0 to 15), by a tree of selections."""
    low, second = (code & 1) != 0, (code & 2) != 0
    a = tl.where(second, tl.where(low, -0.39491748809814453, -0.5250730514526367),
                 tl.where(low, -0.6961928009986877, -1.0))
    b = tl.where(second, tl.where(low, 0.0, -0.09105003625154495),
                 tl.where(low, -0.18477343022823334, -0.28444138169288635))
    c = tl.where(second, tl.where(low, 0.33791524171829224, 0.24611230194568634),
                 tl.where(low, 0.16093020141124725, 0.07958029955625534))
    d = tl.where(second, tl.where(low, 1.0, 0.7229568362236023),
                 tl.where(low, 0.5626170039176941, 0.44070982933044434))
    third, top = (code & 4) != 0, (code & 8) != 0
    return tl.where(top, tl.where(third, d, c), tl.where(third, b, a))


@jit
def nf4_absmax(absmax, group_scale, mean, block, mask, DOUBLE: tl.constexpr):
    """The absmax of blocks by their number in the weight; DOUBLE: int8 with a scale a 256."""
    value = tl.load(absmax + block, mask=mask, other=0).to(tl.float32)
    if DOUBLE:
        value *= tl.load(group_scale + block // 256, mask=mask, other=0.0)
        value += tl.load(mean)
    return value


@jit
def _nf4_kernel(x, packed, absmax, group_scale, mean, bias, out, rows, columns, inner, width, x_row,
                DOUBLE: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
                PRECISION: tl.constexpr, ROWS: tl.constexpr, OTHER: tl.constexpr,
                BLOCKS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr):
    """One program a tile of x @ w for an NF4 weight (N, width): BLOCKS whole blocks along width.

    A block's first half lies in the high nibbles of its bytes and its second in the low ones, so
    that each half is a tile of consecutive columns and takes part in a product of its own.
    TRANSPOSED: width is summed over, OTHER is the result's columns; else the other way round.
    """
    wide = BLOCKS * 2 * HALF
    if TRANSPOSED:
        down, across = _tile(rows, columns, ROWS, OTHER, GROUP)
        steps = tl.cdiv(inner, wide)
    else:
        down, across = _tile(rows, columns, ROWS, wide, GROUP)
        steps = tl.cdiv(inner, OTHER)
    row = down * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCKS * HALF)
    early = lane // HALF * (2 * HALF) + lane % HALF  # column of a high nibble within the tile
    if TRANSPOSED:
        first_total = tl.zeros((ROWS, OTHER), dtype=tl.float32)
        second_total = tl.zeros((ROWS, OTHER), dtype=tl.float32)
    else:
        first_total = tl.zeros((ROWS, BLOCKS * HALF), dtype=tl.float32)
        second_total = tl.zeros((ROWS, BLOCKS * HALF), dtype=tl.float32)
    for step in range(steps):
        if TRANSPOSED:
            line, start = across * OTHER + tl.arange(0, OTHER), step * wide
            lines = columns
        else:
            line, start = step * OTHER + tl.arange(0, OTHER), across * wide
            lines = inner
        line = line.to(tl.int64)
        byte = start // 2 + lane
        inside = (line < lines)[:, None]
        code = tl.load(packed + line[:, None] * (width // 2) + byte[None, :],
                       mask=inside & (byte < width // 2)[None, :], other=0).to(tl.int32)
        block = start // (2 * HALF) + tl.arange(0, BLOCKS)
        scale = nf4_absmax(absmax, group_scale, mean,
                           line[:, None] * (width // (2 * HALF)) + block[None, :],
                           inside & (block < width // (2 * HALF))[None, :], DOUBLE)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (OTHER, BLOCKS, HALF)),
                           (OTHER, BLOCKS * HALF))
        first = (nf4_value(code >> 4) * scale).to(x.dtype.element_ty)
        second = (nf4_value(code & 15) * scale).to(x.dtype.element_ty)
        if TRANSPOSED:
            at = start + early
            left = tl.load(x + row[:, None] * x_row + at[None, :],
                           mask=(row < rows)[:, None] & (at < inner)[None, :], other=0.0)
            right = tl.load(x + row[:, None] * x_row + (at + HALF)[None, :],
                            mask=(row < rows)[:, None] & (at < inner)[None, :], other=0.0)
            first_total = tl.dot(left, tl.trans(first), first_total, input_precision=PRECISION)
            second_total = tl.dot(right, tl.trans(second), second_total, input_precision=PRECISION)
        else:
            left = tl.load(x + row[:, None] * x_row + line[None, :],
                           mask=(row < rows)[:, None] & (line < inner)[None, :], other=0.0)
            first_total = tl.dot(left, first, first_total, input_precision=PRECISION)
            second_total = tl.dot(left, second, second_total, input_precision=PRECISION)
    target = out + row[:, None] * columns
    inside = (row < rows)[:, None]
    if TRANSPOSED:
        column = across * OTHER + tl.arange(0, OTHER)
        total = first_total + second_total
        if BIAS:
            total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None]
        tl.store(target + column[None, :], total.to(out.dtype.element_ty),
                 mask=inside & (column < columns)[None, :])
    else:
        column = across * wide + early
        inside = inside & (column < columns)[None, :]
        tl.store(target + column[None, :], first_total.to(out.dtype.element_ty), mask=inside)
        tl.store(target + (column + HALF)[None, :], second_total.to(out.dtype.element_ty),
                 mask=inside)


def _precision(x: Tensor) -> str:
    # Float32 products are exact: TF32 would be asked for, and there is no one to ask here.
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _rows_tile(rows: int, dtype: torch.dtype) -> int:
    most = 64 if dtype == torch.float32 else 128
    return max(16, min(most, next_power_of_2(rows)))


def product(x: Tensor, weight: Tensor, *, transposed: bool, absmax: Tensor | None = None,
            block: int = 64, bias: Tensor | None = None,
            low_rank: tuple[Tensor, Tensor] | None = None, alpha: float = 1.0) -> Tensor:
    """x @ weight.T (transposed) or x @ weight, plus bias and alpha t @ b, (rows, columns).

    x (rows, inner); weight (N, K) of x's type, or int8 with absmax (N, K / block) float32 a block;
    low_rank: t (rows, r) and b (r, columns) in any strides.
    """
    x = rows_of(x)
    rows, inner = x.shape
    columns = weight.shape[0] if transposed else weight.shape[1]
    out = x.new_empty((rows, columns))
    if not rows or not columns:
        return out
    wide = x.dtype == torch.float32
    tile_rows = _rows_tile(rows, x.dtype)
    # Few rows: narrower tiles make more programs, and this is then bound by the weight's bytes.
    tile_columns, tile_inner = (64, 32) if wide else (64 if tile_rows < 64 else 128, 64)
    w_column, w_inner = weight.stride() if transposed else weight.stride()[::-1]
    scales = (0, 0)
    if absmax is not None:
        scales = (absmax.stride(0), 1) if transposed else (1, absmax.stride(0))
        tile_columns, tile_inner = (tile_columns, block) if transposed else (block, tile_inner)
    t, b = low_rank if low_rank is not None else (x, x)
    t = rows_of(t)
    with torch.cuda.device_of(x):
        _product_kernel[(cdiv(rows, tile_rows) * cdiv(columns, tile_columns),)](
            x, weight, x if absmax is None else absmax, t, b, x if bias is None else bias, out,
            rows, columns, inner, x.stride(0), w_column, w_inner, *scales, t.stride(0), b.stride(1),
            b.stride(0), t.shape[1], float(alpha), INT8=absmax is not None, TRANSPOSED=transposed,
            RANK=max(16, next_power_of_2(t.shape[1])) if low_rank is not None else 0,
            BIAS=bias is not None, PRECISION=_precision(x), ROWS=tile_rows, COLUMNS=tile_columns,
            INNER=tile_inner, GROUP=GROUP, num_warps=8 if tile_rows == 128 else 4, num_stages=3)
    return out


def nf4_product(x: Tensor, packed: Tensor, absmax: Tensor, group_scale: Tensor | None,
                mean: Tensor | None, block: int, *, transposed: bool,
                bias: Tensor | None = None) -> Tensor:
    """x @ w.T (transposed) or x @ w for an NF4 weight w (N, K): see `quant.NF4` for its parts."""
    x = rows_of(x)
    rows, inner = x.shape
    width = 2 * packed.shape[1]
    columns = packed.shape[0] if transposed else width
    out = x.new_empty((rows, columns))
    if not rows or not columns:
        return out
    tile_rows = min(64, _rows_tile(rows, x.dtype))
    # Few rows: wider tiles in fewer warps keep 16 bytes a thread in each access to x and out.
    few = tile_rows < 64 and x.dtype != torch.float32
    blocks = max(1, (128 if few else 64) // block)
    other = 32 if x.dtype == torch.float32 else 64
    double = group_scale is not None
    across = cdiv(columns, other if transposed else blocks * block)
    with torch.cuda.device_of(x):
        _nf4_kernel[(cdiv(rows, tile_rows) * across,)](
            x, packed, absmax, group_scale if double else absmax, mean if double else absmax,
            x if bias is None else bias, out, rows, columns, inner, width, x.stride(0),
            DOUBLE=double, TRANSPOSED=transposed, BIAS=bias is not None, PRECISION=_precision(x),
            ROWS=tile_rows, OTHER=other, BLOCKS=blocks, HALF=block // 2, GROUP=GROUP,
            num_warps=4 if few else 8, num_stages=3)
    return out
