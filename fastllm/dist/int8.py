"""The int8 wire format of gradients and parameters, in plain PyTorch; csrc/quantize.cpp is the same in C++."""

import torch
from torch import Tensor

BLOCK = 256
BYTES = BLOCK + 4


def quantize_int8(x: Tensor, error: Tensor | None = None) -> Tensor:
    """(N,) plus `error` as uint8 (N / 256 * 260,): a block's fp32 scale and its 256 int8 numbers.

    `error` (fp32) becomes what the rounding lost. A block with a NaN or an infinity is NaN when it
    is read again. Source: Wang et al., "ZeRO++", 2023: qwZ, and qgZ with the error feedback of
    Seide et al., 2014.
    """
    value = (x.float() if error is None else x.float() + error).view(-1, BLOCK)
    largest = value.abs().amax(1)
    scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
    divisor = torch.where(scale > 0, scale, 1.0)
    code = (value / divisor[:, None]).round().clamp(-127, 127)
    code = torch.where(code.isfinite(), code, 0.0).to(torch.int8)
    if error is not None:
        left = value - code.float() * scale[:, None]
        error.copy_(torch.where(left.isfinite(), left, 0.0).view(-1))
    wire = torch.empty(len(scale), BYTES, dtype=torch.uint8, device=x.device)
    wire[:, :4] = scale[:, None].view(torch.uint8)
    wire[:, 4:] = code.view(torch.uint8)
    return wire.view(-1)


def dequantize_int8(wire: Tensor) -> Tensor:
    """Undo of `quantize_int8` up to its rounding: fp32."""
    rows = wire.view(-1, BYTES)
    scale = rows[:, :4].contiguous().view(torch.float32)
    return (rows[:, 4:].contiguous().view(torch.int8).float() * scale).view(-1)
