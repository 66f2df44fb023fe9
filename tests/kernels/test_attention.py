"""Attention: every option together against the definition, and what a kernel of tiles can get wrong.

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
from meter import Meter

from fastllm import ops
from fastllm.kernels import _attention_launch, _attention_tables, _triton
from fastllm.kernels import attention as module
from fastllm.kernels._attention_tables import Tiles

DEVICE = kc.DEVICE
attention, reference = module.attention, module.reference
INF = math.inf


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


def drawn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


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
