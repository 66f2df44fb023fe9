"""The forward of attention: the online softmax over blocks of keys, nothing of S x S written.

Sources: Milakov and Gimelshein, arXiv:1805.02867; Dao, "FlashAttention-2", arXiv:2307.08691.
"""

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
from fastllm.kernels._attention_tables import tiles_of
from fastllm.kernels._attention_tiles import (
    fetch_tile,
    horizon,
    locate,
    squash,
    store_tile,
    visible_range,
    within,
)
from fastllm.kernels._triton import jit, next_power_of_2, tl


@jit
def _forward_kernel(q, k, v, q_desc, k_desc, v_desc, out_desc, out, lse, sinks, rows, pairs,
                    span, heads, starts, q_bounds, k_bounds, sequences, steps, q_tokens, k_tokens,
                    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                    left, right, factor, inner, GROUP: tl.constexpr, DIM: tl.constexpr,
                    OWN: tl.constexpr, OTHER: tl.constexpr, WIDTH: tl.constexpr,
                    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISE: tl.constexpr,
                    PRECISION: tl.constexpr):
    """One program a tile of OWN queries of one head, last blocks first; out and lse are contiguous.

    total: values weighted by 2^(score - top); weight: the sum of those; top: the largest score so
    far, in base 2.
    """
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
        # int64: offsets of batches, heads and tokens pass 2^31 in real runs.
        batch64, head64, kv64 = batch.to(tl.int64), head.to(tl.int64), kv.to(tl.int64)
        token64, k64 = (q_first + first).to(tl.int64), (k_first + begin).to(tl.int64)
        query = fetch_tile(q + batch64 * q_batch + token64 * q_token + head64 * q_head,
                           queries - first, q_token, q_desc, batch, head, first, DIM, OWN, WIDTH,
                           TMA)
        k_block = k + batch64 * k_batch + k64 * k_token + kv64 * k_head
        v_block = v + batch64 * v_batch + k64 * v_token + kv64 * v_head
        total = tl.zeros((OWN, WIDTH), tl.float32)
        weight = tl.zeros((OWN,), tl.float32)
        top = tl.full((OWN,), -float("inf"), tl.float32)
        if sinks is not None:  # a key without a value
            sink = 1.4426950408889634 * tl.load(sinks + head).to(tl.float32)
            top = tl.maximum(top, sink)
            weight += tl.where(sink == -float("inf"), 0.0, 1.0)
        row = tl.arange(0, OWN)
        lowest, highest = horizon(first + row, queries, keys, left, right, LEFT, RIGHT)
        for at in tl.range(begin, end, OTHER):
            key = fetch_tile(k_block, keys - at, k_token, k_desc, batch, kv, at, DIM, OTHER, WIDTH,
                             TMA)
            score = tl.dot(query, key.T, input_precision=PRECISION)
            if SOFTCAP:
                score = squash(score * inner, PRECISE)
            if (at < whole) | (at >= partial):
                seen = within((at + tl.arange(0, OTHER))[None, :], lowest[:, None],
                              highest[:, None], LEFT, True)
                score = tl.where(seen, score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1) * factor)
            # A query that has seen nothing yet stays at -inf; its exponentials are taken from 0.
            zero = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(score * factor - zero[:, None])
            decay = tl.exp2(top - zero)
            weight = weight * decay + tl.sum(p, 1)
            total = total * decay[:, None]
            value = fetch_tile(v_block, keys - at, v_token, v_desc, batch, kv, at, DIM, OTHER,
                               WIDTH, TMA)
            total = tl.dot(p.to(value.dtype), value, total, input_precision=PRECISION)
            top = higher
            k_block += OTHER * k_token
            v_block += OTHER * v_token
        tl.store(lse + (batch64 * heads + head64) * q_tokens + token64 + row,
                 top * 0.6931471805599453 + tl.log(weight), mask=row < queries - first)
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        store_tile(out + ((batch64 * q_tokens + token64) * heads + head64) * DIM, total,
                   queries - first, heads * DIM, out_desc, batch, head, first, DIM, OWN, WIDTH,
                   TMA)


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
            options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse), contiguous: out of q's shape, lse (B, Hq, Sq) or (Hq, T) in float32."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    if not out.numel():
        return out, lse
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    width = max(16, next_power_of_2(q.shape[-1]))
    tma = describable(options, q, k, v, out)
    tiles = tiles_of("forward", q, options.strain(tma), options.longest(q, k)[0])
    with torch.cuda.device_of(q):
        grid, where = schedule(options, q, k, tiles, "queries")
        descriptors = (describe(x, tma, height, width) for x, height in (
            (q, tiles.own), (k, tiles.other), (v, tiles.other), (out, tiles.own)))
        _forward_kernel[grid](
            q, k, v, *descriptors, out, lse, sinks, *where, *strides(q, k, v), *options.scores,
            GROUP=q.shape[-2] // k.shape[-2], DIM=q.shape[-1], OWN=tiles.own, OTHER=tiles.other,
            WIDTH=width, **options.flags(q, tma), **tiles.options())
    return out, lse
