"""Cross-entropy of logits (T, V) against labels (T,), with its options in one pass.

With x = logit_scale * logit, l = x or, where a softcap c is given, c tanh(x / c),
lse = log sum exp l, e = label_smoothing and class weights w (V,), 1 where none are given, a token's
loss in float32 is
    (1 - e) w[label] (lse - l[label]) + e / V sum_j w_j (lse - l_j) + z_loss lse^2
which is torch's with weights and smoothing; the z-loss is not weighted. "mean" divides their sum by
the sum of the labels' weights. A token labelled ignore_index has loss 0 and gradient exactly 0,
whatever its logits hold. A label that is neither ignore_index nor in [0, V) is never used as an
index: its token's loss and gradient are NaN, so that a non-finite check catches it without a host
synchronisation.
Floor, e bytes an element: forward eTV (one read), backward 2eTV; in place 2eTV for both together.
Sources: Szegedy et al., arXiv:1512.00567 (smoothing); Chowdhery et al., arXiv:2204.02311 (z-loss);
Milakov and Gimelshein, arXiv:1805.02867 (online softmax).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.kernels import _cross_entropy as device
from fastllm.kernels._cross_entropy import Options
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import rows_of


class Metrics(NamedTuple):
    """Each token's share of what one watches; an ignored token's are 0, its prediction is -1."""

    lse: Tensor
    """The log of the sum of exponentials (T,)."""
    entropy: Tensor
    """The entropy of the softmax (T,), in nats."""
    predicted: Tensor
    """The first index of the largest logit (T,), int64."""
    z_loss: Tensor
    """z_loss * lse^2 (T,), which the loss contains."""


# ------------------------------------------------------------------------------ plain torch


def divisor(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What "mean" divides by, 0-d: the trained tokens or their labels' weights, 1 for none."""
    kept = labels != ignore_index
    if weight is None:
        return kept.sum().clamp(min=1)
    # A label out of range has made the sum of the losses NaN, whatever is taken for it here.
    shares = weight.to(compute_dtype(weight))[labels.clamp(0, weight.shape[0] - 1)]
    total = shares.masked_fill(~kept, 0.0).sum()
    return total.masked_fill(total == 0, 1.0)


def reduce(losses: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int,
           reduction: str) -> Tensor:
    """Per-token losses (or their sum) as they are, summed, or averaged over the trained tokens."""
    if reduction == "none":
        return losses
    total = losses.sum() if losses.dim() else losses
    return total / divisor(labels, weight, ignore_index) if reduction == "mean" else total


class Block(NamedTuple):
    """A block of logits and what its loss and gradient need, in plain torch."""

    capped: Tensor
    place: Tensor
    ignored: Tensor
    poison: Tensor
    lse: Tensor
    share: Tensor
    shares: Tensor | None


def block_of(logits: Tensor, labels: Tensor, weight: Tensor | None, options: Options) -> Block:
    vocab, wide = logits.shape[-1], compute_dtype(logits)
    ignored = labels == options.ignore_index
    bad = ~ignored & ((labels < 0) | (labels >= vocab))
    place = labels.masked_fill(ignored | bad, 0)
    # Filled first: a NaN in an ignored row would come back as NaN times zero in the backward.
    capped = logits.masked_fill(ignored[:, None], 0.0).to(wide) * options.logit_scale
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    poison = torch.zeros_like(labels, dtype=wide).masked_fill(bad, float("nan"))
    shares = None if weight is None else weight.detach().to(wide)
    share = torch.ones_like(poison) if shares is None else shares[place]
    return Block(capped, place, ignored, poison, capped.logsumexp(-1), share, shares)


def block_losses(block: Block, options: Options) -> Tensor:
    capped, place, ignored, poison, lse, share, shares = block
    smooth = options.label_smoothing
    losses = (1 - smooth) * share * (lse - capped.gather(-1, place[:, None])[:, 0])
    if smooth and shares is None:
        losses = losses + smooth * (lse - capped.mean(-1))
    elif smooth and shares is not None:
        losses = losses + smooth * (lse * shares.mean() - (capped * shares).mean(-1))
    losses = losses + options.z_loss * lse.square() + poison
    # A product rather than an addition carries the poison into the gradient.
    return (losses * (1 + poison)).masked_fill(ignored, 0.0)


def block_metrics(logits: Tensor, block: Block, options: Options) -> Metrics:
    lse = block.lse.detach()
    log_p = block.capped.detach() - lse[:, None]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -float("inf"), 0.0)).sum(-1)
    lse, entropy, z = (t.masked_fill(block.ignored, 0.0)
                       for t in (lse, entropy, options.z_loss * lse.square()))
    predicted = logits.detach().argmax(-1) if logits.shape[-1] else block.place
    return Metrics(lse, entropy, predicted.masked_fill(block.ignored, -1), z)


def reference(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None,
              ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
              softcap: float | None = None, logit_scale: float = 1.0, reduction: str = "sum",
              inplace: bool = False, return_metrics: bool = False) -> Any:
    """The same in plain PyTorch; `inplace` is a permission that it does not use."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check(logits, labels, weight, options, reduction)
    block = block_of(logits, labels, weight, options)
    loss = reduce(block_losses(block, options), labels, weight, ignore_index, reduction)
    return (loss, block_metrics(logits, block, options)) if return_metrics else loss


# ------------------------------------------------------------------------------------ operators


@torch.library.custom_op("fastllm::cross_entropy", mutates_args=())
def losses_of(logits: Tensor, labels: Tensor, weight: Tensor | None, watch: bool, ignore_index: int,
              label_smoothing: float, z_loss: float, softcap: float | None,
              logit_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `outputs_for`."""
    outputs = device.outputs_for(logits, watch)
    device.launch_losses(rows_of(logits), labels, _weights(weight), None, Options(
        ignore_index, label_smoothing, z_loss, softcap, logit_scale), outputs, gradient=False)
    return outputs


@losses_of.register_fake
def _losses_of_fake(logits: Tensor, labels: Tensor, weight: Tensor | None, watch: bool,
                    *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return device.outputs_for(logits, watch)


def _weights(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


@torch.library.custom_op("fastllm::cross_entropy_backward", mutates_args=())
def _backward(upstream: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None,
              stats: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
              softcap: float | None, logit_scale: float) -> Tensor:
    """The logits' gradient, contiguous, for upstream gradients (T,) of the losses, any stride."""
    gradient = logits.new_empty(logits.shape)
    device.launch_gradient(rows_of(logits), labels, _weights(weight), stats, upstream, gradient, 0,
                     logits.shape[1], Options(ignore_index, label_smoothing, z_loss, softcap,
                                              logit_scale))
    return gradient


@_backward.register_fake
def _backward_fake(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.options = inputs[4:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, upstream: Tensor | None, *_: Tensor):
    gradient = None if upstream is None else _backward(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * 8


losses_of.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("fastllm::cross_entropy_", mutates_args={"logits"})
def overwrite(logits: Tensor, labels: Tensor, weight: Tensor | None, upstream: Tensor | None,
              watch: bool, ignore_index: int, label_smoothing: float, z_loss: float,
              softcap: float | None, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `losses_of`; each row of logits (unit column stride) becomes its loss's gradient times
    upstream, (T,) or one number for all."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("cross_entropy in place: the logits must have unit stride along a row, "
                         f"not {logits.stride()}")
    outputs = device.outputs_for(logits, watch)
    device.launch_losses(logits, labels, _weights(weight), upstream, Options(
        ignore_index, label_smoothing, z_loss, softcap, logit_scale), outputs, gradient=True)
    return outputs


@overwrite.register_fake
def _overwrite_fake(logits: Tensor, labels: Tensor, weight: Tensor | None, upstream: Tensor | None,
                    watch: bool, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return device.outputs_for(logits, watch)


def overwrite_columns(logits: Tensor, labels: Tensor, weight: Tensor | None, stats: Tensor,
                      upstream: Tensor, first: int, vocab: int, options: Options) -> None:
    """Columns [first, first + n) of the logits become their gradient; within an operator only."""
    device.launch_gradient(logits, labels, _weights(weight), stats, upstream, logits, first, vocab,
                     options)


@torch.library.custom_op("fastllm::scale_rows_", mutates_args={"gradient"})
def scale_rows(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row by upstream, (T,) or one number, without a pass where it is exactly 1."""
    device.launch_scale(gradient, upstream)


@scale_rows.register_fake
def _scale_rows_fake(gradient: Tensor, upstream: Tensor) -> None:
    return None


@torch.library.custom_op("fastllm::cross_entropy_attach", mutates_args=())
def _attach(logits: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
    """The loss, as a function of logits whose gradient lies ready in `gradient`."""
    return loss.clone()


@_attach.register_fake
def _attach_fake(logits: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
    return loss.new_empty(loss.shape)


def _attach_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _attach_autograd(ctx, upstream: Tensor):
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling():  # the compiler reuses memory itself, and wants no mutation
        factor = upstream[:, None] if upstream.dim() else upstream
        return (gradient.float() * factor).to(gradient.dtype), None, None
    # A second backward finds the version counter moved and raises, rather than scale twice.
    scale_rows(gradient, upstream)
    return gradient, None, None


_attach.register_autograd(_attach_autograd, setup_context=_attach_setup)


# ----------------------------------------------------------------------------------- the op


def check(logits: Tensor, labels: Tensor, weight: Tensor | None, options: Options,
          reduction: str) -> None:
    """Raise for shapes, types and options that make no sense."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} and labels "
                         f"{tuple(labels.shape)} {labels.dtype} must be (T, V) and (T,) int64")
    check_options(weight, logits.shape[1], options, reduction)


def check_options(weight: Tensor | None, vocab: int, options: Options, reduction: str) -> None:
    """Raise ValueError where an option makes no sense."""
    if weight is not None and (weight.shape != (vocab,) or not weight.is_floating_point()):
        raise ValueError(f"cross_entropy: class weights {tuple(weight.shape)} {weight.dtype} must "
                         f"be ({vocab},) floating point")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(
            f"cross_entropy: label_smoothing {options.label_smoothing} is not in [0, 1]")
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"cross_entropy: softcap {options.softcap} is not positive")
    if not options.logit_scale > 0:
        raise ValueError(f"cross_entropy: logit_scale {options.logit_scale} is not positive")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"cross_entropy: reduction {reduction!r} is not 'none', 'sum' or 'mean'")


def cross_entropy(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None,
                  ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
                  softcap: float | None = None, logit_scale: float = 1.0, reduction: str = "sum",
                  inplace: bool = False, return_metrics: bool = False) -> Any:
    """Cross-entropy of logits (T, V) against labels (T,) int64, in float32.

    weight (V,): class weights, which get no gradient. softcap c: logits x become c tanh(x / c);
    logit_scale multiplies them before. z_loss adds z_loss * logsumexp^2 a token. reduction: "sum",
    "mean" over the tokens not ignored (over their labels' weights; 0 without any), or "none" (T,).
    A label outside the vocabulary makes its token's loss NaN (the cpp backend raises IndexError).
    inplace: where a gradient is due, the logits are overwritten with it in the same pass as the
    loss; anything else that saved them, and a second backward, then raises. Otherwise the logits
    are never changed. The logits' columns must then have unit stride.
    return_metrics: (loss, Metrics(lse, entropy, predicted, z_loss)) per token, without gradient.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check(logits, labels, weight, options, reduction)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        gradient = logits.detach()  # shares the version counter: the overwriting shows
        divide = divisor(labels, weight, ignore_index) if reduction == "mean" else None
        # The mean's division goes into the pass that writes the gradient, and saves another; but
        # not in float16, whose small numbers would vanish before a loss scale lifts them.
        early, late = (None, divide) if logits.dtype == torch.float16 else (divide, None)
        losses, _, metrics, predicted = overwrite(
            gradient, labels, weight, None if early is None else 1.0 / early, return_metrics,
            *options)
        loss = losses if reduction == "none" else losses.sum()
        loss = _attach(logits, gradient, loss if early is None else loss / early)
        loss = loss if late is None else loss / late
    else:
        losses, _, metrics, predicted = losses_of(logits, labels, weight, return_metrics, *options)
        loss = reduce(losses, labels, weight, ignore_index, reduction)
    if not return_metrics:
        return loss
    lse, entropy, z = metrics.detach().unbind()
    return loss, Metrics(lse, entropy, predicted, z)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.0,
           offset: float = 0.0, scale: float = 3.0, weighted: bool = False,
           **options: Any) -> Call:
    tokens, vocab = shape
    logits = normal((tokens, vocab), dtype, device, generator, grad=False, scale=scale)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    labels = labels.masked_fill(drawn < ignored, options.get("ignore_index", -100))
    if weighted:
        options["weight"] = torch.rand((vocab,), generator=generator, device=device)
    logits = (logits + offset).requires_grad_()
    return Call((logits, labels), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, inplace: bool = False,
                weighted: bool = False, **_: Any) -> int:
    """One read of the logits forward, a read and a write backward; in place all is forward."""
    tokens, vocab = shape
    passes = {"forward": 2 if inplace else 1, "backward": 0 if inplace else 2}[direction]
    return dtype.itemsize * tokens * vocab * passes + 12 * tokens + 4 * vocab * weighted


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, inplace: bool = False,
                **_: Any) -> int:
    steps = {"forward": 9 if inplace else 4, "backward": 0 if inplace else 5}[direction]
    return steps * shape[0] * shape[1]


KERNEL = Kernel(
    name="cross_entropy", public=cross_entropy, reference=reference, inputs=inputs,
    axes=("tokens", "vocab_size"),
    test_shapes=((1, 1), (3, 7), (5, 1000), (2, 33001)),
    empty_shapes=((0, 8),),
    bench_shapes=((8192, 6400), (8192, 32000), (8192, 131072)),
    traffic_shapes=((256, 6400), (4096, 6400)),
    bench_options={"in place": {"inplace": True}, "weights": {"weighted": True}},
    audit_shapes=((2, 6400), (2, 32000), (2, 131072)),
    variants={
        "some ignored": {"ignored": 0.4}, "none": {"reduction": "none", "ignored": 0.4},
        "mean": {"reduction": "mean", "ignored": 0.4},
        "smoothing": {"label_smoothing": 0.1}, "z loss": {"z_loss": 1e-2},
        "softcap": {"softcap": 5.0}, "softcap, near zero": {"softcap": 30.0, "scale": 0.3},
        "scale": {"logit_scale": 0.25},
        "weights": {"weighted": True, "reduction": "mean", "ignored": 0.4},
        "ignore index": {"ignore_index": 0}, "all ignored": {"ignored": 2.0},
        "all ignored, mean": {"ignored": 2.0, "reduction": "mean", "weighted": True},
        "shifted": {"offset": 200.0}, "metrics": {"return_metrics": True, "ignored": 0.4},
        "every option": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
                         "logit_scale": 1.5, "weighted": True, "ignore_index": 1,
                         "reduction": "none", "return_metrics": True},
        "in place": {"inplace": True},
        "in place, none": {"inplace": True, "reduction": "none", "ignored": 0.4},
        "in place, every option": {"inplace": True, "label_smoothing": 0.1, "z_loss": 1e-3,
                                   "softcap": 5.0, "ignored": 0.3, "logit_scale": 1.5,
                                   "weighted": True, "return_metrics": True},
    },
    overflow_shape=(3, 9),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
