"""Adagrad over many tensors in one launch, as torch has it.

For each element, in float32:
    g = grad * grad_scale + weight_decay * p            s = s + g * g
    p = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(s) + eps)
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 20 bytes an element (weight and sum in and out, gradient in), float32 or 16-bit with
masters; 14 for bfloat16 without.
Source: Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic
Optimization", JMLR 12 (2011).
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
def _rule(p, g, total, s1, s2, rate, weight_decay, eps, c3, c4, c5, c6, c7):
    g = g + weight_decay * p
    total = total + g * g
    return p - rate * g / (tl.sqrt(total) + eps), total, s1, s2


def _plain(p: Tensor, g: Tensor, total: Tensor, rate: float, weight_decay: float,
           eps: float) -> tuple[Tensor, ...]:
    g = g + weight_decay * p
    total = total + g * g
    return p - rate * g / (total.sqrt() + eps), total


RULE = multi.Rule("adagrad_step", _rule, _plain, ("state_sums",))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor], state_sums: Sequence[Tensor],
             masters: Sequence[Tensor | None], *, lr: float, lr_decay: float = 0.0,
             eps: float = 1e-10, weight_decay: float = 0.0, step: int, grad_scale: Tensor,
             stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, state_sums and masters in place; one launch a kind of tensor.

    state_sums: float32, before step 1 the initial accumulator value. weight_decay is an L2
    penalty, as torch.optim.Adagrad has it. The rest is as in `adamw_step`.
    """
    return multi.Step(RULE, params, grads, (state_sums,), masters,
                      (lr / (1 + (step - 1) * lr_decay), weight_decay, eps), step, grad_scale,
                      stochastic_rounding, seed, offsets)


adagrad_step, reference = multi.faces(_prepare, "adagrad_step")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, **options: Any) -> Call:
    return spec.inputs_of(shape, dtype, device, generator, ("+",), **options)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 9 * spec.elements(shape) if direction == "forward" else 0


KERNEL = Kernel(
    name="adagrad", public=adagrad_step, reference=reference, inputs=inputs,
    variants={"falling rate": {"lr_decay": 0.1}, "eps": {"eps": 0.5}, **spec.VARIANTS},
    floor_bytes=partial(spec.floor_of, states=4), floor_flops=floor_flops, **spec.SHAPES,
)
