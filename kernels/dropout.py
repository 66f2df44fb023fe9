"""Dropout: y = residual + x * kept / (1 - p), whose mask is a hash of (seed, element) and not kept.

x, residual of one shape; y in the residual's type, or in x's without one; computed in float32,
rounded once. Element i, counted in x's logical order whatever its strides, is kept if r(i) >= p,
where r(i) are 32 random bits: with the two halves of the 64-bit seed, all uint32,
    start = mix(low(seed) + 0x9E3779B9) ^ mix(high(seed) + 0x85EBCA6B)
    step = mix(start + low(seed)) | 1          far = mix(start + high(seed))
    r(i) = mix(start + step * low(i) + far * high(i))
a sequence of its own for each seed, through the hash lowbias32 (`_triton.mix`). The backward draws
the same numbers again; neither the launch nor the layout changes any.
Floor, e bytes an element and N elements: 2eN either way; forward with a residual 3eN, whose
gradient is that of y and costs nothing.
Sources: Srivastava et al., JMLR 15 (2014); Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._layout import matrices, tile_of, tiling
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import WORD, jit, mix, mix_reference, require, tl


def random_bits(index: Tensor, seed: Tensor) -> Tensor:
    """The 32 random bits of each element index, as int64."""
    low, high = seed & WORD, (seed >> 32) & WORD
    start = mix_reference((low + 0x9E3779B9) & WORD) ^ mix_reference((high + 0x85EBCA6B) & WORD)
    step = mix_reference((start + low) & WORD) | 1
    far = mix_reference((start + high) & WORD)
    return mix_reference((start + step * (index & WORD) + far * (index >> 32)) & WORD)


def kept(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """The mask of a tensor of this shape."""
    index = torch.arange(shape.numel(), device=seed.device).view(shape)
    return random_bits(index, seed) > last(p)


def last(p: float) -> int:
    """The largest random number that drops its element, for p > 0 in units of 2^-32."""
    return max(round(p * 2**32), 1) - 1


def reference(x: Tensor, p: float = 0.5, *, residual: Tensor | None = None, training: bool = True,
              seed: int | Tensor | None = None) -> Tensor:
    _check(x, p, residual)
    if not training or p == 0:
        return _whole(x, residual)
    wide = x.to(compute_dtype(x)) / (1 - p or 1.0)  # at p = 1 nothing is left to divide
    wide = torch.where(kept(x.shape, p, _drawn(seed, x.device)), wide, 0)
    return wide.to(x.dtype) if residual is None else (residual + wide).to(residual.dtype)


def _check(x: Tensor, p: float, residual: Tensor | None) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p {p} is not a probability, from 0 to 1")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"dropout: residual {tuple(residual.shape)} must have the shape of "
                         f"x {tuple(x.shape)}")


def _drawn(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a tensor on the device, made there: nothing waits."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dim() or seed.dtype != torch.int64:
        raise ValueError(f"dropout: seed {tuple(seed.shape)} {seed.dtype} must be one int64, 0-d")
    return seed


def _whole(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else (residual + x).to(residual.dtype)


@jit
def bits_of(index, seed):
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    start = mix(low + 0x9E3779B9) ^ mix(high + 0x85EBCA6B)
    step = mix(start + low) | 1
    far = mix(start + high)
    near = step * (index & 0xFFFFFFFF).to(tl.uint32)
    return mix(start + near + far * (index >> 32).to(tl.uint32))


@jit
def _kernel(x, residual, y, seed, rows, columns, x_stride, x_step, residual_stride, last, scale,
             blocks, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile; y is contiguous."""
    row, column = tile_of(blocks, ROWS, BLOCK)
    mask = (row < rows) & (column < columns)
    value = tl.load(x + row * x_stride + column * x_step, mask=mask, other=0.0).to(tl.float32)
    index = row * columns + column
    keep = bits_of(index, tl.load(seed)) > tl.full((), last, tl.uint32)
    value = tl.where(keep, value * scale, 0.0)
    if RESIDUAL:
        value += tl.load(residual + row * residual_stride + column, mask=mask,
                         other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastllm::dropout", mutates_args=())
def _dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float,
             dtype: torch.dtype) -> Tensor:
    """Its own backward too: a gradient is dropped where its element was."""
    tensors = [x] if residual is None else [x, residual]
    require("dropout", *tensors, seed)
    y = _dropout_fake(x, residual, seed, p, dtype)
    if y.numel():
        laid = matrices(*tensors)
        given, added = laid[0], laid[-1]
        programs, launch = tiling(*given.shape)
        with torch.cuda.device_of(x):
            _kernel[(programs,)](
                given, added, y, seed, *given.shape, *given.stride(), added.stride(0),
                last(p), 1 / (1 - p or 1.0), RESIDUAL=residual is not None, **launch)
    return y


@_dropout.register_fake
def _dropout_fake(x: Tensor, residual: Tensor | None, seed: Tensor, p: float,
                  dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    x, _, seed, ctx.p, _ = inputs
    ctx.save_for_backward(seed)
    ctx.dtype = x.dtype


def _autograd(ctx, dy: Tensor):
    need_x, need_residual = ctx.needs_input_grad[:2]
    dx = _dropout(dy, None, *ctx.saved_tensors, ctx.p, ctx.dtype) if need_x else None
    return dx, dy if need_residual else None, None, None, None


_dropout.register_autograd(_autograd, setup_context=_setup)


def dropout(x: Tensor, p: float = 0.5, *, residual: Tensor | None = None, training: bool = True,
            seed: int | Tensor | None = None) -> Tensor:
    """residual + x with each element zero with probability p and else divided by 1 - p.

    residual: of x's shape, any strides; the result has its type. seed: an int, or one int64 in a
    0-d tensor on x's device; None draws it there from torch's generator, so that torch.manual_seed
    makes it reproducible, and activation checkpointing draws it again. The mask depends on nothing
    but the seed, p and each element's index. Without training, x + residual as they are.
    """
    _check(x, p, residual)
    if not training or p == 0:
        return _whole(x, residual)
    dtype = x.dtype if residual is None else residual.dtype
    return _dropout(x, residual, _drawn(seed, x.device), p, dtype)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, residual: bool = False,
           residual_dtype: torch.dtype | None = None, p: float = 0.3, seed: int = 7,
           on_device: bool = False, **options: Any) -> Call:
    options["seed"] = torch.tensor(seed, device=device) if on_device else seed
    x = normal(shape, dtype, device, generator)
    if residual:
        options["residual"] = normal(shape, residual_dtype or dtype, device, generator)
    return Call((x, p), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, residual: bool = False,
                **_: Any) -> int:
    return dtype.itemsize * shape[0] * shape[1] * (3 if residual and direction == "forward" else 2)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, residual: bool = False,
                **_: Any) -> int:
    return shape[0] * shape[1] * (2 if residual and direction == "forward" else 1)


KERNEL = Kernel(
    name="dropout", public=dropout, reference=reference, inputs=inputs,
    axes=("rows", "hidden_size"),
    test_shapes=((1, 1), (3, 7), (5, 100), (2, 2049)),
    empty_shapes=((0, 8), (4, 0)),
    bench_shapes=((16384, 2048), (16384, 4096)),
    traffic_shapes=((256, 512), (4096, 512)),
    audit_shapes=((8, 512), (4, 4096)),
    bench_options={"residual": {"residual": True}},
    variants={"float32 residual": {"residual": True, "residual_dtype": torch.float32},
              "everything": {"p": 1.0, "residual": True}, "nothing": {"p": 0.0, "residual": True},
              "rare": {"p": 2.0**-31}, "not training": {"training": False},
              "seed on the device": {"on_device": True, "seed": -(1 << 62) - 12345, "p": 0.7},
              "residual": {"residual": True}},
    overflow_shape=(3, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
