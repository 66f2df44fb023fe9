"""AdamW over many tensors in one launch, with unscaling, clipping and the 16-bit write-back in it.

For each element, in float32 (the scalars are worked out in double on the host):
    g = grad * grad_scale                      m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)        denom = sqrt(v) / sqrt(1 - beta2^step) + eps
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / denom
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 28 bytes an element, as 4 + 2 x 12 in float32, or 2 + 2 + 2 x 12 with 16-bit weights; 22 for
bfloat16 without masters; 12 less with moments in 8 bits (see `_block8`), and 1/16 for their scales.
Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _block8 as block8
from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import _step_spec as spec
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import jit, tl


@jit
def _rule(p, g, m, v, s2, gain1, beta2, gain2, eps, decay, step_size, growth, c7):
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    p = p * decay - step_size * m / (tl.sqrt(v) * growth + eps)
    return p, m, v, s2


def _plain(p: Tensor, g: Tensor, m: Tensor, v: Tensor, gain1: float, beta2: float, gain2: float,
           eps: float, decay: float, step_size: float, growth: float) -> tuple[Tensor, ...]:
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    return p * decay - step_size * m / (v.sqrt() * growth + eps), m, v


RULE = multi.Rule("adamw_step", _rule, _plain, ("exp_avgs", "exp_avg_sqs"))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
             exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
             beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
             grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None,
             exp_avg_scales: Sequence[Tensor | None] | None = None,
             exp_avg_sq_scales: Sequence[Tensor | None] | None = None) -> block8.Step:
    """Update params, exp_avgs, exp_avg_sqs and masters in place; one launch a kind of tensor.

    params: float32 (masters[i] None: its own master), or bfloat16 / float16 with a float32 master,
    or bfloat16 alone with stochastic_rounding. grads: any of the three types. step counts from 1.
    grad_scale: one float32 number that multiplies every gradient (unscaling times the clip
    coefficient); where it is not finite nothing changes. offsets: each tensor's first index among
    all elements of the model, for the random bits (default: end to end, in order).
    stochastic_rounding applies to bfloat16 params, with a master or without.
    exp_avg_scales, exp_avg_sq_scales: float32 (numel / 256 rounded up,) for each tensor whose
    moments are 8-bit, exp_avgs int8 and exp_avg_sqs uint8, both zero before step 1; None for those
    in float32.
    """
    scalars = (1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step),
               1 / math.sqrt(1 - beta2**step)) if step >= 1 else ()
    return block8.Step(RULE, params, grads, (exp_avgs, exp_avg_sqs), masters, scalars, step,
                       grad_scale, stochastic_rounding, seed, offsets,
                       (exp_avg_scales, exp_avg_sq_scales))


adamw_step, reference = multi.faces(_prepare, "adamw_step", block8.run)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, eight_bit: bool = False,
           **options: Any) -> Call:
    scalars = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **options}
    call = spec.inputs_of(shape, dtype, device, generator, (" ", "+"), **scalars)
    if not eight_bit:
        return call
    params, grads, *moments, masters = call.args
    codes, scales = zip(*(block8.encoded(given, kind) for given, kind in zip(
        moments, (torch.int8, torch.uint8), strict=True)), strict=True)
    return Call((params, grads, *codes, masters), {**call.kwargs, "exp_avg_scales": scales[0],
                                                   "exp_avg_sq_scales": scales[1]})


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *,
                eight_bit: bool = False, **options: Any) -> int:
    if not eight_bit or direction == "backward":
        return spec.floor_of(shape, dtype, direction, states=8, **options)
    scales = sum(block8.blocks(max(shape[1] - i, 0)) for i in range(shape[0]))
    return spec.floor_of(shape, dtype, direction, states=2, **options) + 2 * 8 * scales


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 14 * spec.elements(shape) if direction == "forward" else 0


EIGHT = {"eight_bit": True}
KERNEL = Kernel(
    name="adamw", public=adamw_step, reference=reference, inputs=inputs,
    variants={"first step": {"step": 1}, **spec.VARIANTS, "8 bit": EIGHT,
              "8 bit, stochastic": {**EIGHT, **spec.VARIANTS["stochastic"]},
              "8 bit, no masters": {**EIGHT, **spec.VARIANTS["stochastic, no masters"]}},
    floor_bytes=floor_bytes, floor_flops=floor_flops, **{**spec.SHAPES, "bench_options": {
        **spec.SHAPES["bench_options"], "8 bit": EIGHT,
        "8 bit, no masters": {**EIGHT, **spec.VARIANTS["stochastic, no masters"]}}},
)
