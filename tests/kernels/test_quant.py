"""Quantised weights: what the blocks hold, how far they are off, and both ways to the product."""

import kernel_check as kc
import pytest
import torch
import torch.nn.functional as F

from fastllm import ops
from fastllm.kernels import quant

BOTH = pytest.mark.parametrize("quantize", [ops.quantize_nf4, ops.quantize_int8])


def weight(rows=32, columns=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def on_device(quantized):
    return type(quantized)(*(part.to(kc.DEVICE) if isinstance(part, torch.Tensor) else part
                             for part in quantized))


def test_nf4_holds_the_nearest_code_of_every_number():
    w = weight()
    plain = ops.quantize_nf4(w, double_quant=False)
    blocks = w.view(32, 4, 64)
    assert torch.equal(plain.absmax, blocks.abs().amax(-1))
    codes = torch.tensor(quant.CODES)
    nearest = (blocks / plain.absmax[..., None])[..., None].sub(codes).abs().argmin(-1)
    packed = plain.packed.view(32, 4, 32).int()
    assert torch.equal(packed >> 4, nearest[..., :32].int())
    assert torch.equal(packed & 15, nearest[..., 32:].int())


def test_errors_are_those_of_the_formats():
    """Relative error of normal weights: NF4 about 9.5 %, INT8 about 0.6 %; the double
    quantisation adds next to nothing to the first."""
    w = weight(64, 1024)

    def error(quantized):
        back = quant.dequantize_reference(quantized, dtype=torch.float32)
        return ((back - w).norm() / w.norm()).item()

    single, double = (error(ops.quantize_nf4(w, double_quant=on)) for on in (False, True))
    assert 0.08 < single < 0.1
    assert double < single * 1.01
    assert 0.004 < error(ops.quantize_int8(w)) < 0.007


@BOTH
def test_bytes_are_as_declared(quantize):
    w = weight(32, 256)
    for block in (32, 64, 128, 256):
        held = sum(part.nbytes for part in quant.parts_of(quantize(w, block_size=block)))
        assert held == quant.stored_bytes(32, 256, quantize=quantize, block_size=block)
    bits = 8 * quant.stored_bytes(4096, 4096) / 4096**2
    assert bits == pytest.approx(4.127, abs=1e-3)


@BOTH
def test_blocks_of_zeros_and_constants(quantize):
    w = torch.zeros(2, 128)
    w[1, 64:] = 0.5
    kwargs = {"double_quant": False} if quantize is ops.quantize_nf4 else {}
    back = quant.dequantize_reference(quantize(w, **kwargs), dtype=torch.float32)
    assert torch.equal(back, w)
    if kwargs:  # the mean of the absmaxes is taken off: still right to a part in 127
        back = quant.dequantize_reference(quantize(w), dtype=torch.float32)
        assert torch.allclose(back, w, atol=2e-3)


@BOTH
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_many_rows_and_few_take_different_ways_to_one_result(quantize, backend, monkeypatch):
    quantized = quantize(weight(40, 128))
    linear = ops.nf4_linear if quantize is ops.quantize_nf4 else ops.int8_linear
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).to(kc.DEVICE)
    quantized = on_device(quantized)
    results = []
    for most in (1024, 0):
        monkeypatch.setattr(quant, "FUSED_ROWS", most)
        a = x.clone().requires_grad_()
        with ops.use_backend(backend):
            y = linear(a, quantized)
            y.backward(torch.ones_like(y))
        results.append((y.detach(), a.grad))
    w = quant.dequantize_reference(quantized, dtype=torch.float32)
    for y, dx in results:
        assert torch.allclose(y, F.linear(x, w), atol=1e-5)
        assert torch.allclose(dx, w.sum(0).expand_as(x), atol=1e-5)


@BOTH
def test_leading_dimensions_and_bias(quantize):
    quantized = on_device(quantize(weight(24, 64)))
    linear = ops.nf4_linear if quantize is ops.quantize_nf4 else ops.int8_linear
    x, bias = torch.randn(2, 3, 64, device=kc.DEVICE), torch.randn(24, device=kc.DEVICE)
    with ops.use_backend("triton"):
        y = linear(x, quantized, bias=bias)
    assert y.shape == (2, 3, 24)
    w = quant.dequantize_reference(quantized, dtype=torch.float32)
    assert torch.allclose(y, F.linear(x, w, bias), atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"block_size 64 must be .* divide the weight's 100"):
        ops.quantize_nf4(torch.randn(4, 100))
    with pytest.raises(ValueError, match="block_size 48"):
        ops.quantize_int8(torch.randn(4, 96), block_size=48)
    with pytest.raises(ValueError, match=r"weight \(4, 64\) torch.int64"):
        ops.quantize_int8(torch.ones(4, 64, dtype=torch.int64))
    with ops.use_backend("triton"), pytest.raises(ValueError, match=r"nf4_linear: x \(2, 32\)"):
        ops.nf4_linear(torch.randn(2, 32), ops.quantize_nf4(weight(8, 64)))
