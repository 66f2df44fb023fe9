"""Plain torch forms of the ops that have no kernel file, and the C++ parts of the linear loss."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import cpu
from fastllm.kernels import attention as _attention
from fastllm.kernels import linear_cross_entropy as _linear_cross_entropy
from fastllm.kernels._cross_entropy import Options
from fastllm.kernels.attention import Window, check


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
              window: Window | None = None, softcap: float | None = None,
              scale: float | None = None, cu_seqlens_q: Tensor | None = None,
              cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
              max_seqlen_k: int | None = None, sinks: Tensor | None = None,
              return_lse: bool = False, deterministic: bool = True) -> Any:
    """torch's scaled_dot_product_attention where it has the options, by sequence on a CPU; else
    the whole matrix of scores."""
    check(q, k, v, window, softcap, scale, cu_seqlens_q, cu_seqlens_k, sinks)
    plain = not (softcap or return_lse or sinks is not None or window is not None)
    ours = cu_seqlens_q is None or (q.device.type == "cpu" and not torch.compiler.is_compiling())
    if not (plain and ours):
        return _attention.reference(
            q, k, v, causal=causal, window=window, softcap=softcap, scale=scale,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sinks=sinks,
            return_lse=return_lse)
    if cu_seqlens_q is None:
        return _dense_attention(q, k, v, causal, scale)
    bounds = zip(*((cu_seqlens_q if x is None else x).tolist()
                   for x in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    parts = [_dense_attention(q[None, a:b], k[None, c:d], v[None, c:d], causal, scale)[0]
             for (a, c), (b, d) in itertools.pairwise(bounds)]
    done = sum(len(part) for part in parts)
    return torch.cat((*parts, torch.zeros_like(q[done:])))


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if not keys or (causal and queries > keys):  # queries that see nothing are NaN to torch
        return _attention.reference(q, k, v, causal=causal, scale=scale)
    mask = None
    if causal and queries < keys:
        # The last query sees every key; scaled_dot_product_attention aligns the first ones.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        group = q.shape[2] // k.shape[2]
        # With a mask, torch's memory-efficient kernels want as many key heads as query heads.
        k, v = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def _cpp_options(options: Options) -> tuple[int, float, float, float]:
    ignore_index, label_smoothing, z_loss, softcap, _ = options
    return ignore_index, label_smoothing, z_loss, softcap or 0.0


def _cpp_rows(losses: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses with neither statistics nor metrics, which the C++ loss has not."""
    return losses, losses, losses, losses


def _cpp_losses(logits: Tensor, labels: Tensor, ce_weight: None, watch: bool,
                options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _cpp_rows(torch.ops.fastllm_cpu.cross_entropy(
        logits, labels, *_cpp_options(options))[0])


def _cpp_overwrite(logits: Tensor, labels: Tensor, ce_weight: None, upstream: Tensor | None,
                   watch: bool, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = torch.ops.fastllm_cpu.cross_entropy_with_gradient_(
        logits, labels, *_cpp_options(options))
    if upstream is not None and (upstream.dim() or upstream != 1):
        logits *= upstream[:, None] if upstream.dim() else upstream
    return _cpp_rows(losses)


def _cpp_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into out; float32 by the fastest exact product of this CPU, which has no out=."""
    if out.dtype == torch.float32 and cpu.matmul_backend()[0] != "torch":
        with torch.no_grad():
            out.copy_(cpu.linear(a, b.t()))
    else:
        torch.mm(a, b, out=out)


_linear_cross_entropy.PARTS["cpp"] = _linear_cross_entropy.Parts(
    _cpp_losses, _cpp_overwrite, matmul=_cpp_matmul)
