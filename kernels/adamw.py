"""AdamW over many tensors in one launch, with unscaling, clipping and the 16-bit write-back in it.

For each element, in float32 (the scalars are worked out in double on the host):
    g = grad * grad_scale                      m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)        denom = sqrt(v) / sqrt(1 - beta2^step) + eps
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / denom
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 28 bytes an element, as 4 + 2 x 12 in float32, or 2 + 2 + 2 x 12 with 16-bit weights; 22 for
bfloat16 without masters.
Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import jit, tl


@jit
def _rule(p, g, m, v, s2, gain1, beta2, gain2, eps, decay, step_size, correction, c7):
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    p = p * decay - step_size * m / (tl.sqrt(v) / correction + eps)
    return p, m, v, s2


def _plain(p: Tensor, g: Tensor, states: list[Any], gain1: float, beta2: float, gain2: float,
           eps: float, decay: float, step_size: float, correction: float) -> tuple[Tensor, ...]:
    m, v, _ = states
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    return p * decay - step_size * m / (v.sqrt() / correction + eps), m, v


RULE = multi.Rule("adamw_step", _rule, _plain, ("exp_avgs", "exp_avg_sqs"))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
             exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
             beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
             grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, exp_avgs, exp_avg_sqs and masters in place; one launch a kind of tensor.

    params: float32 (masters[i] None: its own master), or bfloat16 / float16 with a float32 master,
    or bfloat16 alone with stochastic_rounding. grads: any of the three types. step counts from 1.
    grad_scale: one float32 number that multiplies every gradient (unscaling times the clip
    coefficient); where it is not finite nothing changes. offsets: each tensor's first index among
    all elements of the model, for the random bits (default: end to end, in order).
    stochastic_rounding applies to bfloat16 params, with a master or without.
    """
    scalars = (1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step),
               math.sqrt(1 - beta2**step)) if step >= 1 else ()
    return multi.Step(RULE, params, grads, (exp_avgs, exp_avg_sqs), masters, scalars, step,
                      grad_scale, stochastic_rounding, seed, offsets)


adamw_step, reference = multi.faces(_prepare, "adamw_step")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    scalars = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **options}
    return multi.inputs_of(shape, dtype, device, generator, (" ", "+"), **scalars)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 14 * multi.elements(shape) if direction == "forward" else 0


KERNEL = Kernel(
    name="adamw", public=adamw_step, reference=reference, inputs=inputs,
    variants={"first step": {"step": 1}, **multi.VARIANTS},
    floor_bytes=partial(multi.floor_of, states=8), floor_flops=floor_flops, **multi.SHAPES,
)
