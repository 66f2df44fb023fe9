"""qk_norm_rope is rms_norm and then rope; its weights' gradients are gathered in a fixed order."""

import kernel_check as kc
import pytest
import torch

from fastllm.kernels import qk_norm_rope as module
from fastllm.kernels import rms_norm, rope

KERNEL = module.KERNEL


@pytest.mark.parametrize("options", [{}, {"rotated": 0.5, "interleaved": True, "offset": 1.0},
                                     {"packed": True, "positions": "documents"}])
def test_it_is_the_norm_and_then_the_rotation(options):
    """What the kernel must not change: the sequence of the two ops that it stands for."""
    call = kc.make(KERNEL, (2, 7, 4, 2, 16), torch.float32, **options)

    def apart(q, k, q_weight, k_weight, cos, sin, *, eps, offset, **rest):
        q, k = (rms_norm.reference(x, weight, eps, offset=offset)
                for x, weight in ((q, q_weight), (k, k_weight)))
        return rope.reference(q, k, cos, sin, **rest)

    truth = kc.run(KERNEL, apart, kc.upcast(call))
    kc.judge(kc.run(KERNEL, module.qk_norm_rope, kc.clone(call)),
             kc.run(KERNEL, apart, kc.clone(call)), truth)


@pytest.mark.parametrize("options", [{}, {"rotated": 0.5}])
def test_programs_that_walk_many_tiles(options, monkeypatch):
    """With two partial sums each program takes several tiles, the last of them not whole."""
    monkeypatch.setattr(module, "PARTIALS", 2)
    monkeypatch.setattr(module.rotary, "THREADS", 1)
    call = kc.make(KERNEL, (2, 11, 3, 2, 12), torch.float32, **options)
    kc.check(KERNEL, module.qk_norm_rope, call)


def test_eps_of_zero_and_heads_that_do_not_fill_a_tile():
    """Beyond the last head and token everything is zero, whose norm would be infinite."""
    call = kc.make(KERNEL, (1, 5, 3, 3, 8), torch.float32, eps=0.0)
    kc.check(KERNEL, module.qk_norm_rope, call)


@pytest.mark.parametrize("frozen", [(2,), (3,), (2, 3)])
def test_a_frozen_weight_gets_no_gradient(frozen):
    call = kc.make(KERNEL, (1, 5, 4, 2, 8), torch.float32)
    for i in frozen:
        call.args[i].requires_grad_(False)
    outputs = module.qk_norm_rope(*call.args, **call.kwargs)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    expected = module.reference(*call.args, **call.kwargs)
    wanted = call.differentiated()
    grads = torch.autograd.grad(expected, wanted, [torch.ones_like(x) for x in expected])
    for tensor, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad)
    assert all(call.args[i].grad is None for i in frozen)


@pytest.mark.parametrize(("q", "weight", "match"), [
    ((1, 4, 2, 8), 6, "q_weight"), ((1, 4, 2, 9), 9, "even"), ((4, 8), 8, "qk_norm_rope: q")])
@pytest.mark.parametrize("function", [module.qk_norm_rope, module.reference])
def test_what_does_not_fit_is_refused(q, weight, match, function):
    x, w = torch.zeros(q), torch.zeros(weight)
    with pytest.raises(ValueError, match=match):
        function(x, x, w, w, *rope.rope_tables(4, 8))
