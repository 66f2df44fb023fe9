"""RMSNorm: y = h / sqrt(mean(h^2) + eps) * (weight + offset), over the last dimension.

x (..., H) float32, bfloat16 or float16; h = x, or x + residual in the residual's type, which may be
float32 over a 16-bit x; weight (H,) of any of these types; y in x's type. All arithmetic is
float32 and y is rounded once (Hugging Face's Llama rounds twice: before and after the weight).
Floor, e bytes an element and N elements: forward 2eN (x in, y out), backward 3eN (x, dy in, dx
out); with a residual of x's type that goes on (prenorm), 4eN each.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _norms
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal


def reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
              residual: Tensor | None = None, prenorm: bool = False, offset: float = 0.0
              ) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    h = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    wide = h.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(dtype) + offset)
    return (y.to(x.dtype), h) if prenorm else y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
             residual: Tensor | None = None, prenorm: bool = False, offset: float = 0.0
             ) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * (weight + offset) over the last dimension, in x's type.

    x (..., H) of any strides, weight (H,) or None for ones; offset is 1 in Gemma, whose weights are
    stored around zero. With a residual of x's shape, h = x + residual in the residual's type
    (float32 keeps a 16-bit model's residual stream exact); else h is x. prenorm returns (y, h): the
    next layer's residual is h. Both directions are one pass, the addition included.
    Raises ValueError where the shapes do not fit, TypeError for float64.
    """
    if weight is None and offset:
        raise ValueError("rms_norm: offset is added to a weight, and there is none")
    return _norms.norm("rms_norm", x, residual, weight, None, eps, offset, False, prenorm)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, weight: bool = True,
           weight_dtype: torch.dtype | None = None, residual: bool = False,
           residual_dtype: torch.dtype | None = None, prenorm: bool = False, offset: float = 0.0,
           scale: float = 1.0, eps: float = 1e-6) -> Call:
    rows, hidden = shape
    x = normal((rows, hidden), dtype, device, generator, scale=scale)
    gain = normal((hidden,), weight_dtype or dtype, device, generator) if weight else None
    options: dict[str, Any] = {"eps": eps}
    if residual:
        options["residual"] = normal((rows, hidden), residual_dtype or dtype, device, generator)
    return Call((x, gain), options | {"prenorm": prenorm, "offset": offset})


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, weight: bool = True,
                weight_dtype: torch.dtype | None = None, residual: bool = False,
                residual_dtype: torch.dtype | None = None, prenorm: bool = False, **_: Any) -> int:
    rows, hidden = shape
    return _norms.floor_bytes(rows, hidden, direction, dtype,
                              (residual_dtype or dtype) if residual else None, prenorm,
                              (weight_dtype or dtype).itemsize if weight else 0)


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, residual: bool = False,
                **_: Any) -> int:
    return ((4 if direction == "forward" else 9) + residual) * shape[0] * shape[1]


KERNEL = Kernel(
    name="rms_norm", public=rms_norm, reference=reference, inputs=inputs,
    axes=("rows", "hidden_size"),
    test_shapes=((1, 2), (3, 7), (5, 64), (33, 100), (2, 1025), (3, 8193)),
    empty_shapes=((0, 8), (2, 0)),
    bench_shapes=((16384, 512), (8192, 8192), (16384, 2048), (16384, 4096)),
    traffic_shapes=((256, 512), (4096, 512)),
    bench_options={"residual": {"residual": True, "prenorm": True},
                   "fp32 residual": {"residual": True, "residual_dtype": torch.float32,
                                     "prenorm": True}},
    audit_shapes=((4, 512), (4, 4096), (4, 8192), (4, 16384)),
    variants={"fp32 weight": {"weight_dtype": torch.float32}, "large": {"scale": 1e4},
              "small": {"scale": 1e-4}, "eps": {"eps": 0.1}, "no weight": {"weight": False},
              "offset": {"offset": 1.0}, "residual": {"residual": True},
              "bf16 residual": {"residual": True, "residual_dtype": torch.bfloat16},
              "fp32 residual": {"residual": True, "residual_dtype": torch.float32,
                                "prenorm": True}},
    overflow_shape=(3, 8), narrow_access=_norms.NARROW,
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
