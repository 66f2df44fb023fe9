"""Lion over many tensors in one launch: the sign of an interpolated momentum, one state.

For each element, in float32:
    g = grad * grad_scale
    p = p * (1 - lr * weight_decay) - lr * sign(m + (g - m) * (1 - beta1))
    m = m + (g - m) * (1 - beta2)
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 20 bytes an element (weight and momentum in and out, gradient in), float32 or 16-bit with
masters; 14 for bfloat16 without.
Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import _step_spec as spec
from fastllm.kernels._spec import Call, Direction, Kernel, Shape
from fastllm.kernels._triton import jit, tl


@jit
def _rule(p, g, m, s1, s2, lr, decay, gain1, gain2, c4, c5, c6, c7):
    towards = m + (g - m) * gain1
    # Zero and NaN are their own sign.
    sign = tl.where(towards > 0, 1.0, tl.where(towards < 0, -1.0, towards))
    return p * decay - lr * sign, m + (g - m) * gain2, s1, s2


def _plain(p: Tensor, g: Tensor, m: Tensor, lr: float, decay: float, gain1: float,
           gain2: float) -> tuple[Tensor, ...]:
    towards = m + (g - m) * gain1
    sign = torch.where(towards.isnan(), towards, towards.sign())
    return p * decay - lr * sign, m + (g - m) * gain2


RULE = multi.Rule("lion_step", _rule, _plain, ("exp_avgs",))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
             masters: Sequence[Tensor | None], *, lr: float, beta1: float = 0.9,
             beta2: float = 0.99, weight_decay: float = 0.0, step: int, grad_scale: Tensor,
             stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, exp_avgs and masters in place; one launch a kind of tensor.

    Params, grads, masters and what follows step are as in `adamw_step`; exp_avgs are float32.
    """
    scalars = (lr, 1 - lr * weight_decay, 1 - beta1, 1 - beta2)
    return multi.Step(RULE, params, grads, (exp_avgs,), masters, scalars, step, grad_scale,
                      stochastic_rounding, seed, offsets)


lion_step, reference = multi.faces(_prepare, "lion_step")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    return spec.inputs_of(shape, dtype, device, generator, (" ",), **options)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 10 * spec.elements(shape) if direction == "forward" else 0


KERNEL = Kernel(
    name="lion", public=lion_step, reference=reference, inputs=inputs,
    variants={"other betas": {"beta1": 0.95, "beta2": 0.98}, **spec.VARIANTS},
    floor_bytes=partial(spec.floor_of, states=4), floor_flops=floor_flops, **spec.SHAPES,
)
