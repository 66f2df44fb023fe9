"""No access outside of a tensor goes unnoticed in the interpreter, and no right one is refused."""

import pytest
import torch
from kernel_check import DEVICE

from fastllm.kernels._triton import TensorDescriptor, addresses, jit, tl

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU compute-sanitizer does this")
N = 16


@jit
def _fill(out, first, last, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, 1.0, mask=(at >= first) & (at < last))


@jit
def _copy(x, out, shift, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at + shift))


@jit
def _count(total, place):
    tl.atomic_add(total + place, 1.0)


@jit
def _claim(lock, place):
    tl.atomic_cas(lock + place, 0, 1)


@jit
def _by_table(table, N: tl.constexpr):
    target = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(target + tl.arange(0, N), 1.0)


@jit
def _tile(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    value = x.load([0, 0])
    tl.store(out + at[:, None] * N + at[None, :], value)


def guarded(*shape):
    """A tensor of zeros inside of a larger one, and that one."""
    whole = torch.zeros(64 + torch.Size(shape).numel() + 64)
    return whole[64:-64].view(shape), whole


def test_a_masked_lane_touches_nothing():
    out, whole = guarded(10)
    _fill[(2,)](out, 0, 10, N=N)
    assert out.sum() == whole.sum() == 10


def test_a_launch_with_every_lane_off_is_right():
    out, whole = guarded(10)
    _fill[(1,)](out, 5, 5, N=N)
    assert whole.sum() == 0


@pytest.mark.parametrize(("first", "last", "words"), [
    (0, 11, r"_fill, program \(0, 0, 0\): a store of 4 bytes outside of every tensor, "
            r"0 bytes past the last element of out \(10,\) float32; is a mask missing\?"),
    (18, 20, r"program \(1, 0, 0\).*32 bytes past the last element of out")])
def test_a_store_past_the_end_is_refused_before_it_is_made(first, last, words):
    out, whole = guarded(10)
    with pytest.raises(Exception, match=words):
        _fill[(2,)](out, first, last, N=N)
    assert whole.sum() == out.sum() == 0


@pytest.mark.parametrize(("shift", "words"), [
    (1, "a load of 4 bytes outside of every tensor, 0 bytes past the last element of x"),
    (-2, "8 bytes before the first element of x")])
def test_a_load_outside_is_refused(shift, words):
    x, _ = guarded(N)
    out = torch.empty(N)
    with pytest.raises(Exception, match=words):
        _copy[(1,)](x, out, shift, N=N)


@pytest.mark.parametrize("kernel", [_count, _claim])
def test_an_atomic_outside_is_refused(kernel):
    whole = torch.zeros(8, dtype=torch.int32 if kernel is _claim else torch.float32)
    kernel[(1,)](whole[:4], 3)
    with pytest.raises(Exception, match="an atomic of 4 bytes outside"):
        kernel[(1,)](whole[:4], 4)
    assert whole[4:].sum() == 0


def test_an_address_in_a_table_is_known_until_the_next_table():
    out, whole = guarded(N)
    table = torch.tensor(addresses([out])[0])
    _by_table[(1,)](table, N=N)
    assert out.sum() == whole.sum() == N
    addresses([torch.zeros(N)])
    with pytest.raises(Exception, match="a store of 4 bytes outside of every tensor"):
        _by_table[(1,)](table, N=N)


def test_what_lies_between_the_elements_of_a_view_is_inside():
    whole = torch.arange(4 * N, dtype=torch.float32)
    out = torch.empty(N)
    _copy[(1,)](whole[: 2 * N].view(2, N).t(), out, 5, N=N)
    assert torch.equal(out, whole[5 : 5 + N])


def test_a_descriptor_masks_its_own_edge():
    x, _ = guarded(10, 12)
    x += 1
    out = torch.empty(N, N)
    _tile[(1,)](TensorDescriptor.from_tensor(x, [N, N]), out, N=N)
    assert out.sum() == 120
