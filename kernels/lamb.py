"""LAMB over many tensors: Adam's update, its length in each tensor tied to that of the weights.

For each element, in float32 (the scalars are worked out in double on the host):
    g = grad * grad_scale                      m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)        denom = sqrt(v) / sqrt(1 - beta2^step) + eps
    u = m / (1 - beta1^step) / denom + weight_decay * p
    p = p - lr * ratio * u                     ratio = |p| / |u| over the tensor, 1 where one is 0
A norm needs the whole tensor before any weight of it may change, so there are three launches, with
nothing read by the host: the moments and the squares of p and u summed for each program, the ratio
of each tensor, and the weights, for which u is made again from the new moments.
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 40 bytes an element, AdamW's 28 and a second pass that reads weight and moments again (32 for
bfloat16 without masters).
Source: You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import _step_spec as spec
from fastllm.kernels._multi_tensor import BLOCK, CHUNK, TYPES, place, pointer, write_back
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import jit, require, tl

RULE = multi.Rule("lamb_step", None, lambda *_: (), ("exp_avgs", "exp_avg_sqs"))
PARTIALS = 1024  # sums that the ratio's program adds at a time


def _run_plain(step: multi.Step) -> None:
    """The step in plain PyTorch; it reads grad_scale on the host."""
    if not bool(step.grad_scale.isfinite()):
        return
    lr, gain1, beta2, gain2, eps, weight_decay, growth, widening = step.scalars
    for i, (m, v) in enumerate(zip(*step.named().values(), strict=True)):
        p, g = multi.wide_of(step, i)
        m.add_((g - m) * gain1)
        v.mul_(beta2).add_(g * g * gain2)
        u = growth * m / (v.sqrt() * widening + eps) + weight_decay * p
        length, reach = (x.double().norm().to(p.dtype) for x in (p, u))
        ratio = torch.where((length > 0) & (reach > 0), length / reach, 1.0)
        multi.write(step, i, p - lr * ratio * u)


@jit
def _direction(p, m, v, eps, weight_decay, growth, widening):
    return growth * m / (tl.sqrt(v) * widening + eps) + weight_decay * p


@jit
def _moments(wide, grad, exp_avg, exp_avg_sq, at, count, scale, gain1, beta2, gain2, eps,
             weight_decay, growth, widening, WHOLE: tl.constexpr):
    """Update the moments of one block; the squares of its weights and of its direction."""
    mask = None if WHOLE else at < count
    g = tl.load(grad + at, mask=mask).to(tl.float32) * scale
    p = tl.load(wide + at, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    u = _direction(p, m, v, eps, weight_decay, growth, widening)
    if not WHOLE:
        p = tl.where(mask, p, 0.0)
        u = tl.where(mask, u, 0.0)
    return p * p, u * u


@jit
def _moments_kernel(table, owner, grad_scale, partials, tensors, gain1, beta2, gain2, eps,
                    weight_decay, growth, widening, PARAM: tl.constexpr, GRAD: tl.constexpr,
                    MASTER: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
                    BLOCK: tl.constexpr):
    """One program CHUNK elements; partials (2, programs) get its sums of squares."""
    scale = tl.load(grad_scale)
    if tl.abs(scale) < float("inf"):
        tensor, count, start = place(table, owner, tensors, CHUNK)
        if MASTER:
            wide = pointer(table, 2, tensors, tensor, tl.float32, ALIGNED)
        else:
            wide = pointer(table, 0, tensors, tensor, PARAM, ALIGNED)
        grad = pointer(table, 1, tensors, tensor, GRAD, ALIGNED)
        exp_avg = pointer(table, 3, tensors, tensor, tl.float32, ALIGNED)
        exp_avg_sq = pointer(table, 4, tensors, tensor, tl.float32, ALIGNED)
        length = tl.zeros((BLOCK,), tl.float32)
        reach = tl.zeros((BLOCK,), tl.float32)
        for piece in range(0, CHUNK, BLOCK):
            at = start + piece + tl.arange(0, BLOCK)
            if start + piece + BLOCK <= count:
                pp, uu = _moments(wide, grad, exp_avg, exp_avg_sq, at, count, scale, gain1, beta2,
                                  gain2, eps, weight_decay, growth, widening, True)
                length += pp
                reach += uu
            elif start + piece < count:
                pp, uu = _moments(wide, grad, exp_avg, exp_avg_sq, at, count, scale, gain1, beta2,
                                  gain2, eps, weight_decay, growth, widening, False)
                length += pp
                reach += uu
        program = tl.program_id(0).to(tl.int64)
        tl.store(partials + program, tl.sum(length))
        tl.store(partials + tl.num_programs(0) + program, tl.sum(reach))


@jit
def _ratio_kernel(table, partials, ratios, tensors, programs, CHUNK: tl.constexpr,
                  BLOCK: tl.constexpr):
    """One program a tensor: the sums of its programs, in a fixed order, to its ratio."""
    tensor = tl.program_id(0).to(tl.int64)
    share = (tl.load(table + tensor) + CHUNK - 1) // CHUNK
    first = tl.load(table + tensors + tensor)
    length = tl.zeros((BLOCK,), tl.float32)
    reach = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, share, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = partials + first + at
        length += tl.load(here, mask=at < share, other=0.0)
        reach += tl.load(here + programs, mask=at < share, other=0.0)
    length = tl.sum(length)
    reach = tl.sum(reach)
    ratio = tl.where((length > 0) & (reach > 0), tl.sqrt(length) / tl.sqrt(reach), 1.0)
    tl.store(ratios + tensor, ratio)


@jit
def _weights(param, master, exp_avg, exp_avg_sq, at, count, index, key, rate, eps, weight_decay,
             growth, widening, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
             WHOLE: tl.constexpr):
    """One block of one tensor's weights."""
    mask = None if WHOLE else at < count
    wide = master if MASTER else param
    p = tl.load(wide + at, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    p -= rate * _direction(p, m, v, eps, weight_decay, growth, widening)
    write_back(param, master, at, mask, p, index, key, MASTER, STOCHASTIC)


@jit
def _weights_kernel(table, owner, grad_scale, ratios, tensors, lr, eps, weight_decay, growth,
                    widening, PARAM: tl.constexpr, MASTER: tl.constexpr,
                    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
                    BLOCK: tl.constexpr):
    """One program CHUNK elements of one tensor."""
    if tl.abs(tl.load(grad_scale)) < float("inf"):
        tensor, count, start = place(table, owner, tensors, CHUNK)
        param = pointer(table, 0, tensors, tensor, PARAM, ALIGNED)
        master = pointer(table, 2, tensors, tensor, tl.float32, ALIGNED)
        exp_avg = pointer(table, 3, tensors, tensor, tl.float32, ALIGNED)
        exp_avg_sq = pointer(table, 4, tensors, tensor, tl.float32, ALIGNED)
        index = tl.load(table + 7 * tensors + tensor)
        key = tl.load(table + 8 * tensors + tensor).to(tl.uint32)
        rate = lr * tl.load(ratios + tensor)
        for piece in range(0, CHUNK, BLOCK):
            at = start + piece + tl.arange(0, BLOCK)
            if start + piece + BLOCK <= count:
                _weights(param, master, exp_avg, exp_avg_sq, at, count, index, key, rate, eps,
                         weight_decay, growth, widening, MASTER, STOCHASTIC, True)
            elif start + piece < count:
                _weights(param, master, exp_avg, exp_avg_sq, at, count, index, key, rate, eps,
                         weight_decay, growth, widening, MASTER, STOCHASTIC, False)


@torch.library.custom_op(
    "fastllm::lamb_", mutates_args={"params", "exp_avgs", "exp_avg_sqs", "masters"})
def _launch(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
            exp_avg_sqs: list[Tensor], masters: list[Tensor], grad_scale: Tensor,
            scalars: list[float], stochastic: bool, key: int, offsets: list[int]) -> None:
    """Three launches for tensors of one type, none empty, all with masters or all without."""
    require("lamb_step", *params, *grads, grad_scale)
    tensors, device = len(params), params[0].device
    rows, aligned = multi.addresses(params, grads, masters or params, exp_avgs, exp_avg_sqs)
    table, owner = multi.plan([p.numel() for p in params], [*rows, offsets, [key] * tensors],
                              device)
    programs = owner.numel()
    partials = torch.empty((2, programs), device=device)
    ratios = torch.empty(tensors, device=device)
    lr, *moments = map(float, scalars)
    kind: dict[str, Any] = {"PARAM": TYPES[params[0].dtype], "MASTER": bool(masters),
                            "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": 8}
    with torch.cuda.device_of(params[0]):
        _moments_kernel[(programs,)](table, owner, grad_scale, partials, tensors, *moments,
                                     GRAD=TYPES[grads[0].dtype], **kind)
        _ratio_kernel[(tensors,)](table, partials, ratios, tensors, programs, CHUNK=CHUNK,
                                  BLOCK=PARTIALS)
        _weights_kernel[(programs,)](table, owner, grad_scale, ratios, tensors, lr, *moments[3:],
                                     STOCHASTIC=stochastic, **kind)


@_launch.register_fake
def _launch_fake(*args: Any) -> None:
    return None


def _run(step: multi.Step) -> None:
    for part in multi.parts(step):
        _launch(part.params, part.grads, *part.states, part.masters, part.grad_scale,
                list(step.scalars), part.stochastic, step.key, part.offsets)


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
             exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
             beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-6,
             weight_decay: float = 0.01, step: int, grad_scale: Tensor,
             stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, exp_avgs, exp_avg_sqs and masters in place; three launches a kind of tensor.

    Everything is as in `adamw_step`. Tensors that the ratio should leave alone (norms, biases) want
    `adamw_step`, which is this with a ratio of 1.
    """
    scalars = (lr, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, 1 / (1 - beta1**step),
               1 / math.sqrt(1 - beta2**step)) if step >= 1 else ()
    return multi.Step(RULE, params, grads, (exp_avgs, exp_avg_sqs), masters, scalars, step,
                      grad_scale, stochastic_rounding, seed, offsets)


lamb_step, reference = multi.faces(_prepare, "lamb_step", _run, _run_plain)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    return spec.inputs_of(shape, dtype, device, generator, (" ", "+"), **options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, masters: bool = True,
                **options: Any) -> int:
    once = spec.floor_of(shape, dtype, direction, states=8, masters=masters, **options)
    weight = 4 if spec.has_master(dtype, masters) else dtype.itemsize
    return once + (8 + weight) * spec.elements(shape) if direction == "forward" else 0


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 26 * spec.elements(shape) if direction == "forward" else 0


KERNEL = Kernel(
    name="lamb", public=lamb_step, reference=reference, inputs=inputs,
    variants={"first step": {"step": 1}, **spec.VARIANTS},
    floor_bytes=floor_bytes, floor_flops=floor_flops, **spec.SHAPES,
)
