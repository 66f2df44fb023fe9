"""Who can run attention on CUDA tensors: what each cannot take, and how it is called.

`CONTENDERS` holds ours first: it takes every call that `kernels.attention` takes. The others say
why they cannot take a call, going by what the host knows of it. Sources of what they can do:
torch/nn/functional.py (the mask of is_causal starts at the top left, ours ends at the bottom
right), and Dao-AILab/flash-attention, hopper/flash_attn_interface.py and hopper/flash_api.cpp.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastllm.kernels import attention as _attention
from fastllm.kernels.attention import Window
from fastllm.ops import _tune

HALVES = (torch.bfloat16, torch.float16)


def _nothing(*_: Any, **__: Any) -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    """One implementation; `run` and `lacks` take q, k, v and the options of `ops.attention`."""

    name: str
    run: Callable[..., Any]
    lacks: Callable[..., str] = _nothing
    """Why it cannot take the call, or an empty string; it is also told `differentiated`, whether a
    gradient is needed."""
    traced: bool = True
    """Whether torch.compile can look into it."""


# ---------------------------------------------------------------------------------------- ours


def triton(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Our kernels, with the tiles that were tuned and kept for this GPU, if any."""
    if q.device.type == "cuda":
        _tune.use_kept(str(q.device))
    return _attention.attention(q, k, v, **options)


# -------------------------------------------------------- torch's scaled_dot_product_attention


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
         scale: float | None = None, **_: Any) -> Tensor:
    """One backend of torch's, for the calls that `sdpa_lacks` lets pass."""
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale,
            is_causal=causal and q.shape[1] > 1,  # a single query is the last: it sees every key
            enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def sdpa_lacks(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
               window: Window | None = None, softcap: float | None = None,
               cu_seqlens_q: Tensor | None = None, sinks: Tensor | None = None,
               return_lse: bool = False, deterministic: bool = True,
               differentiated: bool = False, **_: Any) -> str:
    asked = {"packed sequences": cu_seqlens_q is not None, "softcap": bool(softcap),
             "window": _bounded(window), "sinks": sinks is not None, "return_lse": return_lse}
    for name, wanted in asked.items():
        if wanted:
            return f"it has no {name}"
    if q.dtype not in HALVES:
        return "it takes bfloat16 and float16"
    if q.shape[-1] % 8:
        return "it takes heads of a multiple of 8 elements"
    if not (q.numel() and k.numel()):
        return "nothing to attend to is not a number to it"
    if causal and q.shape[1] > 1 and q.shape[1] != k.shape[1]:
        return "its causal mask starts at the first key, where queries and keys are not as many"
    if backend == SDPBackend.CUDNN_ATTENTION and q.shape[1] == 1:
        return "it plans anew for each length, as of a cache that grows"
    if differentiated and deterministic:
        return "its backward is not deterministic"
    return ""


def _bounded(window: Window | None) -> bool:
    return window is not None and (window[0] >= 0 or window[1] >= 0)


# ------------------------------------------------------------------------------- flash-attn 3


@functools.lru_cache(1)
def _flash3() -> tuple[Any, str]:
    """flash-attn 3's functions, or why they are not there."""
    reason = "it is not installed"
    for name in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        try:
            return importlib.import_module(name), ""
        except ModuleNotFoundError:
            continue
        except Exception as error:  # one that was built for another torch fails in many ways
            reason = f"it cannot be imported: {error}".splitlines()[0]
    return None, reason


@torch.compiler.assume_constant_result
def flash3_missing(device: str) -> str:
    """Why flash-attn 3 cannot be used on a device; its errors on other GPUs end the process."""
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"it is made for compute capability 9, not {major}.{minor}"
    return _flash3()[1]


class _Within(torch.autograd.Function):
    """x (T, H, D), its gradient 0 in the tokens of no sequence, where flash-attn writes none."""

    @staticmethod
    def forward(ctx, x: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0), None


def flash3(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: Window | None = None,
           softcap: float | None = None, scale: float | None = None,
           cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
           max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
           deterministic: bool = True, **_: Any) -> Tensor:
    """flash-attn 3; max_seqlen must be true, as it reads no further."""
    options = {"softmax_scale": scale, "causal": causal, "window_size": tuple(window or (-1, -1)),
               "softcap": softcap or 0.0, "deterministic": deterministic}
    if cu_seqlens_q is None:
        return _first(_flash3()[0].flash_attn_func(q, k, v, **options))
    by_query = cu_seqlens_q.to(torch.int32)
    by_key = by_query if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)
    of_query, of_key = ((torch.arange(len(x), device=x.device) < bounds[-1])[:, None, None]
                        for x, bounds in ((q, by_query), (k, by_key)))
    out = _first(_flash3()[0].flash_attn_varlen_func(
        _Within.apply(q, of_query), _Within.apply(k, of_key), _Within.apply(v, of_key), by_query,
        by_key, max_seqlen_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k, **options))
    return torch.where(of_query, out, 0)


def flash3_lacks(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor | None = None,
                 cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
                 max_seqlen_k: int | None = None, sinks: Tensor | None = None,
                 return_lse: bool = False, deterministic: bool = True,
                 differentiated: bool = False, **_: Any) -> str:
    if reason := flash3_missing(str(q.device)):
        return reason
    if sinks is not None:
        return "it has no sinks"
    if return_lse:
        return "its lse has no gradient"
    if q.dtype not in HALVES:
        return "it takes bfloat16 and float16"
    if q.shape[-1] % 8:
        return "it takes heads of a multiple of 8 elements"
    if not (q.numel() and k.numel()):
        return "there is nothing to attend to"
    if cu_seqlens_q is not None and (max_seqlen_q is None or (
            cu_seqlens_k is not None and max_seqlen_k is None)):
        return "it must be told the longest sequence"
    if differentiated and deterministic and q.shape[-1] > 192:
        return "its deterministic backward takes heads of up to 192 elements"
    return ""


def _first(result: Any) -> Tensor:
    """out; older builds of flash-attn 3 return lse too."""
    return result[0] if isinstance(result, tuple) else result


def _sdpa(name: str, backend: SDPBackend) -> Contender:
    return Contender(name, functools.partial(sdpa, backend), functools.partial(sdpa_lacks, backend))


CONTENDERS = (Contender("triton", triton), _sdpa("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
              _sdpa("sdpa flash", SDPBackend.FLASH_ATTENTION),
              Contender("flash-attn 3", flash3, flash3_lacks, traced=False))
