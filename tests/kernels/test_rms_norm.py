"""RMSNorm's weight gradient: gathered over many tiles, in an order that only shapes decide."""

import kernel_check as kc
import pytest
import torch

from fastllm.kernels import rms_norm as module


@pytest.mark.parametrize("shape", [(40, 64), (9, 8300)])
def test_programs_that_walk_many_tiles(shape, monkeypatch):
    """With two partial sums, each program takes many tiles, of short rows and of long ones."""
    monkeypatch.setattr(module, "PARTIALS", 2)
    kc.check(module.KERNEL, module.rms_norm, kc.make(module.KERNEL, shape, torch.float32))


def test_a_frozen_weight_gets_no_gradient():
    call = kc.make(module.KERNEL, (5, 64), torch.float32)
    x, weight = call.args
    weight.requires_grad_(False)
    module.rms_norm(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(module.reference(x, weight).sum(), x)[0])


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="does not fit"):
        module.rms_norm(torch.zeros(2, 8), torch.zeros(4))
