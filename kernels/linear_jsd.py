"""Jensen-Shannon divergence of a student's head from a teacher's, a chunk of tokens at a time.

student_hidden (T, H) @ student_weight (V, H).T against teacher_hidden (T, G) @ teacher_weight
(V, G).T, divergence as in `jsd`; the teacher may be of another width and type. Each product is
rounded to its type, as a linear layer rounds it, and neither's logits are ever all in memory. For
"sum" and "mean" a chunk's logits become their gradient in the pass that reads them, so that the
gradients are ready when the forward returns and the backward only scales them in place, by a pass
only where its factor is not 1; for "none", where each token has its own upstream gradient, the
backward makes both logits again. The weight's gradient is gathered in float32.
Floor: 2TV(H + G) FLOPs forward, 4THV backward; e(TH + TG + VH + VG) bytes in, e(TH + VH) out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastllm.kernels import _chunks as chunks
from fastllm.kernels import cross_entropy as ce
from fastllm.kernels import jsd as js
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, autocast, normal
from fastllm.kernels._triton import cdiv


def reference(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
              teacher_weight: Tensor, labels: Tensor | None = None, *,
              chunk_size: int | None = None, **options: Any) -> Tensor:
    """Two linear layers, then the divergence: all logits at once."""
    return js.reference(torch.nn.functional.linear(student_hidden, student_weight),
                        torch.nn.functional.linear(teacher_hidden, teacher_weight).detach(),
                        labels, **options)


def plain(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
          teacher_weight: Tensor, labels: Tensor | None = None, *, beta: float = 0.5,
          temperature: float = 1.0, ignore_index: int = -100, reduction: str = "sum",
          chunk_size: int | None = None) -> Tensor:
    """In plain PyTorch, on any device: chunks of the reference, made again in the backward."""
    tokens, width = student_hidden.shape
    held, _ = chunks.rows(tokens, width, student_weight.shape[0], student_hidden.element_size(),
                          chunk_size=chunk_size, cached=student_hidden.device.type == "cpu")

    def part(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return reference(student, student_weight, teacher, teacher_weight, labels, beta=beta,
                         temperature=temperature, ignore_index=ignore_index, reduction="none")

    parts = [checkpoint(part, student_hidden[rows], teacher_hidden[rows],
                        None if labels is None else labels[rows], use_reentrant=False,
                        preserve_rng_state=False) for rows in chunks.spans(tokens, max(held, 1))]
    losses = torch.cat(parts) if parts else part(student_hidden, teacher_hidden, labels)
    return js.reduce(losses, labels, reduction, ignore_index)


def _loop(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
          labels: Tensor | None, factor: Tensor, options: tuple[float, float, int],
          chunk_size: int | None, gradients: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences (T,), and where wanted the gradients of hidden and weight of their sum, weighted
    by factor: one number, or upstream gradients (T,), in which case the divergences are known."""
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    itemsize = hidden.element_size() + teacher.element_size()
    held, _ = chunks.rows(tokens, width, vocab, itemsize, chunk_size=chunk_size)
    losses, stats = js.empty(hidden)
    dhidden = hidden.new_empty((tokens, width) if gradients[0] else (0,))
    dweight = chunks.Sum((vocab, width), weight, cdiv(tokens, max(held, 1))) \
        if gradients[1] else None
    mine, theirs = hidden.new_empty((held, vocab)), teacher.new_empty((held, vocab))
    for rows in chunks.spans(tokens, max(held, 1)):
        logits, taught = (buffer[: rows.stop - rows.start] for buffer in (mine, theirs))
        chunks.linear(hidden[rows], weight, None, logits)
        chunks.linear(teacher[rows], teacher_weight, None, taught)
        both = logits, taught, None if labels is None else labels[rows]
        if factor.dim() or not any(gradients):
            js.measure(*both, losses[rows], stats[rows], *options)
        else:
            losses[rows] = js.overwrite(*both, factor, *options)
        if factor.dim():
            js.differentiate(*both, stats[rows], factor[rows], logits, *options)
        if gradients[0]:
            chunks.product(logits, weight, dhidden[rows])
        if dweight:
            dweight.add(logits.t(), hidden[rows])
    return losses, dhidden, dweight.result() if dweight else weight.new_empty((0,))


@torch.library.custom_op("fastllm::linear_jsd_forward_backward", mutates_args=())
def _gradients(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
               labels: Tensor | None, factor: Tensor, beta: float, temperature: float,
               ignore_index: int, chunk_size: int | None, for_hidden: bool,
               for_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """factor (one number) times the divergences' sum, and its gradients; empty where not wanted."""
    losses, dhidden, dweight = _loop(hidden, weight, teacher, teacher_weight, labels, factor,
                                     (beta, temperature, ignore_index), chunk_size,
                                     (for_hidden, for_weight))
    return losses.sum() * factor, dhidden, dweight


@_gradients.register_fake
def _gradients_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight = rest[-2:]
    return (hidden.new_empty((), dtype=torch.float32),
            hidden.new_empty(hidden.shape if for_hidden else (0,)),
            weight.new_empty(weight.shape if for_weight else (0,)))


@torch.library.custom_op("fastllm::linear_jsd_attach", mutates_args=())
def _attach(loss: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor,
            dweight: Tensor) -> Tensor:
    """The loss, as a function of hidden and weight, whose gradients lie ready."""
    return loss.clone()


@_attach.register_fake
def _attach_fake(loss: Tensor, *_: Any) -> Tensor:
    return loss.new_empty(())


def _attach_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[3:])


def _attach_autograd(ctx, upstream: Tensor):
    gradients = [gradient if due else None for gradient, due in
                 zip(ctx.saved_tensors, ctx.needs_input_grad[1:3], strict=True)]
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        if torch.compiler.is_compiling():  # which reuses memory itself, and wants no mutation
            gradients[i] = gradient * upstream
        else:  # a second backward finds the version counter moved and raises
            ce.scale_rows(gradient, upstream)
    return None, *gradients, None, None


_attach.register_autograd(_attach_autograd, setup_context=_attach_setup)


@torch.library.custom_op("fastllm::linear_jsd", mutates_args=())
def _each(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
          labels: Tensor | None, beta: float, temperature: float, ignore_index: int,
          chunk_size: int | None) -> Tensor:
    """Each token's divergence (T,)."""
    return _loop(hidden, weight, teacher, teacher_weight, labels,
                 hidden.new_ones((), dtype=torch.float32), (beta, temperature, ignore_index),
                 chunk_size, (False, False))[0]


@_each.register_fake
def _each_fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float32)


@torch.library.custom_op("fastllm::linear_jsd_backward", mutates_args=())
def _each_backward(upstream: Tensor, hidden: Tensor, weight: Tensor, teacher: Tensor,
                   teacher_weight: Tensor, labels: Tensor | None, beta: float, temperature: float,
                   ignore_index: int, chunk_size: int | None, for_hidden: bool,
                   for_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients for upstream gradients (T,), from logits made again; empty where not wanted."""
    return _loop(hidden, weight, teacher, teacher_weight, labels, upstream,
                 (beta, temperature, ignore_index), chunk_size, (for_hidden, for_weight))[1:]


@_each_backward.register_fake
def _each_backward_fake(upstream: Tensor, hidden: Tensor, weight: Tensor,
                        *rest: Any) -> tuple[Tensor, Tensor]:
    for_hidden, for_weight = rest[-2:]
    return (hidden.new_empty(hidden.shape if for_hidden else (0,)),
            weight.new_empty(weight.shape if for_weight else (0,)))


def _each_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _each_autograd(ctx, upstream: Tensor):
    wanted = ctx.needs_input_grad[:2]
    made = _each_backward(upstream, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(each if due else None for each, due in zip(made, wanted, strict=True)), *[None] * 7


_each.register_autograd(_each_autograd, setup_context=_each_setup)


def linear_jsd(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
               teacher_weight: Tensor, labels: Tensor | None = None, *, beta: float = 0.5,
               temperature: float = 1.0, ignore_index: int = -100, reduction: str = "sum",
               chunk_size: int | None = None) -> Tensor:
    """`jsd` of student_hidden (T, H) @ student_weight (V, H).T from the teacher's, float32.

    teacher_hidden (T, G) and teacher_weight (V, G) are constants, of any width and type. The
    options are those of `jsd`. Neither's logits are ever all in memory; frozen arguments cost
    nothing. chunk_size: tokens whose logits are held at once (default: by cost and memory).
    """
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, chunk_size)
    js.check_options("linear_jsd", beta, temperature, reduction)
    hidden, weight, teacher, teacher_weight = autocast(
        student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach())
    for name, a, b in (("student", hidden, weight), ("teacher", teacher, teacher_weight)):
        if a.dtype != b.dtype:
            raise TypeError(f"linear_jsd: {name}_hidden is {a.dtype}, {name}_weight {b.dtype}; "
                            "make them one")
    options = (labels, float(beta), temperature, ignore_index, chunk_size)
    if reduction == "none":
        return _each(hidden, weight, teacher, teacher_weight, *options)
    factor, divide = js.divide_early(reduction, hidden, labels, ignore_index)
    due = torch.is_grad_enabled()
    loss, dhidden, dweight = _gradients(
        hidden.detach(), weight.detach(), teacher, teacher_weight, labels, factor, *options[1:],
        due and hidden.requires_grad, due and weight.requires_grad)
    loss = _attach(loss, hidden, weight, dhidden, dweight)
    return loss if divide is None else loss / divide


def _check(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
           labels: Tensor | None, chunk_size: int | None) -> None:
    """Raise ValueError where shapes or chunk_size make no sense."""
    tensors = (hidden, weight, teacher, teacher_weight)
    if any(tensor.dim() != 2 for tensor in tensors) or hidden.shape[1] != weight.shape[1] or (
            teacher.shape[1] != teacher_weight.shape[1] or hidden.shape[0] != teacher.shape[0]
            or weight.shape[0] != teacher_weight.shape[0]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"linear_jsd: {shapes} must be (T, H), (V, H), (T, G) and (V, G)")
    if labels is not None and (labels.shape != hidden.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"linear_jsd: labels {tuple(labels.shape)} {labels.dtype} must be "
                         f"({hidden.shape[0]},) int64")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_jsd: chunk_size {chunk_size} is not positive")


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float | None = 0.2,
           **options: Any) -> Call:
    """ignored None: no labels."""
    tokens, width, teacher_width, vocab = shape
    hidden = normal((tokens, width), dtype, device, generator)
    weight = normal((vocab, width), dtype, device, generator, scale=2 * width**-0.5)
    teacher = normal((tokens, teacher_width), dtype, device, generator, grad=False)
    teacher_weight = normal((vocab, teacher_width), dtype, device, generator, grad=False,
                            scale=2 * teacher_width**-0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    labels = labels.masked_fill(drawn < (ignored or 0.0), -100)
    args = (hidden, weight, teacher, teacher_weight)
    return Call(args if ignored is None else (*args, labels), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, width, teacher_width, vocab = shape
    student = (tokens + vocab) * width * dtype.itemsize
    if direction == "forward":
        return student + (tokens + vocab) * teacher_width * dtype.itemsize + 8 * tokens
    return 2 * student


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, width, teacher_width, vocab = shape
    if direction == "forward":
        return 2 * tokens * vocab * (width + teacher_width)
    return 4 * tokens * vocab * width


KERNEL = Kernel(
    name="linear_jsd", public=linear_jsd, reference=reference, inputs=inputs,
    axes=("tokens", "hidden_size", "teacher_hidden_size", "vocab_size"), composition=True,
    bound="flops",
    test_shapes=((1, 1, 1, 1), (5, 16, 8, 33), (13, 24, 40, 100)),
    empty_shapes=((0, 4, 4, 8),),
    bench_shapes=((8192, 2048, 4096, 128256),),
    audit_shapes=((2, 512, 512, 6400),),
    traffic_shapes=((64, 32, 32, 256), (256, 32, 32, 256)),
    variants={
        "chunks": {"chunk_size": 3}, "mean": {"reduction": "mean", "chunk_size": 4},
        "none": {"reduction": "none", "chunk_size": 4}, "reverse": {"beta": 1.0},
        "all ignored, mean": {"ignored": 2.0, "reduction": "mean"},
        "every option": {"ignored": None, "beta": 0.3, "temperature": 1.5, "chunk_size": 2,
                         "reduction": "mean"},
    },
    overflow_shape=(3, 8, 8, 5),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
