"""The meter counts toy kernels and operators to the byte, as one would by hand."""

import meter as bench_meter
import pytest
import torch
from meter import Meter

from fastllm.kernels._triton import INTERPRETED, addresses, cdiv, jit, tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the meter counts in the interpreter")


@jit
def _scale(x, weight, y, n, ROWS: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * weight, of rows of n; a second read of x where AGAIN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < n
    value = tl.load(x + row * n + column, mask=inside & (row >= 0))
    value *= tl.load(weight + column, mask=inside)
    if AGAIN:
        value += tl.load(x + row * n + column, mask=inside & (row >= 0))
    tl.store(y + row * n + column, value, mask=inside & (row >= 0))


def scaled(rows, n, dtype=torch.bfloat16, again=False, tile=2):
    x, weight = torch.ones(rows, n, dtype=dtype), torch.ones(n, dtype=dtype)
    with Meter() as meter:
        y = torch.empty_like(x)
        _scale[(cdiv(rows, tile),)](x, weight, y, n, ROWS=tile, AGAIN=again, BLOCK=64)
    return meter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_requested_and_unique_bytes_are_exact(dtype):
    meter, e = scaled(6, 50, dtype), dtype.itemsize
    (launch,) = meter.launches
    assert (launch.name, launch.programs) == ("_scale", 3)
    assert launch.loaded == e * (6 * 50 + 3 * 50)  # each program reads the weight
    assert launch.stored == e * 6 * 50
    assert meter.requested == launch.loaded + launch.stored
    assert meter.unique == e * (6 * 50 + 50 + 6 * 50)
    assert meter.aten_bytes == 0  # empty_like writes nothing


def test_a_second_read_shows_in_requested_only():
    once, twice = scaled(6, 50), scaled(6, 50, again=True)
    assert twice.requested - once.requested == 2 * 6 * 50
    assert twice.unique == once.unique


def test_each_launch_has_its_own_unique_bytes():
    x = torch.ones(4, 64)
    with Meter() as meter:
        for _ in range(3):
            _scale[(2,)](x, x, x, 64, ROWS=2, AGAIN=False, BLOCK=64)
    assert len(meter.launches) == 3
    assert meter.unique == 3 * 2 * x.nbytes  # in place: read and written


@jit
def _gather_add(table, index, out, n, BLOCK: tl.constexpr):
    """Reads through addresses held in memory; every lane adds to out[0]."""
    lane = tl.arange(0, BLOCK)
    address = tl.load(table + lane, mask=lane < n)
    value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=lane < n)
    tl.atomic_add(out + tl.load(index + lane, mask=lane < n), value, mask=lane < n)


def test_addresses_from_memory_and_atomics():
    x, out = torch.arange(10.0), torch.zeros(1)
    [[first]], _ = addresses([x])
    table = torch.tensor([first + 4 * (i // 2) for i in range(10)])
    index = torch.zeros(10, dtype=torch.int32)
    with Meter() as meter:
        _gather_add[(1,)](table, index, out, 10, BLOCK=16)
    assert out.item() == 2 * (0 + 1 + 2 + 3 + 4)
    assert meter.requested == 10 * (8 + 4 + 4 + 2 * 4)
    assert meter.unique == 10 * 8 + 5 * 4 + 10 * 4 + 2 * 4


@jit
def _product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_products_count_wherever_they_are_made():
    a = torch.ones(16, 16, dtype=torch.bfloat16)
    with Meter() as meter:
        _product[(1,)](a, a, torch.empty(16, 16), N=16)
        torch.nn.functional.linear(torch.ones(3, 5), torch.ones(7, 5), torch.ones(7))
        torch.ones(3, 7).addmm_(torch.ones(3, 5), torch.ones(5, 7))
    assert meter.flops == 2 * 16**3 + 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize(("run", "expected"), [
    (lambda x: x + 1, 48 + 48),
    (lambda x: x * x, 48 + 48),
    (lambda x: x.view(12)[2:].unsqueeze(0).expand(5, -1), 0),
    (lambda x: x.contiguous().to(torch.float32).reshape(12), 0),
    (lambda x: x.t().contiguous(), 48 + 48),
    (lambda x: x.sum(0), 48 + 16),
    (lambda x: torch.zeros_like(x), 48),
    (lambda x: torch.empty_like(x).copy_(x), 48 + 48),
    (lambda x: torch.empty_like(x).zero_(), 48),
    (lambda x: x.to(torch.bfloat16), 48 + 24),
    (lambda x: x[:1].expand(3, 4).clone(), 16 + 48),
    (lambda x: torch.mm(x, x.t(), out=torch.empty(3, 3)), 48 + 36),  # x.t() is x's own memory
    (lambda x: x[torch.tensor([1, 1])], 32 + 16 + 32),
    (lambda x: x.index_add_(0, torch.tensor([1]), torch.ones(1, 4)), 16 + 16 + 8 + 16),
])
def test_operators_cost_what_they_read_and_write(run, expected):
    x = torch.ones(3, 4)
    made = {"tensor": 0, "ones": 0}
    with Meter() as meter:
        run(x)
    counted = {name: size for name, (_, size) in meter.aten.items()}
    own = sum(size for name, size in counted.items() if name not in made)
    assert own == expected, counted


@torch.library.custom_op("fastllm_test::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _scale[(2,)](x.contiguous(), torch.ones_like(x[0]), out, 64, ROWS=2, AGAIN=False, BLOCK=64)
    return out + out


@_twice.register_fake
def _twice_fake(x):
    return torch.empty_like(x)


def test_custom_operators_are_looked_into():
    x = torch.ones(4, 64)
    with Meter() as meter:
        torch.ops.fastllm_test.twice(x)
    assert len(meter.launches) == 1
    assert meter.aten == {"ones_like": [1, 256], "add": [1, 2048]}


def test_nothing_stays_patched_and_a_misaligned_access_raises():
    stock = bench_meter.Builder.create_masked_load
    with Meter():
        assert bench_meter.Builder.create_masked_load is not stock
    assert bench_meter.Builder.create_masked_load is stock
    askew = torch.frombuffer(bytearray(33), dtype=torch.float32, offset=1)
    x = torch.zeros(8)
    with Meter(), pytest.raises(Exception, match="not aligned"):
        _scale[(1,)](askew, x, x, 8, ROWS=1, AGAIN=False, BLOCK=8)
