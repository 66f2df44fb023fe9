"""Gated linear units, act(gate) * up, with any activation and before a linear layer.

The files swiglu.py and geglu.py are the faces of what is here. Everything is computed in float32
and rounded once; the backward makes the activation again, so that only the inputs are kept. Where
gate and up lie side by side in one tensor, so do their gradients, and nobody has to join them.
"""

import torch
from torch import Tensor

from fastllm.kernels._layout import matrices, matrix_of, tile_of, tiling
from fastllm.kernels._spec import autocast
from fastllm.kernels._triton import jit, require, tl


@jit
def _activation(g, KIND: tl.constexpr):
    """The activation of g and its derivative there: g P(g), and P(g) + g P'(g)."""
    if KIND == "geglu":
        inner = 0.5 * (1.0 + tl.math.erf(g * 0.7071067811865476))
        slope = inner + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        z = g
        rate = 1.0
        if KIND == "geglu_tanh":
            # 0.5 (1 + tanh(u)) is the sigmoid of 2u, which does not cancel.
            z = g * (1.5957691216057308 + 0.07135481282052196 * g * g)
            rate = 1.5957691216057308 + 0.21406443846156588 * g * g
        inner = 1.0 / (1.0 + tl.exp(-z))
        # 1 - s is formed as a sigmoid too, for the same reason.
        slope = inner * (1.0 + g * rate / (1.0 + tl.exp(z)))
    return g * inner, slope


@jit
def _forward_kernel(gate, up, out, rows, columns, gate_stride, up_stride, blocks,
                    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile; out is contiguous."""
    row, column = tile_of(blocks, ROWS, BLOCK)
    mask = (row < rows) & (column < columns)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(g, KIND)
    tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(dout, gate, up, dgate, dup, out, rows, columns, dout_stride, dout_step,
                     gate_stride, up_stride, to_stride, blocks, KIND: tl.constexpr,
                     REWRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile; REWRITE makes the forward's result again, in `out`, contiguous."""
    row, column = tile_of(blocks, ROWS, BLOCK)
    mask = (row < rows) & (column < columns)
    d = tl.load(dout + row * dout_stride + column * dout_step, mask=mask, other=0.0)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    d = d.to(tl.float32)
    value, slope = _activation(g, KIND)
    to = row * to_stride + column
    tl.store(dgate + to, (d * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + to, (d * value).to(dup.dtype.element_ty), mask=mask)
    if REWRITE:
        tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty), mask=mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, or the two halves of a gate that holds both."""
    return gate.chunk(2, -1) if up is None else (gate, up)  # type: ignore[return-value]


def _launch_backward(dout: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor,
                     out: Tensor | None, kind: str) -> None:
    """Write the gradients, laid out as `_gradients` does, and the forward's result into out."""
    tensors = [dout, *_halves(gate, up), *_halves(dgate, None if up is None else dup)]
    if not dout.numel():
        return
    d, g, u, dg, du = matrices(*tensors)
    programs, launch = tiling(*g.shape)
    with torch.cuda.device_of(gate):
        _backward_kernel[(programs,)](
            d, g, u, dg, du, dg if out is None else out, *g.shape, *d.stride(), g.stride(0),
            u.stride(0), dg.stride(0), KIND=kind, REWRITE=out is not None, **launch)


def _gradients(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for the gradients; a gate that holds both has one of its own shape, up's is empty."""
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


# ------------------------------------------------------------------------------- elementwise


@torch.library.custom_op("fastllm::glu", mutates_args=())
def _forward(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    halves = _halves(gate, up)
    require(kind, *halves)
    out = _forward_fake(gate, up, kind)
    if out.numel():
        _, g, u = matrices(out, *halves)
        programs, launch = tiling(*g.shape)
        with torch.cuda.device_of(gate):
            _forward_kernel[(programs,)](g, u, out, *g.shape, g.stride(0), u.stride(0), KIND=kind,
                                         **launch)
    return out


@_forward.register_fake
def _forward_fake(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    return gate.new_empty(_halves(gate, up)[0].shape)


@torch.library.custom_op("fastllm::glu_backward", mutates_args=())
def _backward(dout: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _gradients(gate, up)
    _launch_backward(dout, gate, up, dgate, dup, None, kind)
    return dgate, dup


@_backward.register_fake
def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor | None,
                   kind: str) -> tuple[Tensor, Tensor]:
    return _gradients(gate, up)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.kind = inputs[2]


def _autograd(ctx, dout: Tensor):
    gate, up = ctx.saved_tensors
    dgate, dup = _backward(dout, gate, up, ctx.kind)
    return dgate, None if up is None else dup, None


_forward.register_autograd(_autograd, setup_context=_setup)


def glu(op: str, kind: str, gate: Tensor, up: Tensor | None) -> Tensor:
    _check(op, gate, up)
    return _forward(gate, up, kind)


def _check(op: str, gate: Tensor, up: Tensor | None) -> None:
    if up is None and (not gate.dim() or gate.shape[-1] % 2):
        raise ValueError(f"{op}: gate {tuple(gate.shape)} without up must be (..., 2F), both side "
                         "by side")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and "
                         f"up {tuple(up.shape)} {up.dtype} must agree")


# ---------------------------------------------------------------------- before a linear layer


@torch.library.custom_op("fastllm::glu_linear", mutates_args=())
def _linear(gate: Tensor, up: Tensor | None, weight: Tensor, kind: str) -> Tensor:
    return torch.nn.functional.linear(_forward(gate, up, kind), weight)


@_linear.register_fake
def _linear_fake(gate: Tensor, up: Tensor | None, weight: Tensor, kind: str) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


@torch.library.custom_op("fastllm::glu_linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, kind: str,
                     gradients: bool, weight_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and weight, each empty where it is not wanted."""
    dgate, dup, dweight = _linear_backward_fake(dy, gate, up, weight, kind, gradients,
                                                weight_gradient)
    rows = matrix_of(dy)
    if gradients:
        # One buffer is first the gradient of the activation's result and then that result.
        hidden = torch.mm(rows, weight)
        shape = _halves(gate, up)[0].shape
        _launch_backward(hidden.view(shape), gate, up, dgate, dup,
                         hidden if weight_gradient else None, kind)
    else:
        hidden = matrix_of(_forward(gate, up, kind))
    if weight_gradient:
        torch.mm(rows.t(), hidden, out=dweight)
    return dgate, dup, dweight


@_linear_backward.register_fake
def _linear_backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, kind: str,
                          gradients: bool, weight_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup = _gradients(gate, up) if gradients else (gate.new_empty(0), gate.new_empty(0))
    return dgate, dup, weight.new_empty(weight.shape if weight_gradient else (0,))


def _linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.kind = inputs[3]


def _linear_autograd(ctx, dy: Tensor):
    gate, up, weight = ctx.saved_tensors
    need_gate, need_up, need_weight, _ = ctx.needs_input_grad
    dgate, dup, dweight = _linear_backward(dy, gate, up, weight, ctx.kind, need_gate or need_up,
                                           need_weight)
    return (dgate if need_gate else None, dup if need_up else None,
            dweight if need_weight else None, None)


_linear.register_autograd(_linear_autograd, setup_context=_linear_setup)


def glu_linear(op: str, kind: str, gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    _check(op, gate, up)
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be (O, {width})")
    if up is None:
        gate, weight = autocast(gate, weight)
    else:
        gate, up, weight = autocast(gate, up, weight)
    if gate.dtype != weight.dtype:
        raise TypeError(f"{op}: gate is {gate.dtype}, weight {weight.dtype}")
    return _linear(gate, up, weight, kind)
