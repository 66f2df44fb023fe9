"""RMSNorm and LayerNorm beyond the registry's tests: many tiles a program, which gradients are
wanted, what a call costs, and that no bit depends on the GPU."""

import kernel_check as kc
import pytest
import torch
from meter import Meter

from fastllm import ops
from fastllm.kernels import _norms, layer_norm, rms_norm
from fastllm.kernels._triton import INTERPRETED

BOTH = pytest.mark.parametrize("module", [rms_norm, layer_norm],
                               ids=["rms_norm", "layer_norm"])
STREAM = {"residual": True, "residual_dtype": torch.float32, "prenorm": True}


def gradients(module, call):
    outputs = module.KERNEL.results(module.KERNEL.public, call)
    upstream = [torch.ones_like(y) for y in outputs]
    return torch.autograd.grad(outputs, call.differentiated(), upstream)


@BOTH
@pytest.mark.parametrize(("shape", "options"), [
    ((70, 64), {}), ((70, 64), STREAM), ((7, 3000), {}), ((5, 4112), STREAM), ((5, 4101), {}),
    ((5, 8300), STREAM)])
def test_programs_that_walk_many_tiles(module, options, shape, monkeypatch):
    """On one multiprocessor, with two partial sums: short rows, wide, odd and long ones."""
    monkeypatch.setattr(_norms, "_partials", lambda *_: 2)
    monkeypatch.setattr(_norms, "multiprocessors", lambda device: 1)
    kc.check(module.KERNEL, module.KERNEL.public,
             kc.make(module.KERNEL, shape, torch.bfloat16, **options))


@BOTH
def test_no_bit_depends_on_the_gpu(module, monkeypatch):
    results = []
    for multiprocessors in (1, 132):
        monkeypatch.setattr(_norms, "multiprocessors", lambda device, n=multiprocessors: n)
        call = kc.make(module.KERNEL, (300, 200), torch.bfloat16)
        results.append(kc.run(module.KERNEL, module.KERNEL.public, call))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_partial_sums_are_few():
    """At most 5 % of what a backward in 16 bits streams, once there are rows enough."""
    for gathered in (1, 2):
        for rows in range(512, 40_000, 97):
            for hidden in (64, 512, 4096, 8192, 16384):
                partials = _norms._partials(rows, hidden, gathered)
                assert 1 <= partials <= 256
                assert 2 * 4 * partials * gathered <= 0.05 * 3 * 2 * rows


@pytest.mark.skipif(not INTERPRETED, reason="the meter counts in the interpreter")
@BOTH
def test_one_launch_forward_and_two_backward(module):
    """The addition, the residual's gradient and the casts cost no operator and no copy."""
    for options in ({}, {"residual": True, "prenorm": True}, STREAM):
        call = kc.make(module.KERNEL, (40, 64), torch.bfloat16, **options)
        with Meter() as forward:
            outputs = module.KERNEL.results(module.KERNEL.public, call)
        upstream = [torch.ones_like(y) for y in outputs]
        with Meter() as backward:
            torch.autograd.grad(outputs, call.differentiated(), upstream)
        assert [x.name for x in forward.launches] == ["_forward_kernel"]
        assert [x.name for x in backward.launches] == ["_backward_kernel", "_gather_kernel"]
        assert not forward.aten, forward.aten
        assert not backward.aten, backward.aten


@BOTH
def test_frozen_vectors_get_no_gradient(module):
    """And cost nothing; what remains is what it was."""
    call = kc.make(module.KERNEL, (5, 64), torch.float32)
    all_of_them = gradients(module, call)
    for frozen in ({1}, {2}, {1, 2}):
        again = kc.clone(call)
        vectors = [again.args[i] for i in frozen if i < len(again.args)]
        for vector in vectors:
            vector.requires_grad_(False)
        kept = [g for i, g in enumerate(all_of_them) if i not in frozen]
        for ours, theirs in zip(gradients(module, again), kept, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("hidden", [64, 8300])
def test_strides_of_their_own(module, hidden):
    """x, residual and both upstream gradients each lie at other distances."""
    call = kc.make(module.KERNEL, (5, hidden), torch.float32, residual=True, prenorm=True)
    apart = [0]

    def wider(t):
        if t.dim() < 2:
            return t
        apart[0] += 8
        return t.new_zeros(t.shape[0], t.shape[1] + apart[0])[:, :t.shape[1]].copy_(t.detach())

    truth = kc.run(module.KERNEL, module.reference, kc.upcast(call))
    beside = kc.run(module.KERNEL, module.reference, kc.clone(call))
    got = kc.run(module.KERNEL, module.KERNEL.public, call.map(wider), change=wider)
    kc.judge(got, beside, truth)


@BOTH
@pytest.mark.parametrize("hidden", [64, 8300])
def test_y_is_formed_from_what_was_kept(module, hidden):
    """The norm of the rounded sum, which is what the backward knows, to the bit."""
    call = kc.make(module.KERNEL, (5, hidden), torch.bfloat16, residual=True, prenorm=True)
    y, h = module.KERNEL.public(*call.args, **call.kwargs)
    assert torch.equal(h, call.args[0] + call.kwargs["residual"])
    assert torch.equal(y, module.KERNEL.public(h, *call.args[1:], eps=call.kwargs["eps"]))


@BOTH
def test_only_the_sum_is_used(module):
    call = kc.make(module.KERNEL, (5, 64), torch.bfloat16, **STREAM)
    _, h = module.KERNEL.public(*call.args, **call.kwargs)
    tensors = call.differentiated()
    dx, *vectors, dresidual = torch.autograd.grad(h.sum(), tensors)
    assert (dx == 1).all()
    assert (dresidual == 1).all()
    assert not any(v.any() for v in vectors)
    assert (dx.dtype, dresidual.dtype) == (torch.bfloat16, torch.float32)


@BOTH
def test_the_one_gradient_is_not_shared(module):
    """x and residual get the same numbers, but changing one gradient must not change the other."""
    call = kc.make(module.KERNEL, (5, 64), torch.float32, residual=True)
    x, residual = call.args[0], call.kwargs["residual"]
    module.KERNEL.public(*call.args, **call.kwargs).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.any()


@BOTH
def test_prenorm_without_a_residual_passes_x_on(module):
    call = kc.make(module.KERNEL, (5, 64), torch.float32, prenorm=True)
    _, h = module.KERNEL.public(*call.args, **call.kwargs)
    assert h is call.args[0]
    kc.check(module.KERNEL, module.KERNEL.public, call)


@BOTH
def test_rows_of_one_element(module):
    """Where RMSNorm is a sign and LayerNorm the bias: all of x's gradient is rounding and eps."""
    call = kc.make(module.KERNEL, (40, 1), torch.float32)
    ours = kc.run(module.KERNEL, module.KERNEL.public, kc.clone(call))
    theirs = kc.run(module.KERNEL, module.reference, kc.upcast(call))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [300, 9000])
def test_variance_around_a_far_mean(hidden):
    """mean(x^2) - mean(x)^2 would have nothing left of a deviation of 1 around 1e4."""
    call = kc.make(layer_norm.KERNEL, (3, hidden), torch.float32, level=1e4)
    kc.check(layer_norm.KERNEL, layer_norm.layer_norm, call)
    y = layer_norm.layer_norm(call.args[0])
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, device=y.device), rtol=1e-3,
                               atol=0)


@BOTH
def test_float64_and_gradients_by_differences(module):
    generator = torch.Generator(kc.DEVICE).manual_seed(0)
    op = getattr(ops, module.KERNEL.name)
    x, residual, *vectors = (
        torch.randn(shape, generator=generator, device=kc.DEVICE, dtype=torch.float64,
                    requires_grad=True) for shape in ((3, 6), (3, 6), 6, 6))
    vectors = vectors[:1 if module is rms_norm else 2]
    assert torch.autograd.gradcheck(
        lambda x, r, *v: op(x, *v, residual=r, prenorm=True), (x, residual, *vectors))


@BOTH
def test_what_does_not_fit_raises(module):
    op, x = module.KERNEL.public, torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \(4,\) does not fit x \(2, 8\)"):
        op(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"residual .* is not of x's shape"):
        op(x, torch.zeros(8), residual=torch.zeros(8))
    with pytest.raises(TypeError, match=f"{module.KERNEL.name}: torch.float64"):
        op(x, torch.zeros(8), residual=torch.zeros(2, 8, dtype=torch.float64))


def test_offset_needs_a_weight():
    with pytest.raises(ValueError, match="offset"):
        rms_norm.rms_norm(torch.zeros(2, 8), offset=1.0)
