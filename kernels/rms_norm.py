"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

x (..., H) float32, bfloat16 or float16; weight (H,); y in x's type. All arithmetic is float32 and
y is rounded once (Hugging Face's Llama rounds twice: before and after the weight).
Floor, e bytes an element and T rows: forward 2eTH (x in, y out), backward 3eTH (x, dy in, dx out).
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, rows_of, tl, warps_for

# Partial sums of the weight's gradient: a constant, so that neither the number of multiprocessors
# nor anything else about the GPU changes the order of summation. 256 programs fill an H100 once.
PARTIALS = 256
TILE = 4096
WHOLE = 8192  # longest row that is held in registers, with its weight gradient beside it
LONG_BLOCK = 4096


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.to(compute_dtype(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


@jit
def _forward_kernel(x, weight, y, inverse, rows, hidden, x_stride, eps,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile of ROWS whole rows; y is contiguous."""
    # int64: row * stride passes 2^31 at 2^31 elements, a size that training reaches.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < hidden)
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    mean_square = tl.sum(value * value, axis=1, keep_dims=True) / hidden
    scale = 1.0 / tl.sqrt(mean_square + eps)
    tl.store(y + row * hidden + column, (value * scale * gain).to(y.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale, mask=row < rows)


@jit
def _backward_kernel(dy, x, weight, inverse, dx, partial, rows, hidden, dy_stride, x_stride,
                     WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A fixed number of programs; each walks every num_programs-th tile of ROWS whole rows.

    The weight's gradient is gathered in registers and leaves once, as this program's row of
    `partial`, which needs no zeroing because every program writes all of it.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    gathered = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        normed = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
        normed *= scale
        if WEIGHT:
            gathered += upstream * normed
        upstream *= gain
        along = tl.sum(upstream * normed, axis=1, keep_dims=True) / hidden
        value = (upstream - normed * along) * scale
        tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)
    if WEIGHT:
        total = tl.sum(gathered, axis=0)
        columns = tl.arange(0, BLOCK)
        to = partial + tl.program_id(0).to(tl.int64) * hidden
        tl.store(to + columns, total, mask=columns < hidden)


@jit
def _forward_long_kernel(x, weight, y, inverse, hidden, x_stride, eps, BLOCK: tl.constexpr):
    """One program a row too long for registers: its second pass finds x in the caches."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + lane
        value = tl.load(x + row * x_stride + column, mask=column < hidden, other=0.0)
        squares += value.to(tl.float32) * value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / hidden + eps)
    tl.store(inverse + row, scale)
    for start in range(0, hidden, BLOCK):
        column = start + lane
        mask = column < hidden
        value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row * hidden + column, (value * scale * gain).to(y.dtype.element_ty),
                 mask=mask)


@jit
def _backward_long_kernel(dy, x, weight, inverse, dx, partial, rows, hidden, dy_stride, x_stride,
                          WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """As `_backward_kernel`, a row at a time in blocks; the weight's gradient is gathered in this
    program's row of `partial`, whose first visit writes rather than adds."""
    lane = tl.arange(0, BLOCK)
    here = partial + tl.program_id(0).to(tl.int64) * hidden
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        scale = tl.load(inverse + row)
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, hidden, BLOCK):
            column = start + lane
            mask = column < hidden
            normed = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
            upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
            gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
            products += upstream * gain * (normed * scale)
        along = tl.sum(products, axis=0) / hidden
        for start in range(0, hidden, BLOCK):
            column = start + lane
            mask = column < hidden
            normed = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
            upstream = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
            gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
            normed *= scale
            value = (upstream * gain - normed * along) * scale
            tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)
            if WEIGHT:
                before = tl.load(here + column, mask=mask, other=0.0)
                before = tl.where(row < tl.num_programs(0), 0.0, before)
                tl.store(here + column, before + upstream * normed, mask=mask)


def _tile(hidden: int) -> tuple[int, int, int]:
    """Rows and columns of a tile and its warps, a function of the row's length alone."""
    block = next_power_of_2(hidden)
    rows = max(1, min(16, TILE // block))
    return rows, block, warps_for(rows * block, per_thread=16)


@torch.library.custom_op("fastllm::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, contiguous, and 1/rms (rows,) in float32 for the backward."""
    require("rms_norm", x, weight)
    y, inverse = _forward_fake(x, weight, eps)
    flat, gain = rows_of(x), weight.contiguous()
    rows, hidden = flat.shape
    with torch.cuda.device_of(x):
        if rows and hidden > WHOLE:
            _forward_long_kernel[(rows,)](flat, gain, y, inverse, hidden, flat.stride(0), eps,
                                          BLOCK=LONG_BLOCK, num_warps=8)
        elif rows:
            tile, block, warps = _tile(hidden)
            _forward_kernel[(cdiv(rows, tile),)](
                flat, gain, y, inverse, rows, hidden, flat.stride(0), eps, ROWS=tile, BLOCK=block,
                num_warps=warps)
    return y, inverse


@_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("fastllm::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor,
              weight_gradient: bool) -> tuple[Tensor, Tensor]:
    """dx like x, contiguous, and dweight in the weight's type (empty where it is not wanted)."""
    dx, dweight = _backward_fake(dy, x, weight, inverse, weight_gradient)
    flat, upstream = rows_of(x), rows_of(dy)
    rows, hidden = flat.shape
    if not rows:
        return dx, dweight.zero_()
    tile, block, warps = (1, LONG_BLOCK, 8) if hidden > WHOLE else _tile(hidden)
    programs = min(PARTIALS, cdiv(rows, tile))
    partial = x.new_empty((programs, hidden) if weight_gradient else (0,), dtype=torch.float32)
    arguments = (upstream, flat, weight.contiguous(), inverse, dx, partial, rows, hidden,
                 upstream.stride(0), flat.stride(0))
    with torch.cuda.device_of(x):
        if hidden > WHOLE:
            _backward_long_kernel[(programs,)](*arguments, WEIGHT=weight_gradient, BLOCK=block,
                                               num_warps=warps)
        else:
            _backward_kernel[(programs,)](*arguments, WEIGHT=weight_gradient, ROWS=tile,
                                          BLOCK=block, num_warps=warps)
    if weight_gradient:
        dweight = partial.sum(0).to(weight.dtype)
    return dx, dweight


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor,
                   weight_gradient: bool) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if weight_gradient else (0,))
    return x.new_empty(x.shape), dweight


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _autograd(ctx, dy: Tensor, _: Tensor):
    dx, dweight = _backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of x (..., H) by weight (H,), in x's type; any strides.

    Raises ValueError where the shapes do not fit, TypeError for float64.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return _forward(x, weight, eps)[0]


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, weight_dtype=None,
           scale: float = 1.0, eps: float = 1e-6) -> Call:
    rows, hidden = shape
    x = normal((rows, hidden), dtype, device, generator, scale=scale)
    weight = normal((hidden,), weight_dtype or dtype, device, generator)
    return Call((x, weight), {"eps": eps})


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    rows, hidden = shape
    return dtype.itemsize * hidden * ((2 if direction == "forward" else 3) * rows + 1)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (4 if direction == "forward" else 10) * shape[0] * shape[1]


KERNEL = Kernel(
    name="rms_norm", public=rms_norm, reference=reference, inputs=inputs,
    axes=("rows", "hidden_size"),
    test_shapes=((1, 1), (3, 7), (5, 64), (33, 100), (2, 1025), (3, 8193)),
    empty_shapes=((0, 8),),
    bench_shapes=((16384, 512), (16384, 4096), (8192, 8192)),
    audit_shapes=((4, 512), (4, 4096), (4, 8192), (4, 16384)),
    variants={"fp32 weight": {"weight_dtype": torch.float32}, "large": {"scale": 1e4},
              "small": {"scale": 1e-4}, "eps": {"eps": 0.1}},
    overflow_shape=(2, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
