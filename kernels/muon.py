"""Muon for matrices: momentum, made orthogonal by five Newton-Schulz steps, as the update.

For each matrix (rows, columns), elementwise parts in float32:
    g = grad * grad_scale                      b = b + (g - b) * (1 - momentum)
    u = g + (b - g) * momentum  if nesterov else  b
    X = u / max(|u|, eps), in ns_dtype; five times, for (a, b, c) = ns_coefficients:
        A = X X^T, X = a X + (b A + c A A) X   (X^T X, from the right, where rows > columns)
    p = p * (1 - lr * weight_decay) - lr * scale * X
scale is sqrt(max(1, rows / columns)) ("original") or 0.2 sqrt(max(rows, columns)) ("match_rms_
adamw", which gives updates the size of AdamW's, so that both take one learning rate).
Momentum is one launch over all matrices of a shape, which fills one batch for the products, and
the update of the weights one more. Types, masters, stochastic rounding and the gate of grad_scale:
see `_multi_tensor`.
Floor, s = min and l = max of rows and columns: 3 s^2 l + s^3 FLOPs a step of Newton-Schulz, X X^T
and A A being symmetric. The products here are whole: 4 s^2 l + 2 s^3.
Sources: Jordan et al., "Muon", kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import _step_spec as spec
from fastllm.kernels._multi_tensor import BLOCK, CHUNK, TYPES, place, pointer
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import addresses, jit, require, tl

COEFFICIENTS = (3.4445, -4.775, 2.0315)
Coefficients = tuple[float, float, float]


def scale_of(shape: Sequence[int], adjust_lr_fn: str) -> float:
    """What multiplies the learning rate of a matrix."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def orthogonalised(u: Tensor, coefficients: Coefficients, steps: int, eps: float,
                   dtype: torch.dtype) -> Tensor:
    """Matrices (N, rows, columns) with their singular values brought near 1."""
    a, b, c = coefficients
    length = torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (u / length.clamp(min=eps)).to(dtype)
    tall = u.shape[1] > u.shape[2]
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x


@dataclass(frozen=True)
class Step(multi.Step):
    """A Muon step: the scalars are lr, weight_decay, momentum and nesterov."""

    coefficients: Coefficients = COEFFICIENTS
    steps: int = 5
    eps: float = 1e-7
    dtype: torch.dtype = torch.bfloat16
    adjust: str = "original"

    def __post_init__(self) -> None:
        for i, param in enumerate(self.params):
            if param.dim() != 2:
                raise ValueError(f"muon_step: params[{i}] {tuple(param.shape)} is not a matrix")
        if self.adjust not in ("original", "match_rms_adamw"):
            raise ValueError(f"muon_step: adjust_lr_fn {self.adjust!r} is neither 'original' nor "
                             "'match_rms_adamw'")
        super().__post_init__()


def _run_plain(step: Step) -> None:
    """The step in plain PyTorch, a matrix at a time; it reads grad_scale on the host."""
    if not bool(step.grad_scale.isfinite()):
        return
    lr, weight_decay, momentum, nesterov = step.scalars
    a, b, c = step.coefficients
    for i, buffer in enumerate(step.named()["momentum_buffers"]):
        p, g = multi.wide_of(step, i)
        buffer.add_((g - buffer) * (1 - momentum))
        if not p.numel():
            continue
        x = g + (buffer - g) * momentum if nesterov else buffer
        x = x.T if x.shape[0] > x.shape[1] else x
        x = (x / x.norm().clamp(min=step.eps)).to(p.dtype if p.dtype == torch.float64
                                                  else step.dtype)
        for _ in range(step.steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        x = x.T if p.shape[0] > p.shape[1] else x
        rate = lr * scale_of(p.shape, step.adjust)
        multi.write(step, i, p * (1 - lr * weight_decay) - rate * x.to(p.dtype))


@jit
def _rule(p, u, s0, s1, s2, rate, decay, c2, c3, c4, c5, c6, c7):
    return p * decay - rate * u, s0, s1, s2


RULE = multi.Rule("muon_step", _rule, lambda *_: (), ("momentum_buffers",))


@jit
def _block(grad, buffer, update, at, count, scale, momentum, NESTEROV: tl.constexpr,
           WHOLE: tl.constexpr):
    """One block of one matrix."""
    mask = None if WHOLE else at < count
    g = tl.load(grad + at, mask=mask).to(tl.float32) * scale
    b = tl.load(buffer + at, mask=mask)
    b += (g - b) * (1 - momentum)
    tl.store(buffer + at, b, mask=mask)
    u = g + (b - g) * momentum if NESTEROV else b
    tl.store(update + at, u.to(update.dtype.element_ty), mask=mask)


@jit
def _momentum_kernel(table, owner, grad_scale, tensors, momentum, GRAD: tl.constexpr,
                     UPDATE: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr,
                     CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program CHUNK elements of one matrix: its momentum, and the update in the batch."""
    scale = tl.load(grad_scale)
    if tl.abs(scale) < float("inf"):
        tensor, count, start = place(table, owner, tensors, CHUNK)
        grad = pointer(table, 0, tensors, tensor, GRAD, ALIGNED)
        buffer = pointer(table, 1, tensors, tensor, tl.float32, ALIGNED)
        update = pointer(table, 2, tensors, tensor, UPDATE, ALIGNED)
        for piece in range(0, CHUNK, BLOCK):
            at = start + piece + tl.arange(0, BLOCK)
            if start + piece + BLOCK <= count:
                _block(grad, buffer, update, at, count, scale, momentum, NESTEROV, True)
            elif start + piece < count:
                _block(grad, buffer, update, at, count, scale, momentum, NESTEROV, False)


@torch.library.custom_op("fastllm::muon_momentum_", mutates_args={"buffers"})
def _momentum(grads: list[Tensor], buffers: list[Tensor], grad_scale: Tensor, momentum: float,
              nesterov: bool, dtype: torch.dtype) -> Tensor:
    """Updates of matrices of one shape (N, rows, columns); buffers are brought up to date."""
    require("muon_step", *grads, *buffers, grad_scale)
    updates = _momentum_fake(grads, buffers, grad_scale, momentum, nesterov, dtype)
    rows, aligned = addresses(grads, buffers, updates.unbind())
    table, owner = multi.plan([grad.numel() for grad in grads], rows, grads[0].device)
    with torch.cuda.device_of(grads[0]):
        _momentum_kernel[(owner.numel(),)](
            table, owner, grad_scale, len(grads), float(momentum), GRAD=TYPES[grads[0].dtype],
            UPDATE=TYPES[dtype], NESTEROV=nesterov, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=8)
    return updates


@_momentum.register_fake
def _momentum_fake(grads: list[Tensor], buffers: list[Tensor], grad_scale: Tensor,
                   momentum: float, nesterov: bool, dtype: torch.dtype) -> Tensor:
    return grads[0].new_empty((len(grads), *grads[0].shape), dtype=dtype)


def _run(step: Step) -> None:
    """Two launches and the products for each kind and shape of matrix."""
    lr, weight_decay, momentum, nesterov = step.scalars
    # The gate without the scale: 1, or NaN where the scale is not finite.
    gate = step.grad_scale.to(torch.float32) * 0 + 1
    for part in multi.parts(step):
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, param in enumerate(part.params):
            shapes.setdefault(tuple(param.shape), []).append(i)
        for shape, members in shapes.items():
            updates = _momentum([part.grads[i] for i in members],
                                [part.states[0][i] for i in members], part.grad_scale, momentum,
                                bool(nesterov), step.dtype)
            updates = orthogonalised(updates, step.coefficients, step.steps, step.eps, step.dtype)
            multi.launch_(
                "muon_step", [part.params[i] for i in members], list(updates.unbind()), [], 0,
                [part.masters[i] for i in members] if part.masters else [], gate,
                [lr * scale_of(shape, step.adjust), 1 - lr * weight_decay], part.stochastic,
                step.key, [part.offsets[i] for i in members])


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor],
             momentum_buffers: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
             momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.1,
             ns_coefficients: Coefficients = COEFFICIENTS, ns_steps: int = 5, eps: float = 1e-7,
             adjust_lr_fn: str = "original", ns_dtype: torch.dtype = torch.bfloat16, step: int,
             grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> Step:
    """Update params, momentum_buffers and masters in place; every param a matrix.

    momentum_buffers: float32, zero before step 1. ns_dtype: of the Newton-Schulz products.
    adjust_lr_fn: "original" or "match_rms_adamw". The rest is as in `adamw_step`, which is also
    what embeddings, the head, norms and biases want.
    """
    return Step(RULE, params, grads, (momentum_buffers,), masters,
                (lr, weight_decay, momentum, float(nesterov)), step, grad_scale,
                stochastic_rounding, seed, offsets, coefficients=ns_coefficients, steps=ns_steps,
                eps=eps, dtype=ns_dtype, adjust=adjust_lr_fn)


muon_step, reference = multi.faces(_prepare, "muon_step", _run, _run_plain)


def _sizes(shape: Shape) -> list[Shape]:
    """Matrices of the shape and, every other one, of its transpose."""
    tensors, rows, columns = shape
    return [(columns, rows) if i % 2 else (rows, columns) for i in range(tensors)]


def inputs(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    options = {"ns_dtype": torch.float32, **options}
    return spec.inputs_of(shape[:2], dtype, device, generator, (" ",), sizes=_sizes(shape),
                          **options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    flat = (1, math.prod(shape))
    return spec.floor_of(flat, dtype, direction, states=4, **options)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, ns_steps: int = 5,
                **_: Any) -> int:
    tensors, small, large = shape[0], min(shape[1:]), max(shape[1:])
    each = ns_steps * (3 * small * small * large + small**3)
    return tensors * each if direction == "forward" else 0


BF16 = {"ns_dtype": torch.bfloat16}
KERNEL = Kernel(
    name="muon", public=muon_step, reference=reference, inputs=inputs,
    bound="flops", axes=("tensors", "rows", "columns"), mutates=True,
    test_shapes=((1, 1, 1), (3, 7, 33), (2, 150, 129)), empty_shapes=((0, 8, 8), (2, 0, 4)),
    bench_shapes=((8, 4096, 4096), (8, 4096, 11008)), audit_shapes=((2, 256, 512),),
    traffic_shapes=((2, 256, 512), (2, 512, 2048)), bench_options={"bf16 products": BF16},
    variants={"plain momentum": {"nesterov": False}, "bf16 products": BF16,
              "size of AdamW": {"adjust_lr_fn": "match_rms_adamw"}, **spec.VARIANTS},
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
