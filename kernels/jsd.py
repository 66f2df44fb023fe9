"""Generalised Jensen-Shannon divergence of a student's logits (T, V) from a teacher's.

With q = softmax(student / temperature), p = softmax(teacher / temperature), a token's divergence is
    beta = 0      KL(p || q) = sum p log(p / q)            forward KL
    beta = 1      KL(q || p) = sum q log(q / p)            reverse KL
    between       beta KL(p || m) + (1 - beta) KL(q || m)  with m = beta p + (1 - beta) q
in float32: the convention of GKD, TRL and Liger-Kernel, whose ends are not the limits of the middle
(which tends to 0 there). The teacher is a constant. With o_j = -p_j, q_j log(q_j / p_j) and
(1 - beta) q_j log(q_j / m_j) in the three cases, the student's gradient is
    dz_j = (o_j - q_j sum o) / temperature
The factor temperature^2, which keeps gradients comparable between temperatures (Hinton et al.),
is the caller's. A token labelled ignore_index has divergence 0 and gradient exactly 0, whatever its
logits hold, and they are not read.
Floor, e bytes an element: forward 2eTV, backward 3eTV; in place 3eTV for both together.
Sources: Agarwal et al., arXiv:2306.13649 (GKD); Hinton et al., arXiv:1503.02531.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import cross_entropy as ce
from fastllm.kernels._softmax import LN2, fold, level, load_rows, log2, scales, tiling, weigh
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, rows_of, tl, warps_for

# Rows up to this long are held in registers, both of them, and read once.
SHORT = 8192


def reference(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
              beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100,
              reduction: str = "sum", inplace: bool = False) -> Tensor:
    """The same in plain PyTorch; `inplace` is a permission that it does not use."""
    wide = compute_dtype(student_logits)
    # Filled first: a NaN in an ignored row would come back as NaN times zero in the backward.
    ignored = torch.zeros(student_logits.shape[:1], dtype=torch.bool, device=student_logits.device
                          ) if labels is None else labels == ignore_index
    log_q, log_p = (torch.log_softmax(
        logits.masked_fill(ignored[:, None], 0.0).to(wide) / temperature, -1)
        for logits in (student_logits, teacher_logits.detach()))
    # A word that neither can say counts for nothing.
    dead = (log_q == -torch.inf) & (log_p == -torch.inf)
    log_q, log_p = log_q.masked_fill(dead, -1e9), log_p.masked_fill(dead, -1e9)
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        terms = p * (log_p - log_q).masked_fill(p == 0, 0.0)
    elif beta == 1:
        terms = q * (log_q - log_p).masked_fill(q == 0, 0.0)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        terms = (beta * p * (log_p - log_m).masked_fill(p == 0, 0.0)
                 + (1 - beta) * q * (log_q - log_m).masked_fill(q == 0, 0.0))
    return reduce(terms.sum(-1).masked_fill(ignored, 0.0), labels, reduction, ignore_index)


def count(losses: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor | int:
    """How many tokens are trained, at least 1; left on the device where labels say it."""
    if labels is None:
        return max(losses.shape[0], 1)
    return (labels != ignore_index).sum().clamp(min=1)


def reduce(losses: Tensor, labels: Tensor | None, reduction: str, ignore_index: int) -> Tensor:
    """Per-token losses as they are, summed, or averaged over the trained tokens (0 without any)."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / count(losses, labels, ignore_index)


def divide_early(reduction: str, logits: Tensor, labels: Tensor | None,
                 ignore_index: int) -> tuple[Tensor, Tensor | int | None]:
    """What a gradient that is made with the loss is multiplied by (0-d float32), and what is left
    to divide the loss by.

    A mean's division goes into the pass that writes the gradient, and saves another; but not in
    float16, whose small numbers would vanish before a loss scale lifts them.
    """
    one = logits.new_ones((), dtype=torch.float32)
    if reduction != "mean":
        return one, None
    trained = count(logits, labels, ignore_index)
    return (one, trained) if logits.dtype == torch.float16 else (one / trained, None)


@jit
def _terms(log_q, log_p, q, p, beta, KIND: tl.constexpr):
    """Of each word, its part of the divergence and o, logarithms being to the base 2."""
    if KIND == "forward":
        return weigh(p, log_p - log_q), -p
    if KIND == "reverse":
        own = weigh(q, log_q - log_p)
        return own, own
    # Next to nothing is added: where both underflow the logarithm would be -inf.
    log_m = log2((beta * p + 1e-37) + (1.0 - beta) * q)
    own = (1.0 - beta) * weigh(q, log_q - log_m)
    return beta * weigh(p, log_p - log_m) + own, own


@jit
def _store_stats(stats, row, within, kept, s_peak, s_log, t_peak, t_log, center):
    at = stats + row * 5
    tl.store(at, s_peak, mask=within)
    tl.store(at + 1, s_log, mask=within)
    tl.store(at + 2, t_peak, mask=within)
    tl.store(at + 3, t_log, mask=within)
    tl.store(at + 4, tl.where(kept, center, 0.0), mask=within)


@jit
def _kept(labels, row, tokens, stride, ignore_index, LABELS: tl.constexpr):
    """Which rows there are, and which of them count."""
    within = row < tokens
    if LABELS:
        return within, tl.load(labels + row * stride, mask=within,
                               other=ignore_index) != ignore_index
    return within, within


@jit
def _short_kernel(student, teacher, labels, losses, stats, gradient, factor, student_stride,
                  teacher_stride, label_stride, gradient_stride, tokens, vocab, ignore_index,
                  scale, unit, slope, beta, KIND: tl.constexpr, LABELS: tl.constexpr,
                  GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program ROWS tokens, each row read once: their divergences, and statistics or GRADIENT
    times factor. `gradient` may be `student` itself."""
    # int64: row * stride passes 2^31 in real runs.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within, kept = _kept(labels, row, tokens, label_stride, ignore_index, LABELS)
    column = tl.arange(0, BLOCK)
    s = load_rows(student + row * student_stride, column, kept, vocab, 1.0, False)
    t = load_rows(teacher + row * teacher_stride, column, kept, vocab, 1.0, False)
    empty = tl.full((ROWS,), -float("inf"), tl.float32)
    s_peak, s_above, s_weight, _ = fold(s, empty, scale)
    t_peak, t_above, t_weight, _ = fold(t, empty, scale)
    s_log = tl.log2(tl.sum(s_weight, axis=1))
    t_log = tl.log2(tl.sum(t_weight, axis=1))
    log_q = s_above - s_log[:, None]
    log_p = t_above - t_log[:, None]
    # Powers of 2 again, not s_weight / sum: 64 registers rather than 94, two programs an SM.
    q = tl.exp2(log_q)
    part, own = _terms(log_q, log_p, q, tl.exp2(log_p), beta, KIND)
    tl.store(losses + row, tl.where(kept, tl.sum(part, axis=1) * unit, 0.0), mask=within)
    center = tl.sum(own, axis=1)
    if GRADIENT:
        dz = (own - q * center[:, None]) * (slope * tl.load(factor))
        dz = tl.where(kept[:, None], dz, 0.0)
        tl.store(gradient + (row * gradient_stride)[:, None] + column[None, :],
                 dz.to(gradient.dtype.element_ty),
                 mask=within[:, None] & (column < vocab)[None, :])
    else:
        _store_stats(stats, row, within, kept, s_peak, s_log, t_peak, t_log, center)


@jit
def _long_kernel(student, teacher, labels, losses, stats, student_stride, teacher_stride,
                 label_stride, tokens, vocab, ignore_index, scale, unit, beta, KIND: tl.constexpr,
                 LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program ROWS tokens, BLOCK columns at a time: divergences and statistics.

    Peaks and sums come from one pass over both rows, and with them both KL divergences, as moments
    of the difference; what lies between the two is no moment and takes a second pass.
    """
    # int64: row * stride passes 2^31 at 16,384 tokens of a 131,072-word vocabulary.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within, kept = _kept(labels, row, tokens, label_stride, ignore_index, LABELS)
    student += row * student_stride
    teacher += row * teacher_stride
    s_peak = tl.full((ROWS,), -float("inf"), tl.float32)
    t_peak = tl.full((ROWS,), -float("inf"), tl.float32)
    # Sums stay apart by lane to the end: a reduction over the warps costs more than an addition.
    s_total = tl.zeros((ROWS, BLOCK), tl.float32)
    t_total = tl.zeros((ROWS, BLOCK), tl.float32)
    moment = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = load_rows(student, column, kept, vocab, 1.0, False)
        t = load_rows(teacher, column, kept, vocab, 1.0, False)
        s_peak, s_above, s_weight, s_shift = fold(s, s_peak, scale)
        t_peak, t_above, t_weight, t_shift = fold(t, t_peak, scale)
        if KIND == "forward":  # sum of p (log p - log q), each log above its peak
            moment = (moment + (t_shift - s_shift) * t_total) * tl.exp2(t_shift)
            moment += weigh(t_weight, t_above - s_above)
        if KIND == "reverse":
            moment = (moment + (s_shift - t_shift) * s_total) * tl.exp2(s_shift)
            moment += weigh(s_weight, s_above - t_above)
        s_total = s_total * tl.exp2(s_shift) + s_weight
        t_total = t_total * tl.exp2(t_shift) + t_weight
    s_sum = tl.sum(s_total, axis=1)
    t_sum = tl.sum(t_total, axis=1)
    s_log = tl.log2(s_sum)
    t_log = tl.log2(t_sum)
    if KIND == "forward":
        loss = tl.sum(moment, axis=1) / t_sum + (s_log - t_log)
        center = tl.full((ROWS,), -1.0, tl.float32)
    elif KIND == "reverse":
        loss = tl.sum(moment, axis=1) / s_sum + (t_log - s_log)
        center = loss
    else:
        parts = tl.zeros((ROWS, BLOCK), tl.float32)
        owns = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            s = load_rows(student, column, kept, vocab, 1.0, False)
            t = load_rows(teacher, column, kept, vocab, 1.0, False)
            log_q = level(s, s_peak, s_log, scale)
            log_p = level(t, t_peak, t_log, scale)
            part, own = _terms(log_q, log_p, tl.exp2(log_q), tl.exp2(log_p), beta, KIND)
            parts += part
            owns += own
        loss = tl.sum(parts, axis=1)
        center = tl.sum(owns, axis=1)
    tl.store(losses + row, tl.where(kept, loss * unit, 0.0), mask=within)
    _store_stats(stats, row, within, kept, s_peak, s_log, t_peak, t_log, center)


@jit
def _gradient_kernel(student, teacher, labels, stats, upstream, gradient, student_stride,
                     teacher_stride, label_stride, upstream_stride, gradient_stride, tokens, vocab,
                     blocks, ignore_index, scale, slope, beta, KIND: tl.constexpr,
                     LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile of ROWS tokens by BLOCK columns; `gradient` may be `student` itself."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    within, kept = _kept(labels, row, tokens, label_stride, ignore_index, LABELS)
    s = load_rows(student + row * student_stride, column, kept, vocab, 1.0, False)
    t = load_rows(teacher + row * teacher_stride, column, kept, vocab, 1.0, False)
    at = stats + row * 5
    log_q = level(s, tl.load(at, mask=kept, other=0.0), tl.load(at + 1, mask=kept, other=0.0),
                  scale)
    log_p = level(t, tl.load(at + 2, mask=kept, other=0.0), tl.load(at + 3, mask=kept, other=0.0),
                  scale)
    q = tl.exp2(log_q)
    _, own = _terms(log_q, log_p, q, tl.exp2(log_p), beta, KIND)
    center = tl.load(at + 4, mask=kept, other=0.0)
    factor = slope * tl.load(upstream + row * upstream_stride, mask=kept, other=0.0)
    dz = tl.where(kept[:, None], (own - q * center[:, None]) * factor[:, None], 0.0)
    tl.store(gradient + (row * gradient_stride)[:, None] + column[None, :],
             dz.to(gradient.dtype.element_ty), mask=within[:, None] & (column < vocab)[None, :])


def _kind(beta: float, temperature: float) -> tuple[str, float]:
    """The case, and what (o - q sum o) is multiplied by: o holds a logarithm but for beta 0."""
    kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "between")
    return kind, (1.0 if kind == "forward" else LN2) / temperature


def _labelled(labels: Tensor | None, other: Tensor) -> tuple[Tensor, int, bool]:
    """A pointer (anything where there are no labels), its stride, and whether it is one."""
    return (other, 0, False) if labels is None else (labels, labels.stride(0), True)


def measure(student: Tensor, teacher: Tensor, labels: Tensor | None, losses: Tensor, stats: Tensor,
            beta: float, temperature: float, ignore_index: int, gradient: Tensor | None = None,
            factor: Tensor | None = None) -> None:
    """Write the divergences, and the statistics; or, if asked and the rows are short, in place of
    them the gradient times `factor` (0-d float32)."""
    require("jsd", student, teacher)
    tokens, vocab = student.shape
    if not tokens or not vocab:
        losses.zero_()
        return
    s, t = rows_of(student), rows_of(teacher)
    pointer, label_stride, given = _labelled(labels, losses)
    rows, block, warps = tiling(vocab)
    kind, slope = _kind(beta, temperature)
    scale, _ = scales(temperature, None)
    with torch.cuda.device_of(student):
        if vocab > SHORT:
            _long_kernel[(cdiv(tokens, rows),)](
                s, t, pointer, losses, stats, s.stride(0), t.stride(0), label_stride, tokens,
                vocab, ignore_index, scale, LN2, beta, KIND=kind, LABELS=given, ROWS=rows,
                BLOCK=block, num_warps=warps)
            return
        block = next_power_of_2(vocab)
        target = losses if gradient is None else gradient
        _short_kernel[(cdiv(tokens, rows),)](
            s, t, pointer, losses, stats, target, losses if factor is None else factor, s.stride(0),
            t.stride(0), label_stride, target.stride(0), tokens, vocab, ignore_index, scale, LN2,
            slope, beta, KIND=kind, LABELS=given, GRADIENT=gradient is not None, ROWS=rows,
            BLOCK=block, num_warps=warps_for(rows * block, per_thread=16))


def differentiate(student: Tensor, teacher: Tensor, labels: Tensor | None, stats: Tensor,
                  upstream: Tensor, gradient: Tensor, beta: float, temperature: float,
                  ignore_index: int) -> None:
    """Write the student's gradient into `gradient` (unit column stride), which may be `student`."""
    tokens, vocab = student.shape
    if not tokens or not vocab:
        return
    s, t = rows_of(student), rows_of(teacher)
    pointer, label_stride, given = _labelled(labels, stats)
    rows, block, warps = tiling(vocab)
    blocks = cdiv(vocab, block)
    kind, slope = _kind(beta, temperature)
    scale, _ = scales(temperature, None)
    with torch.cuda.device_of(student):
        _gradient_kernel[(cdiv(tokens, rows) * blocks,)](
            s, t, pointer, stats, upstream, gradient, s.stride(0), t.stride(0), label_stride,
            upstream.stride(0), gradient.stride(0), tokens, vocab, blocks, ignore_index,
            scale, slope, beta, KIND=kind, LABELS=given, ROWS=rows, BLOCK=block,
            num_warps=warps)


def empty(student: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences and statistics of as many rows, yet to be written."""
    tokens = student.shape[0]
    return (student.new_empty((tokens,), dtype=torch.float32),
            student.new_empty((tokens, 5), dtype=torch.float32))


@torch.library.custom_op("fastllm::jsd", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, labels: Tensor | None, beta: float,
             temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Divergences (T,) and statistics (T, 5): student's peak and log of the sum above it, the
    teacher's, and the sum of o."""
    losses, stats = empty(student)
    measure(student, teacher, labels, losses, stats, beta, temperature, ignore_index)
    return losses, stats


@_forward.register_fake
def _forward_fake(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(student)


@torch.library.custom_op("fastllm::jsd_backward", mutates_args=())
def _backward(upstream: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None,
              stats: Tensor, beta: float, temperature: float, ignore_index: int) -> Tensor:
    """The student's gradient, contiguous, for upstream gradients (T,) of any stride."""
    gradient = student.new_empty(student.shape)
    differentiate(student, teacher, labels, stats, upstream, gradient, beta, temperature,
                  ignore_index)
    return gradient


@_backward.register_fake
def _backward_fake(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.options = inputs[3:]


def _autograd(ctx, upstream: Tensor, _: Tensor):
    return _backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("fastllm::jsd_", mutates_args={"student"})
def overwrite(student: Tensor, teacher: Tensor, labels: Tensor | None, factor: Tensor, beta: float,
              temperature: float, ignore_index: int) -> Tensor:
    """Divergences (T,); each row of the student's logits (unit column stride) becomes its
    divergence's gradient times factor (0-d float32)."""
    losses, stats = empty(student)
    options = beta, temperature, ignore_index
    measure(student, teacher, labels, losses, stats, *options, student, factor)
    if student.shape[1] > SHORT:
        differentiate(student, teacher, labels, stats, factor.expand(losses.shape), student,
                      *options)
    return losses


@overwrite.register_fake
def _overwrite_fake(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[:1], dtype=torch.float32)


def check_options(op: str, beta: float, temperature: float, reduction: str) -> None:
    """Raise ValueError where an option makes no sense."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{op}: beta {beta} is not in [0, 1]")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature {temperature} is not positive")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{op}: reduction {reduction!r} is not one of 'none', 'sum', 'mean'")


def jsd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
        beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100,
        reduction: str = "sum", inplace: bool = False) -> Tensor:
    """Generalised Jensen-Shannon divergence of softmax(student) from softmax(teacher), float32.

    Logits (T, V) of any float types, not log-probabilities. beta: 0 is KL(teacher || student), 1 is
    KL(student || teacher), between them beta KL(teacher || m) + (1 - beta) KL(student || m) with
    m = beta teacher + (1 - beta) student. temperature divides both logits; the factor temperature^2
    is the caller's. The teacher is a constant: no gradient reaches it. labels (T,) int64 only say
    which tokens to leave out (those that are ignore_index); None: none.
    reduction: "sum", "mean" over the tokens not ignored (0 if none is), or "none" (T,).
    inplace: where a gradient is due, the student's logits (unit column stride) are overwritten with
    it in the same pass as the loss; anything else that saved them, and a second backward, raises.
    """
    if student_logits.dim() != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(f"jsd: student_logits {tuple(student_logits.shape)} and teacher_logits "
                         f"{tuple(teacher_logits.shape)} must be (T, V) of one shape")
    if labels is not None and (labels.shape != student_logits.shape[:1]
                               or labels.dtype != torch.int64):
        raise ValueError(f"jsd: labels {tuple(labels.shape)} {labels.dtype} must be "
                         f"({student_logits.shape[0]},) int64")
    check_options("jsd", beta, temperature, reduction)
    teacher, options = teacher_logits.detach(), (float(beta), temperature, ignore_index)
    if not (inplace and student_logits.requires_grad and torch.is_grad_enabled()):
        losses, _ = _forward(student_logits, teacher, labels, *options)
        return reduce(losses, labels, reduction, ignore_index)
    if student_logits.shape[1] > 1 and student_logits.stride(1) != 1:
        raise ValueError("jsd in place: the student's logits must have unit stride along a row, "
                         f"not {student_logits.stride()}")
    gradient = student_logits.detach()  # shares the version counter: the overwriting shows
    factor, divide = divide_early(reduction, gradient, labels, ignore_index)
    losses = overwrite(gradient, teacher, labels, factor, *options) * factor
    losses = ce._attach(student_logits, gradient, losses)
    if reduction == "none":
        return losses
    return losses.sum() if divide is None else losses.sum() / divide


def kl_reference(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
                 reverse: bool = False, temperature: float = 1.0, ignore_index: int = -100,
                 reduction: str = "sum", inplace: bool = False) -> Tensor:
    return reference(student_logits, teacher_logits, labels, beta=float(reverse),
                     temperature=temperature, ignore_index=ignore_index, reduction=reduction)


def kl_div(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
           reverse: bool = False, temperature: float = 1.0, ignore_index: int = -100,
           reduction: str = "sum", inplace: bool = False) -> Tensor:
    """KL(teacher || student) of the softmax of logits (T, V); reverse: KL(student || teacher).

    `jsd` with beta 0 or 1; labels and the other options are as there.
    """
    return jsd(student_logits, teacher_logits, labels, beta=float(reverse),
               temperature=temperature, ignore_index=ignore_index, reduction=reduction,
               inplace=inplace)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float | None = 0.2,
           offset: float = 0.0, scale: float = 2.0, **options: Any) -> Call:
    """ignored None: no labels."""
    tokens, vocab = shape
    student, teacher = (normal((tokens, vocab), dtype, device, generator, grad=False, scale=scale)
                        for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    labels = labels.masked_fill(drawn < (ignored or 0.0), options.get("ignore_index", -100))
    args = ((student + offset).requires_grad_(), teacher)
    return Call(args if ignored is None else (*args, labels), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *,
                ignored: float | None = 0.2, inplace: bool = False, **_: Any) -> int:
    """Ignored rows are not read, but their gradients are written."""
    tokens, vocab = shape
    read = 2 * (1 - min(ignored or 0.0, 1.0)) * tokens
    again = 0 if inplace else read
    columns = read if direction == "forward" else again + tokens
    return round(dtype.itemsize * vocab * columns) + 12 * tokens


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (15 if direction == "forward" else 12) * shape[0] * shape[1]


KERNEL = Kernel(
    name="jsd", public=jsd, reference=reference, inputs=inputs,
    axes=("tokens", "vocab_size"),
    test_shapes=((1, 1), (3, 7), (13, 300), (2, 8300)),
    empty_shapes=((0, 8),),
    bench_shapes=((8192, 32000), (8192, 131072)),
    audit_shapes=((2, 6400), (2, 32000), (2, 131072)),
    traffic_shapes=((256, 512), (4096, 512)),
    variants={
        "forward": {"beta": 0.0}, "reverse": {"beta": 1.0}, "mostly teacher": {"beta": 0.9},
        "temperature": {"temperature": 2.0}, "mean": {"reduction": "mean"},
        "no labels": {"ignored": None, "reduction": "mean"}, "none": {"reduction": "none"},
        "all ignored": {"ignored": 2.0, "reduction": "mean"}, "shifted": {"offset": 200.0},
        "in place": {"inplace": True},
        "in place, every option": {"inplace": True, "beta": 0.3, "temperature": 1.5,
                                   "ignore_index": 1, "reduction": "mean"},
    },
    bench_options={"in place": {"inplace": True}},
    overflow_shape=(3, 9),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
