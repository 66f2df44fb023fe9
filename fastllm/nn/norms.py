"""RMSNorm and LayerNorm as torch.nn has them, with the residual stream's addition fused in."""

import math
from typing import Any

import torch
from torch import Tensor

from fastllm import ops


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm. offset is added to the weight (Gemma: 1.0, where weights start at zero).

    forward(x, residual=None, prenorm=False): norm(x + residual); prenorm returns the sum as well.
    """

    def __init__(self, normalized_shape: int | list[int] | torch.Size, eps: float | None = None,
                 elementwise_affine: bool = True, device: Any = None, dtype: Any = None, *,
                 offset: float = 0.0) -> None:
        self.offset = offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None,
                prenorm: bool = False) -> Any:
        # torch's default is the epsilon of the type that it computes in.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps \
            if self.eps is None else self.eps
        flat = [_flat(self, t) for t in (x, residual)]
        weight = None if self.weight is None else self.weight.flatten()
        out = ops.rms_norm(flat[0], weight, eps, residual=flat[1], prenorm=prenorm,
                           offset=self.offset if weight is not None else 0.0)
        return tuple(y.view(x.shape) for y in out) if prenorm else out.view(x.shape)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", offset={self.offset}" if self.offset else "")


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm.

    forward(x, residual=None, prenorm=False): norm(x + residual); prenorm returns the sum as well.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None,
                prenorm: bool = False) -> Any:
        flat = [_flat(self, t) for t in (x, residual)]
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        out = ops.layer_norm(flat[0], weight, bias, self.eps, residual=flat[1], prenorm=prenorm)
        return tuple(y.view(x.shape) for y in out) if prenorm else out.view(x.shape)


def _flat(norm: Any, x: Tensor | None) -> Tensor | None:
    """The normalized dimensions as one."""
    shape = tuple(norm.normalized_shape)
    if x is None:
        return None
    if tuple(x.shape[-len(shape):]) != shape:
        raise ValueError(f"{type(norm).__name__}: the last dimensions of {tuple(x.shape)} are not "
                         f"{shape}")
    return x if len(shape) == 1 else x.reshape(*x.shape[:-len(shape)], math.prod(shape))
