"""The L2 norm of all gradients together, and what to multiply them by to clip it.

norm = sqrt(sum of g^2 over every element), coefficient = min(1, max_norm / (norm + 1e-6)), as
torch.nn.utils.clip_grad_norm_ has it; both one float32 number, left on the device, for the next
step to multiply by. Squares are summed in float32, a partial sum for each CHUNK elements of a
tensor, the partial sums by one program in a fixed order: the same bits every time.
Floor: every gradient read once.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastllm.kernels._multi_tensor import CHUNK, TYPES, place, plan, pointer
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import addresses, cdiv, jit, require, tl

BLOCK = 4096


def _fixed_sum(values: Tensor) -> Tensor:
    """Sum in an order that depends on the length alone: rows of 4096, then rows of row sums."""
    while values.numel() > 1:
        rows = cdiv(values.numel(), 4096)
        # Each row is summed by one thread, so the number of threads changes nothing.
        values = torch.nn.functional.pad(values, (0, rows * 4096 - values.numel()))
        values = values.view(rows, 4096).sum(1)
    return values.sum()


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """1 where the norm is small enough; NaN for NaN."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def reference(grads: Sequence[Tensor], *, max_norm: float | None = None) -> Any:
    """Squared and summed in float64 on CPUs and of float64, in float32 elsewhere."""
    if not grads:
        norm = torch.zeros(())
    elif grads[0].device.type != "cpu":
        norms = torch._foreach_norm(list(grads), 2, dtype=compute_dtype(*grads))
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
    else:
        sums = [_fixed_sum(grad.detach().reshape(-1).double().square()) for grad in grads]
        norm = _fixed_sum(torch.stack(sums)).sqrt().float()
    return norm if max_norm is None else (norm, coefficient(norm, max_norm))


@jit
def _partial_kernel(table, owner, partial, tensors, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
                    CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program CHUNK elements of one tensor; the table's rows: see `plan`, then gradients."""
    tensor, count, start = place(table, owner, tensors, CHUNK)
    grad = pointer(table, 0, tensors, tensor, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in range(0, CHUNK, BLOCK):
        at = start + piece + tl.arange(0, BLOCK)
        if start + piece + BLOCK <= count:  # no mask, which keeps accesses wide
            value = tl.load(grad + at).to(tl.float32)
            total += value * value
        elif start + piece < count:
            value = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
            total += value * value
    tl.store(partial + tl.program_id(0).to(tl.int64), tl.sum(total, axis=0))


@jit
def _norm_kernel(partial, norm, coefficient, count, max_norm, BLOCK: tl.constexpr):
    """One program, all partial sums."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0)
    value = tl.sqrt(tl.sum(total, axis=0))
    ratio = max_norm / (value + 1e-6)
    tl.store(norm, value)
    tl.store(coefficient, tl.where(ratio > 1.0, 1.0, ratio))


def _whole(x: Tensor) -> Tensor:
    """x where its elements lie in memory without gaps, in whatever order, else a copy."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


@torch.library.custom_op("fastllm::grad_norm", mutates_args=())
def _norm(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    require("grad_norm", *grads)
    device = grads[0].device
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            kinds.setdefault(grad.dtype, []).append(_whole(grad))
    norm, coefficient = _norm_fake(grads, max_norm)
    total = sum(cdiv(grad.numel(), CHUNK) for given in kinds.values() for grad in given)
    partial, first = torch.empty(total, dtype=torch.float32, device=device), 0
    with torch.cuda.device_of(grads[0]):
        for dtype, given in kinds.items():
            rows, aligned = addresses(given)
            table, owner = plan([grad.numel() for grad in given], rows, device)
            _partial_kernel[(owner.numel(),)](
                table, owner, partial[first:], len(given), GRAD=TYPES[dtype], ALIGNED=aligned,
                CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)
            first += owner.numel()
        _norm_kernel[(1,)](partial, norm, coefficient, total, max_norm, BLOCK=1024, num_warps=4)
    return norm, coefficient


@_norm.register_fake
def _norm_fake(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    return (grads[0].new_empty((), dtype=torch.float32),
            grads[0].new_empty((), dtype=torch.float32))


@overload
def grad_norm(grads: Sequence[Tensor], *, max_norm: None = None) -> Tensor: ...
@overload
def grad_norm(grads: Sequence[Tensor], *, max_norm: float) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, max_norm: float | None = None) -> Any:
    """The global L2 norm as a 0-d float32 tensor; with max_norm, (norm, clip coefficient).

    grads: of any float types and strides, together on one device; an empty list has norm 0. The
    coefficient, min(1, max_norm / (norm + 1e-6)), stays on the device as well: nothing waits. Both
    are NaN where a gradient is; an infinite norm has coefficient 0. The same bits every time.
    """
    if not grads:
        return reference(grads, max_norm=max_norm)
    norm, ratio = _norm(list(grads), float("inf") if max_norm is None else max_norm)
    return norm if max_norm is None else (norm, ratio)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, mixed: bool = False,
           transposed: bool = False, scale: float = 1.0, **options: Any) -> Call:
    tensors, numel = shape
    others = [torch.float32, torch.bfloat16, torch.float16] if mixed else [dtype]
    grads = [normal((max(numel - i, 0),), others[i % len(others)], device, generator, grad=False,
                    scale=scale) for i in range(tensors)]
    if transposed:
        grads = [grad[: len(grad) // 2 * 2].view(2, -1).t() for grad in grads]
    return Call((grads,), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    if direction == "backward":
        return 0
    return dtype.itemsize * sum(max(shape[1] - i, 0) for i in range(shape[0])) + 4


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 2 * sum(max(shape[1] - i, 0) for i in range(shape[0])) if direction == "forward" else 0


KERNEL = Kernel(
    name="grad_norm", public=grad_norm, reference=reference, inputs=inputs,
    axes=("tensors", "elements"),
    test_shapes=((1, 1), (3, 1000), (2, 20001)),
    empty_shapes=((0, 8), (2, 1), (2, 0)),
    bench_shapes=((16, 4 << 20), (8, 64 << 20)),
    traffic_shapes=((2, 1 << 16), (8, 1 << 18)),
    audit_shapes=((2, 1 << 16),),
    variants={"mixed": {"mixed": True}, "transposed": {"transposed": True},
              "clipped": {"max_norm": 1.0, "scale": 3.0},
              "not clipped": {"max_norm": 1e4, "mixed": True}},
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
