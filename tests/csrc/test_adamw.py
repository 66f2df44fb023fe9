"""csrc/adamw.cpp against the stated formula, worked out in numpy's fp32 operation by operation.

Sums and products round twice in both, so the comparison is bitwise.
"""

import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")

STEP = torch.ops.fastllm_cpu.adamw_step_
NORM = torch.ops.fastllm_cpu.grad_norm
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
f32 = np.float32


def state(sizes, dtype=torch.float32, grad=None, master=True, seed=0):
    """Parameters and gradients, random second moments as in the middle of a run, masters."""
    gen = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=gen) for size in sizes]
    return SimpleNamespace(
        params=[w.to(dtype) for w in weights],
        grads=[torch.randn(size, generator=gen).to(grad or dtype) for size in sizes],
        exp_avgs=[torch.randn(size, generator=gen) * 0.1 for size in sizes],
        exp_avg_sqs=[torch.rand(size, generator=gen) for size in sizes],
        masters=[w.clone() if master and dtype != torch.float32 else None for w in weights])


def step(s, scale=0.5, stochastic=False, seed=0, number=7, offsets=()):
    STEP(s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, s.masters, *HYPER.values(),
         torch.tensor(scale), stochastic, seed, number, list(offsets))


def tensors(s):
    return [t for group in (s.params, s.exp_avgs, s.exp_avg_sqs, s.masters) for t in group
            if t is not None]


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(_bits(x), _bits(y))
                                    for x, y in zip(a, b, strict=True))


def _bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def formula(p, g, m, v, scale, number):
    """The update in numpy fp32: scalars in double, then rounded once."""
    lr, b1, b2, eps, wd = HYPER.values()
    g = g * f32(scale)
    m = m + (g - m) * f32(1 - b1)
    v = v * f32(b2) + g * g * f32(1 - b2)
    denom = np.sqrt(v) / f32(math.sqrt(1 - b2**number)) + f32(eps)
    return p * f32(1 - lr * wd) - f32(lr / (1 - b1**number)) * m / denom, m, v


def noise(index, seed, number):
    """The 16 random bits of each global element index."""
    def mix(x):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))
    with np.errstate(over="ignore"):
        h = np.uint32(seed) ^ np.uint32((number * 0x9E3779B9) & 0xFFFFFFFF)
        high = (index >> np.uint64(32)).astype(np.uint32) * np.uint32(0x85EBCA6B)
        x = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ h ^ high
        return mix(mix(x) + (h + np.uint32(0x632BE5AB))) >> np.uint32(16)


@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula_bit_for_bit(dtype, grad):
    s = state([(40001,), (3, 5), (0,), ()], dtype, grad)
    expected = [formula((p if w is None else w).float().numpy(), g.float().numpy(), m.numpy(),
                        v.numpy(), 0.5, 7)
                for p, g, m, v, w in zip(*vars(s).values(), strict=True)]
    grads = [g.clone() for g in s.grads]
    step(s)
    for i, (p, m, v) in enumerate(expected):
        weight = s.params[i] if s.masters[i] is None else s.masters[i]
        assert np.array_equal(weight.numpy(), p)
        assert np.array_equal(s.exp_avgs[i].numpy(), m)
        assert np.array_equal(s.exp_avg_sqs[i].numpy(), v)
        assert torch.equal(s.params[i], torch.from_numpy(np.asarray(p)).to(dtype))
    assert same_bits(grads, s.grads)


@pytest.mark.parametrize("offset", [0, 12345, 2**32 - 1000, 3 * 2**32 + 17])
@pytest.mark.parametrize("master", [True, False])
def test_stochastic_rounding_equals_the_stated_hash(master, offset):
    s = state([(3000,)], torch.bfloat16, master=master)
    old = s.masters[0] if master else s.params[0].float()
    updated, _, _ = formula(old.numpy(), s.grads[0].float().numpy(), s.exp_avgs[0].numpy(),
                            s.exp_avg_sqs[0].numpy(), 0.5, 7)
    index = np.arange(3000, dtype=np.uint64) + np.uint64(offset)
    step(s, stochastic=True, seed=1234, offsets=[offset])
    expected = (updated.view(np.uint32) + noise(index, 1234, 7)) >> np.uint32(16)
    assert np.array_equal(s.params[0].view(torch.int16).numpy().view(np.uint16), expected)
    if master:
        assert np.array_equal(s.masters[0].numpy(), updated)


def test_stochastic_rounding_is_unbiased_and_independent_between_steps():
    """Repeated over steps, the mean of the rounded weights is the weight itself."""
    n, steps = 20000, 200
    exact = torch.linspace(1.0, 1.0 + 2**-7, n)
    total, ups = torch.zeros(n, dtype=torch.float64), []
    for number in range(1, steps + 1):
        s = SimpleNamespace(params=[torch.zeros(n, dtype=torch.bfloat16)], grads=[torch.zeros(n)],
                            exp_avgs=[torch.zeros(n)], exp_avg_sqs=[torch.zeros(n)],
                            masters=[exact.clone()])
        STEP(*vars(s).values(), 0.0, 0.9, 0.95, 1e-8, 0.0, torch.tensor(1.0), True, 5, number, [])
        total += s.params[0].double()
        ups.append((s.params[0] > 1).double())
    unit = 2**-7  # between neighbouring bf16 numbers above 1
    error = (total / steps - exact.double()) / unit
    # The mean of k draws has a standard deviation of at most 0.5 / sqrt(k).
    assert error.abs().max() < 5.5 * 0.5 / math.sqrt(steps)
    assert error.mean().abs() < 4 * 0.5 / math.sqrt(n * steps)
    middle = slice(int(0.4 * n), int(0.6 * n))
    pair = torch.stack([ups[0][middle], ups[1][middle]])
    assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(0.2 * n)
    neighbours = torch.stack([ups[0][middle][:-1], ups[0][middle][1:]])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 4 / math.sqrt(0.2 * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_no_layout_changes_the_result(dtype, stochastic):
    """One tensor, or cut at odd places (also misaligned ones), with one thread or two."""
    n = 100003
    whole = state([(n,)], dtype, master=not stochastic)
    cut = state([(n,)], dtype, master=not stochastic)
    bounds = [0, 1, 17, 16400, 16401, 70000, n]
    pieces = SimpleNamespace(**{
        name: [None if group[0] is None else group[0][a:b]
               for a, b in itertools.pairwise(bounds)]
        for name, group in vars(cut).items()})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        step(whole, stochastic=stochastic, offsets=[10])
        torch.set_num_threads(2)
        step(pieces, stochastic=stochastic, offsets=[10 + a for a in bounds[:-1]])
    finally:
        torch.set_num_threads(before)
    assert same_bits(tensors(whole), tensors(cut))


def test_offsets_default_to_the_order_of_the_list():
    given, counted = (state([(100,), (7,)], torch.bfloat16, master=False) for _ in range(2))
    step(given, stochastic=True, offsets=[0, 100])
    step(counted, stochastic=True)
    assert same_bits(tensors(given), tensors(counted))


# The inputs come from numpy: torch.randn itself differs between instruction sets.
PROBE = """
import hashlib, sys, numpy, torch
sys.path.insert(0, {root!r})
import fastllm._C
rng = numpy.random.default_rng(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    w, m, g, v = (torch.from_numpy(rng.standard_normal(5003, numpy.float32)) for _ in range(4))
    v, p, g = v * v, w.to(dtype), g.to(dtype)
    wide = dtype == torch.float32
    torch.ops.fastllm_cpu.adamw_step_([p], [g], [m], [v], [None if wide else w], 1e-2, 0.9, 0.95,
        1e-8, 0.1, torch.tensor(0.3), dtype == torch.bfloat16, 3, 2, [])
    for t in (p, m, v, w, torch.ops.fastllm_cpu.grad_norm([g])):
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
print(torch.ops.fastllm_cpu.isa(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = {}
    for capability in ("default", "avx2", "avx512"):
        result = subprocess.run(
            [sys.executable, "-c", PROBE.format(root=root)], capture_output=True, text=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True)
        isa, digest = result.stdout.split()
        found[isa] = digest
    assert "baseline" in found
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_scale_touches_nothing(dtype, scale):
    s, before = state([(33, 5)], dtype), state([(33, 5)], dtype)
    step(s, scale=scale)
    assert same_bits(tensors(s), tensors(before))


def test_every_fp16_gradient_is_read_exactly():
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    grad = bits.view(torch.float16)
    zeros = [torch.zeros(grad.shape) for _ in range(3)]
    STEP([zeros[0]], [grad], [zeros[1]], [zeros[2]], [None], 0.0, 0.0, 0.95, 1e-8, 0.0,
         torch.tensor(1.0), False, 0, 1, [])
    assert torch.equal(zeros[1].nan_to_num(7.0, 8.0, 9.0), grad.float().nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize(("dtype", "stochastic"), [(torch.bfloat16, False), (torch.float16, False),
                                                   (torch.bfloat16, True)])
def test_extreme_weights_are_rounded_as_torch_rounds_them(dtype, stochastic):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0,
                            1e-8, 5.9e-8, 6e-5, 3.3e38, 1e-40, 1.00390625, 1.01171875, -3e-8])
    weights = special.repeat(20)
    params = torch.zeros(weights.shape, dtype=dtype)
    zeros = [torch.zeros(weights.shape) for _ in range(3)]
    STEP([params], [zeros[0]], [zeros[1]], [zeros[2]], [weights], 0.0, 0.9, 0.95, 1e-8, 0.0,
         torch.tensor(1.0), stochastic, 0, 1, [])
    expected = weights.to(dtype)
    if stochastic:  # the two neighbours for finite weights; the same number for the others
        index = np.arange(len(weights), dtype=np.uint64)
        bits = weights.view(torch.int32).numpy().view(np.uint32)
        rounded = ((bits + noise(index, 0, 1)) >> np.uint32(16)).astype(np.uint16).view(np.int16)
        finite = weights.isfinite()
        expected[finite] = torch.from_numpy(rounded).view(torch.bfloat16)[finite]
    assert torch.equal(params.isnan(), expected.isnan())
    assert torch.equal(_bits(params)[~params.isnan()], _bits(expected)[~expected.isnan()])


def test_autograd_notices_the_change():
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        STEP([weight], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], [None],
             *HYPER.values(), torch.tensor(1.0), False, 0, 1, [])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.grads.pop(), "expected 2 grads, one per parameter, found 1"),
    (lambda s: s.masters.pop(), "expected 2 masters, one per parameter, found 1"),
    (lambda s: s.grads.__setitem__(1, torch.zeros(3).bfloat16()),
     r"grads\[1\] must have the shape of params\[1\], \[4, 6\], found \[3\]"),
    (lambda s: s.exp_avgs.__setitem__(0, torch.zeros(8).double()),
     r"exp_avgs\[0\] must be Float, found Double"),
    (lambda s: s.exp_avg_sqs.__setitem__(1, torch.zeros(6, 4).t()),
     r"exp_avg_sqs\[1\] must be contiguous, found strides \[1, 4\]"),
    (lambda s: s.masters.__setitem__(1, None),
     r"params\[1\] is BFloat16 and needs an fp32 masters\[1\]"),
    (lambda s: s.params.__setitem__(0, torch.zeros(8)),
     r"params\[0\] is Float and so its own master; masters\[0\] must be None"),
    (lambda s: s.params.__setitem__(0, torch.zeros(8).double()),
     r"params\[0\] must be Float, BFloat16 or Half, found Double"),
    (lambda s: s.grads.__setitem__(0, torch.zeros(8).int()),
     r"grads\[0\] must be Float, BFloat16 or Half, found Int"),
])
def test_bad_arguments_are_named(change, message):
    s = state([(8,), (4, 6)], torch.bfloat16)
    change(s)
    with pytest.raises(ValueError, match=message):
        step(s)


def test_bad_scalars_are_named():
    s = state([(8,)], torch.bfloat16)
    with pytest.raises(ValueError, match="step counts from 1, found 0"):
        step(s, number=0)
    with pytest.raises(ValueError, match="expected 1 offsets, one per parameter, found 2"):
        step(s, offsets=[0, 8])
    with pytest.raises(ValueError, match=r"offsets\[0\] must not be negative, found -1"):
        step(s, offsets=[-1])
    with pytest.raises(ValueError, match="grad_scale must be one Float on the CPU, found Double"):
        STEP(*vars(s).values(), *HYPER.values(), torch.tensor(1.0).double(), False, 0, 1, [])
    half = state([(8,)], torch.float16)
    with pytest.raises(ValueError, match="must be BFloat16 for stochastic rounding, found Half"):
        step(half, stochastic=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_against_fp64(dtype):
    grads = state([(4096 * 3 + 5,), (7, 9), (0,), (), (70000,)], dtype).grads
    truth = torch.cat([g.flatten() for g in grads]).double().norm()
    assert NORM(grads).dtype == torch.float32 and NORM(grads).shape == ()
    torch.testing.assert_close(NORM(grads).double(), truth, rtol=2e-7, atol=0)


def test_norm_is_the_same_for_any_number_of_threads():
    grads = state([(300001,), (17,), (5000, 7)], torch.bfloat16).grads
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found |= {NORM(grads).item() for _ in range(5)}
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 4096, 9998])
def test_one_bad_gradient_makes_the_norm_non_finite(dtype, bad, at):
    grads = [torch.ones(10000, dtype=dtype), torch.ones(9999, dtype=dtype)]
    grads[1][at] = bad
    assert not NORM(grads).isfinite()


def test_norm_of_nothing_is_zero():
    assert NORM([torch.zeros(0), torch.zeros(0, 3)]).item() == 0


def test_norm_names_a_bad_tensor():
    with pytest.raises(ValueError, match=r"grads\[1\] must be a contiguous .* found Long"):
        NORM([torch.ones(3), torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"grads\[0\] must be a contiguous"):
        NORM([torch.ones(3, 4).t()])
