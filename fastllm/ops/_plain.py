"""Plain torch forms of the ops that have no kernel file, and the C++ parts of the linear loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import cpu
from fastllm.kernels import linear_cross_entropy as _linear_cross_entropy
from fastllm.kernels._cross_entropy import Options


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
                         scale: float | None = None, cu_seqlens: Tensor | None = None,
                         max_seqlen: int | None = None) -> Tensor:
    """torch's scaled_dot_product_attention, per document where cu_seqlens is given."""
    batch, length = q.shape[:2]
    # One boundary a row start and one at the end: each row is one document.
    if cu_seqlens is None or cu_seqlens.numel() == batch + 1:
        return _dense_attention(q, k, v, causal, scale)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        flat = [x.reshape(1, batch * length, *x.shape[2:]) for x in (q, k, v)]
        sizes = cu_seqlens.diff().tolist()
        pieces = zip(*(x.split(sizes, 1) for x in flat), strict=True)
        parts = [_dense_attention(a, b, c, causal, scale) for a, b, c in pieces if a.numel()]
        return torch.cat(parts, 1).view(q.shape) if parts else torch.zeros_like(q)
    # No host synchronisation on a GPU: documents by comparison, at S^2 bits of mask a row.
    token = torch.arange(batch * length, device=q.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True).view(batch, 1, length)
    mask = document[..., :, None] == document[..., None, :]
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    return _masked_attention(q, k, v, mask, scale)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if causal and 1 < queries < keys:
        # The last query sees every key; scaled_dot_product_attention aligns the first ones.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return _masked_attention(q, k, v, mask, scale)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=causal and queries == keys, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                      scale: float | None) -> Tensor:
    # With a mask, torch's memory-efficient kernels want as many key heads as query heads.
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                         attn_mask=mask, scale=scale)
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
