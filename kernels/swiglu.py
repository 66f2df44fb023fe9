"""SwiGLU: silu(gate) * up, with silu(g) = g / (1 + exp(-g)), alone and before a linear layer.

gate, up (..., F) of one type, or gate (..., 2F) that holds both side by side; the product in that
type, computed in float32, rounded once. The backward recomputes the sigmoid, so nothing but the
two inputs is kept; before a linear layer it rewrites the product in the same pass.
Floor, e bytes an element and N elements: forward 3eN, backward 5eN (gate, up, dout in; two out).
With the layer, weight (O, F) and N = TF: 2NO FLOPs forward, 4NO backward, around which the one
kernel of the backward moves 6eN bytes.
Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fastllm.kernels._glu import glu, glu_linear
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    g, u = gate.chunk(2, -1) if up is None else (gate, up)
    wide = compute_dtype(g)
    return (silu(g.to(wide)) * u.to(wide)).to(g.dtype)


def reference_linear(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    return linear(reference(gate, up), weight)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up for gate, up (..., F) of one shape and type; any strides.

    Without up, gate (..., 2F) holds both side by side, as one projection makes them; its gradient
    is then one tensor that nobody has to join.
    """
    return glu("swiglu", "swiglu", gate, up)


def swiglu_linear(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    """swiglu(gate, up) @ weight.T for weight (O, F): an MLP from its two projections on.

    Keeps gate and up alone: the backward makes their product again in the pass that makes their
    gradients. up None: as in `swiglu`. Takes part in autocast.
    """
    return glu_linear("swiglu_linear", "swiglu", gate, up, weight)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, packed: bool = False,
           fused: bool = False, scale: float = 1.0, **options: Any) -> Call:
    rows, columns = shape[:2]
    if packed or fused:
        both = normal((rows, 2 * columns), dtype, device, generator, grad=packed, scale=scale)
        halves = [half.requires_grad_() for half in both.chunk(2, -1)] if fused else [both]
        return Call(tuple(halves), options)
    return Call(tuple(normal((rows, columns), dtype, device, generator, scale=scale)
                      for _ in range(2)), options)


def inputs_linear(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    call = inputs(shape, dtype, device, generator, **options)
    gate, up = (*call.args, None)[:2]
    weight = normal((shape[2], shape[1]), dtype, device, generator, scale=shape[1] ** -0.5)
    return Call((gate, up, weight), call.kwargs)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return dtype.itemsize * shape[0] * shape[1] * (3 if direction == "forward" else 5)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return shape[0] * shape[1] * (5 if direction == "forward" else 13)


def floor_bytes_linear(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    rows, columns, out = shape
    once = 2 * rows * columns + columns * out
    return dtype.itemsize * (rows * out + (once if direction == "forward" else 2 * once))


def floor_flops_linear(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (2 if direction == "forward" else 4) * shape[0] * shape[1] * shape[2]


ELEMENTWISE: dict[str, Any] = {
    "inputs": inputs, "axes": ("rows", "intermediate_size"),
    "test_shapes": ((1, 1), (3, 7), (5, 100), (2, 2049)),
    "empty_shapes": ((0, 8), (4, 0)),
    "bench_shapes": ((16384, 1408), (16384, 8192), (16384, 14336)),
    "traffic_shapes": ((256, 1408), (4096, 1408)),
    "audit_shapes": ((4, 1408), (4, 14336)),
    "bench_options": {"packed": {"packed": True}},
    "overflow_shape": (3, 8),
    "floor_bytes": floor_bytes, "floor_flops": floor_flops,
}
LINEAR: dict[str, Any] = {
    "inputs": inputs_linear, "axes": ("rows", "intermediate_size", "hidden_size"),
    "bound": "flops",
    "test_shapes": ((1, 1, 1), (3, 7, 5), (5, 100, 24)),
    "empty_shapes": ((0, 8, 4), (4, 8, 0)),
    "bench_shapes": ((16384, 8192, 2048), (16384, 14336, 4096)),
    "traffic_shapes": ((256, 1408, 512),),
    "audit_shapes": ((4, 1408, 512),),
    "bench_options": {"packed": {"packed": True}},
    "overflow_shape": (3, 8, 5),
    "floor_bytes": floor_bytes_linear, "floor_flops": floor_flops_linear,
}
"""What every gated linear unit tells its tools, alone and before a linear layer."""

KERNELS = (
    Kernel(name="swiglu", public=swiglu, reference=reference, **ELEMENTWISE,
           variants={"fused halves": {"fused": True}, "saturated": {"scale": 40.0},
                     "packed": {"packed": True}}),
    Kernel(name="swiglu_linear", public=swiglu_linear, reference=reference_linear, **LINEAR,
           variants={"fused halves": {"fused": True}, "packed": {"packed": True}}),
)
