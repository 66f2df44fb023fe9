"""The backward of attention.

With the scores' P = e^(score - lse) made again from q, k and lse, and delta = rowsum(dout * out) -
dlse: dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dQ = scale dS K, dK = scale dS^T Q.

One kernel keeps a tile of keys and runs over the queries that see them: dK and dV, no two programs
writing the same. dQ is wanted by query. Deterministic, a second kernel keeps a tile of queries and
runs over their keys, which makes S and dP twice: 7 products. Otherwise the first kernel adds its
part of dQ to a float32 buffer with atomics, in any order: 5 products.

Source: Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._attention_launch import (
    Options,
    describable,
    describe,
    schedule,
    strides,
    unit_stride,
)
from fastllm.kernels._attention_tables import Name, tiles_of
from fastllm.kernels._attention_tiles import (
    fetch_tile,
    horizon,
    load_numbers,
    load_tile,
    locate,
    squash,
    store_tile,
    visible_range,
    within,
)
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, tl


@jit
def _rows_kernel(out, grad, lse, grad_lse, delta, log, tokens, heads, out_batch, out_token,
                 out_head, grad_batch, grad_token, grad_head, lse_batch, lse_head, lse_token,
                 blocks, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One program ROWS tokens of a head: delta, and lse in base 2; both (B, H, S), contiguous."""
    # int64: offsets of batches, heads and tokens pass 2^31 in real runs.
    program = tl.program_id(0).to(tl.int64)
    pair, first = program // blocks, program % blocks * ROWS
    batch, head = pair // heads, pair % heads
    o = load_tile(out + batch * out_batch + head * out_head + first * out_token, tokens - first,
                  out_token, DIM, ROWS, WIDTH).to(tl.float32)
    g = load_tile(grad + batch * grad_batch + head * grad_head + first * grad_token,
                  tokens - first, grad_token, DIM, ROWS, WIDTH).to(tl.float32)
    total = tl.sum(o * g, 1)
    row = first + tl.arange(0, ROWS)
    inside = row < tokens
    if grad_lse is not None:
        total -= tl.load(grad_lse + batch * lse_batch + head * lse_head + row * lse_token,
                         mask=inside, other=0.0)
    value = tl.load(lse + pair * tokens + row, mask=inside, other=0.0) * 1.4426950408889634
    tl.store(delta + pair * tokens + row, total, mask=inside)
    # A query that sees no key has -inf; every probability of its must come out 0.
    tl.store(log + pair * tokens + row, tl.where(value == -float("inf"), float("inf"), value),
             mask=inside)


@jit
def _queries_kernel(q, k, v, do, q_desc, k_desc, v_desc, do_desc, dq_desc, log, delta, dq, rows,
                    pairs, span, heads, starts, q_bounds, k_bounds, sequences, steps, q_tokens,
                    k_tokens, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token,
                    v_head, do_batch, do_token, do_head, left, right, factor, inner, scale,
                    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr,
                    OTHER: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
                    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                    TMA: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr):
    """dq: one program a tile of OWN queries of one head, last blocks first; dq is contiguous."""
    if PACKED:
        rows = tl.load(starts + sequences + 1)
    tile = tl.program_id(0).to(tl.int32)
    if tile < rows * pairs:
        batch, head, block, q_first, queries, k_first, keys = locate(
            tile, rows, pairs, span, heads, starts, q_bounds, k_bounds, sequences, steps,
            q_tokens, k_tokens, PACKED, True)
        first, kv = block * OWN, head // GROUP
        begin, whole, partial, end = visible_range(first, queries, keys, left, right, OWN, OTHER,
                                                   LEFT, RIGHT)
        batch64, head64, kv64 = batch.to(tl.int64), head.to(tl.int64), kv.to(tl.int64)
        token64, k64 = (q_first + first).to(tl.int64), (k_first + begin).to(tl.int64)
        query = fetch_tile(q + batch64 * q_batch + token64 * q_token + head64 * q_head,
                           queries - first, q_token, q_desc, batch, head, first, DIM, OWN, WIDTH,
                           TMA)
        upstream = fetch_tile(do + batch64 * do_batch + token64 * do_token + head64 * do_head,
                              queries - first, do_token, do_desc, batch, head, first, DIM, OWN,
                              WIDTH, TMA)
        at_row = (batch64 * heads + head64) * q_tokens + token64
        row_log = load_numbers(log + at_row, queries - first, float("inf"), OWN)
        row_delta = load_numbers(delta + at_row, queries - first, 0.0, OWN)
        k_block = k + batch64 * k_batch + k64 * k_token + kv64 * k_head
        v_block = v + batch64 * v_batch + k64 * v_token + kv64 * v_head
        total = tl.zeros((OWN, WIDTH), tl.float32)
        lowest, highest = horizon(first + tl.arange(0, OWN), queries, keys, left, right, LEFT,
                                  RIGHT)
        for at in tl.range(begin, end, OTHER):
            key = fetch_tile(k_block, keys - at, k_token, k_desc, batch, kv, at, DIM, OTHER, WIDTH,
                             TMA)
            value = fetch_tile(v_block, keys - at, v_token, v_desc, batch, kv, at, DIM, OTHER,
                               WIDTH, TMA)
            score = tl.dot(query, key.T, input_precision=PRECISION)
            if SOFTCAP:
                score = squash(score * inner, PRECISE)
            p = tl.exp2(score * factor - row_log[:, None])
            if (at < whole) | (at >= partial):
                seen = within((at + tl.arange(0, OTHER))[None, :], lowest[:, None],
                              highest[:, None], LEFT, True)
                p = tl.where(seen, p, 0.0)
            ds = p * (tl.dot(upstream, value.T, input_precision=PRECISION) - row_delta[:, None])
            if SOFTCAP:
                ds *= 1.0 - score * score
            total = tl.dot(ds.to(key.dtype), key, total, input_precision=PRECISION)
            k_block += OTHER * k_token
            v_block += OTHER * v_token
        store_tile(dq + ((batch64 * q_tokens + token64) * heads + head64) * DIM, total * scale,
                   queries - first, heads * DIM, dq_desc, batch, head, first, DIM, OWN, WIDTH, TMA)


@jit
def _keys_kernel(q, k, v, do, q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, log, delta, dk,
                 dv, dq, rows, pairs, span, heads, starts, k_bounds, q_bounds, sequences, steps,
                 k_tokens, q_tokens, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch,
                 v_token, v_head, do_batch, do_token, do_head, left, right, factor, inner, scale,
                 GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
                 WIDTH: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr,
                 RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
                 PRECISE: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv: one program a tile of OWN keys of one head, first blocks first, over its GROUP
    query heads.

    All results are contiguous; to dq (float32, not scaled yet), if given, parts are added. Scores
    are held as (keys, queries), so that P and dS are left operands as they come.
    """
    if PACKED:
        rows = tl.load(starts + sequences + 1)
    tile = tl.program_id(0).to(tl.int32)
    if tile < rows * pairs:
        batch, kv, block, k_first, keys, q_first, queries = locate(
            tile, rows, pairs, span, heads, starts, k_bounds, q_bounds, sequences, steps, k_tokens,
            q_tokens, PACKED, False)
        first, q_heads = block * OWN, heads * GROUP
        # The mask seen from the keys is the same with its sides exchanged.
        begin, whole, partial, end = visible_range(first, keys, queries, right, left, OWN, OTHER,
                                                   RIGHT, LEFT)
        # Rows beyond the last key must not count in dq: they are masked.
        partial = tl.where(first + OWN <= keys, partial, 0)
        lowest, highest = horizon(first + tl.arange(0, OWN), keys, queries, right, left, RIGHT,
                                  LEFT)
        batch64, kv64 = batch.to(tl.int64), kv.to(tl.int64)
        token64, q64 = (k_first + first).to(tl.int64), (q_first + begin).to(tl.int64)
        key = fetch_tile(k + batch64 * k_batch + token64 * k_token + kv64 * k_head, keys - first,
                         k_token, k_desc, batch, kv, first, DIM, OWN, WIDTH, TMA)
        value = fetch_tile(v + batch64 * v_batch + token64 * v_token + kv64 * v_head, keys - first,
                           v_token, v_desc, batch, kv, first, DIM, OWN, WIDTH, TMA)
        dk_total = tl.zeros((OWN, WIDTH), tl.float32)
        dv_total = tl.zeros((OWN, WIDTH), tl.float32)
        q_base = q + batch64 * q_batch + q64 * q_token + kv64 * (GROUP * q_head)
        do_base = do + batch64 * do_batch + q64 * do_token + kv64 * (GROUP * do_head)
        row_base = (batch64 * q_heads + kv64 * GROUP) * q_tokens + q64
        count = tl.cdiv(end - begin, OTHER)
        # One loop over heads and blocks: two would begin anew, and wait for memory, at every head.
        for turn in tl.range(0, GROUP * count):
            member = turn // count
            at = begin + (turn - member * count) * OTHER
            member64, at64 = member.to(tl.int64), (at - begin).to(tl.int64)
            query = fetch_tile(q_base + member64 * q_head + at64 * q_token, queries - at, q_token,
                               q_desc, batch, kv * GROUP + member, at, DIM, OTHER, WIDTH, TMA)
            score = tl.dot(key, query.T, input_precision=PRECISION)
            if SOFTCAP:
                score = squash(score * inner, PRECISE)
                slope = (1.0 - score * score).to(query.dtype)
            numbers = row_base + member64 * q_tokens + at64
            row_log = load_numbers(log + numbers, queries - at, float("inf"), OTHER)
            rounded = tl.exp2(score * factor - row_log[None, :]).to(query.dtype)
            if (at < whole) | (at >= partial):
                seen = within((at + tl.arange(0, OTHER))[None, :], lowest[:, None],
                              highest[:, None], RIGHT, LEFT or not RIGHT)
                rounded = tl.where(seen, rounded, 0.0)
            upstream = fetch_tile(do_base + member64 * do_head + at64 * do_token, queries - at,
                                  do_token, do_desc, batch, kv * GROUP + member, at, DIM, OTHER,
                                  WIDTH, TMA)
            dv_total = tl.dot(rounded, upstream, dv_total, input_precision=PRECISION)
            row_delta = load_numbers(delta + numbers, queries - at, 0.0, OTHER)
            dp = tl.dot(value, upstream.T, input_precision=PRECISION)
            ds = rounded.to(tl.float32) * (dp - row_delta[None, :])
            if SOFTCAP:
                ds *= slope.to(tl.float32)
            ds = ds.to(query.dtype)
            dk_total = tl.dot(ds, query, dk_total, input_precision=PRECISION)
            if dq is not None:
                part = tl.dot(ds.T, key, input_precision=PRECISION)
                row, lane = tl.arange(0, OTHER), tl.arange(0, WIDTH)
                to = dq + ((batch64 * q_tokens + q64 + at64) * q_heads + kv64 * GROUP
                           + member64) * DIM
                tl.atomic_add(to + (row.to(tl.int64)[:, None] * (q_heads * DIM) + lane[None, :]),
                              part, mask=(row < queries - at)[:, None] & (lane < DIM)[None, :],
                              sem="relaxed")
        offset = ((batch64 * k_tokens + token64) * heads + kv64) * DIM
        store_tile(dk + offset, dk_total * scale, keys - first, heads * DIM, dk_desc, batch, kv,
                   first, DIM, OWN, WIDTH, TMA)
        store_tile(dv + offset, dv_total, keys - first, heads * DIM, dv_desc, batch, kv, first,
                   DIM, OWN, WIDTH, TMA)


def _rows(out: Tensor, grad: Tensor, lse: Tensor,
          grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rowsum(grad * out) - grad_lse, lse in base 2), both like lse."""
    tokens, heads, dim = out.shape[-3:]
    delta, log = torch.empty_like(lse), torch.empty_like(lse)
    width = max(16, next_power_of_2(dim))
    rows = max(16, 8192 // width)
    by_lse: tuple[int, ...] = (0, 0, 0)
    if grad_lse is not None:
        by_lse = (grad_lse.stride(0) if grad_lse.dim() == 3 else 0, *grad_lse.stride()[-2:])
    blocks = cdiv(tokens, rows)
    _rows_kernel[(lse.numel() // tokens * blocks,)](
        out, grad, lse, grad_lse, delta, log, tokens, heads, *strides(out, grad), *by_lse, blocks,
        DIM=dim, ROWS=rows, WIDTH=width, num_warps=4)
    return delta, log


def backward(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
             lse: Tensor, sinks: Tensor | None, options: Options,
             deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks), contiguous, of the types of q, k, v and sinks."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not (q.numel() and k.numel()):
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    tensors = tuple(unit_stride(x) for x in (q, k, v, grad))
    with torch.cuda.device_of(q):
        numbers = _rows(unit_stride(out), tensors[-1], lse, grad_lse)
        if deterministic:
            _launch(_keys_kernel, "keys", tensors, numbers, (dk, dv), (None,), options)
            _launch(_queries_kernel, "queries", tensors, numbers, (dq,), (), options)
        else:
            parts = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            _launch(_keys_kernel, "keys", tensors, numbers, (dk, dv), (parts,), options)
            torch.mul(parts, options.scale, out=dq)
    return dq, dk, dv, _sink_gradient(sinks, lse, numbers[0])


def _launch(kernel: Any, own: Name, tensors: tuple[Tensor, ...], numbers: tuple[Tensor, Tensor],
            results: tuple[Tensor, ...], parts: tuple[Tensor | None, ...],
            options: Options) -> None:
    """tensors: q, k, v and the upstream gradient; numbers: `_rows`; parts: what is added to."""
    q, k = tensors[:2]
    tma = describable(options, *tensors, *results)
    strain = options.strain(tma, parts=any(x is not None for x in parts))
    tiles = tiles_of(own, q, strain, options.longest(q, k)[own == "keys"])
    by_query, by_key = tiles.own, tiles.other
    if own == "keys":
        by_query, by_key = by_key, by_query
    heights = (by_query, by_key, by_key, by_query, *[tiles.own] * len(results))
    width = max(16, next_power_of_2(q.shape[-1]))
    descriptors = (describe(x, tma, height, width)
                   for x, height in zip((*tensors, *results), heights, strict=True))
    grid, where = schedule(options, q, k, tiles, own)
    kernel[grid](*tensors, *descriptors, *reversed(numbers), *results, *parts, *where,
                 *strides(*tensors), *options.scores, options.scale,
                 GROUP=q.shape[-2] // k.shape[-2], DIM=q.shape[-1], OWN=tiles.own,
                 OTHER=tiles.other, WIDTH=width, **options.flags(q, tma), **tiles.options())


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's probability times what its score's gradient is, for a value of 0, over all rows."""
    if sinks is None:
        return None
    # A query that sees no key has the sink alone, or -inf where that is -inf too.
    share = torch.exp(sinks.float()[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
    total = -(share * delta).sum(-1)
    return (total.sum(0) if total.dim() == 2 else total).to(sinks.dtype)
