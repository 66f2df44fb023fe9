"""SGD over many tensors in one launch: momentum, dampening, Nesterov and L2 decay as in torch.

For each element, in float32:
    g = grad * grad_scale + weight_decay * p
    b = momentum * b + (1 - dampening) * g     (b = g in step 1, whose b is zero before)
    p = p - lr * (g + momentum * b  if nesterov else  b)
Types, masters, stochastic rounding and the gate of grad_scale: see `_multi_tensor`.
Floor: 12 bytes an element, 20 with momentum; for bfloat16 without masters 6 and 14.
Source: Sutskever et al., "On the importance of initialization and momentum in deep learning".
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
def _rule(p, g, b, s1, s2, lr, weight_decay, momentum, gain, nesterov, c5, c6, c7):
    g = g + weight_decay * p
    b = momentum * b + gain * g
    return p - lr * tl.where(nesterov > 0, g + momentum * b, b), b, s1, s2


def _plain(p: Tensor, g: Tensor, b: Any, lr: float, weight_decay: float, momentum: float,
           gain: float, nesterov: float) -> tuple[Tensor, ...]:
    g = g + weight_decay * p
    b = momentum * b + gain * g
    return p - lr * (g + momentum * b if nesterov else b), b


RULE = multi.Rule("sgd_step", _rule, _plain, ("momentum_buffers",))


def _prepare(params: Sequence[Tensor], grads: Sequence[Tensor],
             momentum_buffers: Sequence[Tensor] | None, masters: Sequence[Tensor | None], *,
             lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
             weight_decay: float = 0.0, step: int, grad_scale: Tensor,
             stochastic_rounding: bool = False, seed: int = 0,
             offsets: Sequence[int] | None = None) -> multi.Step:
    """Update params, momentum_buffers and masters in place; one launch a kind of tensor.

    momentum_buffers: float32, zero before step 1; None where momentum is 0. weight_decay is an L2
    penalty, as torch.optim.SGD has it. The rest is as in `adamw_step`.
    Raises ValueError for momentum without buffers, and for nesterov without momentum or with
    dampening.
    """
    if momentum and momentum_buffers is None:
        raise ValueError(f"sgd_step: momentum {momentum} needs momentum_buffers")
    if nesterov and (not momentum or dampening):
        raise ValueError("sgd_step: nesterov needs momentum and no dampening, found momentum "
                         f"{momentum} and dampening {dampening}")
    gain = 1.0 if step == 1 or not momentum else 1 - dampening
    return multi.Step(RULE, params, grads, (momentum_buffers,), masters,
                      (lr, weight_decay, momentum, gain, float(nesterov)), step, grad_scale,
                      stochastic_rounding, seed, offsets)


sgd_step, reference = multi.faces(_prepare, "sgd_step")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, momentum: float = 0.9,
           **options: Any) -> Call:
    return spec.inputs_of(shape, dtype, device, generator, (" " if momentum else "",),
                           momentum=momentum, **options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, momentum: float = 0.9,
                **options: Any) -> int:
    return spec.floor_of(shape, dtype, direction, states=4 if momentum else 0, **options)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 8 * spec.elements(shape) if direction == "forward" else 0


KERNEL = Kernel(
    name="sgd", public=sgd_step, reference=reference, inputs=inputs,
    variants={"plain": {"momentum": 0.0}, "nesterov": {"nesterov": True},
              "dampening": {"dampening": 0.3}, "first step": {"dampening": 0.3, "step": 1},
              **spec.VARIANTS},
    floor_bytes=floor_bytes, floor_flops=floor_flops, **{**spec.SHAPES, "bench_options": {
        **spec.SHAPES["bench_options"], "plain": {"momentum": 0.0}}},
)
