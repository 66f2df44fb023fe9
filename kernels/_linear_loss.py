"""The loops over chunks of logits that linear_cross_entropy is made of, and what they are made of.

By rows, each chunk's logits become their gradient in the pass that reads their loss; by columns,
the statistics of an earlier pass over rows say what the gradient is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.kernels import _chunks as chunks
from fastllm.kernels import cross_entropy as ce
from fastllm.kernels._cross_entropy import Options
from fastllm.kernels._spec import compute_dtype
from fastllm.kernels._triton import cdiv

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Losses (T,), statistics (T, n), metrics (3, T) and predictions (T,), the last two if watched."""


@dataclass(frozen=True)
class Parts:
    """What the loops over chunks are made of, for one kind of tensor."""

    losses: Callable[..., Rows]
    """losses(logits, labels, ce_weight, watch, options)."""
    overwrite: Callable[..., Rows]
    """overwrite(logits, labels, ce_weight, upstream, watch, options): the same, and the logits
    become their gradient times upstream: None, a 0-d tensor or (T,)."""
    columns: Callable[..., None] | None = None
    """columns(logits, labels, ce_weight, stats, upstream, first, vocab, options): a chunk of
    columns becomes its gradient."""
    matmul: chunks.Matmul = chunks.product
    statistics: int = 0
    """The n of the statistics that `columns` needs."""
    cached: bool = True
    """On a CPU: chunks follow its cache, not what a GPU would want."""


# ------------------------------------------------------------------------------ plain torch


def _torch_losses(logits: Tensor, labels: Tensor, ce_weight: Tensor | None, watch: bool,
                  options: Options) -> Rows:
    block = ce.block_of(logits, labels, ce_weight, options)
    losses = ce.block_losses(block, options)
    smooth = options.label_smoothing
    pull = (1 - smooth) * block.share + 2 * options.z_loss * block.lse
    pull += smooth * (1.0 if block.shares is None else block.shares.mean())
    metrics, predicted = losses.new_empty((3, 0)), labels.new_empty((0,))
    if watch:
        seen = ce.block_metrics(logits, block, options)
        metrics, predicted = torch.stack((seen.lse, seen.entropy, seen.z_loss)), seen.predicted
    return losses, torch.stack((block.lse, pull), 1), metrics, predicted


def _torch_columns(logits: Tensor, labels: Tensor, ce_weight: Tensor | None, stats: Tensor,
                   upstream: Tensor, first: int, vocab: int, options: Options) -> None:
    wide, smooth = stats.dtype, options.label_smoothing
    ignored = labels == options.ignore_index
    bad = ~ignored & ((labels < 0) | (labels >= vocab))
    capped = logits.to(wide) * options.logit_scale
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    gradient = (capped - stats[:, :1]).exp_() * stats[:, 1:]
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    hit = torch.full_like(stats[:, 0], 1 - smooth)
    even: Tensor | float = smooth / vocab
    if ce_weight is not None:
        hit = hit * ce_weight.to(wide)[labels.clamp(0, vocab - 1)]
        even = even * ce_weight[first:first + logits.shape[1]].to(wide)
    gradient -= even
    gradient -= (columns == labels[:, None]) * hit[:, None]
    if options.softcap:
        gradient *= 1 - (capped / options.softcap).square_()
    factor = upstream.to(wide) * options.logit_scale
    factor = torch.where(bad, float("nan"), factor)
    logits.copy_((gradient * factor[:, None]).masked_fill_(ignored[:, None], 0.0))


def _torch_overwrite(logits: Tensor, labels: Tensor, ce_weight: Tensor | None,
                     upstream: Tensor | None, watch: bool, options: Options) -> Rows:
    rows = _torch_losses(logits, labels, ce_weight, watch, options)
    factor = rows[0].new_ones(()) if upstream is None else upstream
    _torch_columns(logits, labels, ce_weight, rows[1], factor.expand(labels.shape), 0,
                   logits.shape[1], options)
    return rows


PARTS = {
    "triton": Parts(
        lambda logits, labels, ce_weight, watch, options: ce.losses_of(
            logits, labels, ce_weight, watch, *options),
        lambda logits, labels, ce_weight, upstream, watch, options: ce.overwrite(
            logits, labels, ce_weight, upstream, watch, *options),
        ce.overwrite_columns, statistics=3, cached=False),
    "torch": Parts(_torch_losses, _torch_overwrite, _torch_columns, statistics=2),
}
"""By name, since an operator's arguments cannot be functions; `fastllm.ops` adds its C++ parts."""


# ------------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Problem:
    """The arguments of a loop over chunks."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    ce_weight: Tensor | None
    chunk_size: int | None
    parts: Parts
    options: Options

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]

    def rows(self, tight: bool) -> tuple[int, int]:
        """Rows of logits to hold, and to work on at once."""
        return chunks.rows(*self.sizes, self.hidden.element_size(), chunk_size=self.chunk_size,
                           cached=self.parts.cached and not self.hidden.is_cuda, tight=tight)

    def results(self, watch: bool) -> Rows:
        return results_for(self.hidden, watch, self.parts.statistics)

    def fill(self, results: Rows, rows: slice, found: Rows) -> None:
        """Put a chunk's results into those of all tokens."""
        losses, stats, metrics, predicted = results
        losses[rows] = found[0]
        if stats.shape[1]:
            stats[rows] = found[1]
        if predicted.numel():
            metrics[:, rows], predicted[rows] = found[2], found[3]


def results_for(hidden: Tensor, watch: bool, statistics: int) -> Rows:
    tokens, wide = hidden.shape[0], compute_dtype(hidden)
    watched = tokens if watch else 0
    return (hidden.new_empty((tokens,), dtype=wide),
            hidden.new_empty((tokens, statistics), dtype=wide),
            hidden.new_empty((3, watched), dtype=wide),
            hidden.new_empty((watched,), dtype=torch.int64))


def gradients_for(hidden: Tensor, weight: Tensor, want: tuple[bool, bool, bool],
                  given: bool) -> list[Tensor]:
    """Memory for the gradients of hidden, weight and bias: empty where not wanted or given."""
    shapes = (hidden.shape, weight.shape if not given else (0,), weight.shape[:1])
    return [weight.new_empty(shape if due else (0,)) for shape, due in
            zip(shapes, want, strict=True)]


def only_losses(problem: Problem, watch: bool) -> Rows:
    """The forward that keeps no gradient."""
    tokens, _, vocab = problem.sizes
    results = problem.results(watch)
    _, tile = problem.rows(tight=True)
    buffer = problem.hidden.new_empty((min(tile, tokens), vocab))
    for rows in chunks.spans(tokens, tile):
        logits = buffer[: rows.stop - rows.start]
        chunks.linear(problem.hidden[rows], problem.weight, problem.bias, logits,
                      problem.parts.matmul)
        problem.fill(results, rows, problem.parts.losses(
            logits, problem.labels[rows], problem.ce_weight, watch, problem.options))
    return results


def by_rows(problem: Problem, upstream: Tensor | None, main_grad: Tensor | None, watch: bool,
             want: tuple[bool, bool, bool], tight: bool) -> tuple[Rows, list[Tensor]]:
    """Results, and gradients of the losses' sum weighted by upstream (None, 0-d or (T,))."""
    tokens, width, vocab = problem.sizes
    hidden, weight, parts = problem.hidden, problem.weight, problem.parts
    results = problem.results(watch)
    dhidden, dweight, dbias = gradients_for(hidden, weight, (want[0], False, False), False)
    held, tile = problem.rows(tight)
    buffer = hidden.new_empty((min(held, tokens), vocab))
    total = chunks.Sum((vocab, width), weight, cdiv(tokens, held), main_grad,
                       parts.matmul) if want[1] else None
    bias = hidden.new_zeros((vocab,), dtype=compute_dtype(hidden)) if want[2] else None
    for chunk in chunks.spans(tokens, held):
        filled = buffer[: chunk.stop - chunk.start]
        for tiled in chunks.spans(filled.shape[0], tile):
            rows = slice(chunk.start + tiled.start, chunk.start + tiled.stop)
            logits = filled[tiled]
            chunks.linear(hidden[rows], weight, problem.bias, logits, parts.matmul)
            above = upstream[rows] if upstream is not None and upstream.dim() else upstream
            problem.fill(results, rows, parts.overwrite(
                logits, problem.labels[rows], problem.ce_weight, above, watch, problem.options))
            if want[0]:
                parts.matmul(logits, weight, dhidden[rows])
        if total is not None:
            total.add(filled.t(), hidden[chunk])
        if bias is not None:
            bias += filled.sum(0, dtype=bias.dtype)
    del buffer
    if total is not None and main_grad is None:
        dweight = total.result()
    return results, [dhidden, dweight, dbias if bias is None else bias.to(weight.dtype)]


def by_columns(problem: Problem, stats: Tensor, upstream: Tensor, main_grad: Tensor | None,
                want: tuple[bool, bool, bool]) -> list[Tensor]:
    """The gradients from the forward's statistics, a chunk of the vocabulary at a time."""
    tokens, width, vocab = problem.sizes
    hidden, weight, parts = problem.hidden, problem.weight, problem.parts
    step = chunks.columns(tokens, width, vocab, hidden.element_size(),
                          chunk_size=problem.chunk_size)
    dhidden, dweight, dbias = gradients_for(hidden, weight, (False, *want[1:]),
                                            main_grad is not None)
    total = chunks.Sum((tokens, width), hidden, cdiv(vocab, step), matmul=parts.matmul) \
        if want[0] else None
    buffer = hidden.new_empty((tokens * step,))
    for columns in chunks.spans(vocab, step):
        size = columns.stop - columns.start
        logits = buffer[: tokens * size].view(tokens, size)
        bias = None if problem.bias is None else problem.bias[columns]
        chunks.linear(hidden, weight[columns], bias, logits, parts.matmul)
        assert parts.columns is not None
        parts.columns(logits, problem.labels, problem.ce_weight, stats, upstream, columns.start,
                      vocab, problem.options)
        if total is not None:
            total.add(logits, weight[columns])
        if want[1] and main_grad is not None:
            chunks.Sum((size, width), weight, 1, main_grad[columns], parts.matmul).add(
                logits.t(), hidden)
        elif want[1]:
            parts.matmul(logits.t(), hidden, dweight[columns])
        if want[2]:
            dbias[columns] = logits.sum(0, dtype=compute_dtype(hidden))
    del buffer
    return [dhidden if total is None else total.result(), dweight, dbias]
