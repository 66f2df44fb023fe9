"""LayerNorm: y = (h - mean(h)) / sqrt(mean((h - mean(h))^2) + eps) * weight + bias, over the last
dimension.

x (..., H) float32, bfloat16 or float16; h = x, or x + residual in the residual's type, which may be
float32 over a 16-bit x; weight and bias (H,) of any of these types; y in x's type. All arithmetic
is float32, the variance is taken around the mean, and y is rounded once.
Floor, e bytes an element and N elements: forward 2eN (x in, y out), backward 3eN (x, dy in, dx
out); with a residual of x's type that goes on (prenorm), 4eN each.
Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _norms
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
              eps: float = 1e-5, *, residual: Tensor | None = None, prenorm: bool = False
              ) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    h = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    wide = h.to(dtype)
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return (y.to(x.dtype), h) if prenorm else y.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, *, residual: Tensor | None = None, prenorm: bool = False
               ) -> Tensor | tuple[Tensor, Tensor]:
    """(h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, in x's type.

    x (..., H) of any strides; weight and bias (H,), None for ones and for zeros. With a residual of
    x's shape, h = x + residual in the residual's type (float32 keeps a 16-bit model's residual
    stream exact); else h is x. prenorm returns (y, h): the next layer's residual is h. Both
    directions are one pass, the addition included.
    Raises ValueError where the shapes do not fit, TypeError for float64.
    """
    return _norms.norm("layer_norm", x, residual, weight, bias, eps, 0.0, True, prenorm)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, weight: bool = True,
           bias: bool = True, weight_dtype: torch.dtype | None = None, residual: bool = False,
           residual_dtype: torch.dtype | None = None, prenorm: bool = False, level: float = 0.5,
           scale: float = 1.0, eps: float = 1e-5) -> Call:
    rows, hidden = shape
    x = normal((rows, hidden), dtype, device, generator, scale=scale)
    x.data += level * scale  # a mean that must not be forgotten
    gain, shift = (normal((hidden,), weight_dtype or dtype, device, generator) if given else None
                   for given in (weight, bias))
    options: dict[str, Any] = {"eps": eps}
    if residual:
        options["residual"] = normal((rows, hidden), residual_dtype or dtype, device, generator)
    return Call((x, gain, shift), options | {"prenorm": prenorm})


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, weight: bool = True,
                bias: bool = True, weight_dtype: torch.dtype | None = None, residual: bool = False,
                residual_dtype: torch.dtype | None = None, prenorm: bool = False, **_: Any) -> int:
    vector = (weight_dtype or dtype).itemsize
    rows, hidden = shape
    floor = _norms.floor_bytes(rows, hidden, direction, dtype,
                               (residual_dtype or dtype) if residual else None, prenorm,
                               vector * (weight + bias))
    # The backward does not read the bias.
    return floor - (hidden * vector if bias and direction == "backward" else 0)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, residual: bool = False,
                **_: Any) -> int:
    return ((7 if direction == "forward" else 13) + residual) * shape[0] * shape[1]


KERNEL = Kernel(
    name="layer_norm", public=layer_norm, reference=reference, inputs=inputs,
    axes=("rows", "hidden_size"),
    test_shapes=((2, 3), (3, 7), (5, 64), (33, 100), (2, 1025), (3, 8193)),
    empty_shapes=((0, 8), (2, 0)),
    bench_shapes=((16384, 768), (8192, 8192), (16384, 2048), (16384, 4096)),
    traffic_shapes=((256, 512), (4096, 512)),
    bench_options={"residual": {"residual": True, "prenorm": True}},
    audit_shapes=((4, 512), (4, 4096), (4, 8192), (4, 16384)),
    variants={"fp32 weight": {"weight_dtype": torch.float32}, "far mean": {"level": 100.0},
              "large": {"scale": 1e4}, "small": {"scale": 1e-2}, "eps": {"eps": 0.1},
              "no weight": {"weight": False}, "no bias": {"bias": False},
              "neither": {"weight": False, "bias": False}, "residual": {"residual": True},
              "fp32 residual": {"residual": True, "residual_dtype": torch.float32,
                                "prenorm": True}},
    overflow_shape=(3, 8), narrow_access=_norms.NARROW,
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
