"""SwiGLU's elementwise part: silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

gate, up (..., F) of one type; the product in that type, computed in float32, rounded once. The
backward recomputes the sigmoid, so nothing but the two inputs is kept.
Floor, e bytes an element and N elements: forward 3eN, backward 5eN (gate, up, dout in; two out).
Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, rows_of, tl, warps_for

TILE = 2048


def reference(gate: Tensor, up: Tensor) -> Tensor:
    wide = compute_dtype(gate)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@jit
def _forward_kernel(gate, up, out, columns, blocks, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One program a piece of BLOCK columns of one row; out is contiguous."""
    # int64: row * stride passes 2^31 in real runs.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(dout, gate, up, dgate, dup, columns, blocks, dout_stride, gate_stride,
                     up_stride, BLOCK: tl.constexpr):
    """One program a piece of BLOCK columns of one row; dgate and dup are contiguous."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    d = tl.load(dout + row * dout_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    # silu'(g) = s (1 + g (1 - s)); 1 - s is formed as a sigmoid too, which does not cancel.
    slope = sigmoid * (1.0 + g / (1.0 + tl.exp(g)))
    to = row * columns + column
    tl.store(dgate + to, (d * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + to, (d * (g * sigmoid)).to(dup.dtype.element_ty), mask=mask)


def _layout(*tensors: Tensor) -> list[Tensor]:
    """Matrices with unit column stride: one long row where everything is contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.reshape(1, -1) for tensor in tensors]
    return [rows_of(tensor) for tensor in tensors]


def _grid(matrix: Tensor) -> tuple[int, int, int]:
    """Blocks a row, the block and its warps."""
    block = min(TILE, next_power_of_2(matrix.shape[1]))
    return cdiv(matrix.shape[1], block), block, warps_for(block)


@torch.library.custom_op("fastllm::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    require("swiglu", gate, up)
    out = _forward_fake(gate, up)
    if gate.numel():
        g, u = _layout(gate, up)
        blocks, block, warps = _grid(g)
        with torch.cuda.device_of(gate):
            _forward_kernel[(g.shape[0] * blocks,)](
                g, u, out, g.shape[1], blocks, g.stride(0), u.stride(0),
                BLOCK=block, num_warps=warps)
    return out


@_forward.register_fake
def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("fastllm::swiglu_backward", mutates_args=())
def _backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_fake(dout, gate, up)
    if gate.numel():
        d, g, u = _layout(dout, gate, up)
        blocks, block, warps = _grid(g)
        with torch.cuda.device_of(gate):
            _backward_kernel[(g.shape[0] * blocks,)](
                d, g, u, dgate, dup, g.shape[1], blocks, d.stride(0), g.stride(0), u.stride(0),
                BLOCK=block, num_warps=warps)
    return dgate, dup


@_backward.register_fake
def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout: Tensor):
    return _backward(dout, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate, up (..., F) of one shape and type; any strides.

    The two halves of one projection, `both.chunk(2, -1)`, are read where they lie.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and "
                         f"up {tuple(up.shape)} {up.dtype} must agree")
    return _forward(gate, up)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, fused: bool = False,
           scale: float = 1.0) -> Call:
    rows, columns = shape
    if fused:
        both = normal((rows, 2 * columns), dtype, device, generator, grad=False, scale=scale)
        gate, up = both.chunk(2, -1)
        return Call((gate.requires_grad_(), up.requires_grad_()))
    gate = normal((rows, columns), dtype, device, generator, scale=scale)
    return Call((gate, normal((rows, columns), dtype, device, generator, scale=scale)))


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return dtype.itemsize * shape[0] * shape[1] * (3 if direction == "forward" else 5)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return shape[0] * shape[1] * (5 if direction == "forward" else 13)


KERNEL = Kernel(
    name="swiglu", public=swiglu, reference=reference, inputs=inputs,
    axes=("rows", "intermediate_size"),
    test_shapes=((1, 1), (3, 7), (5, 100), (2, 2049)),
    empty_shapes=((0, 8), (4, 0)),
    bench_shapes=((16384, 1408), (16384, 14336)),
    audit_shapes=((4, 1408), (4, 14336)),
    variants={"fused halves": {"fused": True}, "saturated": {"scale": 40.0}},
    overflow_shape=(2, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
