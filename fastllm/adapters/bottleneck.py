"""A small network after each branch of a block: x + up(gelu(down(x))), before the residual sum.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751. PEFT has
no such method: the files are of the same two names, the tensors bear the model's names.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastllm import ops
from fastllm.adapters.base import Adapter, Switch


class Bottleneck(Switch):
    """x (..., H) + up(gelu(down(x))), with biases."""

    def __init__(self, size: int, width: int, like: Tensor):
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(size, width, **options)
        self.up = nn.Linear(width, size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to the same."""
        if not self.active:
            return x
        narrow = functional.gelu(ops.linear(x, self.down.weight, self.down.bias))
        return x + ops.linear(narrow, self.up.weight, self.up.bias)


def _after(branch: nn.Module, args: Any, output: Tensor) -> Tensor:
    return branch.bottleneck(output)  # type: ignore[operator]


class BottleneckAdapter(Adapter):
    """bottleneck. First values: down uniform in +-1/sqrt(H), up and biases 0, so that the model's
    outputs do not change."""

    def _attach(self) -> None:
        size = self.model.config.hidden_size
        for number, layer in enumerate(self.model.layers):
            for name in ("self_attn", "mlp"):
                made = Bottleneck(size, self.config.bottleneck_size, self.like)
                down = torch.empty(made.down.weight.shape, device="cpu")
                made.down.weight.copy_(down.uniform_(
                    -size**-0.5, size**-0.5, generator=self.generator(f"{number}.{name}.down")))
                for zero in (made.down.bias, made.up.weight, made.up.bias):
                    zero.zero_()
                branch = layer.get_submodule(name)
                branch.bottleneck = made
                branch.register_forward_hook(_after)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if ".bottleneck." in name:
                yield name, parameter

    def described(self) -> dict[str, Any]:
        return {"fastllm_type": "bottleneck", "bottleneck_size": self.config.bottleneck_size}
