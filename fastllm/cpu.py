"""The C++ ops of `fastllm._C` for CPU tensors, as differentiable functions.

They carry the names and signatures of `fastllm.ops`, which picks them for CPU tensors. Every op
sums in fp32, gives the same bits for any number of threads, and takes float32, bfloat16 and
float16 (in fp32 inside). The exact fp32 matmul (`linear`) needs no extension.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastllm.kernels import _rotary as rotary
from fastllm.kernels.attention import bounds_of, check
from fastllm.kernels.grad_norm import coefficient

Reduction = Literal["sum", "mean", "none"]
_OPS = torch.ops.fastllm_cpu
# Ops of the extension, and how many arguments each takes.
_NEEDED = {"rms_norm": 3, "rope": 5, "swiglu": 2, "cross_entropy": 6, "attention": 10,
           "attention_backward": 14, "adamw_step_": 15, "grad_norm": 1, "keep_freed_memory": 0}

_LOAD_ERROR = ""
try:
    from fastllm import _C as _C
except ImportError as error:
    _LOAD_ERROR = str(error)
else:
    # A checkout that moved on while its built extension stayed behind.
    if missing := [name for name in _NEEDED if not hasattr(_OPS, name)]:
        _LOAD_ERROR = f"it was built from older sources: {', '.join(missing)} not in it"
    elif other := [name for name, count in _NEEDED.items()
                   if len(getattr(_OPS, name).default._schema.arguments) != count]:
        _LOAD_ERROR = f"it was built from older sources: other arguments of {', '.join(other)}"


def available() -> bool:
    """Whether the C++ extension was built and loads."""
    return not _LOAD_ERROR


def why_not() -> str:
    """Why the extension cannot be used; empty where it can."""
    if available():
        return ""
    return (f"the C++ extension fastllm._C is not there ({_LOAD_ERROR}): install a C++20 compiler "
            "and reinstall fastllm")


# ------------------------------------------------------------------------- shapes for torch.compile

if available():

    @torch.library.register_fake("fastllm_cpu::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = x.numel() // max(1, x.shape[-1])
        return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)

    @torch.library.register_fake("fastllm_cpu::rms_norm_backward")
    def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    @torch.library.register_fake("fastllm_cpu::rope")
    def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @torch.library.register_fake("fastllm_cpu::swiglu")
    def _(gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("fastllm_cpu::swiglu_backward")
    def _(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))

    @torch.library.register_fake("fastllm_cpu::attention")
    def _(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
        rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)

    @torch.library.register_fake("fastllm_cpu::attention_backward")
    def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
          *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @torch.library.register_fake("fastllm_cpu::cross_entropy")
    def _(logits: Tensor, labels: Tensor, *options: float) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(
            rows, dtype=torch.float32)

    @torch.library.register_fake("fastllm_cpu::cross_entropy_backward")
    def _(grad: Tensor, logits: Tensor, *rest: object) -> Tensor:
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("fastllm_cpu::cross_entropy_backward_")
    def _(grad: Tensor, logits: Tensor, *rest: object) -> None:
        return None

    @torch.library.register_fake("fastllm_cpu::cross_entropy_with_gradient_")
    def _(logits: Tensor, *rest: object) -> Tensor:
        return logits.new_empty(logits.shape[0], dtype=torch.float32)


# ------------------------------------------------------------------------------- elementwise ops


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _OPS.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dweight = _OPS.rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
             residual: Tensor | None = None, prenorm: bool = False, offset: float = 0.0
             ) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * (weight + offset) over the last dimension; x (..., H).

    h = x + residual, in the residual's type; prenorm returns it as well. weight (H,) or None.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} is not of x's shape "
                         f"{tuple(x.shape)}")
    h = x if residual is None else (x + residual).to(residual.dtype)
    # The op rounds to the type that it is given: the wider one, where residual and x differ.
    wide = h.to(torch.promote_types(h.dtype, x.dtype))
    if weight is None:
        weight = x.new_ones(x.shape[-1:], dtype=torch.float32)
    y = _RmsNorm.apply(wide, weight.float() + offset if offset else weight, eps).to(x.dtype)
    return (y, h) if prenorm else y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _OPS.rope(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, dq, dk):
        return *_OPS.rope(dq, dk, *ctx.saved_tensors, True), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None,
         cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotates q (B, S, Hq, D) and k (B, S, Hkv, D), or (T, H, D), as `fastllm.ops.rope` says.

    Pairs are (i, i + R/2). Raises IndexError for a position that the tables do not have.
    """
    rotary.check("rope", q, k, cos, sin, position_ids, cu_seqlens)
    if position_ids is not None or cu_seqlens is not None:
        place = rotary.positions(q, position_ids, cu_seqlens)
        cos, sin = (table.index_select(0, place.flatten()).unflatten(0, place.shape)
                    for table in (cos, sin))
    elif cos.dim() == 2:
        cos, sin = cos[:q.shape[-3]], sin[:q.shape[-3]]
    heads = [x if x.dim() == 4 else x[None] for x in (q, k)]
    turning = 2 * cos.shape[-1]
    if turning == q.shape[-1]:
        turned = _Rope.apply(*heads, cos.float(), sin.float())
    else:
        turned = _Rope.apply(*(x[..., :turning] for x in heads), cos.float(), sin.float())
        turned = [torch.cat((y, x[..., turning:]), -1)
                  for x, y in zip(heads, turned, strict=True)]
    return turned[0].view(q.shape), turned[1].view(k.shape)


def qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
                 sin: Tensor, *, eps: float = 1e-6, offset: float = 0.0,
                 position_ids: Tensor | None = None,
                 cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm` of every head of q and k by weight + offset, then `rope`; rounded once."""
    q_normed, k_normed = (_RmsNorm.apply(x.float(), weight.float() + offset if offset
                                         else weight.float(), eps)
                          for x, weight in ((q, q_weight), (k, k_weight)))
    q_out, k_out = rope(q_normed, k_normed, cos, sin, position_ids=position_ids,
                        cu_seqlens=cu_seqlens)
    return q_out.to(q.dtype), k_out.to(k.dtype)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _OPS.swiglu(*(gate.chunk(2, -1) if up is None else (gate, up)))

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        halves = gate.chunk(2, -1) if up is None else (gate, up)
        both = _OPS.swiglu_backward(grad, *halves)
        return (both, None) if up is None else both.chunk(2, -1)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, elementwise; both (..., F), or gate (..., 2F) with both side by side."""
    return _SwiGlu.apply(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    """swiglu(gate, up) @ weight.T; keeps the product for its backward."""
    return linear(swiglu(gate, up), weight)


# -------------------------------------------------------------------------------------- attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, options, return_lse):
        # cu_seqlens_k None: those of q. (torch.compile does not take one tensor twice.)
        ends = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, lse = _OPS.attention(q, k, v, *ends, sinks, *options)
        ctx.save_for_backward(q, k, v, out, lse, *ends, sinks)
        ctx.options = options
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx, grad, grad_lse=None):
        saved = ctx.saved_tensors  # once: checkpointing makes them again at each look
        _, _, _, out, lse, _, _, sinks = saved
        grads = _OPS.attention_backward(grad, grad_lse, *saved, *ctx.options)
        need = ctx.needs_input_grad[3]
        dsinks = _sink_gradient(sinks, lse, out, grad, grad_lse) if need else None
        return *grads, dsinks, None, None, None, None


def _sink_gradient(sinks: Tensor, lse: Tensor, out: Tensor, grad: Tensor,
                   grad_lse: Tensor | None) -> Tensor:
    """-sum_tokens e^(sink - lse) (grad . out - grad_lse): a sink's probability and no value."""
    delta = (grad.float() * out.float()).sum(-1).transpose(-1, -2)
    if grad_lse is not None:
        delta = delta - grad_lse
    terms = (sinks.float()[:, None] - lse).exp() * delta
    heads = terms.where(lse != -torch.inf, 0).transpose(0, -2).reshape(len(sinks), -1)
    # Two sums of the same: torch would share a single one out to its threads, whose number shows.
    return -heads.expand(2, -1, -1).sum(-1)[0].to(sinks.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
              window: tuple[int, int] | None = None, softcap: float | None = None,
              scale: float | None = None, cu_seqlens_q: Tensor | None = None,
              cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
              max_seqlen_k: int | None = None, sinks: Tensor | None = None,
              return_lse: bool = False, deterministic: bool = True) -> Any:
    """softmax(scores) v per head; q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), Hq % Hkv == 0.

    Packed: q (Tq, Hq, D), k and v (Tk, Hkv, D) with cu_seqlens_q and cu_seqlens_k (N + 1,), the
    boundaries of the documents; cu_seqlens_k is cu_seqlens_q by default. window (left, right), -1
    for no limit: query i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right; causal
    makes right 0. A query that sees none gets 0. score = scale q.k, with scale D^-0.5 by default;
    softcap c makes it c tanh(score / c). sinks (Hq,): e^sink joins the sum of the softmax.
    return_lse: also the logarithm of that sum, (B, Hq, Sq) or (Hq, Tq) in fp32. The lengths are
    not needed, and the result is deterministic in any case.
    """
    check(q, k, v, window, softcap, scale, cu_seqlens_q, cu_seqlens_k, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = bounds_of(causal, window, q.shape[-3], k.shape[-3])
    options = (*bounds, float(scale), float(softcap or 0.0))
    cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    return _Attention.apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, options, return_lse)


# ------------------------------------------------------------------------------------------- loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, options, inplace):
        loss, lse = _OPS.cross_entropy(logits, labels, *options)
        ctx.options, ctx.inplace, ctx.spent = options, inplace, False
        ctx.save_for_backward(logits, labels, lse)
        return loss

    @staticmethod
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        if not ctx.inplace:
            gradient = _OPS.cross_entropy_backward(grad, logits, labels, lse, *ctx.options)
            return gradient, None, None, None
        if ctx.spent:
            raise RuntimeError("cross_entropy(inplace=True): the first backward has overwritten "
                               "the logits, a second one cannot run")
        ctx.spent = True
        out = logits.detach()
        _OPS.cross_entropy_backward_(grad, out, labels, lse, *ctx.options)
        return out, None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                  reduction: Reduction = "sum", inplace: bool = False) -> Tensor:
    """Cross-entropy of logits (T, V) and labels (T,) int64, in fp32.

    z_loss adds z_loss * logsumexp^2 to every token; softcap c replaces x by c tanh(x / c) first.
    "mean" divides by the number of labels that are not ignore_index, and is 0 where all are.
    inplace=True: the backward writes the gradient over the logits. A label outside the vocabulary
    raises IndexError.
    """
    if inplace and logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError("cross_entropy in place: the logits must have unit stride along a row, "
                         f"not {logits.stride()}")
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    return _reduce(_CrossEntropy.apply(logits, labels, options, inplace), labels, ignore_index,
                   reduction)


def _reduce(loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / (labels != ignore_index).sum().clamp(min=1)
    raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}")


# --------------------------------------------------------------------------------- fp32 matmul


def _vendor() -> str:
    """The CPU's maker as the kernel or the platform names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _choose_matmul(vendor: str) -> tuple[str, str]:
    if "AMD" not in vendor:
        return "torch", f"torch's own BLAS is the fast one on this CPU ({vendor or 'unknown'})"
    has_op = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not has_op:
        return "torch", "this torch was built without oneDNN"
    return "onednn", f"{vendor}: oneDNN's fp32 matmul is about twice as fast as MKL's, and as exact"


# Once at import: torch.compile traces through `linear`, and must meet a constant there.
_MATMUL = _choose_matmul(_vendor())


def matmul_backend() -> tuple[str, str]:
    """(name, reason) of the fp32 matmul: "onednn" or "torch". A pure function of the machine."""
    return _MATMUL


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (N, K)^T in fp32."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = _onednn(rows, weight.t()).view(x.shape) if need_x else None
        dweight = _onednn(rows.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None
        return dx, dweight, rows.sum(0) if need_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight (O, I)^T + bias, as F.linear, by the fastest exact matmul of this CPU.

    Only fp32 outside of autocast takes another way than F.linear, see `matmul_backend`; and not
    under torch.compile, whose inductor takes oneDNN's product for one of its own making.
    """
    if torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    exact = (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
             and weight.numel() > 0 and not torch.is_autocast_enabled("cpu"))
    if not exact or matmul_backend()[0] != "onednn":
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


# --------------------------------------------------------------------------------------- memory


def keep_freed_memory() -> bool:
    """Have the C library keep large freed blocks for the next step instead of returning them.

    For a process that trains on the CPU: call it once, before the model is made. Without it every
    step pays for the pages of its activations again. Nothing but the allocator changes; peak memory
    stays within a few percent. Returns False where the C library has no such setting (not glibc).
    """
    return available() and _OPS.keep_freed_memory()


# ------------------------------------------------------------------------------------- optimizer


def adamw_step(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
               exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
               beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
               grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
               offsets: Sequence[int] | None = None) -> None:
    """One AdamW step over lists of tensors, in place. masters[i] is None for an fp32 parameter.

    grad_scale (0-d fp32) multiplies every gradient; where it is not finite nothing changes.
    offsets are the global indices of the tensors' first elements, which key the stochastic
    rounding; by default the tensors follow each other.
    """
    _OPS.adamw_step_(params, grads, exp_avgs, exp_avg_sqs, masters, lr, beta1, beta2, eps,
                     weight_decay, grad_scale, stochastic_rounding, seed, step,
                     list(offsets) if offsets is not None else [])


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, max_norm: float | None = None) -> Any:
    """The global L2 norm as a 0-d fp32 tensor, summed in a fixed order; see `ops.grad_norm`."""
    norm = _OPS.grad_norm([grad.contiguous() for grad in grads])
    return norm if max_norm is None else (norm, coefficient(norm, max_norm))
