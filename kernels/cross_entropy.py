"""Cross-entropy of logits (T, V) against labels (T,), with its options in one kernel.

With l = softcap * tanh(logit / softcap) where a softcap is given, lse = log sum exp l, and
e = label_smoothing, a token's loss in float32 is
    lse - (1 - e) l[label] - e mean(l) + z_loss * lse^2
A token labelled ignore_index has loss 0 and gradient exactly 0, whatever its logits hold. A label
that is neither ignore_index nor in [0, V) is never used as an index: its token's loss and gradient
are NaN, so that a non-finite check catches it without a host synchronisation.
Floor, e bytes an element: forward eTV (one read), backward 2eTV; in place 2eTV for both together.
Sources: Szegedy et al., arXiv:1512.00567 (smoothing); Chowdhery et al., arXiv:2204.02311 (z-loss);
Milakov and Gimelshein, arXiv:1805.02867 (online softmax).
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import jit, next_power_of_2, require, rows_of, tanh, tl, warps_for

# A row up to this long is held in registers and read once; a longer one is read twice, block by
# block, the second time from the L2 cache as far as it reaches.
ONE_BLOCK = 32768
BLOCK = 8192


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.to(compute_dtype(logits))
    return wide if not softcap else softcap * torch.tanh(wide / softcap)


def _checked(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels safe to index with, which tokens are ignored, and 0 or (label out of range) NaN."""
    ignored = labels == ignore_index
    bad = ~ignored & ((labels < 0) | (labels >= vocab))
    poison = torch.zeros(labels.shape, device=labels.device).masked_fill(bad, float("nan"))
    return labels.masked_fill(ignored | bad, 0), ignored, poison


def reduce(losses: Tensor, labels: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """Per-token losses as they are, summed, or averaged over the trained tokens (0 without any)."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / (labels != ignore_index).sum().clamp(min=1)
    raise ValueError(f"reduction {reduction!r} is not one of 'none', 'sum', 'mean'")


def reference(logits: Tensor, labels: Tensor, *, ignore_index: int = -100,
              label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
              reduction: str = "sum", inplace: bool = False) -> Tensor:
    """The same in plain PyTorch; `inplace` is a permission that it does not use."""
    index, ignored, poison = _checked(labels, logits.shape[-1], ignore_index)
    # Filled first: a NaN in an ignored row would come back as NaN times zero in the backward.
    capped = _cap(logits.masked_fill(ignored[:, None], 0.0), softcap)
    lse = capped.logsumexp(-1)
    losses = lse - (1 - label_smoothing) * capped.gather(-1, index[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing * capped.mean(-1)
    losses = losses + z_loss * lse.square() + poison
    # A product rather than an addition carries the poison into the gradient.
    losses = (losses * (1 + poison)).masked_fill(ignored, 0.0)
    return reduce(losses, labels, reduction, ignore_index)


def overwrite_reference(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
                        z_loss: float, softcap: float | None) -> Tensor:
    """Per-token losses; each row of logits becomes its loss's gradient. No autograd in it."""
    index, ignored, poison = _checked(labels, logits.shape[-1], ignore_index)
    capped = _cap(logits, softcap)
    lse = capped.logsumexp(-1)
    target = capped.gather(-1, index[:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * target + z_loss * lse.square() + poison
    if label_smoothing:
        losses -= label_smoothing * capped.mean(-1)
    gradient = (capped - lse[:, None]).exp_()
    gradient *= (1 + 2 * z_loss * lse + poison)[:, None]
    gradient -= label_smoothing / max(logits.shape[-1], 1)
    gradient.scatter_add_(-1, index[:, None], torch.full_like(target, label_smoothing - 1)[:, None])
    if softcap:
        gradient *= 1 - (capped / softcap).square_()
    logits.copy_(gradient.masked_fill_(ignored[:, None], 0.0))
    return losses.masked_fill(ignored, 0.0)


@jit
def _capped(values, softcap, SOFTCAP: tl.constexpr):
    values = values.to(tl.float32)
    if SOFTCAP:
        values = softcap * tanh(values / softcap)
    return values


@jit
def _load(source, column, vocab, softcap, SOFTCAP: tl.constexpr):
    """Capped logits, -inf past the row's end."""
    inside = column < vocab
    # The second pass of a long row should find it in L2; nothing else here is read twice.
    values = tl.load(source + column, mask=inside, other=-float("inf"),
                     eviction_policy="evict_last")
    return tl.where(inside, _capped(values, softcap, SOFTCAP), -float("inf"))


@jit
def _add_block(values, column, vocab, peak, total, plain, SMOOTH: tl.constexpr):
    """Online softmax: fold a block into the peak, the sum of exp above it, and the plain sum."""
    higher = tl.maximum(peak, tl.max(values, axis=0))
    # A block of -inf alone must add 0, not exp(-inf + inf).
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp(peak - anchor) + tl.sum(tl.exp(values - anchor), axis=0)
    if SMOOTH:
        plain += tl.sum(tl.where(column < vocab, values, 0.0), axis=0)
    return anchor, total, plain


@jit
def _gradient(values, column, label, peak, log_sum, z_slope, smoothing, even, softcap, factor,
              SOFTCAP: tl.constexpr):
    """d loss / d logit of a block of capped values, times `factor`."""
    slope = tl.exp((values - peak) - log_sum) * z_slope - even
    slope = tl.where(column == label, slope - (1.0 - smoothing), slope)
    if SOFTCAP:
        ratio = values / softcap
        slope *= 1.0 - ratio * ratio
    return slope * factor


@jit
def _kernel(logits, labels, losses, stats, gradient, upstream, logits_stride, gradient_stride,
            upstream_stride, vocab, ignore_index, smoothing, z_loss, softcap,
            SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, KNOWN: tl.constexpr,
            GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row. First the loss and the row's statistics (unless KNOWN), then GRADIENT.

    `gradient` may be `logits` itself: every element is rewritten by the thread that read it, and
    the label's logit is read before the reductions, which are barriers.
    """
    # int64: row * vocab passes 2^31 at 16,384 tokens of a 131,072-word vocabulary.
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    target = gradient + row * gradient_stride
    column = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    if label == ignore_index:
        if not KNOWN:
            tl.store(losses + row, 0.0)
            tl.store(stats + row * 2, 0.0)
            tl.store(stats + row * 2 + 1, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), dtype=gradient.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(target + start + column, zero, mask=start + column < vocab)
        return
    valid = (label >= 0) & (label < vocab)
    poison = tl.where(valid, 0.0, float("nan"))
    if KNOWN:
        peak = tl.load(stats + row * 2)
        log_sum = tl.load(stats + row * 2 + 1)
    else:
        labelled = tl.load(source + label, mask=valid, other=0.0)
        labelled = _capped(labelled, softcap, SOFTCAP)
        if ONE:
            values = _load(source, column, vocab, softcap, SOFTCAP)
            peak, total, plain = _add_block(values, column, vocab, -float("inf"), 0.0, 0.0, SMOOTH)
        else:
            peak, total, plain = -float("inf"), 0.0, 0.0
            for start in range(0, vocab, BLOCK):
                at = start + column
                peak, total, plain = _add_block(_load(source, at, vocab, softcap, SOFTCAP), at,
                                                vocab, peak, total, plain, SMOOTH)
        log_sum = tl.log(total)
        loss = log_sum + (1.0 - smoothing) * (peak - labelled)
        if SMOOTH:
            loss += smoothing * (peak - plain / vocab)
        lse = peak + log_sum
        tl.store(losses + row, loss + z_loss * lse * lse + poison)
        tl.store(stats + row * 2, peak)
        tl.store(stats + row * 2 + 1, log_sum)
    if GRADIENT:
        factor = 1.0 + poison
        if UPSTREAM:
            factor *= tl.load(upstream + row * upstream_stride).to(tl.float32)
        z_slope = 1.0 + 2.0 * z_loss * (peak + log_sum)
        even = smoothing / vocab
        if ONE:
            slope = _gradient(values, column, label, peak, log_sum, z_slope, smoothing, even,
                              softcap, factor, SOFTCAP)
            tl.store(target + column, slope.to(gradient.dtype.element_ty), mask=column < vocab)
        else:
            for start in range(0, vocab, BLOCK):
                at = start + column
                values = _load(source, at, vocab, softcap, SOFTCAP)
                slope = _gradient(values, at, label, peak, log_sum, z_slope, smoothing, even,
                                  softcap, factor, SOFTCAP)
                tl.store(target + at, slope.to(gradient.dtype.element_ty), mask=at < vocab)


@jit
def _scale_kernel(gradient, upstream, stride, upstream_stride, vocab, BLOCK: tl.constexpr):
    """One program a row: the row times its upstream gradient, untouched where that is exactly 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32)
    if factor != 1.0:
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = gradient + row * stride + column
            value = tl.load(at, mask=column < vocab, other=0.0).to(tl.float32) * factor
            tl.store(at, value.to(gradient.dtype.element_ty), mask=column < vocab)


def _launch(logits: Tensor, labels: Tensor, losses: Tensor, stats: Tensor, gradient: Tensor | None,
            upstream: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
            softcap: float | None, known: bool) -> None:
    require("cross_entropy", logits, labels)
    tokens, vocab = logits.shape
    if not tokens or not vocab:
        losses.zero_()
        return
    one = vocab <= ONE_BLOCK and not known
    block = next_power_of_2(vocab) if one else min(BLOCK, next_power_of_2(vocab))
    target = logits if gradient is None else gradient
    with torch.cuda.device_of(logits):
        _kernel[(tokens,)](
            logits, labels.contiguous(), losses, stats, target,
            losses if upstream is None else upstream, logits.stride(0), target.stride(0),
            0 if upstream is None else upstream.stride(0), vocab, ignore_index,
            float(label_smoothing), float(z_loss), float(softcap or 0.0),
            SOFTCAP=bool(softcap), SMOOTH=label_smoothing != 0.0, KNOWN=known,
            GRADIENT=gradient is not None, UPSTREAM=upstream is not None, ONE=one, BLOCK=block,
            num_warps=warps_for(block, per_thread=16))


@torch.library.custom_op("fastllm::cross_entropy", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
             z_loss: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses (T,) and statistics (T, 2): each row's peak and the log of its sum above the peak."""
    losses, stats = _forward_fake(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    _launch(rows_of(logits), labels, losses, stats, None, None, ignore_index, label_smoothing,
            z_loss, softcap, known=False)
    return losses, stats


@_forward.register_fake
def _forward_fake(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
                  z_loss: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    tokens = labels.shape[0]
    return (logits.new_empty((tokens,), dtype=torch.float32),
            logits.new_empty((tokens, 2), dtype=torch.float32))


@torch.library.custom_op("fastllm::cross_entropy_backward", mutates_args=())
def _backward(upstream: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int,
              label_smoothing: float, z_loss: float, softcap: float | None) -> Tensor:
    """The logits' gradient, contiguous, for upstream gradients (T,) of the losses, any stride."""
    gradient = logits.new_empty(logits.shape)
    _launch(rows_of(logits), labels, stats[:, 0], stats, gradient, upstream, ignore_index,
            label_smoothing, z_loss, softcap, known=True)
    return gradient


@_backward.register_fake
def _backward_fake(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[2:]


def _autograd(ctx, upstream: Tensor, _: Tensor):
    return _backward(upstream, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("fastllm::cross_entropy_", mutates_args={"logits"})
def overwrite(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
              z_loss: float, softcap: float | None) -> Tensor:
    """Per-token losses; each row of logits (unit column stride) becomes its loss's gradient."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("cross_entropy in place: the logits must have unit stride along a row, "
                         f"not {logits.stride()}")
    losses, stats = _forward_fake(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    _launch(logits, labels, losses, stats, logits, None, ignore_index, label_smoothing, z_loss,
            softcap, known=False)
    return losses


@overwrite.register_fake
def _overwrite_fake(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((labels.shape[0],), dtype=torch.float32)


@torch.library.custom_op("fastllm::scale_rows_", mutates_args={"gradient"})
def _scale_rows(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row by upstream (T,), without a pass over memory for rows where it is 1."""
    tokens, vocab = gradient.shape
    if tokens and vocab:
        block = min(BLOCK, next_power_of_2(vocab))
        with torch.cuda.device_of(gradient):
            _scale_kernel[(tokens,)](gradient, upstream, gradient.stride(0), upstream.stride(0),
                                     vocab, BLOCK=block, num_warps=warps_for(block))


@_scale_rows.register_fake
def _scale_rows_fake(gradient: Tensor, upstream: Tensor) -> None:
    return None


@torch.library.custom_op("fastllm::cross_entropy_attach", mutates_args=())
def _attach(logits: Tensor, gradient: Tensor, losses: Tensor) -> Tensor:
    """The losses, as a function of logits whose gradient lies ready in `gradient`."""
    return losses.clone()


@_attach.register_fake
def _attach_fake(logits: Tensor, gradient: Tensor, losses: Tensor) -> Tensor:
    return losses.new_empty(losses.shape)


def _attach_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _attach_autograd(ctx, upstream: Tensor):
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling():  # the compiler reuses memory itself, and wants no mutation
        return (gradient.float() * upstream[:, None]).to(gradient.dtype), None, None
    # A second backward finds the version counter moved and raises, rather than scale twice.
    _scale_rows(gradient, upstream)
    return gradient, None, None


_attach.register_autograd(_attach_autograd, setup_context=_attach_setup)


def check_options(label_smoothing: float, softcap: float | None) -> None:
    """Raise ValueError where an option makes no sense."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing {label_smoothing} is not in [0, 1]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"cross_entropy: softcap {softcap} is not positive")


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                  reduction: str = "sum", inplace: bool = False) -> Tensor:
    """Cross-entropy of logits (T, V) against labels (T,) int64, in float32.

    reduction: "sum", "mean" over the tokens not ignored (0 if none is), or "none" (T,).
    inplace: where a gradient is due, the logits are overwritten with it in the same pass as the
    loss; anything else that saved them, and a second backward, then raises. Otherwise the logits
    are never changed. The logits' columns must then have unit stride.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} and labels "
                         f"{tuple(labels.shape)} {labels.dtype} must be (T, V) and (T,) int64")
    check_options(label_smoothing, softcap)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        gradient = logits.detach()  # shares the version counter: the overwriting shows
        losses = _attach(logits, gradient, overwrite(gradient, labels, *options))
    else:
        losses, _ = _forward(logits, labels, *options)
    return reduce(losses, labels, reduction, ignore_index)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.2,
           offset: float = 0.0, scale: float = 3.0, **options: Any) -> Call:
    tokens, vocab = shape
    logits = normal((tokens, vocab), dtype, device, generator, grad=False, scale=scale)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    labels = labels.masked_fill(drawn < ignored, options.get("ignore_index", -100))
    logits = (logits + offset).requires_grad_()
    return Call((logits, labels), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, vocab = shape
    return dtype.itemsize * tokens * vocab * (1 if direction == "forward" else 2) + 12 * tokens


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (4 if direction == "forward" else 5) * shape[0] * shape[1]


KERNEL = Kernel(
    name="cross_entropy", public=cross_entropy, reference=reference, inputs=inputs,
    axes=("tokens", "vocab_size"),
    test_shapes=((1, 1), (3, 7), (5, 1000), (3, 33001)),
    empty_shapes=((0, 8),),
    bench_shapes=((8192, 6400), (8192, 32000), (8192, 131072)),
    audit_shapes=((2, 6400), (2, 32000), (2, 131072)),
    variants={
        "none": {"reduction": "none"}, "mean": {"reduction": "mean"},
        "smoothing": {"label_smoothing": 0.1}, "z loss": {"z_loss": 1e-2},
        "softcap": {"softcap": 5.0}, "softcap, near zero": {"softcap": 30.0, "scale": 0.3},
        "ignore index": {"ignore_index": 0}, "all ignored": {"ignored": 2.0},
        "all ignored, mean": {"ignored": 2.0, "reduction": "mean"},
        "shifted": {"offset": 200.0},
        "every option": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
                         "ignore_index": 1, "reduction": "none"},
        "in place": {"inplace": True}, "in place, none": {"inplace": True, "reduction": "none"},
        "in place, every option": {"inplace": True, "label_smoothing": 0.1, "z_loss": 1e-3,
                                   "softcap": 5.0, "ignore_index": 1, "reduction": "mean"},
    },
    overflow_shape=(2, 9),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
