"""The device side of cross_entropy: its kernels, and what their launchers choose.

Two kernels, one program a row each: one reads the row for its loss, statistics and metrics and may
write the row's gradient over it, the other makes the gradient from the statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, tanh, tl, warps_for

# Columns of a row that the passes without anything to hold work on at once.
BLOCK = 8192


class Options(NamedTuple):
    """What an operator's arguments end in."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0




@jit
def _capped(raw, scale, softcap, SOFTCAP: tl.constexpr):
    values = raw.to(tl.float32) * scale
    if SOFTCAP:
        values = softcap * tanh(values / softcap)
    return values


@jit
def _widen(raw, start, vocab, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Capped logits, -inf past the row's end (where a cap would have made it finite)."""
    values = _capped(raw, scale, softcap, SOFTCAP)
    if SOFTCAP:
        values = tl.where(tl.arange(0, BLOCK) < vocab - start, values, -float("inf"))
    return values


@jit
def _load(source, start, vocab, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    # The start is added to the pointer, not to the lanes: one address serves all blocks then.
    lane = tl.arange(0, BLOCK)
    return tl.load(source + start + lane, mask=lane < vocab - start, other=-float("inf"),
                   eviction_policy=KEEP)


@jit
def _hold(source, start, vocab, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """HELD blocks from `start`, as they are."""
    blocks = ()
    for i in tl.static_range(HELD):
        block = (_load(source, start + i * BLOCK, vocab, "evict_first", BLOCK),)
        blocks = blocks + block  # type: ignore[assignment]
    return blocks


@jit
def _share(weight, start, vocab, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """Class weights of a block, 0 past the row's end; 1 where there are none."""
    shares = 1.0
    if WEIGHTS:
        lane = tl.arange(0, BLOCK)
        shares = tl.load(weight + start + lane, mask=lane < vocab - start, other=0.0)
    return shares.to(tl.float32) if WEIGHTS else shares


@jit
def _raise(height, peak, total, moment, METRICS: tl.constexpr):
    """Online softmax: sums above a peak become sums above the higher of it and `height`."""
    higher = tl.maximum(peak, height)
    # Sums over nothing but -inf are 0 whatever they stand above; -inf minus itself would be NaN.
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    fall = tl.where(peak == -float("inf"), 0.0, peak - anchor)
    if METRICS:
        moment = (moment + fall * total) * tl.exp(fall)
    return higher, anchor, total * tl.exp(fall), moment


@jit
def _add(raw, weight, start, vocab, anchor, total, plain, mass, moment, scale, softcap,
         SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTS: tl.constexpr, METRICS: tl.constexpr,
         BLOCK: tl.constexpr):
    """Add a block, lane by lane: exponentials above the anchor and those times the height, logits
    times weights, and weights. What is not wanted stays the number it is."""
    values = _widen(raw, start, vocab, scale, softcap, SOFTCAP, BLOCK)
    powers = tl.exp(values - anchor)
    total += powers
    if METRICS:
        moment += tl.where(powers == 0.0, 0.0, powers * (values - anchor))
    if SMOOTH:
        shares = _share(weight, start, vocab, WEIGHTS, BLOCK)
        plain += tl.where(tl.arange(0, BLOCK) < vocab - start, shares * values, 0.0)
        if WEIGHTS:
            mass += shares
    return total, plain, mass, moment


@jit
def _gather(sums, lanes, SMOOTH: tl.constexpr, WEIGHTS: tl.constexpr, METRICS: tl.constexpr):
    """Add the lanes' sums to the row's, four of each."""
    total = sums[0] + tl.sum(lanes[0], axis=0)
    plain, mass, moment = sums[1], sums[2], sums[3]
    if SMOOTH:
        plain += tl.sum(lanes[1], axis=0)
    if WEIGHTS:
        mass += tl.sum(lanes[2], axis=0)
    if METRICS:
        moment += tl.sum(lanes[3], axis=0)
    return total, plain, mass, moment


@jit
def _first(raw, start, height, BLOCK: tl.constexpr):
    """Columns where a block is as high as `height`, and a large number elsewhere."""
    return tl.where(raw.to(tl.float32) == height, start + tl.arange(0, BLOCK), 2147483647)


@jit
def _finish(row, losses, stats, metrics, predicted, tokens, vocab, labelled, share, poison, peak,
            total, plain, mass, moment, best, smoothing, z_loss, SMOOTH: tl.constexpr,
            WEIGHTS: tl.constexpr, METRICS: tl.constexpr):
    """Store what a row's sums come to; its statistics are peak, log of the sum above the peak, and
    the factor of the softmax in the gradient."""
    log_sum = tl.log(total)
    lse = peak + log_sum
    z = z_loss * lse * lse
    pull = (1.0 - smoothing) * share
    loss = pull * (log_sum + (peak - labelled))
    if SMOOTH:
        part = 1.0
        if WEIGHTS:
            part = mass / vocab
        loss += smoothing * (part * log_sum + (part * peak - plain / vocab))
        pull += smoothing * part
    pull += 2.0 * z_loss * lse
    tl.store(losses + row, loss + z + poison)
    tl.store(stats + row * 3, peak)
    tl.store(stats + row * 3 + 1, log_sum)
    tl.store(stats + row * 3 + 2, pull)
    if METRICS:
        tl.store(metrics + row, lse)
        tl.store(metrics + tokens + row, log_sum - moment / total)
        tl.store(metrics + 2 * tokens + row, z)
        tl.store(predicted + row, best.to(tl.int64))
    return log_sum, pull


@jit
def _ignore(row, losses, stats, metrics, predicted, tokens, METRICS: tl.constexpr):
    """What a token labelled ignore_index has."""
    tl.store(losses + row, 0.0)
    for i in tl.static_range(3):
        tl.store(stats + row * 3 + i, 0.0)
        if METRICS:
            tl.store(metrics + i * tokens + row, 0.0)
    if METRICS:
        tl.store(predicted + row, tl.full((), -1, tl.int64))


@jit
def _turn(raw, target, weight, start, place, columns, vocab, peak, log_sum, pull, hit, smoothing,
          softcap, scale, factor, SOFTCAP: tl.constexpr, WEIGHTS: tl.constexpr,
          BLOCK: tl.constexpr):
    """Store the gradient of a block of logits: d loss / d logit times `factor`; the label's column
    is `place`."""
    lane = tl.arange(0, BLOCK)
    values = _widen(raw, start, columns, scale, softcap, SOFTCAP, BLOCK)
    slope = tl.exp((values - peak) - log_sum) * pull
    slope -= smoothing / vocab * _share(weight, start, columns, WEIGHTS, BLOCK)
    slope = tl.where(lane == place - start, slope - hit, slope)
    if SOFTCAP:
        ratio = values / softcap
        slope *= 1.0 - ratio * ratio
    tl.store(target + start + lane, (slope * factor).to(target.dtype.element_ty),
             mask=lane < columns - start)


@jit
def _clear(target, vocab, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), dtype=target.dtype.element_ty)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(target + column, zero, mask=column < vocab)


@jit
def _loss_kernel(logits, labels, weight, losses, stats, metrics, predicted, upstream,
                 logits_stride, label_stride, upstream_stride, tokens, vocab, ignore_index,
                 smoothing, z_loss, softcap, scale, one, SOFTCAP: tl.constexpr,
                 SMOOTH: tl.constexpr, WEIGHT: tl.constexpr, METRICS: tl.constexpr,
                 GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, HELD: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One program a row: its loss, statistics and metrics; with GRADIENT the row becomes its
    loss's gradient. The row's last HELD blocks stay in registers from one to the other.

    Every element is rewritten by the thread that read it, and the label's logit is read before
    the reductions, which are barriers.
    """
    # int64: row * vocab passes 2^31 at 16,384 tokens of a 131,072-word vocabulary.
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    label = tl.load(labels + row * label_stride)
    if label == ignore_index:
        _ignore(row, losses, stats, metrics, predicted, tokens, METRICS)
        if GRADIENT:
            _clear(source, vocab, BLOCK)
        return
    valid = (label >= 0) & (label < vocab)
    poison = tl.where(valid, 0.0, float("nan"))
    labelled = _capped(tl.load(source + label, mask=valid, other=0.0), scale, softcap, SOFTCAP)
    share = 1.0
    if WEIGHT:
        share = tl.load(weight + label, mask=valid, other=0.0).to(tl.float32)
    WEIGHTS: tl.constexpr = WEIGHT and SMOOTH
    # What will be read again should be found in L2; what is read once should leave it to others.
    KEEP: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    none = tl.zeros((BLOCK,), tl.float32)
    total, plain, mass, moment = 0.0, 0.0, 0.0, 0.0
    peak, top, best = -float("inf"), -float("inf"), 0
    body = tl.maximum(tl.cdiv(vocab, BLOCK) - HELD, 0) * BLOCK
    for start in range(0, body, BLOCK):
        raw = _load(source, start, vocab, KEEP, BLOCK)
        height = tl.max(raw.to(tl.float32), axis=0)
        peak, anchor, total, moment = _raise(_capped(height, scale, softcap, SOFTCAP), peak, total,
                                             moment, METRICS)
        lanes = _add(raw, weight, start, vocab, anchor, none, none, none, none, scale, softcap,
                     SOFTCAP, SMOOTH, WEIGHTS, METRICS, BLOCK)
        total, plain, mass, moment = _gather((total, plain, mass, moment), lanes, SMOOTH, WEIGHTS,
                                             METRICS)
        if METRICS:
            first = tl.min(_first(raw, start, height, BLOCK), axis=0)
            best = tl.where(height > top, first, best)
            top = tl.maximum(top, height)
    held = _hold(source, body, vocab, HELD, BLOCK)
    highest = held[0]
    for i in tl.static_range(HELD - 1):
        highest = tl.maximum(highest, held[i + 1])
    height = tl.max(highest.to(tl.float32), axis=0)
    peak, anchor, total, moment = _raise(_capped(height, scale, softcap, SOFTCAP), peak, total,
                                         moment, METRICS)
    lanes = (none, none, none, none)
    for i in tl.static_range(HELD):
        lanes = _add(held[i], weight, body + i * BLOCK, vocab, anchor, lanes[0], lanes[1], lanes[2],
                     lanes[3], scale, softcap, SOFTCAP, SMOOTH, WEIGHTS, METRICS, BLOCK)
    total, plain, mass, moment = _gather((total, plain, mass, moment), lanes, SMOOTH, WEIGHTS,
                                         METRICS)
    if METRICS:
        # A cap may round neighbours together: the argmax is that of the logits themselves.
        first = _first(held[0], body, height, BLOCK)
        for i in tl.static_range(HELD - 1):
            first = tl.minimum(first, _first(held[i + 1], body + (i + 1) * BLOCK, height, BLOCK))
        best = tl.where(height > top, tl.min(first, axis=0), best)
    log_sum, pull = _finish(row, losses, stats, metrics, predicted, tokens, vocab, labelled, share,
                            poison, peak, total, plain, mass, moment, best, smoothing, z_loss,
                            SMOOTH, WEIGHTS, METRICS)
    if GRADIENT:
        factor = (1.0 + poison) * scale
        if UPSTREAM:
            factor *= tl.load(upstream + row * upstream_stride).to(tl.float32)
        hit = (1.0 - smoothing) * share
        place = label.to(tl.int32)
        for i in tl.static_range(HELD):
            # `one` is 1, which the compiler cannot know: it widens the held numbers once more,
            # where it would otherwise keep them in float32, twice the registers, and spill.
            _turn(held[i] * one.to(held[i].dtype), source, weight, body + i * BLOCK, place, vocab,
                  vocab, peak, log_sum, pull, hit, smoothing, softcap, scale, factor, SOFTCAP,
                  WEIGHTS, BLOCK)
        for done in range(0, body, BLOCK):
            start = body - BLOCK - done  # backwards: what was read last is nearest
            _turn(_load(source, start, vocab, "evict_first", BLOCK), source, weight, start, place,
                  vocab, vocab, peak, log_sum, pull, hit, smoothing, softcap, scale, factor,
                  SOFTCAP, WEIGHTS, BLOCK)


@jit
def _gradient_kernel(logits, labels, weight, stats, upstream, gradient, logits_stride,
                     label_stride, upstream_stride, gradient_stride, columns, first, vocab,
                     ignore_index, smoothing, softcap, scale, SOFTCAP: tl.constexpr,
                     SMOOTH: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: the gradient of columns [first, first + columns) of a vocabulary, from
    the row's statistics; `gradient` may be `logits` itself."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    target = gradient + row * gradient_stride
    label = tl.load(labels + row * label_stride)
    if label == ignore_index:
        _clear(target, columns, BLOCK)
        return
    valid = (label >= 0) & (label < vocab)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32) * scale
    factor *= tl.where(valid, 1.0, float("nan"))
    peak = tl.load(stats + row * 3)
    log_sum = tl.load(stats + row * 3 + 1)
    pull = tl.load(stats + row * 3 + 2)
    hit = 1.0 - smoothing
    if WEIGHT:
        hit *= tl.load(weight + label, mask=valid, other=0.0).to(tl.float32)
    place = (label - first).to(tl.int32)
    for start in range(0, columns, BLOCK):
        _turn(_load(source, start, columns, "evict_first", BLOCK), target, weight + first, start,
              place, columns, vocab, peak, log_sum, pull, hit, smoothing, softcap, scale, factor,
              SOFTCAP, WEIGHT and SMOOTH, BLOCK)


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


def launch_losses(logits: Tensor, labels: Tensor, weight: Tensor | None, upstream: Tensor | None,
                  options: Options, outputs: tuple[Tensor, ...], gradient: bool) -> None:
    """Fill losses, stats, metrics and predicted (the last two where they have elements)."""
    require("cross_entropy", logits, labels)
    losses, stats, metrics, predicted = outputs
    tokens, vocab = logits.shape
    if not tokens or not vocab:
        losses.zero_()
        return
    block, held, warps = _division(vocab, logits.element_size(), options, weight is not None,
                                   predicted.numel() > 0)
    with torch.cuda.device_of(logits):
        _loss_kernel[(tokens,)](
            logits, labels, losses if weight is None else weight, losses, stats, metrics, predicted,
            losses if upstream is None else upstream, logits.stride(0), labels.stride(0),
            _step(upstream), tokens, vocab, options.ignore_index, float(options.label_smoothing),
            float(options.z_loss), float(options.softcap or 0.0), float(options.logit_scale), 1.0,
            SOFTCAP=bool(options.softcap), SMOOTH=options.label_smoothing != 0.0,
            WEIGHT=weight is not None, METRICS=predicted.numel() > 0, GRADIENT=gradient,
            UPSTREAM=upstream is not None, HELD=held, BLOCK=block, num_warps=warps)


def _division(vocab: int, itemsize: int, options: Options, weighted: bool,
              watched: bool) -> tuple[int, int, int]:
    """The block of a row that a program works on at once, how many of them it holds, its warps.

    What no architecture spills, at 64 registers a thread of 1,024: of 16-bit logits a plain row of
    49,152 is held, and less with options that gather further sums.
    """
    smooth = options.label_smoothing != 0.0
    further = smooth + (smooth and weighted) + 2 * watched + (options.softcap is not None)
    block, held = (8192, 6) if not further else (8192, 4) if further == 1 else (4096, 2)
    block = min(2 * block // itemsize, next_power_of_2(cdiv(vocab, held)))
    return block, min(held, cdiv(vocab, block)), warps_for(block, per_thread=16 // itemsize)


def launch_gradient(logits: Tensor, labels: Tensor, weight: Tensor | None, stats: Tensor,
                    upstream: Tensor, gradient: Tensor, first: int, vocab: int,
                    options: Options) -> None:
    """Columns [first, first + n) of a vocabulary; gradient may be the logits themselves."""
    tokens, columns = logits.shape
    if not tokens or not columns:
        return
    block = min(BLOCK, next_power_of_2(columns))
    with torch.cuda.device_of(logits):
        _gradient_kernel[(tokens,)](
            logits, labels, stats if weight is None else weight, stats, upstream, gradient,
            logits.stride(0), labels.stride(0), _step(upstream), gradient.stride(0), columns, first,
            vocab, options.ignore_index, float(options.label_smoothing),
            float(options.softcap or 0.0), float(options.logit_scale),
            SOFTCAP=bool(options.softcap), SMOOTH=options.label_smoothing != 0.0,
            WEIGHT=weight is not None, BLOCK=block, num_warps=warps_for(block, per_thread=16))


def launch_scale(gradient: Tensor, upstream: Tensor) -> None:
    tokens, vocab = gradient.shape
    if tokens and vocab:
        block = min(BLOCK, next_power_of_2(vocab))
        with torch.cuda.device_of(gradient):
            _scale_kernel[(tokens,)](gradient, upstream, gradient.stride(0), _step(upstream),
                                     vocab, BLOCK=block, num_warps=warps_for(block))


def _step(upstream: Tensor | None) -> int:
    """The stride from a row's upstream gradient to the next; one scalar serves all rows."""
    return upstream.stride(0) if upstream is not None and upstream.dim() else 0


def outputs_for(logits: Tensor, watch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (T,), statistics (T, 3), metrics (3, T) and predictions (T,): empty if not watched."""
    tokens, wide = logits.shape[0], torch.float32
    watched = tokens if watch else 0
    return (logits.new_empty((tokens,), dtype=wide), logits.new_empty((tokens, 3), dtype=wide),
            logits.new_empty((3, watched), dtype=wide),
            logits.new_empty((watched,), dtype=torch.int64))
