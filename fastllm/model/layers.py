"""The parts of a block that hold weights or tables. Their math is `fastllm.ops`.

Projections that read the same input are one weight with named parts (q|k|v and gate|up): one
matrix product instead of three or two. `named_parts` shows them apart, which is how weights are
initialised, read and written.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.model.config import ModelConfig


class Linear(nn.Linear):
    """y = x W^T + b through `ops.linear`, its rows made of named parts.

    Args:
        in_features: width of x.
        parts: rows of the weight by name, in order; None means one part, named as the module.
        out_features: number of rows where there are no parts.
    """

    def __init__(self, in_features: int, out_features: int | None = None, *,
                 parts: dict[str, int] | None = None, bias: bool = False):
        rows = sum(parts.values()) if parts is not None else out_features
        if rows is None:
            raise TypeError("Linear needs out_features or parts")
        super().__init__(in_features, rows, bias=bias)
        self.parts = parts

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` fills every parameter by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def made_again(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor
               ) -> AbstractContextManager[None]:
    """Within, whoever wants to keep `result` for its backward gets `make(*inputs)` there instead.

    For a cheap function before a product, such as SwiGLU or a norm, whose inputs are kept anyway:
    its result is not held from the forward to the backward. Does nothing without gradients, and
    under torch.compile, which decides this by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    address, size = result.data_ptr(), result.numel()
    sources = [tensor.detach() for tensor in inputs]

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.data_ptr() == address and tensor.numel() == size
        return tensor.shape if same and tensor.is_contiguous() else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(*sources).view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Embedding(nn.Embedding):
    """A look-up of rows, filled by `init_weights`."""

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` fills every parameter by its name."""


class RMSNorm(nn.Module):
    """x * (weight + offset) / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryTable(nn.Module):
    """cos and sin of every position and frequency: (max_position_embeddings, head_dim / 2) fp32.

    Made in fp64, kept in fp32 whatever dtype the model is cast to (angles of thousands of radians
    mean nothing in bf16), and not saved: they follow from the config.

    Args:
        local: of the sliding layers, whose base is rope_local_base_freq and not stretched.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, *, local: bool = False):
        super().__init__()
        self.config, self.local = config, local
        self._build(torch.get_default_device())

    def _build(self, device: torch.device) -> None:
        config = self.config
        theta, scaling = config.rope_theta, config.rope_scaling.parameters()
        if self.local and config.rope_local_base_freq is not None:
            theta, scaling = config.rope_local_base_freq, {}
        cos, sin = ops.rope_tables(config.max_position_embeddings, config.head_size, theta=theta,
                                   scaling=scaling, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTable":
        # .to(), .cuda() and .to_empty() come through here. Only the device is taken from them:
        # a cast would round the table, and to_empty would leave it without values.
        device = fn(self.cos).device
        if device != self.cos.device:
            self._build(device)
        return self

    def forward(self, position_ids: Tensor | slice) -> tuple[Tensor, Tensor]:
        """cos and sin at position_ids: each (*position_ids.shape, head_dim / 2) fp32.

        A slice of positions gives views, (its length, head_dim / 2).
        """
        return self.cos[position_ids], self.sin[position_ids]


def named_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its own name, fused projections apart, as views of the parameters.

    `layers.0.self_attn.qkv_proj.weight` comes as `layers.0.self_attn.q_proj.weight` and so on:
    Hugging Face's names without the prefix "model.". The views carry no gradient history.
    """
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(path, recurse=False):
            yield from parts_of(child, name, parameter.detach())


def parts_of(module: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter of `module`, of this full name, or views of its parts under their own names."""
    parts = getattr(module, "parts", None)
    if parts is None:
        yield name, tensor
        return
    path, _, leaf = name.rpartition(".")
    base = path.rpartition(".")[0]
    for part, piece in zip(parts, tensor.split(list(parts.values())), strict=True):
        yield ".".join(filter(None, (base, part, leaf))), piece
