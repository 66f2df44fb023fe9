"""LoRA: y = x W^T + bias + scale (x A^T) B^T, without passes over y for the low-rank term.

x (..., K); W (N, K) of x's type, or frozen in NF4 or INT8 (QLoRA); A (r, K), B (N, r) as in peft.
t = x A^T is rounded to x's type; the rest is summed in float32 and y is rounded once. Written op by
op, the term costs six passes over an (..., N) matrix; here it is added where the product leaves
its accumulators (narrow inputs), or by a product that accumulates in place (wide ones: 2 passes).
The backward is the same op with the roles changed, u = dy B in the place of t:
    dx = dy W + scale u A        dA = scale u^T x        dB = scale dy^T t
and keeps x, t and the weights. Floor, T rows: 2T(NK + r(N + K)) FLOPs forward, that and 2Tr(N + K)
backward (W frozen).
Sources: Hu et al., "LoRA", arXiv:2106.09685; Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import _gemm, quant
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, autocast, normal
from fastllm.kernels._triton import require
from fastllm.kernels.quant import Quantized

# Adding the term in the accumulators saves 2TN numbers of traffic, and gives up the vendor's
# product, which is about a fifth faster than ours: at 3 TB/s and 700 TFLOP/s they meet near here.
FUSED_INNER = 2048


def reference(x: Tensor, weight: Tensor | Quantized, lora_a: Tensor, lora_b: Tensor, *,
              scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    full = weight if isinstance(weight, Tensor) else quant.dequantize_reference(
        weight, dtype=x.dtype)
    return F.linear(x, full, bias) + scale * F.linear(F.linear(x, lora_a), lora_b)


def _apply(x: Tensor, weight: list[Tensor], block_size: int, t: Tensor, b: Tensor, scale: float,
           bias: Tensor | None, transposed: bool) -> Tensor:
    """x @ W^T (transposed) or x @ W, plus bias and scale t @ b."""
    if len(weight) == 1 and x.shape[1] <= FUSED_INNER:
        return _gemm.product(x, weight[0], transposed=transposed, bias=bias, low_rank=(t, b),
                             alpha=scale)
    if len(weight) == 1:
        y = F.linear(x, weight[0] if transposed else weight[0].t(), bias)
    else:
        y = quant.product(x, weight, block_size, transposed, bias)
    return torch.addmm(y, t, b, alpha=scale, out=y)


@torch.library.custom_op("fastllm::lora_linear", mutates_args=())
def _forward(x: Tensor, weight: list[Tensor], block_size: int, lora_a: Tensor, lora_b: Tensor,
             scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (T, N) and t = x A^T (T, r); weight: one dense tensor, or `quant.parts_of` a packed one."""
    require("lora_linear", x, *weight, lora_a, lora_b)
    t = x @ lora_a.t()
    bias = None if bias is None else bias.contiguous()
    return _apply(x, weight, block_size, t, lora_b.t(), scale, bias, True), t


@_forward.register_fake
def _forward_fake(x: Tensor, weight: list[Tensor], block_size: int, lora_a: Tensor, lora_b: Tensor,
                  scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x.new_empty((x.shape[0], lora_b.shape[0])),
            x.new_empty((x.shape[0], lora_a.shape[0])))


@torch.library.custom_op("fastllm::lora_linear_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: list[Tensor], block_size: int, lora_a: Tensor,
              lora_b: Tensor, t: Tensor, scale: float, needs: list[bool]) -> list[Tensor]:
    """Gradients of x, W, A and B where `needs` says so, empty elsewhere."""
    dx, dw, da, db = _backward_fake(dy, x, weight, block_size, lora_a, lora_b, t, scale, needs)
    if needs[0] or needs[2]:
        u = dy @ lora_b
    if needs[0]:
        dx = _apply(dy, weight, block_size, u, lora_a, scale, None, False)
    if needs[1]:
        torch.mm(dy.t(), x, out=dw)
    if needs[2]:  # beta 0: what the memory held is not read, and the scale is not a pass of its own
        torch.addmm(da, u.t(), x, beta=0, alpha=scale, out=da)
    if needs[3]:
        torch.addmm(db, dy.t(), t, beta=0, alpha=scale, out=db)
    return [dx, dw, da, db]


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, weight: list[Tensor], block_size: int, lora_a: Tensor,
                   lora_b: Tensor, t: Tensor, scale: float, needs: list[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape if need else (0,))
            for tensor, need in zip((x, weight[0], lora_a, lora_b), needs, strict=True)]


def _setup(ctx, inputs, output) -> None:
    x, weight, ctx.block_size, lora_a, lora_b, ctx.scale, bias = inputs
    ctx.save_for_backward(x, lora_a, lora_b, output[1], *weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, dy: Tensor, _: Tensor):
    x, lora_a, lora_b, t, *weight = ctx.saved_tensors
    # A list's tensors have no flags of their own; only a dense weight can want a gradient.
    needs = [ctx.needs_input_grad[0], len(weight) == 1 and weight[0].requires_grad,
             ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
    made = _backward(dy, x, weight, ctx.block_size, lora_a, lora_b, t, ctx.scale, needs)
    dx, dw, da, db = (gradient if need else None for gradient, need in zip(
        made, needs, strict=True))
    dbias = None
    if ctx.needs_input_grad[6]:
        dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, [dw, *[None] * (len(weight) - 1)], None, da, db, None, dbias


_forward.register_autograd(_autograd, setup_context=_setup)


def lora_linear(x: Tensor, weight: Tensor | Quantized, lora_a: Tensor, lora_b: Tensor, *,
                scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T, (..., N) in x's type.

    x (..., K); weight (N, K), or an NF4 or Int8 of that shape; lora_a (r, K); lora_b (N, r), all of
    x's type outside autocast. Gradients for x, lora_a, lora_b, bias and a dense weight that
    requires one. Raises ValueError where the shapes do not fit, TypeError for mixed types.
    """
    columns, rank = weight.shape[0], lora_a.shape[0]
    if x.shape[-1] != weight.shape[1] or lora_a.shape[1] != x.shape[-1] or (
            lora_b.shape != (columns, rank) or (bias is not None and bias.shape != (columns,))):
        raise ValueError(f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a "
                         f"{tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be (..., K),"
                         " (N, K), (r, K) and (N, r), and a bias (N,)")
    x, lora_a, lora_b = autocast(x, lora_a, lora_b)
    if isinstance(weight, Tensor):
        (weight,) = autocast(weight)
        parts, block_size = [weight], 0
    else:
        parts, block_size = quant.parts_of(weight), weight.block_size
    dense = (*parts[:1], lora_a, lora_b) if block_size == 0 else (lora_a, lora_b)
    if any(tensor.dtype != x.dtype for tensor in dense):
        raise TypeError(f"lora_linear: x is {x.dtype}, but the weights are "
                        f"{', '.join(str(tensor.dtype) for tensor in dense)}")
    y, _ = _forward(x.reshape(-1, x.shape[-1]), parts, block_size, lora_a, lora_b, float(scale),
                    bias)
    return y.view(*x.shape[:-1], columns)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, quantize: Any = None,
           bias: bool = False, frozen: bool = True, scale: float = 0.7) -> Call:
    tokens, rows, columns, rank = shape
    x = normal((tokens, columns), dtype, device, generator)
    weight = normal((rows, columns), dtype, device, generator, grad=not frozen and not quantize,
                    scale=columns**-0.5)
    a = normal((rank, columns), dtype, device, generator, scale=columns**-0.5)
    b = normal((rows, rank), dtype, device, generator)
    options: dict[str, Any] = {"scale": scale}
    if bias:
        options["bias"] = normal((rows,), dtype, device, generator)
    return Call((x, quantize(weight, block_size=32) if quantize else weight, a, b), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, quantize: Any = None,
                **_: Any) -> int:
    tokens, rows, columns, rank = shape
    size = dtype.itemsize
    weight = quant.stored_bytes(rows, columns, quantize=quantize, block_size=32) if quantize else (
        size * rows * columns)
    matrices = size * rank * (rows + columns)
    if direction == "forward":
        return size * tokens * (rows + columns) + weight + matrices
    return size * tokens * (rows + 2 * columns) + weight + 2 * matrices


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, rows, columns, rank = shape
    narrow = rank * (rows + columns)
    return 2 * tokens * (rows * columns + (narrow if direction == "forward" else 2 * narrow))


KERNEL = Kernel(
    name="lora_linear", public=lora_linear, reference=reference, inputs=inputs, bound="flops",
    axes=("tokens", "out_features", "in_features", "rank"),
    test_shapes=((3, 5, 32, 1), (5, 7, 64, 3), (17, 35, 96, 9), (3, 70, 32, 20)),
    empty_shapes=((0, 3, 32, 2),),
    bench_shapes=((8192, 2048, 2048, 16), (8192, 4096, 4096, 16)),
    traffic_shapes=((256, 512, 512, 16), (1024, 512, 512, 16)),
    audit_shapes=((128, 256, 256, 16),),
    variants={"bias": {"bias": True}, "trained weight": {"frozen": False},
              "nf4": {"quantize": quant.quantize_nf4},
              "int8, bias": {"quantize": quant.quantize_int8, "bias": True}},
    bench_options={"nf4": {"quantize": quant.quantize_nf4}},
    overflow_shape=(3, 5, 8, 2),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
