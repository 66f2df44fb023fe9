"""The interpreter's bfloat16, held to torch's, which is right."""

import torch
from kernel_check import DEVICE

from fastllm.kernels._triton import INTERPRETED, jit, tl

N = 1024


@jit
def _arithmetic(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + N + at, x * y)
    tl.store(out + 2 * N + at, -x)
    tl.store(out + 3 * N + at, tl.where(x > y, x, y))
    tl.store(out + 4 * N + at, x.to(tl.float32).to(tl.bfloat16))


@jit
def _cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


@jit
def _sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@jit
def _dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@jit
def _scaled(x, out, factor, count, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    for _ in range(count):
        value *= factor
    tl.store(out + at, value)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def test_it_is_on_where_there_is_no_gpu():
    assert (DEVICE == "cpu") == INTERPRETED


def test_arithmetic_is_bit_exact():
    a, b = draw(2, N).bfloat16()
    out = torch.empty(5, N, dtype=torch.bfloat16, device=DEVICE)
    _arithmetic[(1,)](a, b, out, N=N)
    assert torch.equal(out, torch.stack([a + b, a * b, -a, torch.maximum(a, b), a]))


def test_casts_round_to_nearest_even():
    # Every upper half with lower halves below, at and above the tie, then the specials.
    upper = torch.arange(0, 1 << 16, 37, dtype=torch.int64)[:, None] << 16
    bits = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()[:8192]
    x = bits.to(torch.int32).view(torch.float32).to(DEVICE)
    x[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])
    out = torch.empty(8192, dtype=torch.bfloat16, device=DEVICE)
    _cast[(1,)](x, out, N=8192)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_sums_round_once():
    x = draw(N).bfloat16()
    out = torch.empty(1, dtype=torch.bfloat16, device=DEVICE)
    _sum[(1,)](x, out, N=N)
    wide = x.double()
    slack = 2**-8 * abs(out.item()) if INTERPRETED else 2**-8 * wide.abs().sum()
    assert abs(out.item() - wide.sum()) <= slack + 1e-6


def test_dots_multiply_numbers_not_bits():
    a, b = draw(2, 32, 32).bfloat16()
    out = torch.empty(32, 32, device=DEVICE)
    _dot[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_python_floats_and_run_time_loop_bounds():
    x, out = draw(N), torch.empty(N, device=DEVICE)
    _scaled[(1,)](x, out, 0.5, 3, N=N)
    assert torch.equal(out, x * 0.125)
