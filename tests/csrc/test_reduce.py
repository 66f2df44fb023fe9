"""csrc/reduce.cpp against sums in torch in the same order: bit for bit.

The last test runs reduce.cpp, quantize.cpp and state_hash.cpp on every instruction set.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")

OPS = torch.ops.fastllm_cpu
REDUCE = OPS.reduce_chunks_
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [(world, rank) for world in (1, 2, 3, 4, 5) for rank in range(world)]


def draw(world, size, dtype, seed=0):
    """The chunks of all ranks, over a range of sizes in which the order of a sum counts."""
    gen = torch.Generator().manual_seed(seed)
    spread = torch.randn(world, size, generator=gen).exp()
    return (torch.randn(world, size, generator=gen) * spread).to(dtype)


def cut(chunks, rank):
    """(own, received) as the rank has them."""
    others = [chunk for i, chunk in enumerate(chunks) if i != rank]
    return chunks[rank].clone(), torch.cat(others) if others else chunks.new_empty(0)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def formula(shard, chunks, scale, accumulate):
    total = chunks[0].to(shard.dtype)
    for chunk in chunks[1:]:
        total = total + chunk.to(shard.dtype)
    total = total * torch.tensor(scale, dtype=shard.dtype)
    return shard + total if accumulate else total


def bits(tensor):
    return tensor.view(torch.int64 if tensor.element_size() == 8 else torch.int32)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_sum_in_order_of_rank(dtype, accumulate):
    for world, size in itertools.product((1, 2, 3, 4, 5), (256, 4096, 4352, 16384 + 768)):
        chunks = draw(world, size, dtype)
        before = draw(1, size, wide(dtype), seed=1)[0]
        expected = formula(before, chunks, 0.3, accumulate)
        truth = expected.double().square().sum().item()
        for rank in range(world):
            shard = before.clone()
            own, received = cut(chunks, rank)
            squares = REDUCE(shard, own, received, rank, 0.3, accumulate)
            assert torch.equal(bits(shard), bits(expected)), (world, rank, size)
            assert squares == pytest.approx(truth, rel=3e-7)


def test_the_order_of_the_sum_counts():
    """Otherwise the test above would prove little."""
    chunks = draw(3, 4096, torch.float32)
    zeros = torch.zeros(4096)
    backwards = formula(zeros, chunks.flip(0), 1, False)
    assert not torch.equal(formula(zeros, chunks, 1, False), backwards)


@pytest.mark.parametrize(("world", "rank"), RANKS)
def test_every_rank_gets_the_same_bits(world, rank):
    chunks = draw(world, 2560, torch.bfloat16)
    shard = torch.full((2560,), math.nan)  # not accumulated, so what was there does not count
    squares = REDUCE(shard, *cut(chunks, rank), rank, 1.0, False)
    first = torch.empty(2560)
    assert squares == REDUCE(first, *cut(chunks, 0), 0, 1.0, False)
    assert torch.equal(bits(shard), bits(first))


def test_a_negative_zero_survives():
    shard = torch.ones(256)
    zeros = -torch.zeros(256)
    assert REDUCE(shard, zeros, zeros.clone(), 1, 1.0, False) == 0
    assert torch.equal(bits(shard), bits(zeros))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shard_may_be_the_own_chunk(dtype, rank, accumulate):
    chunks = draw(3, 8448, dtype)
    own, received = cut(chunks, rank)
    expected = formula(own, chunks, 0.5, accumulate)
    REDUCE(own, own, received, rank, 0.5, accumulate)
    assert torch.equal(bits(own), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_squares_are_exact_to_fp32_and_in_double_for_fp64(dtype):
    chunks = draw(2, 300 * 256, dtype)
    shard = torch.empty(300 * 256, dtype=wide(dtype))
    squares = REDUCE(shard, *cut(chunks, 0), 0, 1.0, False)
    truth = math.fsum(x * x for x in shard.tolist())
    assert squares == pytest.approx(truth, rel=1e-14 if dtype == torch.float64 else 2e-7)


def test_the_squares_are_those_of_grad_norm():
    shard = torch.empty(37 * 256)
    squares = REDUCE(shard, *cut(draw(2, 37 * 256, torch.float32), 0), 0, 1.0, False)
    assert torch.tensor(squares).sqrt() == OPS.grad_norm([shard])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 255, 4096, 4607])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_number_is_seen(dtype, at, bad):
    for sender, rank in itertools.product(range(3), range(3)):
        chunks = torch.ones(3, 4608, dtype=dtype)
        chunks[sender, at] = bad
        shard = torch.empty(4608, dtype=wide(dtype))
        assert not math.isfinite(REDUCE(shard, *cut(chunks, rank), rank, 0.5, False))
        good = shard.isfinite()
        assert not good[at] and good.sum() == 4607
        assert math.isnan(shard[at]) == math.isnan(bad)


def test_infinities_of_both_signs_cancel_to_nan():
    chunks = torch.ones(2, 256)
    chunks[0, 3], chunks[1, 3] = math.inf, -math.inf
    shard = torch.empty(256)
    assert math.isnan(REDUCE(shard, *cut(chunks, 0), 0, 1.0, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_and_any_number_of_threads(dtype):
    size = 100 * 256
    chunks = draw(3, size, dtype)
    own, received = cut(chunks, 1)
    padded = torch.empty(3 * size + 3, dtype=dtype)
    before, found, counts = torch.get_num_threads(), [], set()
    try:
        for threads, off in itertools.product((1, 2, 3), (0, 1, 3)):
            torch.set_num_threads(threads)
            a = padded[off:off + size].copy_(own)
            b = padded[off + size:off + 3 * size].copy_(received)
            shard = torch.zeros(size + 3, dtype=wide(dtype))[off:off + size]
            counts.add(REDUCE(shard, a, b, 1, 0.7, True))
            found.append(shard)
    finally:
        torch.set_num_threads(before)
    assert len(counts) == 1
    assert all(torch.equal(bits(shard), bits(found[0])) for shard in found)


def test_nothing_sums_to_nothing():
    assert REDUCE(torch.empty(0), torch.empty(0), torch.empty(0), 1, 1.0, True) == 0


def test_autograd_notices_the_change():
    weight = torch.ones(256, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        REDUCE(weight, torch.ones(256), torch.empty(0), 0, 1.0, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"shard": torch.zeros(512).double()}, "shard must be Float, found Double"),
    ({"own": torch.zeros(512).double()}, "shard must be Double, found Float"),
    ({"own": torch.zeros(512).int()}, "own must be Float, BFloat16, Half or Double, found Int"),
    ({"received": torch.zeros(1024).half()}, "received must be Float, found Half"),
    ({"own": torch.zeros(256)}, "own must have 512 elements for a shard of 512, found 256"),
    ({"received": torch.zeros(1000)},
     "received must be whole chunks of 512 elements, found 1000"),
    ({"shard": torch.zeros(500)}, "shard must have a multiple of 256 elements, found 500"),
    ({"shard": torch.zeros(2, 256).t()}, r"shard must be a contiguous .* shape \[256, 2\]"),
    ({"received": torch.zeros(2, 512).t()}, "received must be a contiguous"),
    ({"rank": 3}, r"rank must be in \[0, 3\), as received has 2 chunks, found 3"),
    ({"rank": -1}, r"rank must be in \[0, 3\), as received has 2 chunks, found -1"),
])
def test_bad_arguments_are_named(change, message):
    arguments = {"shard": torch.zeros(512), "own": torch.zeros(512),
                 "received": torch.zeros(1024), "rank": 0, "scale": 1.0, "accumulate": False}
    REDUCE(**arguments)
    with pytest.raises(ValueError, match="reduce_chunks_: " + message):
        REDUCE(**{**arguments, **change})


def test_overlapping_buffers_are_refused():
    flat = torch.zeros(1536)
    with pytest.raises(ValueError, match="shard and received must not overlap"):
        REDUCE(flat[:512], torch.zeros(512), flat[256:768], 0, 1.0, False)
    with pytest.raises(ValueError, match="shard and own must not overlap"):
        REDUCE(flat[:512], flat[256:768], torch.zeros(512), 0, 1.0, False)
    REDUCE(flat[:512], flat[512:1024], flat[1024:], 0, 1.0, False)


# The inputs come from numpy: torch.randn itself differs between instruction sets.
PROBE = """
import hashlib, numpy, torch
import fastllm._C
ops = torch.ops.fastllm_cpu
rng = numpy.random.default_rng(0)
digest = hashlib.sha256()

def draw(size):
    x = torch.from_numpy(rng.standard_normal(size, numpy.float32))
    return x * torch.from_numpy(numpy.exp2(rng.integers(-30, 10, size)).astype(numpy.float32))

def add(*results):
    for x in results:
        x = x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())

n = 5120
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    own, received = draw(n).to(dtype), draw(2 * n).to(dtype)
    shard = torch.zeros(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    add(ops.reduce_chunks_(shard, own, received, 1, 0.3, False), shard)
    add(ops.reduce_chunks_(shard, own, received, 2, 0.3, True), shard)
    wires = [torch.zeros(n // 256 * 260, dtype=torch.uint8) for _ in range(3)]
    error = draw(n)
    for wire in wires:
        x = draw(n)
        x[:256] *= 2.0 ** -126
        x[300] = float("nan")
        x[600] = 2.0 ** 127
        x[1024:1280] = 0
        ops.quantize_int8_(wire, x.to(dtype), error, 0.7)
    out = torch.zeros(n, dtype=dtype)
    ops.dequantize_int8_(out, wires[0])
    shard = torch.zeros(n)
    squares = ops.reduce_int8_(shard, wires[0], torch.cat(wires[1:]), 1, 0.3, False)
    add(*wires, error, out.nan_to_num(7.0), shard.nan_to_num(7.0))
    add(ops.state_hash(out.nan_to_num(7.0), 1, 2))
result = ops.isa(), digest.hexdigest()
"""


def test_every_instruction_set_gives_the_same_bits():
    here: dict = {}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    exec(PROBE, here)  # starting torch is slow: this process is one of those compared
    found = dict([here["result"]])
    code = f"import sys; sys.path.insert(0, {root!r})\n{PROBE}print(*result)"
    for capability in {"baseline": (), "avx2": ("default",)}.get(OPS.isa(), ("default", "avx2")):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True)
        isa, digest = result.stdout.split()
        found[isa] = digest
    assert "baseline" in found
    assert len(set(found.values())) == 1, found
