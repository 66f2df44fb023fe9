"""Cross-entropy of hidden @ weight.T + bias against labels, a chunk of logits at a time.

hidden (T, H), weight (V, H) and bias (V,) of one type, labels (T,); options and loss as in
`cross_entropy`. The logits are rounded to that type, as a linear layer rounds them, and are never
all in memory. Two ways, each with the weight's gradient summed in float32:

* gradients with the loss ("sum" and "mean"): a chunk of rows of logits is made, overwritten by its
  gradient in the pass that reads its loss, and consumed by the two products of the backward. The
  gradients lie ready when the forward returns; the backward scales them in place, by a pass only
  where its factor is not exactly 1. 6THV FLOPs.
* recompute (and "none", where each token has its own upstream gradient): the forward keeps (T,)
  statistics alone, and the backward makes the logits again: 8THV FLOPs. It takes all tokens and a
  chunk of columns at a time, so that a column's part of the weight's gradient is one product and
  no sum (V, H) in float32 exists; where tokens outnumber the vocabulary it goes by rows.

Floor: 2THV FLOPs forward, 4THV backward; e(TH + VH) bytes in, as much out. Peak memory beyond the
arguments and gradients of e bytes: e chunk V + 4VH with several chunks, or 4TH + 32 MB for the
recomputing backward: never T x V.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _linear_loss as loops
from fastllm.kernels import cross_entropy as ce
from fastllm.kernels._cross_entropy import Options
from fastllm.kernels._linear_loss import PARTS, Parts, Problem, Rows
from fastllm.kernels._spec import (
    Call,
    Direction,
    Kernel,
    Shape,
    autocast,
    compute_dtype,
    normal,
)

__all__ = ["KERNEL", "PARTS", "Parts", "linear_cross_entropy", "reference"]


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
              ce_weight: Tensor | None = None, chunk_size: int | None = None,
              recompute: bool = False, **options: Any) -> Any:
    """A linear layer, then the cross-entropy: all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias).flatten(0, -2)
    return ce.reference(logits, labels.flatten(), weight=ce_weight, **options)


# --------------------------------------------------------------------------------- operators


def _problem(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
             ce_weight: Tensor | None, chunk_size: int | None, parts: str,
             options: tuple[Any, ...]) -> Problem:
    return Problem(hidden, weight, labels, bias, ce_weight, chunk_size, PARTS[parts],
                   Options(*options))


def _exact(tensor: Tensor) -> torch.autocast:
    """Products in the types that they were given; autocast has chosen before."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("fastllm::linear_cross_entropy_gradients", mutates_args={"main_grad"})
def _gradients(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
               ce_weight: Tensor | None, scale: Tensor | None, main_grad: Tensor | None,
               watch: bool, want: list[bool], chunk_size: int | None, parts: str,
               ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
               logit_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, metrics and predictions, and the wanted gradients of scale times the losses' sum by
    hidden, weight (added to main_grad where that is given) and bias; what is not wanted is empty.
    """
    problem = _problem(hidden, weight, labels, bias, ce_weight, chunk_size, parts,
                       (ignore_index, label_smoothing, z_loss, softcap, logit_scale))
    with _exact(hidden):
        (losses, _, metrics, predicted), found = loops.by_rows(
            problem, scale, main_grad, watch, (want[0], want[1], want[2]), tight=False)
    return losses, metrics, predicted, *found


@_gradients.register_fake
def _gradients_fake(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
                    ce_weight: Tensor | None, scale: Tensor | None, main_grad: Tensor | None,
                    watch: bool, want: list[bool], chunk_size: int | None, parts: str,
                    *_: Any) -> tuple[Tensor, ...]:
    losses, _, metrics, predicted = loops.results_for(hidden, watch, 0)
    return losses, metrics, predicted, *loops.gradients_for(hidden, weight, tuple(want),
                                                            main_grad is not None)


@torch.library.custom_op("fastllm::linear_cross_entropy_attach", mutates_args=())
def _attach(loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dhidden: Tensor,
            dweight: Tensor, dbias: Tensor, promised: Tensor | None, parts: str) -> Tensor:
    """The loss, as a function of arguments whose gradients lie ready; where an upstream gradient
    was promised they are multiplied with it already."""
    return loss.clone()


@_attach.register_fake
def _attach_fake(loss: Tensor, *_: Any) -> Tensor:
    return loss.new_empty(loss.shape)


def _attach_setup(ctx, inputs, output) -> None:
    *_, dhidden, dweight, dbias, promised, ctx.parts = inputs
    ctx.save_for_backward(dhidden, dweight, dbias, promised)
    ctx.spent = False


def _attach_autograd(ctx, upstream: Tensor):
    compiling = torch.compiler.is_compiling()
    if not compiling and (ctx.spent or torch.is_grad_enabled()):
        raise RuntimeError("linear_cross_entropy: its gradients are made in the forward and given "
                           "away by the first backward; for a second one, use recompute=True")
    ctx.spent = True
    *gradients, promised = ctx.saved_tensors
    if promised is not None:
        torch._assert_async(upstream == promised,
                            "linear_cross_entropy: the upstream gradient is not the grad_scale "
                            "with which the weight's gradient was added to main_grad")
    else:
        gradients = [_scaled(gradient, upstream, ctx.parts, compiling) for gradient in gradients]
    _, hidden, weight, bias, *_ = ctx.needs_input_grad
    due = (hidden, weight and promised is None, bias)
    return None, *(gradient if wanted else None for gradient, wanted in
                   zip(gradients, due, strict=True)), None, None, None, None, None


def _scaled(gradient: Tensor, upstream: Tensor, parts: str, compiling: bool) -> Tensor:
    """The gradient times a number, in its memory, without a pass over it where that is 1."""
    if compiling:  # the compiler reuses memory itself, and wants no mutation
        return (gradient * upstream).to(gradient.dtype)
    if not gradient.numel():
        return gradient
    if parts == "triton":
        ce.scale_rows(gradient.view(-1, gradient.shape[-1]), upstream)
    elif gradient.is_cuda or upstream != 1:
        gradient.mul_(upstream)
    return gradient


_attach.register_autograd(_attach_autograd, setup_context=_attach_setup)


@torch.library.custom_op("fastllm::linear_cross_entropy", mutates_args=())
def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
            ce_weight: Tensor | None, main_grad: Tensor | None, watch: bool,
            chunk_size: int | None, parts: str, ignore_index: int, label_smoothing: float,
            z_loss: float, softcap: float | None,
            logit_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics, metrics and predictions; main_grad is for the backward."""
    problem = _problem(hidden, weight, labels, bias, ce_weight, chunk_size, parts,
                       (ignore_index, label_smoothing, z_loss, softcap, logit_scale))
    with _exact(hidden):
        return loops.only_losses(problem, watch)


@_losses.register_fake
def _losses_fake(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
                 ce_weight: Tensor | None, main_grad: Tensor | None, watch: bool,
                 chunk_size: int | None, parts: str, *_: Any) -> Rows:
    return loops.results_for(hidden, watch, PARTS[parts].statistics)


@torch.library.custom_op("fastllm::linear_cross_entropy_backward", mutates_args={"main_grad"})
def _backward(upstream: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
              bias: Tensor | None, ce_weight: Tensor | None, stats: Tensor,
              main_grad: Tensor | None, want: list[bool], chunk_size: int | None, parts: str,
              ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
              logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for upstream gradients (T,), from logits made again."""
    problem = _problem(hidden, weight, labels, bias, ce_weight, chunk_size, parts,
                       (ignore_index, label_smoothing, z_loss, softcap, logit_scale))
    due = (want[0], want[1], want[2])
    # By columns dhidden is summed in float32, by rows dweight: the smaller one should be.
    fewer = not want[0] or hidden.shape[0] < weight.shape[0]
    with _exact(hidden):
        if problem.parts.columns is not None and want[1] and fewer:
            return tuple(loops.by_columns(problem, stats, upstream, main_grad, due))
        return tuple(loops.by_rows(problem, upstream, main_grad, False, due, tight=True)[1])


@_backward.register_fake
def _backward_fake(upstream: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
                   bias: Tensor | None, ce_weight: Tensor | None, stats: Tensor,
                   main_grad: Tensor | None, want: list[bool], *_: Any) -> tuple[Tensor, ...]:
    return tuple(loops.gradients_for(hidden, weight, tuple(want), main_grad is not None))


def _setup(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, ce_weight, ctx.main_grad, _, *ctx.options = inputs
    # main_grad may change between forward and backward, so it is not saved as a value.
    ctx.save_for_backward(hidden, weight, labels, bias, ce_weight, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, upstream: Tensor | None, *_: Tensor):
    if upstream is None:
        return (None,) * 14
    hidden, weight, labels, bias, ce_weight, stats = ctx.saved_tensors
    want = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = _backward(upstream, hidden, weight, labels, bias, ce_weight, stats, ctx.main_grad, want,
                      *ctx.options)
    given = ctx.main_grad is not None
    dhidden, dweight, dbias = (gradient if due else None for gradient, due in
                               zip(found, want, strict=True))
    return dhidden, None if given else dweight, None, dbias, *[None] * 10


_losses.register_autograd(_autograd, setup_context=_setup)


# ----------------------------------------------------------------------------------- the op


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
           main_grad: Tensor | None, grad_scale: Tensor | float | None,
           chunk_size: int | None) -> None:
    name = "linear_cross_entropy"
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1] or (
            labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64):
        raise ValueError(f"{name}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and "
                         f"labels {tuple(labels.shape)} {labels.dtype} must be (..., H), (V, H) "
                         "and (...) int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} does not fit weight "
                         f"{tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(f"{name}: hidden is {hidden.dtype}, weight {weight.dtype}"
                        + (f", bias {bias.dtype}" if bias is not None else ""))
    wide = compute_dtype(weight)
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != wide
                                  or not main_grad.is_contiguous() or main_grad.requires_grad):
        raise ValueError(f"{name}: main_grad {tuple(main_grad.shape)} {main_grad.dtype} must be a "
                         f"contiguous {tuple(weight.shape)} {wide} that needs no gradient")
    if grad_scale is not None and main_grad is None:
        raise ValueError(f"{name}: grad_scale is the factor of what main_grad gets, and there is "
                         "no main_grad")
    if isinstance(grad_scale, Tensor) and grad_scale.dim():
        raise ValueError(f"{name}: grad_scale {tuple(grad_scale.shape)} is not one number")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size {chunk_size} is not positive")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *,
                         bias: Tensor | None = None, ce_weight: Tensor | None = None,
                         ignore_index: int = -100, label_smoothing: float = 0.0,
                         z_loss: float = 0.0, softcap: float | None = None,
                         logit_scale: float = 1.0, reduction: str = "sum",
                         chunk_size: int | None = None, main_grad: Tensor | None = None,
                         grad_scale: Tensor | float | None = None, recompute: bool = False,
                         return_metrics: bool = False, parts: str = "triton") -> Any:
    """`cross_entropy` of hidden (..., H) @ weight (V, H).T + bias, whose logits are never whole.

    labels (...) int64; ce_weight: class weights (V,); ignore_index to reduction and return_metrics
    as in `cross_entropy`. Under autocast hidden, weight and bias are cast, else they must agree.
    chunk_size: rows of logits held at once (default: from a cost model of the device).
    recompute: the forward keeps nothing but a few numbers a token and the backward makes the logits
    again: a third more FLOPs, least memory; always so for reduction "none".
    main_grad (V, H) float32: the weight's gradient is added to it and its autograd gradient is
    None. Without recompute that happens in the forward, times grad_scale (a number or 0-d tensor;
    1), which promises the gradient that the backward will get; the backward checks it, on the
    device: where it is another one, torch's asynchronous assertion fails.
    parts: which of PARTS the loop over chunks uses.
    """
    hidden, weight = autocast(hidden, weight)
    bias = bias if bias is None else autocast(bias)[0]
    _check(hidden, weight, labels, bias, main_grad, grad_scale, chunk_size)
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    ce.check_options(ce_weight, weight.shape[0], options, reduction)
    shape, labels, hidden = labels.shape, labels.flatten(), hidden.flatten(0, -2)
    due = torch.is_grad_enabled()
    want = [due and hidden.requires_grad, due and weight.requires_grad,
            due and bias is not None and bias.requires_grad]
    if recompute or reduction == "none" or not any(want):
        losses, _, metrics, predicted = _losses(
            hidden, weight, labels, bias, ce_weight, main_grad, return_metrics, chunk_size, parts,
            *options)
        loss = ce.reduce(losses, labels, ce_weight, ignore_index, reduction)
    else:
        loss, metrics, predicted = _ready(hidden, weight, labels, bias, ce_weight, main_grad,
                                          grad_scale, return_metrics, want, chunk_size, parts,
                                          options, reduction)
    loss = loss.view(shape) if reduction == "none" else loss
    if not return_metrics:
        return loss
    lse, entropy, z = metrics.detach().view(3, *shape).unbind()
    return loss, ce.Metrics(lse, entropy, predicted.view(shape), z)


def _ready(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
           ce_weight: Tensor | None, main_grad: Tensor | None, grad_scale: Tensor | float | None,
           watch: bool, want: list[bool], chunk_size: int | None, parts: str, options: Options,
           reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with its gradients, metrics and predictions."""
    wide = compute_dtype(hidden)
    divide = ce.divisor(labels, ce_weight, options.ignore_index) if reduction == "mean" else None
    promised = None
    if main_grad is not None:
        promised = grad_scale.detach().to(wide) if isinstance(grad_scale, Tensor) else torch.full(
            (), 1.0 if grad_scale is None else grad_scale, dtype=wide, device=hidden.device)
    # The mean's division goes into the pass that writes the gradient, and saves another; but not
    # in float16, whose small numbers would vanish before a loss scale lifts them.
    early, late = (None, divide) if promised is None and hidden.dtype == torch.float16 \
        else (divide, None)
    scale = promised
    if early is not None:
        scale = (1.0 if promised is None else promised) / early.to(wide)
    losses, metrics, predicted, *found = _gradients(
        hidden.detach(), weight.detach(), labels, None if bias is None else bias.detach(),
        ce_weight, scale, main_grad if want[1] else None, watch, want, chunk_size, parts, *options)
    loss = losses.sum()
    loss = _attach(loss if early is None else loss / early, hidden, weight, bias, *found, promised,
                   parts)
    return loss if late is None else loss / late, metrics, predicted


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.0,
           biased: bool = False, weighted: bool = False, **options: Any) -> Call:
    tokens, width, vocab = shape
    hidden = normal((tokens, width), dtype, device, generator)
    weight = normal((vocab, width), dtype, device, generator, scale=width**-0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    if biased:
        options["bias"] = normal((vocab,), dtype, device, generator)
    if weighted:
        options["ce_weight"] = torch.rand((vocab,), generator=generator, device=device)
    return Call((hidden, weight, labels.masked_fill(drawn < ignored, -100)), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, width, vocab = shape
    both = (tokens + vocab) * width * dtype.itemsize
    return both if direction == "forward" else 2 * both


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (2 if direction == "forward" else 4) * shape[0] * shape[1] * shape[2]


KERNEL = Kernel(
    name="linear_cross_entropy", public=linear_cross_entropy, reference=reference, inputs=inputs,
    axes=("tokens", "hidden_size", "vocab_size"), composition=True, bound="flops",
    test_shapes=((1, 8, 9), (5, 16, 33), (13, 24, 100)),
    empty_shapes=((0, 4, 8),),
    bench_shapes=((2720, 512, 6400), (8192, 2048, 128256), (8192, 4096, 128256),
                  (32768, 4096, 131072)),
    traffic_shapes=((256, 512, 6400), (2720, 512, 6400)),
    bench_options={"recompute": {"recompute": True}},
    audit_shapes=((2, 512, 6400),),
    variants={
        "chunks": {"chunk_size": 3, "ignored": 0.3},
        "mean": {"reduction": "mean", "chunk_size": 4, "ignored": 0.3},
        "none": {"reduction": "none", "chunk_size": 4, "ignored": 0.3},
        "all ignored": {"ignored": 2.0},
        "all ignored, mean": {"ignored": 2.0, "reduction": "mean"},
        "every option of C++": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
                                "chunk_size": 2, "biased": True},
        "recompute": {"recompute": True, "chunk_size": 2, "biased": True, "ignored": 0.3},
        "weights": {"weighted": True, "reduction": "mean", "logit_scale": 0.5,
                    "return_metrics": True},
        "recompute, every option": {
            "recompute": True, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
            "chunk_size": 3, "biased": True, "weighted": True, "reduction": "mean",
            "logit_scale": 0.5, "return_metrics": True},
        "every option": {
            "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "chunk_size": 2,
            "biased": True, "weighted": True, "logit_scale": 0.5, "return_metrics": True,
            "ignored": 0.3},
    },
    overflow_shape=(3, 8, 5),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
