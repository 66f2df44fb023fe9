"""RMSprop over many tensors in one launch: centred or not, with momentum or not, as torch has it.

For each element, in float32:
    g = grad * grad_scale + weight_decay * p            v = alpha * v + (1 - alpha) * g * g
    a = a + (g - a) * (1 - alpha)                       (centred; else a is 0)
    b = momentum * b + g / (sqrt(v - a * a) + eps)      p = p - lr * b
Rounding may leave v - a * a just below zero, which counts as zero (in torch it becomes NaN).
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 20 bytes an element, 8 more for each of momentum and the centre; 6 less for bfloat16 without
masters.
Sources: Tieleman and Hinton, lecture 6.5 of COURSERA's "Neural Networks for Machine Learning";
Graves, arXiv:1308.0850 (centred).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import _step_spec as spec
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import jit, tl


@jit
def _rule(p, g, v, a, b, lr, weight_decay, alpha, gain, centre, momentum, eps, c7):
    g = g + weight_decay * p
    v = alpha * v + gain * (g * g)
    a = a + (g - a) * centre
    variance = v - a * a
    variance = tl.where(variance < 0, 0.0, variance)
    b = momentum * b + g / (tl.sqrt(variance) + eps)
    return p - lr * b, v, a, b


def _plain(p: Tensor, g: Tensor, v: Tensor, a: Any, b: Any, lr: float, weight_decay: float,
           alpha: float, gain: float, centre: float, momentum: float,
           eps: float) -> tuple[Tensor, ...]:
    g = g + weight_decay * p
    v = alpha * v + gain * (g * g)
    a = a + (g - a) * centre
    b = momentum * b + g / ((v - a * a).clamp(min=0).sqrt() + eps)
    return p - lr * b, v, a, b


RULE = multi.Rule("rmsprop_step", _rule, _plain, ("square_avgs", "grad_avgs", "momentum_buffers"))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], square_avgs: Sequence[Tensor],
             grad_avgs: Sequence[Tensor] | None, momentum_buffers: Sequence[Tensor] | None,
             masters: Sequence[Tensor | None], *, lr: float, alpha: float = 0.99,
             eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0, step: int,
             grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, the states and masters in place; one launch a kind of tensor.

    The states are float32, zero before step 1. grad_avgs, where given, centre the second moment;
    momentum_buffers may be None where momentum is 0. weight_decay is an L2 penalty, as
    torch.optim.RMSprop has it. The rest is as in `adamw_step`.
    Raises ValueError for momentum without buffers.
    """
    if momentum and momentum_buffers is None:
        raise ValueError(f"rmsprop_step: momentum {momentum} needs momentum_buffers")
    centre = 0.0 if grad_avgs is None else 1 - alpha
    return multi.Step(RULE, params, grads, (square_avgs, grad_avgs, momentum_buffers), masters,
                      (lr, weight_decay, alpha, 1 - alpha, centre, momentum, eps), step, grad_scale,
                      stochastic_rounding, seed, offsets)


rmsprop_step, reference = multi.faces(_prepare, "rmsprop_step")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, centered: bool = False,
           momentum: float = 0.0, **options: Any) -> Call:
    # A mean drawn apart from its second moment could exceed it.
    kept = ("+", "0" if centered else "", " " if momentum else "")
    return spec.inputs_of(shape, dtype, device, generator, kept, momentum=momentum, **options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, centered: bool = False,
                momentum: float = 0.0, **options: Any) -> int:
    states = 4 * (1 + centered + bool(momentum))
    return spec.floor_of(shape, dtype, direction, states=states, **options)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, centered: bool = False,
                momentum: float = 0.0, **_: Any) -> int:
    each = 11 + 5 * centered + 2 * bool(momentum)
    return each * spec.elements(shape) if direction == "forward" else 0


FULL = {"centered": True, "momentum": 0.9}
KERNEL = Kernel(
    name="rmsprop", public=rmsprop_step, reference=reference, inputs=inputs,
    variants={"momentum": {"momentum": 0.9}, "centred": {"centered": True},
              "centred, momentum": FULL, **spec.VARIANTS},
    floor_bytes=floor_bytes, floor_flops=floor_flops, **{**spec.SHAPES, "bench_options": {
        **spec.SHAPES["bench_options"], "centred, momentum": FULL}},
)
