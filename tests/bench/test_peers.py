"""Liger under the interpreter computes our op: else its column would be another op's."""

import kernel_check as kc
import peers
import pytest
import torch

pytest.importorskip("liger_kernel")
SHARED = [kernel for kernel in kc.KERNELS if kernel.name in peers.LIGER]


def results(kernel, name, call):
    """As float64 vectors of one length each, so that a sum equals a mean."""
    found = peers.results(kernel, peers.prepare(kernel, call, name), call)
    return [x.detach().double().flatten() for x in found]


@pytest.mark.parametrize("kernel", SHARED, ids=lambda kernel: kernel.name)
def test_liger_computes_the_same(kernel):
    shape = kernel.test_shapes[-2]
    compared = 0
    for options in ({}, *kernel.bench_options.values()):
        if peers.prepare(kernel, kc.make(kernel, shape, torch.float32, **options), "liger") is None:
            continue
        compared += 1
        ours, theirs = (results(kernel, name, kc.make(kernel, shape, torch.float32, **options))
                        for name in ("torch eager", "liger"))
        for a, b in zip(ours, theirs, strict=True):
            if a.numel() > 1:  # losses differ by their reduction's divisor alone
                a, b = a / a.norm(), b / b.norm()
                torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    assert compared


def test_an_argument_that_liger_lacks_has_no_peer(monkeypatch):
    kernel = next(kernel for kernel in SHARED if kernel.name == "swiglu")
    call = kc.make(kernel, kernel.test_shapes[0], torch.float32)
    assert peers.prepare(kernel, call, "liger") is not None
    monkeypatch.setitem(peers.LIGER, "swiglu", lambda gate: None)
    assert peers.prepare(kernel, call, "liger") is None
    assert peers.prepare(kernel, call, "torch fused") is None
