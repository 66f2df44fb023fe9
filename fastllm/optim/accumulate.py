"""Gradients of one optimizer step from several micro-batches, summed in fp32."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settled:
    """What is known after the last backward of a step; on the device, not waited for."""

    norm: Tensor | None
    """The global L2 norm of the gradients, 0-d fp32; None where the optimizer finds it."""
    totals: Tensor
    """The numbers given to `settle`, fp64; over several ranks their sums."""

    def check(self) -> None:
        """Raises RunError where the step cannot count."""


class GradAccumulator:
    """Sums the gradients of `grad_accum` backward passes.

    16-bit gradients would lose what is smaller than 1/256 (bf16) of the running sum. So with
    grad_accum > 1 a hook adds each one to an fp32 buffer as soon as backward has made it, and frees
    it. fp32 parameters, and every parameter with grad_accum == 1, use `param.grad` as it is: no
    buffer and no copy.
    """

    def __init__(self, params: Sequence[Tensor], grad_accum: int = 1) -> None:
        if grad_accum < 1:
            raise ValueError(f"grad_accum must be at least 1, found {grad_accum}")
        self.params, self.grad_accum = list(params), grad_accum
        self._collected = 0
        self._buffers: dict[int, Tensor] = {}
        self._filled: set[int] = set()
        self._hooked = {i for i, param in enumerate(self.params)
                        if grad_accum > 1 and param.dtype != torch.float32}
        self._handles = [self.params[i].register_post_accumulate_grad_hook(self._adder(i))
                         for i in sorted(self._hooked)]

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """A context for the forward and backward of one micro-batch. (fastllm.dist.zero.Zero, which
        takes this one's place on several ranks, has something to do there.)"""
        return nullcontext()

    def collect(self) -> None:
        """Once after the backward of every micro-batch."""
        self._collected += 1

    def gradients(self) -> list[Tensor | None]:
        """The sums, in the order of `params`; None for a parameter that no micro-batch reached.

        Raises RuntimeError unless `collect` was called `grad_accum` times since `zero`.
        """
        if self._collected != self.grad_accum:
            raise RuntimeError(f"{self._collected} of {self.grad_accum} micro-batches were "
                               "collected: the sum is not the whole step's gradient")
        return [(self._buffers[i] if i in self._filled else None) if i in self._hooked
                else param.grad for i, param in enumerate(self.params)]

    def settle(self, *values: float | Tensor) -> Settled:
        """After the last micro-batch; values: numbers, or 0-d tensors, wanted together."""
        device = self.params[0].device
        return Settled(None, torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device)
                                          for value in values]))

    def publish(self) -> None:
        """After the optimizer's update: nothing, as no other rank waits for it."""

    def zero(self) -> None:
        """Start the next step. The fp32 buffers keep their memory."""
        for param in self.params:
            param.grad = None
        self._filled.clear()
        self._collected = 0

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _adder(self, i: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def add(param: Tensor) -> None:
            grad = param.grad
            assert grad is not None
            if i not in self._buffers:
                self._buffers[i] = grad.to(torch.float32, memory_format=torch.contiguous_format)
            elif i in self._filled:
                self._buffers[i].add_(grad)
            else:
                self._buffers[i].copy_(grad)
            self._filled.add(i)
            param.grad = None

        return add
