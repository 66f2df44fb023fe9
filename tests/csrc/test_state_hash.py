"""csrc/state_hash.cpp against the stated formula in numpy's uint64."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")

HASH = torch.ops.fastllm_cpu.state_hash
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
          torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
          torch.float8_e5m2]
MASK = 2**64 - 1
u64 = np.uint64


def mix(z):
    z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
    return z ^ (z >> u64(31))


def formula(x, seed, first):
    unsigned = np.dtype(f"u{x.element_size()}")
    bits = x.reshape(-1).view(torch.uint8).numpy().view(unsigned).astype(u64)
    index = u64(first & MASK) + np.arange(x.numel(), dtype=u64)
    each = mix(mix(u64(seed & MASK) + u64(0x9E3779B97F4A7C15) * index) ^ bits)
    return signed(int(each.sum(dtype=u64)))


def signed(value):
    return (value + 2**63 & MASK) - 2**63


def draw(dtype, size, seed=0):
    """Every pattern of bits that the dtype may hold, also NaNs and negative numbers."""
    if dtype == torch.bool:
        return torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.5
    raw = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype) if size else torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("size", [0, 1, 7, 256, 50001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(dtype, size):
    x = draw(dtype, size)
    for seed, first in [(0, 0), (1, 0), (-5, 2**40 + 3), (2**63 - 1, 2**63 - 10), (7, -20)]:
        assert HASH(x, seed, first) == formula(x, seed, first)


def test_numbers_that_must_never_change():
    """They are compared across machines and kept in checkpoints."""
    assert HASH(torch.zeros(1), 0, 0) == 0
    assert HASH(torch.arange(1000), 42, 17) == -6625564704040965901
    assert HASH(torch.ones(3, 5, dtype=torch.bfloat16), -1, 0) == 1923644678366332978


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_pieces_add_up_wherever_the_cuts_are(dtype):
    n = 70001
    x = draw(dtype, n)
    cuts = np.random.default_rng(1).integers(0, n, 20).tolist()
    whole = HASH(x, 9, 1000)
    for bounds in ([0, 1, n], [0, 17, 16384, 16385, n], [0, *sorted(cuts), n]):
        pieces = [HASH(x[a:b], 9, 1000 + a) for a, b in itertools.pairwise(bounds)]
        assert signed(sum(pieces) & MASK) == whole


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_one_flipped_bit_changes_it(dtype):
    x = draw(dtype, 999)
    before, raw = HASH(x, 3, 0), x.view(torch.uint8)
    found = {before}
    places = np.random.default_rng(2).integers(0, 8 * len(raw), 300)
    places = sorted({0, 8 * len(raw) - 1, *places.tolist()})
    for place in places:
        raw[place // 8] ^= 1 << place % 8
        found.add(HASH(x, 3, 0))
        raw[place // 8] ^= 1 << place % 8
    assert len(found) == 1 + len(places)
    assert HASH(x, 3, 0) == before


def test_order_place_seed_and_the_sign_of_zero_count():
    x = torch.arange(100.0)
    found = {HASH(x, 0, 0), HASH(x.flip(0), 0, 0), HASH(x, 0, 1), HASH(x, 1, 0), HASH(-x, 0, 0)}
    assert len(found) == 5
    assert HASH(torch.zeros(1), 0, 5) != HASH(-torch.zeros(1), 0, 5)


def test_the_shape_does_not_count():
    x = draw(torch.float32, 24)
    assert HASH(x.view(2, 3, 4), 1, 2) == HASH(x, 1, 2) == HASH(x.clone().requires_grad_(), 1, 2)
    assert HASH(torch.tensor(5.0), 1, 2) == HASH(torch.tensor([5.0]), 1, 2)


def test_it_is_the_same_for_any_number_of_threads():
    x = draw(torch.bfloat16, 300001)
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(HASH(x, 1, 2))
    finally:
        torch.set_num_threads(before)
    assert found == {formula(x, 1, 2)}


def test_what_it_cannot_hash_is_named():
    with pytest.raises(ValueError, match=r"expected a contiguous tensor .* shape \[4, 3\]"):
        HASH(torch.ones(3, 4).t(), 0, 0)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bytes, found ComplexDouble of 16"):
        HASH(torch.ones(3, dtype=torch.complex128), 0, 0)
