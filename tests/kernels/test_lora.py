"""LoRA: both ways of adding the low-rank term, quantised bases, and what needs no gradient."""

import kernel_check as kc
import pytest
import torch
import torch.nn.functional as F

from fastllm import ops
from fastllm.kernels import lora, quant

KERNEL = lora.KERNEL


def drawn(*shape):
    generator = torch.Generator(kc.DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=kc.DEVICE)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"frozen": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_accumulate_in_place(dtype, options, monkeypatch):
    monkeypatch.setattr(lora, "FUSED_INNER", 0)
    kc.check(KERNEL, kc.op_of(KERNEL, "triton"), kc.make(KERNEL, (17, 35, 96, 9), dtype, **options))


def test_only_what_is_asked_for_is_computed():
    call = kc.make(KERNEL, (5, 7, 64, 3), torch.float32)
    x, weight, a, b = call.args
    with ops.use_backend("triton", "lora_linear"):
        ops.lora_linear(x.detach(), weight, a, b).sum().backward()
    assert x.grad is None and weight.grad is None
    y = F.linear(F.linear(x.detach(), a), b).sum()
    wanted = torch.autograd.grad(y, (a, b))
    assert torch.allclose(a.grad, wanted[0], atol=1e-5)
    assert torch.allclose(b.grad, wanted[1], atol=1e-5)


def test_zero_b_is_the_base_layer():
    """peft starts with B = 0: the layer must then be the base layer, bit for bit."""
    x, weight, a, b = drawn(6, 64), drawn(10, 64), drawn(4, 64), drawn(10, 4) * 0
    with ops.use_backend("triton", "lora_linear"):
        with_term = ops.lora_linear(x, weight, a, b, scale=2.0)
        without = ops.lora_linear(x, weight, torch.zeros_like(a), b)
    assert torch.equal(with_term, without)


def test_leading_dimensions_and_strides():
    x = drawn(3, 2, 64).transpose(0, 1)
    weight, a, b = drawn(10, 64), drawn(4, 64), drawn(10, 4)
    with ops.use_backend("triton", "lora_linear"):
        y = ops.lora_linear(x, weight, a, b)
    assert y.shape == (2, 3, 10)
    assert torch.allclose(y, lora.reference(x, weight, a, b), atol=1e-4)


def test_under_autocast_all_factors_are_cast():
    x, weight, a, b = (drawn(*shape) for shape in ((5, 64), (10, 64), (4, 64), (10, 4)))
    for backend in ("triton", "reference"):
        with ops.use_backend(backend, "lora_linear"), torch.autocast(kc.DEVICE, torch.bfloat16):
            y = ops.lora_linear(x, weight, a, b)
        assert y.dtype == torch.bfloat16
        wanted = lora.reference(x, weight, a, b)
        assert (y - wanted).norm() / wanted.norm() < 0.01


@pytest.mark.parametrize("quantize", [quant.quantize_nf4, quant.quantize_int8])
def test_a_frozen_base_keeps_no_dense_weight(quantize):
    """Between forward and backward only packed parts, the input and t are held."""
    call = kc.make(KERNEL, (5, 70, 64, 3), torch.float32, quantize=quantize)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, ops.use_backend("triton", "lora_linear"):
        ops.lora_linear(*call.args, **call.kwargs)
    assert not any(t.is_floating_point() and t.shape == (70, 64) for t in saved)
    assert any(t.dtype in (torch.uint8, torch.int8) and t.shape[0] == 70 for t in saved)


def test_what_does_not_fit_is_named():
    x, weight, a, b = (drawn(*shape) for shape in ((5, 64), (10, 64), (4, 64), (10, 4)))
    with ops.use_backend("triton", "lora_linear"):
        with pytest.raises(ValueError, match=r"lora_linear: x \(5, 64\).*lora_b \(4, 10\)"):
            ops.lora_linear(x, weight, a, b.t())
        with pytest.raises(TypeError, match=r"x is torch.float32, but the weights are .*bfloat16"):
            ops.lora_linear(x, weight.bfloat16(), a, b)
