"""The public face of every fused op: one function each, and what runs it.

Backends: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "cpp" (CPU tensors, the
extension fastllm._C) and "reference" (plain torch, any device). "auto", the default, takes triton
for CUDA tensors and cpp for CPU tensors if it was built; where an op has no such implementation,
for float64 and for other devices it takes the reference. `dispatch` says what that comes to and
why. A backend asked for by name that cannot run raises; so does a CUDA tensor without Triton.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import cpu
from fastllm.kernels import _triton
from fastllm.kernels import adamw as _adamw
from fastllm.kernels import cross_entropy as _cross_entropy
from fastllm.kernels import linear_cross_entropy as _linear_cross_entropy
from fastllm.kernels import rms_norm as _rms_norm
from fastllm.kernels import rope as _rope
from fastllm.kernels import swiglu as _swiglu

BACKENDS = ("triton", "cpp", "reference")

# ------------------------------------------------------------------------------- plain torch


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
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


def _fixed_sum(values: Tensor) -> Tensor:
    """Sum in an order that depends on the length alone: rows of 4096, then rows of row sums."""
    while values.numel() > 1:
        rows = -(-values.numel() // 4096)
        # Each row is summed by one thread, so the number of threads changes nothing.
        values = F.pad(values, (0, rows * 4096 - values.numel())).view(rows, 4096).sum(1)
    return values.sum()


def _reference_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """sqrt of the sum of squares: squared and summed in float64 on CPUs, float32 elsewhere."""
    if grads[0].device.type != "cpu":
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    sums = [_fixed_sum(grad.detach().reshape(-1).double().square()) for grad in grads]
    return _fixed_sum(torch.stack(sums)).sqrt().float()


# ---------------------------------------------------------------- the C++ parts of the linear loss


def _cpp_losses(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
                z_loss: float, softcap: float | None) -> Tensor:
    return torch.ops.fastllm_cpu.cross_entropy(
        logits, labels, ignore_index, label_smoothing, z_loss, softcap or 0.0)[0]


def _cpp_overwrite(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
                   z_loss: float, softcap: float | None) -> Tensor:
    return torch.ops.fastllm_cpu.cross_entropy_with_gradient_(
        logits, labels, ignore_index, label_smoothing, z_loss, softcap or 0.0)


def _cpp_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into out; float32 by the fastest exact product of this CPU, which has no out=."""
    if out.dtype == torch.float32 and cpu.matmul_backend()[0] != "torch":
        with torch.no_grad():
            out.copy_(cpu.linear(a, b.t()))
    else:
        torch.mm(a, b, out=out)


_linear_cross_entropy.PARTS["cpp"] = _linear_cross_entropy.Parts(
    _cpp_losses, _cpp_overwrite, _cpp_matmul)


# ---------------------------------------------------------------------------------- dispatch

_linear_loss = _linear_cross_entropy.linear_cross_entropy
_TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "rms_norm": {"triton": _rms_norm.rms_norm, "cpp": cpu.rms_norm,
                 "reference": _rms_norm.reference},
    "rope": {"triton": _rope.rope, "cpp": cpu.rope, "reference": _rope.reference},
    "swiglu": {"triton": _swiglu.swiglu, "cpp": cpu.swiglu, "reference": _swiglu.reference},
    "cross_entropy": {"triton": _cross_entropy.cross_entropy, "cpp": cpu.cross_entropy,
                      "reference": _cross_entropy.reference},
    "linear_cross_entropy": {name: partial(_linear_loss, parts=parts) for name, parts in
                             (("triton", "triton"), ("cpp", "cpp"), ("reference", "torch"))},
    "attention": {"cpp": cpu.attention, "reference": _reference_attention},
    "adamw_step": {"triton": _adamw.adamw_step, "cpp": cpu.adamw_step,
                   "reference": _adamw.reference},
    "grad_norm": {"cpp": cpu.grad_norm, "reference": _reference_grad_norm},
    "linear": {"cpp": cpu.linear, "reference": F.linear},
}
OPS = tuple(_TABLE)
_NOT_YET = {"attention": "torch's scaled_dot_product_attention",
            "grad_norm": "torch's multi-tensor norm", "linear": "the vendor's matrix product"}
_asked: dict[str, str] = {}


def _why_not(op: str, backend: str, device: torch.device) -> str:
    """Why the backend cannot run the op on this device; an empty string where it can."""
    if backend not in _TABLE[op]:
        return f"{op} has no {backend} implementation"
    if backend == "triton":
        return _triton.why_not(device)
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ ops take CPU tensors, not {device.type} ones"
        # The fast float32 product comes from torch itself and needs no extension.
        return "" if op == "linear" else cpu.why_not()
    return ""


def _automatic(op: str, device: torch.device) -> tuple[str, str]:
    """What "auto" means for an op on a device, and why."""
    if device.type == "cuda":
        if "triton" in _TABLE[op]:
            return "triton", "CUDA tensors"
        return "reference", _NOT_YET.get(op, "no Triton kernel yet")
    if device.type == "cpu":
        reason = _why_not(op, "cpp", device)
        if reason:
            return "reference", reason
        return "cpp", cpu.matmul_backend()[1] if op == "linear" else "CPU tensors"
    return "reference", f"plain torch is what runs on {device.type} tensors"


def _pick(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The implementation of an op for a tensor's device and type."""
    backend = _asked.get(op, "auto")
    if backend == "auto":
        if tensor.dtype == torch.float64:
            return _TABLE[op]["reference"]
        backend = _automatic(op, tensor.device)[0]
    reason = _why_not(op, backend, tensor.device)
    if reason:
        raise RuntimeError(f"{op}: the {backend} backend cannot run on {tensor.device}: {reason}")
    return _TABLE[op][backend]


def set_backend(op: str, backend: str) -> None:
    """Make every later call of `op` use a backend; "auto" undoes it. Unknown names: ValueError."""
    if op not in _TABLE:
        raise ValueError(f"no op {op!r}; the ops are {', '.join(OPS)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; the backends are auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        _asked.pop(op, None)
    else:
        _asked[op] = backend


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Within the block, the named ops (every op where none is named) use the backend.

    An op without that backend raises when it is called, so name the ops that should change.
    """
    before = dict(_asked)
    try:
        for op in ops or OPS:
            set_backend(op, backend)
        yield
    finally:
        _asked.clear()
        _asked.update(before)


def dispatch(device: torch.device | str) -> dict[str, tuple[str, str]]:
    """{op: (backend, reason)} for floating-point tensors (but float64) on a device, as set now."""
    device = torch.device(device)
    return {op: (_asked[op], "asked for") if op in _asked else _automatic(op, device) for op in OPS}


# ------------------------------------------------------------------------------------- the ops


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x (..., H), weight (H,)."""
    return _pick("rms_norm", x)(x, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, S, Hq, D) and k (B, S, Hkv, D) rotated by cos, sin (S, D/2) or (B, S, D/2) float32.

    The rotate-half convention of Hugging Face; cos and sin get no gradient.
    """
    return _pick("rope", q)(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both (..., F), slices of one projection welcome."""
    return _pick("swiglu", gate)(gate, up)


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                  reduction: str = "sum", inplace: bool = False) -> Tensor:
    """Cross-entropy of logits (T, V) and labels (T,) int64, in float32.

    z_loss adds z_loss * logsumexp^2 a token; softcap c replaces x by c tanh(x / c) first. "mean"
    divides by the number of labels that are not ignore_index and is 0 where all are. inplace lets
    the forward or the backward overwrite the logits with their gradient. A label outside the
    vocabulary raises IndexError on the cpp backend and makes its token's loss NaN on the others.
    """
    return _pick("cross_entropy", logits)(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        softcap=softcap, reduction=reduction, inplace=inplace)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *,
                         ignore_index: int = -100, label_smoothing: float = 0.0,
                         z_loss: float = 0.0, softcap: float | None = None,
                         reduction: str = "sum", chunk_size: int | None = None) -> Tensor:
    """`cross_entropy` of hidden (T, H) @ weight (V, H).T, whose logits are never all in memory.

    chunk_size: rows of logits held at once (default: by memory and device). Gradients of the
    weight are gathered in float32.
    """
    return _pick("linear_cross_entropy", hidden)(
        hidden, weight, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, reduction=reduction, chunk_size=chunk_size)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
              cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
    """softmax(scale * q k^T) v per head; q (B, Sq, Hq, D), k, v (B, Skv, Hkv, D), Hq % Hkv == 0.

    scale: default D^-0.5. cu_seqlens (N + 1,) int32 over the B * S flattened tokens, every row
    start among them, keeps attention within a document. Skv > Sq (generation with a cache) only
    without cu_seqlens; causal then lets the last query see every key.
    """
    _check_attention(q, k, v, causal, cu_seqlens)
    return _pick("attention", q)(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens,
                                 max_seqlen=max_seqlen)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool,
                     cu_seqlens: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != q.shape[0] or (
            k.shape[3] != q.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]):
        raise ValueError(f"attention: {shapes} are not (B, Sq, Hq, D) and twice (B, Skv, Hkv, D) "
                         "with Hq a multiple of Hkv")
    if k.shape[1] != q.shape[1] and cu_seqlens is not None:
        raise ValueError(f"attention: {shapes}: with cu_seqlens, queries and keys are as many")
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(f"attention: {shapes}: causal needs at least as many keys as queries")


def adamw_step(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
               exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
               beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
               grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
               offsets: Sequence[int] | None = None) -> None:
    """One AdamW step over lists of tensors, in place; step counts from 1.

    masters[i]: None for a float32 parameter, else its float32 master. grad_scale: 0-d float32 that
    multiplies every gradient (unscaling times the clip coefficient); where it is not finite nothing
    changes. stochastic_rounding (bfloat16) draws from seed, step and the element's index, counted
    from offsets[i] (default: the tensors lie end to end).
    """
    _pick("adamw_step", params[0] if params else grad_scale)(
        params, grads, exp_avgs, exp_avg_sqs, masters, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, step=step, grad_scale=grad_scale,
        stochastic_rounding=stochastic_rounding, seed=seed, offsets=offsets)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The global L2 norm as a 0-d float32 tensor; the same bits for any number of threads."""
    return _pick("grad_norm", grads[0])(grads) if grads else torch.zeros(())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight (O, I).T + bias, by the fastest exact product of the device."""
    return _pick("linear", x)(x, weight, bias)
