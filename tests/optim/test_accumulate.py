"""Gradient accumulation: cutting a step into micro-batches does not change its gradient."""

import pytest
import torch
from torch import nn

from fastllm.optim import AdamW, GradAccumulator, OptimConfig


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batches(count=8):
    gen = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=gen), torch.randn(4, 3, generator=gen))
            for _ in range(count)]


def accumulate(net, data, accumulator):
    """Sum of squares over all data over the number of rows, in len(data) backward passes."""
    rows = sum(len(x) for x, _ in data)
    dtype = next(net.parameters()).dtype
    for x, y in data:
        (((net(x.to(dtype)).float() - y) ** 2).sum() / rows).backward()
        accumulator.collect()
    return accumulator.gradients()


def whole(data):
    return [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]


def test_one_batch_of_eight_equals_eight_of_one():
    data, found = batches(), []
    for cut in (whole(data), data):
        net = model()
        params = list(net.parameters())
        opt = AdamW(net.named_parameters(), OptimConfig(grad_clip=1.0))
        accumulator = GradAccumulator(params, len(cut))
        for _ in range(5):
            norm = opt.step(1e-2, accumulate(net, cut, accumulator))
            opt.applied(bool(norm.isfinite()))
            accumulator.zero()
        found.append([p.detach().clone() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_gradients_are_summed_in_fp32():
    """Many small gradients: bf16 sums stall, fp32 sums keep every one exactly."""
    weight = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    accumulator = GradAccumulator([weight], 1000)
    for _ in range(1000):
        (weight * 1.0078125).sum().backward()  # bf16's next number after 1
        accumulator.collect()
    (total,) = accumulator.gradients()
    assert total.dtype == torch.float32
    assert (total == 1000 * 1.0078125).all()
    assert weight.grad is None


def test_bf16_sum_is_that_of_the_micro_batches_gradients():
    net, data = model(torch.bfloat16), batches()
    params = list(net.parameters())
    sums = accumulate(net, data, GradAccumulator(params, 8))
    expected = [torch.zeros(p.shape) for p in params]
    oracle = model(torch.bfloat16)
    for x, y in data:
        loss = ((oracle(x.bfloat16()).float() - y) ** 2).sum() / 32
        for total, grad in zip(expected, torch.autograd.grad(loss, oracle.parameters()),
                               strict=True):
            total += grad.float()
    for a, b in zip(sums, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.float32, 8)])
def test_no_copy_where_none_is_needed(dtype, count):
    net = model(dtype)
    params = list(net.parameters())
    accumulator = GradAccumulator(params, count)
    grads = accumulate(net, batches(count), accumulator)
    assert all(grad is param.grad for grad, param in zip(grads, params, strict=True))


def test_buffers_are_reused_and_start_anew():
    net = model(torch.bfloat16)
    accumulator = GradAccumulator(list(net.parameters()), 2)
    first = accumulate(net, batches(2), accumulator)
    values, places = [g.clone() for g in first], [g.data_ptr() for g in first]
    accumulator.zero()
    second = accumulate(net, batches(2), accumulator)
    assert [g.data_ptr() for g in second] == places
    assert all(torch.equal(a, b) for a, b in zip(second, values, strict=True))


def test_a_parameter_that_only_some_micro_batches_reach():
    a = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    b = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    c = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    accumulator = GradAccumulator([a, b, c], 2)
    for step in range(2):
        (a * 2 + b).sum().backward()
        accumulator.collect()
        (a * 3).sum().backward()
        accumulator.collect()
        grad_a, grad_b, grad_c = accumulator.gradients()
        assert (grad_a == 5).all() and (grad_b == 1).all() and grad_c is None, step
        accumulator.zero()


def test_an_unfinished_step_is_an_error():
    net = model()
    accumulator = GradAccumulator(list(net.parameters()), 8)
    with pytest.raises(RuntimeError, match="3 of 8 micro-batches were collected"):
        accumulate(net, batches(3), accumulator)
    with pytest.raises(ValueError, match="grad_accum must be at least 1, found 0"):
        GradAccumulator(list(net.parameters()), 0)


def test_close_gives_the_gradients_back():
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    GradAccumulator([weight], 2).close()
    weight.sum().backward()
    assert weight.grad is not None
