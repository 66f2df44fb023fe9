"""Attention: every option together against the definition, and what tiles can get wrong.

Tiles are small here, so that few tokens make several, and launches are those of two architectures:
rows come by pointers, as on sm_80, and by tensor descriptors, as on sm_90.
"""

import math
import random
from contextlib import contextmanager
from itertools import pairwise

import cpu_check
import kernel_check as kc
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from meter import Meter

from fastllm import ops
from fastllm.kernels import _attention_launch, _attention_tables, _triton
from fastllm.kernels import attention as module
from fastllm.kernels._attention_tables import Tiles
from fastllm.kernels._attention_tiles import locate
from fastllm.kernels._triton import INTERPRETED, jit, tl

DEVICE = kc.DEVICE
attention, reference = module.attention, module.reference
INF = math.inf
metered = pytest.mark.skipif(not INTERPRETED, reason="the meter counts in the interpreter")


@contextmanager
def tiles(own=16, other=16, arch=90):
    """Launches in tiles of this size, made for an architecture (a GPU's own where there is one)."""
    known = {key[:2] for key in _attention_tables.TABLE}
    before = _attention_tables.override(
        {(name, a, width, strain): Tiles(own, other, 4, 1) for name, a in known
         for width in _attention_tables.WIDTHS for strain in (0, 1, 2)})
    target, _triton.TARGET = _triton.TARGET, arch
    try:
        yield
    finally:
        _triton.TARGET = target
        _attention_tables.override(before)


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def bounds(*lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def run(function, tensors, upstream=None, **options):
    """Results and gradients of the tensors (that are not None)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    results = function(*leaves[:3], **options,
                       **({"sinks": leaves[3]} if len(leaves) > 3 else {}))
    results = results if isinstance(results, tuple) else (results,)
    if upstream is None:
        upstream = [drawn(*x.shape, seed=90 + i).bfloat16().to(x.dtype)
                    for i, x in enumerate(results)]
    wanted = [x for x in leaves if x is not None]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, wanted, upstream)]


# ------------------------------------------------------------------- every option, drawn together


def draw(number):
    """(tensors, options, layout of the launch) of a case; the number is all that it depends on."""
    rng = random.Random(number)
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    dim = rng.choice([16, 24, 40, 64, 64, 80, 96, 128] + [256] * (number % 8 == 0))
    kv_heads, group = rng.choice([(1, 1), (1, 2), (2, 1), (2, 3), (1, 4)])
    packed, same = rng.random() < 0.4, rng.random() < 0.5
    options = {}
    if packed:
        count = rng.randint(1, 4)
        lengths = [[rng.choice([0, 1, 5, 16, rng.randint(2, 28)]) for _ in range(count)]
                   for _ in range(2)]
        lengths[1] = lengths[0] if same else lengths[1]
        tails = [rng.choice([0, 3, 20])] * 2 if same else [rng.choice([0, 7]) for _ in range(2)]
        sizes = [(sum(n) + tail,) for n, tail in zip(lengths, tails, strict=True)]
        options["cu_seqlens_q"] = bounds(*lengths[0])
        if not same or rng.random() < 0.5:
            options["cu_seqlens_k"] = bounds(*lengths[1])
        if rng.random() < 0.5:
            options |= {"max_seqlen_q": max(lengths[0]), "max_seqlen_k": max(lengths[1])}
        same = same and sizes[0] == sizes[1]
    else:
        batch, queries = rng.choice([1, 1, 2]), rng.randint(1, 44)
        sizes = [(batch, queries), (batch, queries if same else rng.randint(1, 44))]
    options["causal"] = rng.random() < 0.6
    if rng.random() < 0.4:
        options["window"] = rng.choice([-1, 0, rng.randint(1, 30)]), rng.choice([-1, 0, 6])
    if rng.random() < 0.3:
        options["softcap"] = rng.choice([1.0, 4.0, 30.0])
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.05, 0.3])
    options["return_lse"] = rng.random() < 0.4
    options["deterministic"] = rng.random() < 0.7
    heads = kv_heads * group
    shapes = [(*sizes[0], heads, dim), (*sizes[1], kv_heads, dim), (*sizes[1], kv_heads, dim)]
    layout = rng.choice(["plain", "fused", "head first", "padded"])
    if layout == "fused" and same:
        tensors = list(drawn(*sizes[0], heads + 2 * kv_heads, dim, seed=number, dtype=dtype)
                       .split((heads, kv_heads, kv_heads), -2))
    else:
        tensors = [drawn(*s, seed=number + i, dtype=dtype) for i, s in enumerate(shapes)]
        if layout == "head first":
            tensors = [x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in tensors]
        if layout == "padded":
            tensors = [kc.padded(x) for x in tensors]
    tensors.append(drawn(heads, seed=number + 5, dtype=dtype) if rng.random() < 0.3 else None)
    return tensors, options, (rng.choice([16, 32]), rng.choice([16, 32]), rng.choice([80, 90]))


def by_definition(q, k, v, sinks=None, *, return_lse=False, **options):
    """`cpu_check.plain_attention` with the options that change no value taken out."""
    left_out = ("deterministic", "max_seqlen_q", "max_seqlen_k")
    options = {name: value for name, value in options.items() if name not in left_out}
    options.setdefault("cu_seqlens_k", options.get("cu_seqlens_q"))
    results = cpu_check.plain_attention(q, k, v, sinks, **options)
    return results if return_lse else results[0]


def cancelling(upstream, q, k, v, _, scale=None, **options):
    """Rounding of float32 where dP and rowsum(dout * out) cancel, as where a query sees one key."""
    if not (q.numel() and k.numel()):
        return 1e-30
    size = (scale or q.shape[-1] ** -0.5) * upstream.float().norm(dim=-1).max()
    return float(size * v.float().norm(dim=-1).max() * max(q.abs().max(), k.abs().max()) * 1.2e-7)


def wide(tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("number", range(320))
def test_every_option(number):
    check(number)


@pytest.mark.battery
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(number=st.integers(320, 1 << 40))
def test_many_more_options(number):
    """Not of a few scores, whose errors are luck, such as a single key in the whole call."""
    (q, k, *_), options, _ = draw(number)
    q_bounds = options.get("cu_seqlens_q")
    seen = module.visible(q, k, *module.bounds_of(
        options["causal"], options.get("window"), q.shape[-3], k.shape[-3]),
        q_bounds, options.get("cu_seqlens_k", q_bounds))
    assume(int(seen.sum()) >= 64)
    check(number)


def check(number):
    tensors, options, launch = draw(number)
    beside = run(reference, tensors, **options)
    count = len(beside) - sum(x is not None for x in tensors)
    upstream = [drawn(*x.shape, seed=90 + i).bfloat16() for i, x in enumerate(beside[:count])]
    truth = run(by_definition, wide(tensors), [x.double() for x in upstream], **options)
    with tiles(*launch):
        got = run(attention, tensors,
                  [x.to(y.dtype) for x, y in zip(upstream, beside[:count], strict=True)],
                  **options)
    if tensors[3] is not None:
        judge_sinks(got.pop(), beside.pop(), truth.pop(), wide(tensors), upstream[0], options)
    kc.judge(got, beside, truth, cancelling(upstream[0], *tensors, **options))


def judge_sinks(got, beside, truth, tensors, upstream, options):
    """A sink's gradient is a sum of p dout out over queries and elements, in which out is rounded,
    and probabilities before it: beside twice the reference's error, 4 standard deviations of it."""
    out, lse = by_definition(*tensors, **{**options, "return_lse": True})
    p = (tensors[3][:, None] - lse).exp().transpose(-1, -2)[..., None]
    terms = (p * upstream * out).square().transpose(-2, 0).flatten(1).sum(1).sqrt()
    deviation = torch.finfo(got.dtype).eps * (terms / 6 ** 0.5 + truth.abs() / 2)
    assert ((got - truth).abs() <= 2 * (beside - truth).abs() + 4 * deviation + 1e-6).all()


# ------------------------------------------------------------------------- packed is by document


ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90])


def packed(lengths, tail=0, heads=2, kv_heads=1, dim=16, dtype=torch.bfloat16):
    tokens = sum(lengths) + tail
    tensors = [drawn(tokens, h, dim, seed=i, dtype=dtype)
               for i, h in enumerate((heads, kv_heads, kv_heads))]
    return tensors, bounds(*lengths)


@pytest.mark.parametrize("options", [
    {"causal": True}, {"window": (9, 3)}, {"softcap": 2.0, "return_lse": True}], ids=str)
def test_packed_is_every_document_alone(options):
    """To the bit, on every architecture: packed rows never come by descriptors, so neither here."""
    lengths = [17, 0, 40, 1, 16]
    tensors, ends = packed(lengths, tail=9)
    with tiles(arch=80):
        whole = run(attention, tensors, cu_seqlens_q=ends, **options)
        results = len(whole) - 3
        upstream = [drawn(*x.shape, seed=90 + i).bfloat16().to(x.dtype)
                    for i, x in enumerate(whole[:results])]
        for first, last in pairwise(ends.tolist()):
            place = slice(first, last)
            alone = run(attention, [x[None, place] for x in tensors],
                        [upstream[0][None, place], *(x[None, :, place] for x in upstream[1:])],
                        **options)
            for i, (a, b) in enumerate(zip(whole, alone, strict=True)):
                lse = results == 2 and i == 1
                assert torch.equal(a[:, place] if lse else a[place], b[0]), (i, place)
    tail = slice(int(ends[-1]), None)
    assert all(not x[tail].any() for i, x in enumerate(whole) if not (results == 2 and i == 1))


@ARCHITECTURES
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_a_bad_document_spoils_itself_alone(arch, bad):
    lengths = [13, 20, 16]
    tensors, ends = packed(lengths, tail=5)
    with tiles(arch=arch):
        clean = run(attention, tensors, cu_seqlens_q=ends, causal=True)
        for x in tensors:
            x[13:33] = bad
            x[49:] = bad
        got = run(attention, tensors, cu_seqlens_q=ends, causal=True)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[:13], b[:13])
        assert torch.equal(a[33:], b[33:])
        assert not a[49:].any()
        assert not a[13:33].isfinite().all()


@metered
def test_padding_costs_nothing():
    """A tail's programs write zeros: they read no keys and multiply nothing."""
    with tiles(arch=80):
        launched = []
        for tail in (0, 64):
            tensors, ends = packed([32, 48], tail)
            with Meter() as meter:
                run(attention, tensors, cu_seqlens_q=ends, causal=True)
            launched.append([launch for launch in meter.launches if "plan" not in launch.name])
        for short, long in zip(*launched, strict=True):
            assert short.name == long.name
            assert long.flops == short.flops
            if "rows" not in short.name:
                # The tail's own tile of queries, or of keys and values, and what finds it.
                own = 64 * 16 * 2 * {"_forward_kernel": 2, "_queries_kernel": 4}.get(short.name, 2)
                assert long.loaded - short.loaded <= own + 64 * 16 + 4096


@ARCHITECTURES
@pytest.mark.parametrize("lengths", [[0, 0], [], [0]], ids=str)
def test_only_padding(arch, lengths):
    tensors, ends = packed(lengths, tail=20)
    with tiles(arch=arch):
        out, lse, *grads = run(attention, tensors, cu_seqlens_q=ends, return_lse=True)
    assert not any(x.any() for x in (out, *grads))
    assert (lse == -INF).all()


# ------------------------------------------------------------------------------- masks and scores


@ARCHITECTURES
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (17, 49), (49, 17)])
@pytest.mark.parametrize("window", [(0, 0), (15, 0), (16, 16), (3, -1), (-1, 5), (200, 200)],
                         ids=str)
def test_windows_are_masks(arch, queries, keys, window):
    """Against torch's attention with the mask spelled out; queries that see nothing apart."""
    q, k, v = (drawn(1, n, 2, 16, seed=i) for i, n in enumerate((queries, keys, keys)))
    own, other = (torch.arange(n, device=DEVICE) for n in (queries, keys))
    distance = other - own[:, None] - (keys - queries)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE)
    mask &= (distance >= -window[0]) | (window[0] < 0)
    mask &= (distance <= window[1]) | (window[1] < 0)
    some = mask.any(1)
    with tiles(arch=arch):
        got = attention(q, k, v, window=window)
    mine, theirs = (x.transpose(1, 2) for x in (q, k))
    exact = torch.nn.functional.scaled_dot_product_attention(
        mine, theirs, v.transpose(1, 2), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(got[:, some], exact[:, some], rtol=1e-5, atol=1e-5)
    assert not got[:, ~some].any()


@metered
def test_blocks_that_nobody_sees_are_not_read():
    """K and V as often as the tiling predicts, and products for the visible blocks alone."""
    tokens, dim, block = 80, 16, 16
    q, k, v = (drawn(1, tokens, 1, dim, seed=i, dtype=torch.bfloat16) for i in range(3))
    count = tokens // block
    cases = {"all": ({}, count * count), "causal": ({"causal": True}, count * (count + 1) // 2),
             "window": ({"window": (block, 0)}, 2 * count - 1)}
    for name, (options, blocks) in cases.items():
        for arch in (80, 90):
            with tiles(block, block, arch), Meter() as meter:
                run(attention, (q, k, v), **options)
            by_name = {launch.name: launch for launch in meter.launches}
            tile, product = block * dim * 2, 2 * block * block * dim
            expected = {"_forward_kernel": (2, 1, 2, tile), "_queries_kernel": (2, 2, 3, tile),
                        "_keys_kernel": (2, 2, 4, tile)}
            for kernel, (swept, kept, products, size) in expected.items():
                launch = by_name[kernel]
                assert launch.flops == products * product * blocks, (name, arch, kernel)
                rows = swept * size * blocks + kept * size * count
                assert rows <= launch.loaded <= rows + 4 * 3 * block * (blocks + count) + 64 * count


@metered
@ARCHITECTURES
def test_results_are_written_once(arch):
    q, k, v = (drawn(1, 48, h, 16, seed=i, dtype=torch.bfloat16) for i, h in enumerate((4, 2, 2)))
    with tiles(arch=arch), Meter() as meter:
        run(attention, (q, k, v), causal=True)
    written = {launch.name: launch.stored for launch in meter.launches}
    size = {name: 2 * x.numel() for name, x in (("q", q), ("k", k))}
    assert written["_forward_kernel"] == size["q"] + 4 * 4 * 48
    assert written["_queries_kernel"] == size["q"]
    assert written["_keys_kernel"] == 2 * size["k"]


@ARCHITECTURES
def test_one_key_has_no_gradient(arch):
    """A query that sees one key: its probability is 1 whatever the score."""
    q, k, v = (drawn(1, 33, 2, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    with tiles(arch=arch):
        out, dq, dk, dv = run(attention, (q, k, v), window=(0, 0))
    assert torch.equal(out, v)
    off = 1e-6 if INTERPRETED else cancelling(drawn(*q.shape, seed=90), q, k, v, None)
    assert dq.abs().max() < off
    assert dk.abs().max() < off
    assert dv.abs().max() > 0.1


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_scores(arch, dtype):
    """Scores of several thousand: a softmax that is one key."""
    q, k, v = (drawn(1, 40, 1, 32, seed=i, dtype=dtype) for i in range(3))
    q, k = q * 60, k * 60
    truth = run(by_definition, wide((q, k, v)), causal=True)
    beside = run(reference, (q, k, v), causal=True)
    # The backward's probabilities are e^(s - lse), and lse is a float32 number as large as s.
    off = 2e-7 * float((q[0, :, 0].float() @ k[0, :, 0].float().t()).abs().max()) * 32 ** -0.5
    with tiles(arch=arch):
        kc.judge(run(attention, (q, k, v), causal=True), beside, truth,
                 off * max(float(x.abs().max()) for x in truth))


@ARCHITECTURES
@pytest.mark.parametrize("dim", [1, 8, 16, 33, 72, 80, 96, 160, 192, 255, 256])
def test_every_width(arch, dim):
    q, k, v = (drawn(1, 36, h, dim, seed=i, dtype=torch.bfloat16) for i, h in enumerate((2, 1, 1)))
    truth = run(by_definition, wide((q, k, v)), causal=True)
    beside = run(reference, (q, k, v), causal=True)
    upstream = drawn(*q.shape, seed=90).bfloat16()
    with tiles(arch=arch):
        kc.judge(run(attention, (q, k, v), causal=True), beside, truth,
                 cancelling(upstream, q, k, v, None))


@ARCHITECTURES
def test_a_sink_of_no_weight_is_none(arch):
    q, k, v = (drawn(1, 30, 2, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    nothing = torch.full((2,), -INF, device=DEVICE)
    with tiles(arch=arch):
        without = run(attention, (q, k, v), causal=True, return_lse=True)
        *same, grad = run(attention, (q, k, v, nothing), causal=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(same, without, strict=True))
    assert not grad.any()


@ARCHITECTURES
def test_atomics_add_up_to_the_same(arch):
    q, k, v = (drawn(1, 40, h, 32, seed=i, dtype=torch.bfloat16) for i, h in enumerate((2, 1, 1)))
    with tiles(arch=arch):
        one = run(attention, (q, k, v), causal=True)
        other = run(attention, (q, k, v), causal=True, deterministic=False)
    assert all(torch.equal(a, b) for a, b in zip(one[2:], other[2:], strict=True))  # dk and dv
    assert (one[1] - other[1]).abs().max() < 2 ** -7 * one[1].abs().max()


@ARCHITECTURES
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (21, 4)},
                                     {"softcap": 3.0, "causal": True}], ids=str)
def test_bits_do_not_depend_on_others_in_the_batch(arch, options):
    q, k, v = (drawn(2, 33, h, 16, seed=i, dtype=torch.bfloat16) for i, h in enumerate((2, 1, 1)))
    up = drawn(2, 33, 2, 16, seed=90).bfloat16()
    with tiles(arch=arch):
        whole = run(attention, (q, k, v), [up], **options)
        alone = run(attention, [x[1:2] for x in (q, k, v)], [up[1:2]], **options)
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


# ------------------------------------------------------------------------------ parts, and launches


@ARCHITECTURES
@pytest.mark.parametrize("split", [1, 23])
@pytest.mark.parametrize("causal", [False, True])
def test_halves_merge_into_the_whole(arch, split, causal):
    """Keys in two parts, as in ring attention and chunked prefill: values and all gradients."""
    queries, keys = 24, 40
    q, k, v = (drawn(1, n, h, 16, seed=i) for i, (n, h) in enumerate(
        ((queries, 2), (keys, 1), (keys, 1))))

    def parts(q, k, v):
        pieces = []
        for first, last in ((0, split), (split, keys)):
            # The part's own diagonal, moved to where the whole's is.
            window = (-1, keys - last if causal else -1)
            pieces += attention(q, k[:, first:last], v[:, first:last], window=window,
                                return_lse=True)
        return ops.merge_attention(*pieces)

    with tiles(arch=arch), ops.use_backend("triton", "merge_attention"):
        whole = run(attention, (q, k, v), causal=causal, return_lse=True)
        merged = run(parts, (q, k, v))
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@jit
def _list_kernel(found, rows, pairs, span, heads, starts, own_bounds, other_bounds, sequences,
                 steps, own_tokens, other_tokens, PACKED: tl.constexpr, REVERSED: tl.constexpr):
    """What `locate` says of every tile of a launch."""
    tile = tl.program_id(0)
    if PACKED:
        rows = tl.load(starts + sequences + 1)
    if tile < rows * pairs:
        batch, head, block, own_first, own, other_first, others = locate(
            tile, rows, pairs, span, heads, starts, own_bounds, other_bounds, sequences, steps,
            own_tokens, other_tokens, PACKED, REVERSED)
        to = found + tile * 7
        tl.store(to, batch)
        tl.store(to + 1, head)
        tl.store(to + 2, block)
        tl.store(to + 3, own_first)
        tl.store(to + 4, own)
        tl.store(to + 5, other_first)
        tl.store(to + 6, others)


def listed(q, k, own="queries", **options):
    given = {"q_bounds": None, "k_bounds": None, "max_queries": -1, "max_keys": -1, "left": -1,
             "right": 0, "scale": 1.0, "softcap": 0.0, "tf32": False} | options
    (programs,), where = _attention_launch.schedule(
        _attention_launch.Options(**given), q, k, Tiles(16, 16, 4, 1), own)
    found = torch.full((programs, 7), -1, dtype=torch.int32, device=DEVICE)
    _list_kernel[(programs,)](found, *where, PACKED=given["q_bounds"] is not None,
                              REVERSED=own == "queries")
    return [tuple(row) for row in found.tolist() if row[0] >= 0], where[2]


@pytest.mark.parametrize("own", ["queries", "keys"])
@pytest.mark.parametrize("l2", [1, 40_000, 1 << 25], ids=["small", "two heads", "all"])
def test_the_list_has_every_tile_once_the_longest_first(own, l2, monkeypatch):
    monkeypatch.setattr(_attention_launch, "L2_BYTES", l2)
    q, k = drawn(2, 70, 6, 16), drawn(2, 100, 3, 16)
    found, span = listed(q, k, own)
    heads, tokens = (6, 70) if own == "queries" else (3, 100)
    every = {(b, h, i) for b in range(2) for h in range(heads) for i in range(-(-tokens // 16))}
    assert sorted(row[:3] for row in found) == sorted(every)
    assert {row[3:] for row in found} == {(0, tokens, 0, 170 - tokens)}
    # Among the heads that are in flight together, causal tiles that see more come first.
    assert span == {1: 2 if own == "queries" else 1}.get(l2, span)
    per_group = span * -(-tokens // 16)
    for first in range(0, len(found), per_group):
        blocks = [row[2] for row in found[first:first + per_group]]
        assert blocks == sorted(blocks, reverse=own == "queries")
        assert len({row[:2] for row in found[first:first + per_group]}) <= span


@pytest.mark.parametrize("own", ["queries", "keys"])
@pytest.mark.parametrize("lengths", [[5, 0, 33, 0, 16, 1], [0, 0], [], [40], [1] * 37], ids=len)
def test_the_list_of_packed_sequences(own, lengths, monkeypatch):
    monkeypatch.setattr(_attention_launch, "CHUNK", 16)
    tail = 20
    q = k = drawn(sum(lengths) + tail, 1, 16)
    ends = bounds(*lengths)
    found, _ = listed(q, k, own, q_bounds=ends, k_bounds=ends)
    every = [(0, 0, block, first, length, first, length)
             for first, length in zip(ends.tolist(), lengths, strict=False)
             for block in range(-(-length // 16))]
    last = int(ends[-1])
    owned = [row for row in found if row[3] < last]
    assert sorted(owned) == sorted(every)
    assert sorted(row[2:5] for row in found if row[3] >= last) == [
        (block, last, tail) for block in range(2)]
    assert all(row[6] == 0 for row in found if row[3] >= last)  # no keys for the tail


# ------------------------------------------------------------------------------------- tile table


def test_every_launch_has_tiles():
    for arch in (80, 86, 89, 90, 100, 103, 120):
        _triton.TARGET, before = arch, _triton.TARGET
        try:
            for name in ("forward", "queries", "keys"):
                for dim in (1, 64, 65, 128, 200, 256):
                    for strain in (0, 1, 2):
                        for dtype in (torch.bfloat16, torch.float32):
                            x = torch.empty(1, dim, dtype=dtype)
                            found = _attention_tables.tiles_of(name, x, strain, 4096)
                            assert found.own >= 16 <= found.other
                            assert _attention_tables.tiles_of(name, x, strain, 3).own == 16
        finally:
            _triton.TARGET = before


def test_measured_tiles_come_first_and_go_again():
    x = torch.empty(1, 64, dtype=torch.bfloat16)
    key = _attention_tables.key_of("forward", x, 0)
    before = _attention_tables.tiles_of("forward", x, 0, 4096)
    mine = Tiles(32, 16, 4, 1)
    with pytest.raises(ValueError, match="no tiles are kept for"):
        _attention_tables.override({("forward", 90, 100, 0): mine})
    old = _attention_tables.override({key: mine})
    try:
        assert _attention_tables.tiles_of("forward", x, 0, 4096) == mine
        assert _attention_tables.tiles_of("forward", x, 2, 4096) == mine
    finally:
        _attention_tables.override(old)
    assert _attention_tables.tiles_of("forward", x, 0, 4096) == before


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("shapes", "options", "message"), [
    (((1, 4, 3, 8), (1, 4, 2, 8)), {}, "3 query heads are not a multiple of 2"),
    (((2, 4, 2, 8), (1, 4, 2, 8)), {}, r"are not \(B, Sq, Hq, D\)"),
    (((4, 2, 8), (4, 2, 8)), {}, "cu_seqlens_q is for packed"),
    (((1, 4, 2, 0), (1, 4, 2, 0)), {}, "heads of no elements"),
    (((1, 4, 2, 300), (1, 4, 2, 300)), {}, "the kernel takes up to 256"),
    (((4, 2, 8), (5, 2, 8)), {"cu_seqlens_q": [0, 4]}, "give cu_seqlens_k"),
    (((4, 2, 8), (4, 2, 8)), {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 2, 4]}, "different"),
    (((1, 4, 2, 8), (1, 4, 2, 8)), {"window": (-2, 0)}, "window"),
    (((1, 4, 2, 8), (1, 4, 2, 8)), {"softcap": -1.0}, "softcap"),
    (((1, 4, 2, 8), (1, 4, 2, 8)), {"softcap": INF}, "softcap"),
    (((1, 4, 2, 8), (1, 4, 2, 8)), {"scale": 0.0}, "scale"),
], ids=str)
def test_refusals_name_what_is_wrong(shapes, options, message):
    q, k = (torch.zeros(shape) for shape in shapes)
    options = {name: torch.tensor(value, dtype=torch.int32) if name.startswith("cu") else value
               for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)


def test_types_must_agree():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(TypeError, match="must be of one type"):
        attention(q, q.bfloat16(), q.bfloat16())
    with pytest.raises(ValueError, match=r"must be \(N \+ 1,\) integers"):
        attention(q[0], q[0], q[0], cu_seqlens_q=torch.tensor([0.0, 4.0]))
    with pytest.raises(ValueError, match="one number for each of the 2 query heads"):
        attention(q, q, q, sinks=torch.zeros(3))
