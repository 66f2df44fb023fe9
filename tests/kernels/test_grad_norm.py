"""What the registry cannot know of the gradient norm: bad numbers, layouts, and how it clips."""

import math

import kernel_check as kc
import pytest
import torch

from fastllm import ops
from fastllm.kernels.grad_norm import _whole
from fastllm.ops import _dispatch


@pytest.fixture(autouse=True, params=["triton", "reference", "cpp"])
def backend(request):
    reason = _dispatch.why_not("grad_norm", request.param, torch.device(kc.DEVICE))
    if reason:
        pytest.skip(reason)
    with ops.use_backend(request.param, "grad_norm"):
        yield request.param


def drawn(*shape, seed=0):
    generator = torch.Generator(kc.DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=kc.DEVICE)


def test_clips_as_torch_does():
    grads = [drawn(70, 30), drawn(5, seed=1).bfloat16(), drawn(40000, seed=2)]
    for limit in (0.5, 1e9):
        params = [torch.nn.Parameter(grad.clone()) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        wanted = torch.nn.utils.clip_grad_norm_(params, limit)
        norm, coefficient = ops.grad_norm(grads, max_norm=limit)
        assert norm.shape == coefficient.shape == ()
        assert norm.dtype == coefficient.dtype == torch.float32
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert torch.allclose(params[0].grad, grads[0] * coefficient, rtol=1e-5)
    assert coefficient == 1.0
    assert torch.equal(ops.grad_norm(grads), norm)


def test_a_norm_of_many_elements_is_exact(backend):
    """Equal squares are where a long float32 sum goes wrong: the error stays near one rounding."""
    if backend == "reference" and kc.DEVICE != "cpu":
        pytest.skip("there the reference is torch's sum of squares in float32, which says less")
    grad = torch.full(((1 << 20) + 3,), 0.1, device=kc.DEVICE)
    exact = float(grad[0].double()) * math.sqrt(grad.numel())
    assert ops.grad_norm([grad]).item() == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize(("bad", "norm", "coefficient"), [
    (math.nan, math.nan, math.nan), (math.inf, math.inf, 0.0), (-math.inf, math.inf, 0.0)])
@pytest.mark.parametrize("at", [0, 16383, 16384, 20000])
def test_bad_numbers_show(bad, norm, coefficient, at):
    grads = [drawn(3), drawn(20001)]
    grads[1][at] = bad
    got = ops.grad_norm(grads, max_norm=1.0)
    assert torch.equal(torch.stack(got).cpu().nan_to_num(nan=-1.0, posinf=-2.0),
                       torch.tensor([norm, coefficient]).nan_to_num(nan=-1.0, posinf=-2.0))


def test_nothing_has_no_norm():
    assert ops.grad_norm([]) == 0
    assert [t.item() for t in ops.grad_norm([], max_norm=1.0)] == [0, 1]
    assert ops.grad_norm([drawn(0), drawn(3, 0)]) == 0


@pytest.mark.parametrize("lay", [
    lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[1:, 3:], lambda x: x.view(2, 20, 15).mT,
    lambda x: x.sum().expand(30, 3), lambda x: x[:1].expand(4, 30), lambda x: x.view(-1)[7:]])
def test_layouts(lay):
    grad = lay(drawn(20, 30))
    wanted = torch.linalg.vector_norm(grad.double()).item()
    assert ops.grad_norm([grad]).item() == pytest.approx(wanted, rel=1e-6)


def test_gradients_without_gaps_are_not_copied():
    x = drawn(4, 6, 8)
    for whole in (x, x.mT, x.permute(2, 0, 1), x[1:], x[1:2].mT):
        assert _whole(whole) is whole
    for gaps in (x[:, 1:], x[..., ::2], x.sum().expand(3, 3), x[:, :1]):
        assert _whole(gaps).is_contiguous()
        assert torch.equal(_whole(gaps), gaps)
