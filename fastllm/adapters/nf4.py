"""A projection's frozen weight in 4 bits (Dettmers et al., "QLoRA", arXiv:2305.14314)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops


class NF4Weight(nn.Module):
    """A weight (N, K) as an `ops.NF4`, in buffers: it is not trained, and a cast leaves it alone.

    Raises ValueError where block_size does not divide K.
    """

    packed: Tensor
    absmax: Tensor
    scale: Tensor | None
    mean: Tensor | None

    def __init__(self, weight: Tensor, *, block_size: int, double_quant: bool):
        super().__init__()
        made = ops.quantize_nf4(weight, block_size=block_size, double_quant=double_quant)
        self.block_size = block_size
        for name in ("packed", "absmax", "scale", "mean"):
            self.register_buffer(name, getattr(made, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Weight":
        # .to() and .cuda() come through here. Only the device is taken from them: scales that were
        # rounded to 16 bits would be other weights.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                same = moved.dtype == buffer.dtype
                self._buffers[name] = moved if same else buffer.to(moved.device)
        return self

    def value(self) -> ops.NF4:
        """As the operators take it."""
        return ops.NF4(self.packed, self.absmax, self.scale, self.mean, self.block_size)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) that the 4 bits stand for."""
        return ops.dequantize(self.value(), dtype=dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) W^T + bias: (..., N) in x's type, with a gradient for x."""
        if x.is_cuda:
            return ops.nf4_linear(x, self.value(), bias=bias)
        return _Linear.apply(x, self, bias)


class _Linear(torch.autograd.Function):
    """`ops.nf4_linear` that keeps the 4 bits for its backward.

    On a GPU the operator does so itself. Plain torch would keep the dense weight of every layer
    until the backward, and the model would be as large as before.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return ops.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ops.linear(grad, ctx.weight.dense(grad.dtype).t()), None, None
