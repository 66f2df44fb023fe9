"""Scaled dot-product attention, forward and backward, with grouped queries and packed sequences.

q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) of one type, or packed (T, H, D) with boundaries; query
head h reads key head h * Hkv // Hq. For a query i and the keys j that it sees
    s_j = scale q_i k_j  (softcap c: c tanh(s_j / c)),  lse = log sum_j e^s_j,
    out = sum_j e^(s_j - lse) v_j
in float32, probabilities rounded to the type of v for their product. A sink adds e^sink to the sum
alone. Query i of n sees key j of m where i + m - n - left <= j <= i + m - n + right.
Floor, e bytes an element, P pairs that see each other: 4PD FLOPs forward, 10PD backward; bytes are
those of q, k, v, out, lse once, backward also of the four gradients.
Sources: Dao, "FlashAttention-2", arXiv:2307.08691; Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", arXiv:2309.17453; Gemma 2's softcap, arXiv:2408.00118.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._attention_backward import backward
from fastllm.kernels._attention_forward import forward
from fastllm.kernels._attention_launch import Options
from fastllm.kernels._spec import (
    Call,
    Direction,
    Kernel,
    Shape,
    autocast,
    compute_dtype,
    normal,
)
from fastllm.kernels._triton import require

Window = tuple[int, int]
WIDEST = 256


def bounds_of(causal: bool, window: Window | None, queries: int, keys: int) -> Window:
    """(left, right) of the mask, -1 where there is no bound that could matter."""
    left, right = window or (-1, -1)
    if causal:
        right = 0
    far = queries + keys  # tokens of all sequences: no distance is as large
    return (-1 if left < 0 or left >= far else left), (-1 if right < 0 or right >= far else right)


def visible(q: Tensor, k: Tensor, left: int, right: int, q_bounds: Tensor | None,
            k_bounds: Tensor | None) -> Tensor:
    """(Sq, Sk) bool: which queries see which keys, by the definition."""
    query = torch.arange(q.shape[-3], device=q.device)[:, None]
    key = torch.arange(k.shape[-3], device=q.device)[None, :]
    shift: Any = k.shape[-3] - q.shape[-3]
    seen = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool, device=q.device)
    if q_bounds is not None and k_bounds is not None:
        of_query, of_key = (torch.bucketize(x, bounds[1:], right=True)
                            for x, bounds in ((query, q_bounds), (key, k_bounds)))
        ends = [bounds.long()[1:].index_select(0, of_query[:, 0].clamp(max=bounds.shape[0] - 2))
                [:, None] for bounds in (k_bounds, q_bounds)] if q_bounds.shape[0] > 1 else [0, 0]
        seen = (of_query == of_key) & (query < q_bounds[-1]) & (key < k_bounds[-1])
        shift = ends[0] - ends[1]
    if right >= 0:
        seen = seen & (key <= query + shift + right)
    if left >= 0:
        seen = seen & (key >= query + shift - left)
    return seen


class _Operand(torch.autograd.Function):
    """Scores whose gradient is rounded to a type: products take operands of the tensors' own type,
    and this gradient is one, as the probabilities are."""

    @staticmethod
    def forward(ctx, scores: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        return grad.to(ctx.dtype).to(grad.dtype), None


def reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
              window: Window | None = None, softcap: float | None = None,
              scale: float | None = None, cu_seqlens_q: Tensor | None = None,
              cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
              max_seqlen_k: int | None = None, sinks: Tensor | None = None,
              return_lse: bool = False, deterministic: bool = True) -> Any:
    check(q, k, v, window, softcap, scale, cu_seqlens_q, cu_seqlens_k, sinks)
    wide, group = compute_dtype(q), q.shape[-2] // k.shape[-2]
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    a, b, c = ((x if x.dim() == 4 else x[None]).to(wide) for x in (q, k, v))
    b, c = (x.repeat_interleave(group, 2) for x in (b, c))
    left, right = bounds_of(causal, window, q.shape[-3], k.shape[-3])
    seen = visible(q, k, left, right, cu_seqlens_q, cu_seqlens_k)
    scores = _Operand.apply(torch.einsum("bshd,bthd->bhst", a, b), q.dtype)
    scores = scores * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    share = (weights / total.masked_fill(empty, 1.0))[..., :k.shape[-3]]
    rounded = share.to(v.dtype).to(wide)
    out = torch.einsum("bhst,bthd->bshd", share + (rounded - share).detach(), c)
    log = top.masked_fill(empty, 0.0) + total.masked_fill(empty, 1.0).log()
    if wide != q.dtype:
        # A score's gradient P (dP - dO out) has the rounded out in it. As P = e^(s - lse), that is
        # what comes of a rounding that is multiplied by 1 - lse, lse's own value taken off.
        exact = torch.einsum("bhst,bthd->bshd", share, c).detach()
        rounding = (out.detach().to(q.dtype).to(wide) - exact).nan_to_num(0.0, 0.0, 0.0)
        out = out + rounding * (log.detach() - log).transpose(1, 2)
    out = out.to(q.dtype).view(q.shape)
    if not return_lse:
        return out
    log = log.masked_fill(empty, -torch.inf)[..., 0]
    return out, (log if q.dim() == 4 else log[0]).to(torch.promote_types(wide, torch.float32))


# ----------------------------------------------------------------------------------- operators


@torch.library.custom_op("fastllm::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor | None, k_bounds: Tensor | None,
               sinks: Tensor | None, max_queries: int, max_keys: int, left: int, right: int,
               scale: float, softcap: float, tf32: bool,
               deterministic: bool) -> tuple[Tensor, Tensor]:
    """(out, lse), contiguous; deterministic is for the backward."""
    given = [x for x in (q_bounds, k_bounds, sinks) if x is not None]
    require("attention", q, k, v, *given)
    options = Options(q_bounds, k_bounds, max_queries, max_keys, left, right, scale, softcap, tf32)
    return forward(q, k, v, sinks, options)


@_attention.register_fake
def _attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = *q.shape[:-3], q.shape[-2], q.shape[-3]
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fastllm::attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
                        out: Tensor, lse: Tensor, q_bounds: Tensor | None,
                        k_bounds: Tensor | None, sinks: Tensor | None, max_queries: int,
                        max_keys: int, left: int, right: int, scale: float, softcap: float,
                        tf32: bool, deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty where there are none)."""
    options = Options(q_bounds, k_bounds, max_queries, max_keys, left, right, scale, softcap, tf32)
    dq, dk, dv, dsinks = backward(grad, grad_lse, q, k, v, out, lse, sinks, options, deterministic)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@_attention_backward.register_fake
def _attention_backward_fake(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor,
                             v: Tensor, out: Tensor, lse: Tensor, q_bounds: Tensor | None,
                             k_bounds: Tensor | None, sinks: Tensor | None,
                             *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup(ctx, inputs, output) -> None:
    q, k, v, q_bounds, k_bounds, sinks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, q_bounds, k_bounds, sinks)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    q, k, v, out, lse, q_bounds, k_bounds, sinks = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, dsinks = _attention_backward(grad, grad_lse, q, k, v, out, lse, q_bounds,
                                             k_bounds, sinks, *ctx.options)
    return dq, dk, dv, None, None, None if sinks is None else dsinks, *[None] * 8


_attention.register_autograd(_autograd, setup_context=_setup)


# -------------------------------------------------------------------------------------- public


def check(q: Tensor, k: Tensor, v: Tensor, window: Window | None, softcap: float | None,
          scale: float | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
          sinks: Tensor | None) -> None:
    """Raise ValueError or TypeError where arguments do not fit each other."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    packed = cu_seqlens_q is not None
    if q.dim() != (3 if packed else 4) or k.dim() != q.dim() or k.shape != v.shape or (
            k.shape[-1] != q.shape[-1] or k.shape[:-3] != q.shape[:-3]):
        wanted = "(T, Hq, D) and twice (Tk, Hkv, D)" if packed else (
            "(B, Sq, Hq, D) and twice (B, Sk, Hkv, D); cu_seqlens_q is for packed (T, H, D)")
        raise ValueError(f"attention: {shapes} are not {wanted}")
    if not q.shape[-1]:
        raise ValueError(f"attention: {shapes}: heads of no elements")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"attention: {shapes}: {q.shape[-2]} query heads are not a multiple of "
                         f"{k.shape[-2]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype} must be of one type")
    if cu_seqlens_k is not None and not packed:
        raise ValueError("attention: cu_seqlens_k needs cu_seqlens_q")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is not None and (bounds.dim() != 1 or not bounds.numel()
                                   or bounds.is_floating_point()):
            raise ValueError(f"attention: {name} must be (N + 1,) integers, not "
                             f"{tuple(bounds.shape)} {bounds.dtype}")
    if packed and cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {shapes}: give cu_seqlens_k where queries and keys are not "
                         "as many")
    if cu_seqlens_q is not None and cu_seqlens_k is not None and (
            cu_seqlens_q.shape != cu_seqlens_k.shape):
        raise ValueError(f"attention: cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_k "
                         f"{tuple(cu_seqlens_k.shape)} count different sequences")
    if sinks is not None and sinks.shape != q.shape[-2:-1]:
        raise ValueError(f"attention: sinks {tuple(sinks.shape)} must have one number for each of "
                         f"the {q.shape[-2]} query heads")
    if window is not None and (len(window) != 2 or min(window) < -1):
        raise ValueError(f"attention: window {window} must be (left, right), each a number of "
                         "tokens or -1 for no bound")
    if (softcap is not None and not 0 <= softcap < math.inf) or (
            scale is not None and not 0 < scale < math.inf):
        raise ValueError(f"attention: softcap {softcap} must be at least 0, scale {scale} above 0, "
                         "and both finite")


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
              window: Window | None = None, softcap: float | None = None,
              scale: float | None = None, cu_seqlens_q: Tensor | None = None,
              cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
              max_seqlen_k: int | None = None, sinks: Tensor | None = None,
              return_lse: bool = False, deterministic: bool = True) -> Any:
    """softmax(scale q k^T) v by head, in flash-attn's conventions.

    q (B, Sq, Hq, D), k, v (B, Sk, Hkv, D), Hq a multiple of Hkv, D up to 256; any strides, such as
    slices of one projection. Packed: q (T, Hq, D), k, v (Tk, Hkv, D) with cu_seqlens_q and
    cu_seqlens_k (N + 1,), where sequences begin and the last one ends; one of them is enough where
    they are the same. Tokens after the last boundary belong to no sequence and cost nothing: their
    output and gradients are 0. max_seqlen_q, max_seqlen_k: the longest sequence, which helps to
    choose tiles and is not needed.

    causal: no key after the query's own place, the last query and the last key being at the same.
    window: (left, right) tokens before and after that place, -1: no bound. softcap: c replaces the
    scores s by c tanh(s / c). scale: D^-0.5 by default. sinks (Hq,): logits of a key without a
    value. A query that sees no key gets 0.

    deterministic: the same bits every time, at 7 products in the backward in place of 5 with
    float32 atomics, which also need 4 bytes for each element of q. float32 is multiplied in full,
    or in TF32 where torch.backends.cuda.matmul.allow_tf32 is set. Takes part in autocast.

    Returns out, of q's shape, or with return_lse (out, lse), lse (B, Hq, Sq) or (Hq, T) float32,
    the logarithm of each softmax's denominator, differentiable. Raises ValueError or TypeError
    where shapes, types or options do not fit.
    """
    check(q, k, v, window, softcap, scale, cu_seqlens_q, cu_seqlens_k, sinks)
    if q.shape[-1] > WIDEST:
        raise ValueError(f"attention: heads of {q.shape[-1]} elements; the kernel takes up to "
                         f"{WIDEST}")
    q, k, v = autocast(q, k, v)
    q_bounds = cu_seqlens_q if cu_seqlens_q is None else cu_seqlens_q.to(torch.int32)
    k_bounds = q_bounds if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)
    left, right = bounds_of(causal, window, q.shape[-3], k.shape[-3])
    out, lse = _attention(
        q, k, v, q_bounds, k_bounds, sinks, -1 if max_seqlen_q is None else max_seqlen_q,
        -1 if max_seqlen_k is None else max_seqlen_k, left, right,
        q.shape[-1] ** -0.5 if scale is None else scale, softcap or 0.0,
        torch.backends.cuda.matmul.allow_tf32, deterministic)
    return (out, lse) if return_lse else out


# ------------------------------------------------------------------------------------ registry


def documents(tokens: int, others: int) -> list[int]:
    """Boundaries of the sequences that `inputs` packs, beside an axis of `others`: one is empty,
    and a sixteenth is a tail; of few tokens one sequence."""
    if min(tokens, others) < 16:
        return [0, tokens]
    used = tokens - tokens // 16
    return [0, used // 5, used // 5, used // 2, used // 2 + used // 3, used]


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, packed: bool = False,
           layout: str = "plain", sinks: bool = False, **options: Any) -> Call:
    """layout "fused": q, k and v are slices of one projection, where they are as long."""
    batch, queries, keys, kv_heads, group, dim = shape
    heads = kv_heads * group
    if layout == "fused" and queries == keys:
        both = normal((batch, queries, heads + 2 * kv_heads, dim), dtype, device, generator,
                      grad=False)
        tensors = list(both.split((heads, kv_heads, kv_heads), 2))
    else:
        tensors = [normal((batch, n, h, dim), dtype, device, generator, grad=False)
                   for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    if packed:
        tensors = [x.flatten(0, 1) for x in tensors]
        for name, own, other in (("q", queries, keys), ("k", keys, queries)):
            options[f"cu_seqlens_{name}"] = torch.tensor(
                documents(batch * own, batch * other), dtype=torch.int32, device=device)
    if sinks:
        options["sinks"] = normal((heads,), dtype, device, generator)
    return Call(tuple(x.requires_grad_() for x in tensors), options)


def pairs(shape: Shape, *, packed: bool = False, causal: bool = False,
          window: Window | None = None, **_: Any) -> int:
    """Queries and keys that see each other, in all heads."""
    batch, queries, keys, kv_heads, group = shape[:5]
    left, right = bounds_of(causal, window, batch * queries, batch * keys)
    stretches = [(queries, keys)] * batch
    if packed:
        ends = zip(documents(batch * queries, batch * keys),
                   documents(batch * keys, batch * queries), strict=True)
        stretches = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]
    total = 0
    for n, m in stretches:
        place = torch.arange(n) + m - n
        last = (place + right if right >= 0 else torch.full_like(place, m)).clamp(max=m - 1)
        first = (place - left if left >= 0 else torch.zeros_like(place)).clamp(min=0)
        total += int((last - first + 1).clamp(min=0).sum())
    return total * kv_heads * group


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    batch, queries, keys, kv_heads, group, dim = shape
    times = 2 if direction == "forward" else 4
    rows = dtype.itemsize * dim * batch * kv_heads * (queries * group + keys)
    return times * rows + 4 * batch * queries * kv_heads * group


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    return (4 if direction == "forward" else 10) * shape[-1] * pairs(shape, **options)


KERNEL = Kernel(
    name="attention", public=attention, reference=reference, inputs=inputs, bound="flops",
    axes=("batch", "queries", "keys", "num_key_value_heads", "query_heads_each", "head_dim"),
    test_shapes=((1, 3, 7, 1, 1, 16), (2, 5, 9, 1, 3, 24), (2, 33, 33, 1, 2, 64),
                 (1, 130, 130, 1, 2, 80)),
    empty_shapes=((0, 4, 4, 1, 2, 16), (2, 0, 4, 1, 2, 16), (2, 4, 0, 1, 2, 16)),
    bench_shapes=((8, 2048, 2048, 2, 4, 64), (4, 4096, 4096, 8, 4, 64),
                  (4, 4096, 4096, 8, 4, 128)),
    traffic_shapes=((1, 512, 512, 2, 2, 64),),
    audit_shapes=((1, 2048, 2048, 2, 4, 64), (1, 2048, 2048, 2, 4, 128)),
    variants={
        "causal": {"causal": True}, "window": {"window": (7, 2)},
        "causal window": {"causal": True, "window": (9, -1), "layout": "fused"},
        "softcap": {"causal": True, "softcap": 3.0}, "scale": {"scale": 0.3},
        "sinks": {"causal": True, "sinks": True}, "lse": {"causal": True, "return_lse": True},
        "packed": {"packed": True, "causal": True, "layout": "fused"},
        "not deterministic": {"causal": True, "deterministic": False},
        "all together": {"packed": True, "window": (11, 1), "softcap": 2.0, "sinks": True,
                         "return_lse": True, "layout": "fused", "scale": 0.2}},
    bench_options={"causal": {"causal": True},
                   "causal, atomics": {"causal": True, "deterministic": False},
                   "packed": {"packed": True, "causal": True, "layout": "fused"},
                   "window": {"window": (255, 0)}},
    overflow_shape=(3, 2, 2, 1, 2, 16),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
