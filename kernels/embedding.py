"""Embedding: y[t] = weight[input[t]], whose backward is the same bits every time.

input (...) int64 or int32, weight (V, H), y (..., H) in the weight's type. An id that is not in
0 ... V - 1 makes its row of y NaN and gets no gradient: to refuse it the host would have to wait.
The backward sorts the ids, so that the tokens of one id lie in one run, in their order. Each row of
the weight's gradient is then written once, by the program that sums its run in float32; rows of ids
that do not occur are zero. A run of more than PIECE tokens is cut, PIECE apart from its start, and
the pieces but the first are summed beforehand, all at once: a token that is a third of all makes
nobody wait. Everything is a function of the ids alone.
Floor, e bytes an element, T tokens of D different ids: forward eH(T + D), backward eH(T + V), and
the ids.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._layout import matrix_of, tile_of, tiling
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, rows_of, tl

PIECE = 64  # tokens
TOKENS = 8  # rows in flight at once


def reference(input: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    padding = _check(input, weight, padding_idx)
    vocab = weight.shape[0]
    inside = (input >= 0) & (input < vocab)
    y = torch.nn.functional.embedding(input.clamp(0, vocab - 1), weight.to(compute_dtype(weight)),
                                      padding_idx=None if padding < 0 else padding)
    return y.masked_fill(~inside[..., None], float("nan")).to(weight.dtype)


@jit
def _forward_kernel(ids, weight, y, tokens, vocab, columns, stride, blocks, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """One program a tile of y, which is contiguous."""
    row, column = tile_of(blocks, ROWS, BLOCK)
    mask = (row < tokens) & (column < columns)
    # int64: id * stride passes 2^31 in large vocabularies.
    place = tl.load(ids + row, mask=row < tokens, other=0).to(tl.int64)
    inside = (place >= 0) & (place < vocab)
    value = tl.load(weight + place * stride + column, mask=mask & inside, other=float("nan"))
    tl.store(y + row * columns + column, value, mask=mask)


@jit
def _rows(dy, order, at, stop, column, columns, stride, step, COUNT: tl.constexpr):
    """The sum of dy's rows order[at ... min(at + COUNT, stop)], in float32."""
    token = at + tl.arange(0, COUNT)
    place = tl.load(order + token, mask=token < stop, other=0)
    value = tl.load(dy + place[:, None] * stride + column[None, :] * step,
                    mask=(token < stop)[:, None] & (column < columns)[None, :], other=0.0)
    return tl.sum(value.to(tl.float32), axis=0)


@jit
def _piece_kernel(dy, ids, order, starts, partial, vocab, columns, dy_stride, dy_step, padding,
                  blocks, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a piece of a long run, for BLOCK columns.

    ids are sorted. A piece that begins in places p PIECE ... (p + 1) PIECE belongs to the run that
    is there at p PIECE already: the program looks whether there is one.
    """
    # int64: a place times the row's length passes 2^31.
    program = tl.program_id(0).to(tl.int64)
    slot = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(ids + slot * PIECE).to(tl.int64)
    if (place >= 0) & (place < vocab) & (place != padding):
        start = tl.load(starts + place).to(tl.int64)
        stop = tl.load(starts + place + 1)
        at = start + tl.cdiv(slot * PIECE - start, PIECE) * PIECE
        if (at > start) & (at < stop):
            total = _rows(dy, order, at, stop, column, columns, dy_stride, dy_step, PIECE)
            tl.store(partial + slot * columns + column, total, mask=column < columns)


@jit
def _gather_kernel(dy, order, starts, partial, dweight, columns, dy_stride, dy_step, padding,
                   blocks, PIECE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """One program BLOCK columns of one row of dweight, which is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if row != padding:
        start = tl.load(starts + row).to(tl.int64)
        stop = tl.load(starts + row + 1).to(tl.int64)
        own = tl.minimum(stop, start + PIECE)
        for at in range(start, own, TOKENS):
            total += _rows(dy, order, at, own, column, columns, dy_stride, dy_step, TOKENS)
        first = start // PIECE + 1
        beyond = first + tl.cdiv(stop - own, PIECE)
        for at in range(first, beyond, TOKENS):
            slot = at + tl.arange(0, TOKENS)
            value = tl.load(partial + slot[:, None] * columns + column[None, :],
                            mask=(slot < beyond)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(value, axis=0)
    tl.store(dweight + row * columns + column, total.to(dweight.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastllm::embedding", mutates_args=())
def _forward(input: Tensor, weight: Tensor, padding: int) -> Tensor:
    require("embedding", input, weight)
    y = _forward_fake(input, weight, padding)
    if y.numel():
        ids, rows = input.reshape(-1).contiguous(), rows_of(weight)
        tokens, columns = input.numel(), weight.shape[1]
        programs, launch = tiling(tokens, columns)
        with torch.cuda.device_of(weight):
            _forward_kernel[(programs,)](ids, rows, y, tokens, weight.shape[0],
                                         columns, rows.stride(0), **launch)
    return y


@_forward.register_fake
def _forward_fake(input: Tensor, weight: Tensor, padding: int) -> Tensor:
    return weight.new_empty((*input.shape, weight.shape[1]))


@torch.library.custom_op("fastllm::embedding_backward", mutates_args=())
def _backward(dy: Tensor, input: Tensor, vocab: int, padding: int, dtype: torch.dtype) -> Tensor:
    dweight = _backward_fake(dy, input, vocab, padding, dtype)
    columns = dweight.shape[1]
    if not dweight.numel():
        return dweight
    ids, order = torch.sort(input.reshape(-1), stable=True)
    every = torch.arange(vocab + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ids, every, out_int32=True)
    rows, slots = matrix_of(dy), cdiv(ids.numel(), PIECE)
    partial = dy.new_empty((slots, columns), dtype=torch.float32)
    narrow, wide = (min(most, next_power_of_2(columns)) for most in (256, 1024))
    with torch.cuda.device_of(dy):
        if slots:
            blocks = cdiv(columns, narrow)
            _piece_kernel[(slots * blocks,)](
                rows, ids, order, starts, partial, vocab, columns, *rows.stride(), padding, blocks,
                PIECE=PIECE, BLOCK=narrow, num_warps=8)
        blocks = cdiv(columns, wide)
        _gather_kernel[(vocab * blocks,)](
            rows, order, starts, partial, dweight, columns, *rows.stride(), padding, blocks,
            PIECE=PIECE, TOKENS=TOKENS, BLOCK=wide, num_warps=max(1, wide // 256))
    return dweight


@_backward.register_fake
def _backward_fake(dy: Tensor, input: Tensor, vocab: int, padding: int,
                   dtype: torch.dtype) -> Tensor:
    return dy.new_empty((vocab, dy.shape[-1]), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    input, weight, ctx.padding = inputs
    ctx.save_for_backward(input)
    ctx.vocab, ctx.dtype = weight.shape[0], weight.dtype


def _autograd(ctx, dy: Tensor):
    return None, _backward(dy, *ctx.saved_tensors, ctx.vocab, ctx.padding, ctx.dtype), None


_forward.register_autograd(_autograd, setup_context=_setup)


def _check(input: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """The row without a gradient, -1 where there is none."""
    if weight.dim() != 2 or input.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: input {input.dtype} and weight {tuple(weight.shape)} must be "
                         "int64 or int32 and (V, H)")
    vocab = weight.shape[0]
    if padding_idx is None:
        return -1
    if not -vocab <= padding_idx < vocab:
        raise ValueError(f"embedding: padding_idx {padding_idx} is no row of weight "
                         f"{tuple(weight.shape)}")
    return padding_idx % vocab


def embedding(input: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Rows of weight (V, H) by the ids in input (...) int64 or int32: (..., H).

    The weight's gradient is in its type, summed in float32 and the same bits every time. An id that
    is not in 0 ... V - 1 makes a row of NaN and no gradient. padding_idx: a row that gets no
    gradient. Rows of weight may lie at any distance.
    """
    return _forward(input, weight, _check(input, weight, padding_idx))


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, skew: float = 0.0,
           ids: torch.dtype = torch.int64, **options: Any) -> Call:
    tokens, vocab, hidden = shape
    # As many different ids as there can be: floor_bytes must know how many rows are read.
    input = torch.randperm(max(tokens, vocab), generator=generator, device=device)[:tokens] % vocab
    drawn = torch.rand((tokens,), generator=generator, device=device)
    input = input.masked_fill(drawn < skew, vocab - 1)
    return Call((input.to(ids), normal((vocab, hidden), dtype, device, generator)), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, skew: float = 0.0,
                ids: torch.dtype = torch.int64, **_: Any) -> int:
    tokens, vocab, hidden = shape
    different = min(round(tokens * (1 - skew)), vocab)
    rows = tokens + (different if direction == "forward" else vocab)
    return dtype.itemsize * hidden * rows + ids.itemsize * tokens


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 0 if direction == "forward" else shape[0] * shape[2]


KERNEL = Kernel(
    name="embedding", public=embedding, reference=reference, inputs=inputs,
    axes=("tokens", "vocab_size", "hidden_size"),
    test_shapes=((1, 1, 1), (13, 5, 7), (300, 11, 40)),
    empty_shapes=((0, 4, 8), (3, 4, 0)),
    bench_shapes=((16384, 128256, 2048), (16384, 128256, 4096)),
    traffic_shapes=((256, 256, 512), (4096, 4096, 512)),
    audit_shapes=((128, 16, 512), (128, 16, 4096)),
    bench_options={"skewed": {"skew": 0.1}},
    variants={"padding": {"padding_idx": 0}, "padding everywhere": {"padding_idx": -1, "skew": 0.9},
              "skewed": {"skew": 0.5}, "one id": {"skew": 1.0}, "int32": {"ids": torch.int32}},
    overflow_shape=(3, 3, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
