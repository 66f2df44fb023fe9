"""What the step functions tell the registry in common: calls, floors, shapes and variants."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Shape, normal


def inputs_of(shape: Shape, dtype: torch.dtype, device: Any, generator: torch.Generator | None,
              states: Sequence[str], *, sizes: Sequence[Shape] | None = None, masters: bool = True,
              grad_dtype: torch.dtype | None = None, stochastic: bool = False, offset: int = 0,
              bad_scale: bool = False, **options: Any) -> Call:
    """A call of a step function: tensors of n, n - 1, ... elements, or of the sizes.

    states: one of "" (not kept), " " (normal), "+" (positive) and "0" (zero) each.
    """
    sizes = [(max(shape[1] - i, 0),) for i in range(shape[0])] if sizes is None else sizes

    def draw(kind: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [normal(size, kind, device, generator, grad=False, scale=scale) for size in sizes]

    wide = draw(torch.float32)
    params, grads = [w.to(dtype) for w in wide], draw(grad_dtype or dtype, 8.0)
    change = {" ": lambda x: x, "+": torch.square, "0": torch.zeros_like}
    drawn = [[change[state](x) for x in draw(torch.float32, 0.1)] if state else None
             for state in states]
    scale = torch.full((), float("nan") if bad_scale else 0.125, device=device)
    scalars = {"lr": 1e-2, "weight_decay": 0.1, "step": 3, "grad_scale": scale, **options}
    if stochastic:
        scalars["stochastic_rounding"] = dtype == torch.bfloat16
        scalars["offsets"] = [offset + i * math.prod(sizes[0]) for i in range(len(sizes))]
    mastered = has_master(dtype, masters)
    return Call((params, grads, *drawn, wide if mastered else [None] * len(sizes)), scalars)


def has_master(dtype: torch.dtype, masters: bool) -> bool:
    """Float32 is its own master, and float16 has no stochastic rounding: there it is moot."""
    return dtype == torch.float16 or (masters and dtype == torch.bfloat16)


def elements(shape: Shape) -> int:
    return sum(max(shape[1] - i, 0) for i in range(shape[0]))


def floor_of(shape: Shape, dtype: torch.dtype, direction: Direction, *, states: int,
             masters: bool = True, grad_dtype: torch.dtype | None = None, **_: Any) -> int:
    """Weight and states read and written, gradient read, a 16-bit weight beside a master written.

    states: bytes of the states of one element.
    """
    if direction == "backward":
        return 0
    mastered = has_master(dtype, masters)
    weight = 8 + dtype.itemsize if mastered else 2 * dtype.itemsize
    return (weight + (grad_dtype or dtype).itemsize + 2 * states) * elements(shape)


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32 gradients": {"grad_dtype": torch.float32}, "no decay": {"weight_decay": 0.0},
    "not finite": {"bad_scale": True},
    "stochastic": {"stochastic": True, "seed": 7, "offset": (1 << 33) + 5},
    "stochastic, no masters": {"stochastic": True, "masters": False}}
"""What every step is tried on."""
SHAPES: dict[str, Any] = {
    "axes": ("tensors", "elements"), "mutates": True,
    "test_shapes": ((1, 1), (3, 1000), (2, 20001)), "empty_shapes": ((0, 8), (2, 1)),
    "bench_shapes": ((16, 4 << 20), (8, 64 << 20)), "traffic_shapes": ((2, 1 << 16), (8, 1 << 17)),
    "audit_shapes": ((2, 1 << 16),),
    "bench_options": {"bf16, no masters": VARIANTS["stochastic, no masters"]}}
"""Fields of `Kernel` that every step has in common."""
