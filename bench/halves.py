"""A kernel's call in its halves, forward and backward, each to be run under a tool by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastllm.kernels._spec import Call, Kernel

ELEMENTS = 100
"""A shape with no more says little: it may fit one program."""


def shape_of(kernel: Kernel, large: bool = False) -> tuple[int, ...]:
    """The smallest test shape with more than ELEMENTS elements and more than one of its first
    axis, or the largest."""
    ordered = sorted(kernel.test_shapes, key=lambda shape: torch.Size(shape).numel())
    useful = [shape for shape in ordered
              if shape[0] > 1 and torch.Size(shape).numel() > ELEMENTS]
    return ordered[-1] if large or not useful else useful[0]


def halves(kernel: Kernel, call: Call, forward: Callable[[], Any],
           generator: torch.Generator) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of a half and what runs it; the second, if there is one, after the first was run."""
    returned: list[Any] = []
    yield "forward", lambda: returned.append(forward())
    outputs = [x for x in tree_leaves(returned)
               if isinstance(x, torch.Tensor) and x.requires_grad]
    if kernel.mutates or not outputs:
        return
    upstream = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) if x.dim()
                else torch.ones_like(x) for x in outputs]
    yield "backward", lambda: torch.autograd.grad(outputs, call.differentiated(), upstream,
                                                  allow_unused=True)
