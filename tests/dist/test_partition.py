"""Which rank owns which elements: a partition for every size and world, the same in C++."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import cpu
from fastllm.dist.partition import ALIGN, fill, layout, runs, sent_order

SIZES = st.lists(st.one_of(st.just(0), st.integers(1, 4), st.integers(200, 1200)), min_size=1,
                 max_size=9)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 7))
def test_every_element_has_one_owner(sizes, world):
    place = layout(sizes, world)
    assert place.padded >= sum(sizes) and place.shard % ALIGN == 0
    assert place.padded - sum(sizes) < ALIGN * (len(sizes) + world)
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for rank in range(world):
        for run in runs(place, [rank]):
            assert 0 <= run.begin and run.begin + run.size <= place.shard
            assert run.offset % ALIGN == 0  # blocks of 8-bit states are never cut
            seen[run.parameter][run.offset:run.offset + run.size] += 1
    assert all(bool((one == 1).all()) for one in seen)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.data())
def test_the_sent_buffer_holds_every_element_once(sizes, world, data):
    rank = data.draw(st.integers(0, world - 1))
    place, order = layout(sizes, world), sent_order(world, rank)
    assert sorted(order) == list(range(world)) and order[-1] == rank
    flat = torch.full((place.padded,), -1)
    buffer = flat.clone()
    for i, (begin, size) in enumerate(zip(place.begins, sizes, strict=True)):
        flat[begin:begin + size] = torch.arange(size) + 10_000 * i
    for run in runs(place, order):
        at = 10_000 * run.parameter + run.offset
        buffer[run.begin:run.begin + run.size] = torch.arange(at, at + run.size)
    whole = torch.cat([buffer.view(world, -1)[order.index(rank)] for rank in range(world)])
    assert torch.equal(whole, flat)


@pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")
@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 6), st.data())
def test_cpp_is_the_same(sizes, world, data):
    place = layout(sizes, world)
    assert torch.ops.fastllm_cpu.partition_layout(sizes, world) == [*place.begins, place.shard]
    order = data.draw(st.permutations(range(world)))
    flat = [n for run in runs(place, order)
            for n in (run.parameter, run.offset, run.begin, run.size)]
    assert torch.ops.fastllm_cpu.partition_runs(sizes, world, order) == flat


def test_buckets_are_filled_in_order():
    assert fill([3, 3, 9, 1, 1], 6) == [range(0, 2), range(2, 3), range(3, 5)]
    assert fill([], 5) == []
