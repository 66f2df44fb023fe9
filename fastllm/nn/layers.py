"""Gated activations, Embedding and Dropout."""

from typing import Any

import torch
from torch import Tensor

from fastllm import ops


class SwiGLU(torch.nn.Module):
    """silu(gate) * up; called with both, or with one tensor (..., 2 F) that holds gate, then up."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)


class GeGLU(torch.nn.Module):
    """gelu(gate) * up; called as SwiGLU. approximate: "none" or "tanh", as torch.nn.GELU."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f'GeGLU: approximate is "none" or "tanh", not {approximate!r}')
        self.approximate: Any = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding with a deterministic backward, by segments of sorted ids.

    max_norm, scale_grad_by_freq and sparse are not supported and raise ValueError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self, option):
                raise ValueError(f"Embedding: {option} is not supported; use torch.nn.Embedding")

    def forward(self, input: Tensor) -> Tensor:
        return ops.embedding(input, self.weight, padding_idx=self.padding_idx)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout whose mask is not kept but made again in the backward.

    forward(x, residual=None): residual + dropout(x). inplace is not supported and raises.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if inplace:
            raise ValueError("Dropout: inplace is not supported; use torch.nn.Dropout")
        super().__init__(p)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.dropout(x, self.p, residual=residual, training=self.training)
