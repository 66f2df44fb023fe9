"""The int8 wire of csrc/quantize.cpp, and its sum in csrc/reduce.cpp, against torch."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")

OPS = torch.ops.fastllm_cpu
QUANTIZE, DEQUANTIZE, REDUCE = OPS.quantize_int8_, OPS.dequantize_int8_, OPS.reduce_int8_
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TILE, BYTES = 256, 260


def draw(size, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    spread = torch.randn(size // TILE, 1, generator=gen).mul(2).exp()
    return (torch.randn(size // TILE, TILE, generator=gen) * spread).view(-1).to(dtype)


def empty_wire(size):
    return torch.full((size // TILE * BYTES,), 0xAB, dtype=torch.uint8)


def quantized(x, error=None, pre_scale=1.0):
    wire = empty_wire(x.numel())
    QUANTIZE(wire, x, error, pre_scale)
    return wire


def dequantized(wire, dtype=torch.float32):
    out = torch.empty(wire.numel() // BYTES * TILE, dtype=dtype)
    DEQUANTIZE(out, wire)
    return out


def parts(wire):
    """(scales, q) of a wire."""
    rows = wire.view(-1, BYTES)
    return (rows[:, :4].contiguous().view(torch.float32).view(-1),
            rows[:, 4:].contiguous().view(torch.int8))


def formula(x, error, pre_scale):
    """(scales, q, error) of finite numbers, in numpy's fp32 operation by operation."""
    v = x.float().numpy() * np.float32(pre_scale)
    v = (v if error is None else v + error.numpy()).reshape(-1, TILE)
    scale = np.abs(v).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        q = np.where(scale > 0, np.clip(np.rint(v / scale), -127, 127), np.float32(0))
    return scale.reshape(-1), q, (v - q * scale).reshape(-1)


@pytest.mark.parametrize("size", [TILE, 5 * TILE, 200 * TILE])
@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula_bit_for_bit(dtype, with_error, size):
    x = draw(size, dtype)
    x[:TILE // 2] *= 1e-3
    error = draw(size, seed=1) if with_error else None
    scale, q, lost = formula(x, error, 0.3)
    found_scale, found_q = parts(quantized(x, error, 0.3))
    assert np.array_equal(found_scale.numpy(), scale)
    assert np.array_equal(found_q.numpy(), q)
    if with_error:
        assert np.array_equal(error.numpy(), lost)
    for out in DTYPES:
        exact = torch.from_numpy(scale[:, None] * q.astype(np.float32)).view(-1)
        wire = quantized(x, draw(size, seed=1) if with_error else None, 0.3)
        assert torch.equal(dequantized(wire, out), exact.to(out))


def test_halves_round_to_even():
    x = torch.zeros(TILE)
    x[:6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])
    error = torch.zeros(TILE)
    scale, q = parts(quantized(x, error))
    assert scale.item() == 1
    assert q[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert error[:6].tolist() == [0, 0.5, -0.5, 0.5, -0.5, -0.5]


def test_an_element_is_off_by_half_a_quantum_at_most():
    x = draw(50 * TILE)
    scale, _ = parts(quantized(x))
    lost = (dequantized(quantized(x)) - x).view(-1, TILE).abs().amax(1)
    assert (lost <= scale * 0.5 * (1 + 1e-5)).all()
    assert (dequantized(quantized(x)).view(-1, TILE).abs().amax(1)
            == pytest.approx(x.view(-1, TILE).abs().amax(1), rel=1e-6))


def test_any_run_of_blocks_stands_alone():
    x = draw(12 * TILE)
    wire = quantized(x)
    for a, b in itertools.combinations((0, 1, 5, 12), 2):
        assert torch.equal(wire[a * BYTES:b * BYTES], quantized(x[a * TILE:b * TILE]))
        assert torch.equal(dequantized(wire[a * BYTES:b * BYTES]),
                           dequantized(wire)[a * TILE:b * TILE])


@pytest.mark.parametrize("off", [1, 2, 3])
def test_a_wire_may_begin_at_any_byte(off):
    x = draw(3 * TILE)
    wire = torch.zeros(3 * BYTES + off, dtype=torch.uint8)[off:]
    QUANTIZE(wire, x, None, 1.0)
    assert torch.equal(wire, quantized(x))
    assert torch.equal(dequantized(wire), dequantized(quantized(x)))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 255, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_block_is_nan(dtype, at, bad):
    x = draw(4 * TILE, dtype)
    x[at] = bad
    error = torch.ones(4 * TILE)
    wire = quantized(x, error)
    hit = torch.arange(4 * TILE) // TILE == at // TILE
    for out in DTYPES:
        assert torch.equal(dequantized(wire, out).isnan(), hit)
    assert (error[hit] == 0).all() and error.isfinite().all()
    shard = torch.empty(4 * TILE)
    assert math.isnan(REDUCE(shard, quantized(torch.ones(4 * TILE)), wire, 0, 1.0, False))
    assert torch.equal(shard.isnan(), hit)


def test_overflow_is_nan_too():
    """Whether in the product, the sum with the error, or fp64 beyond fp32."""
    big = torch.full((TILE,), 3e38)
    assert dequantized(quantized(big, None, 2.0)).isnan().all()
    assert dequantized(quantized(big, big.clone())).isnan().all()
    assert dequantized(quantized(torch.full((TILE,), 1e300, dtype=torch.float64))).isnan().all()
    assert torch.equal(dequantized(quantized(big)), big)


def test_zeros_and_the_smallest_numbers():
    error = torch.zeros(3 * TILE)
    x = torch.zeros(3 * TILE)
    x[TILE] = 1e-45  # a scale that underflows: all of it is kept as error
    x[2 * TILE:] = torch.linspace(-1e-42, 1e-42, TILE)  # a subnormal scale
    wire = quantized(x, error)
    out = dequantized(wire)
    assert torch.equal(wire[:BYTES], torch.zeros(BYTES, dtype=torch.uint8))
    assert (out[:2 * TILE] == 0).all()
    assert torch.equal(error[:2 * TILE], x[:2 * TILE])
    assert torch.equal(out.double() + error.double(), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_error_feedback_the_sums_stay_together(dtype):
    """After any number of steps, what was sent is what was meant but for the last error."""
    size, steps = 8 * TILE, 200
    error = torch.zeros(size)
    meant, sent, plain = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    constant = draw(size)  # the same rounding at every step, which adds up without feedback
    quantum = torch.zeros(size)
    for number in range(steps):
        x = (constant + draw(size, seed=number) * 1e-3).to(dtype)
        wire = quantized(x, error, 0.5)
        meant += x.double() * 0.5
        sent += dequantized(wire, torch.float64)
        plain += dequantized(quantized(x, None, 0.5), torch.float64)
        quantum = torch.maximum(quantum, parts(wire)[0].repeat_interleave(TILE))
        assert (error.abs() <= quantum * 0.5 * (1 + 1e-4)).all()
        torch.testing.assert_close(sent + error.double(), meant, rtol=0,
                                   atol=1e-4 * quantum.max().item())
        assert ((sent - meant).abs() <= quantum).all()
    assert (plain - meant).abs().mean() > 5 * (sent - meant).abs().mean()


@pytest.mark.parametrize("accumulate", [False, True])
def test_reduce_equals_the_sum_in_order_of_rank(accumulate):
    for world, blocks in itertools.product((1, 2, 3, 5), (1, 16, 37)):
        size = blocks * TILE
        wires = [quantized(draw(size, seed=rank)) for rank in range(world)]
        before = draw(size, seed=77)
        total = dequantized(wires[0])
        for wire in wires[1:]:
            total = total + dequantized(wire)
        total = total * torch.tensor(0.3)
        expected = before + total if accumulate else total
        for rank in range(world):
            shard = before.clone()
            others = [wire for i, wire in enumerate(wires) if i != rank]
            received = torch.cat(others) if others else torch.empty(0, dtype=torch.uint8)
            squares = REDUCE(shard, wires[rank], received, rank, 0.3, accumulate)
            assert torch.equal(shard, expected), (world, rank, blocks)
            assert squares == pytest.approx(expected.double().square().sum().item(), rel=3e-7)


def test_the_number_of_threads_changes_nothing():
    size = 300 * TILE
    x = draw(size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            error = draw(size, seed=1)
            wire = quantized(x, error)
            shard = torch.zeros(size)
            squares = REDUCE(shard, wire, wire.clone(), 1, 1.0, True)
            found.append((wire, error, dequantized(wire), shard, torch.tensor(squares)))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_nothing_is_quantized_to_nothing():
    assert dequantized(quantized(torch.empty(0), torch.empty(0))).numel() == 0


def test_bad_arguments_are_named():
    x, wire, shard = torch.zeros(512), empty_wire(512), torch.zeros(512)
    for call, message in [
        (lambda: QUANTIZE(wire, x[:500], None, 1.0), "x must have a multiple of 256 .* found 500"),
        (lambda: QUANTIZE(wire, x[:256], None, 1.0),
         "wire must have 260 bytes for 256 elements, found 520"),
        (lambda: QUANTIZE(wire.view(torch.int8), x, None, 1.0), "wire must be Byte, found Char"),
        (lambda: QUANTIZE(wire, x.int(), None, 1.0),
         "x must be Float, BFloat16, Half or Double, found Int"),
        (lambda: QUANTIZE(wire, x.view(2, 256).t(), None, 1.0), "x must be a contiguous"),
        (lambda: QUANTIZE(wire, x, x[:256].clone(), 1.0),
         "error must have the 512 elements of x, found 256"),
        (lambda: QUANTIZE(wire, x, x.double(), 1.0), "error must be Float, found Double"),
        (lambda: QUANTIZE(wire, x, x, 1.0), "error and x must not overlap"),
        (lambda: QUANTIZE(x.view(torch.uint8)[:520], x, None, 1.0),
         "wire and x must not overlap"),
        (lambda: DEQUANTIZE(x.int(), wire), "out must be Float, BFloat16, Half or Double"),
        (lambda: DEQUANTIZE(x[:256], wire), "wire must have 260 bytes for 256 elements"),
        (lambda: REDUCE(shard, wire, wire[:100], 0, 1.0, False),
         "received must be whole chunks of 520 elements, found 100"),
        (lambda: REDUCE(shard, wire[:260], wire, 0, 1.0, False),
         "own must have 520 elements for a shard of 512, found 260"),
        (lambda: REDUCE(shard, x, wire, 0, 1.0, False), "own must be Byte, found Float"),
        (lambda: REDUCE(shard.double(), wire, wire, 0, 1.0, False),
         "shard must be Float, found Double"),
        (lambda: REDUCE(shard, wire, wire, 2, 1.0, False), r"rank must be in \[0, 2\)"),
    ]:
        with pytest.raises(ValueError, match="_int8_: " + message):
            call()
