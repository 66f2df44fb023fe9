"""Merging parts of attention: rows without keys, many parts, and that order does not matter."""

import math

import kernel_check as kc
import pytest
import torch

from fastllm.kernels import merge_attention as module

DEVICE = kc.DEVICE
functions = pytest.mark.parametrize("merge", [module.merge_attention, module.reference],
                                    ids=["triton", "reference"])


def part(seed, shape=(2, 5, 3, 8), dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    out = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    lse = torch.randn(shape[0], shape[2], shape[1], generator=generator, device=DEVICE)
    return out, lse


@functions
def test_rows_without_keys(merge):
    """In one part, in the other and in both; what stands in them, even NaN, is not read."""
    (a, lse_a), (b, lse_b) = part(0), part(1)
    lse_a[:, :, :2], lse_b[:, :, 1:3] = -math.inf, -math.inf
    a[:, :2], b[:, 1:3] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = merge(*leaves)
    assert torch.equal(out[:, 0], b[:, 0])
    assert torch.equal(out[:, 2], a[:, 2])
    assert not out[:, 1].any()
    assert (lse[:, :, 1] == -math.inf).all()
    assert torch.equal(lse[:, :, 0], lse_b[:, :, 0])
    grads = torch.autograd.grad((out.sum(), lse[:, :, [0, 2, 3, 4]].sum()), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert not any(x[:, 1].any() for x in grads[::2])
    assert not any(x[:, :, 1].any() for x in grads[1::2])
    assert not grads[0][:, 0].any()
    assert not grads[3][:, :, 2].any()


@functions
def test_many_parts_in_any_order(merge):
    parts = [part(i) for i in range(5)]
    results = []
    for order in (range(5), reversed(range(5))):
        first, *rest = [parts[i] for i in order]
        out, lse = first
        for other in rest:
            out, lse = merge(out, lse, *other)
        results.append((out, lse))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0).transpose(-1, -2)[..., None]
    exact = (weights * torch.stack([out for out, _ in parts])).sum(0)
    torch.testing.assert_close(results[0][0], exact, rtol=1e-5, atol=1e-6)


@functions
def test_the_wider_type_wins(merge):
    (a, lse_a), (b, lse_b) = part(0, dtype=torch.bfloat16), part(1)
    out, lse = merge(a, lse_a, b, lse_b)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)


@functions
def test_large_lses(merge):
    """Far apart and far from zero: neither overflows, and the larger one is the result."""
    (a, lse_a), (b, lse_b) = part(0), part(1)
    out, lse = merge(a, lse_a + 1e4, b, lse_b - 1e4)
    assert torch.equal(out, a)
    assert torch.equal(lse, lse_a + 1e4)


@functions
@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda a, x, b, y: (a, x, b[:1], y), ValueError, r"not twice \(B, S, H, D\)"),
    (lambda a, x, b, y: (a, x.mT, b, y), ValueError, r"with \(B, H, S\)"),
    (lambda a, x, b, y: (a[0, 0], x, b, y), ValueError, "not twice"),
    (lambda a, x, b, y: (a, x.half(), b, y.half()), TypeError, "must be float32"),
    (lambda a, x, b, y: (a, x, b, y.double()), TypeError, "must be float32")])
def test_refusals(merge, change, error, message):
    with pytest.raises(error, match=f"merge_attention: .*{message}"):
        merge(*change(*part(0), *part(1)))
