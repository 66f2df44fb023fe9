"""AdamW: the textbook's numbers, and random bits that depend on nothing but what they must."""

import pytest
import torch
from kernel_check import DEVICE

from fastllm import cpu, ops
from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import adamw

BACKENDS = ["triton", "reference", *(["cpp"] if DEVICE == "cpu" and cpu.available() else [])]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def step(backend, params, grads, m, v, masters, scale=1.0, **kwargs):
    with ops.use_backend(backend, "adamw_step"):
        ops.adamw_step(params, grads, m, v, masters, **SCALARS,
                       grad_scale=torch.tensor(scale, device=DEVICE), **kwargs)


def draw(*sizes, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=DEVICE) for size in sizes]


@by_backend
def test_five_steps_are_torchs(backend):
    params = draw(7, 4100)
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=SCALARS["lr"], betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.1)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for number in range(1, 6):
        grads = draw(7, 4100, seed=number)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        step(backend, params, [2 * g for g in grads], m, v, [None, None], scale=0.5, step=number)
    torch.testing.assert_close(params, [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


def python_bits(index, seed, number):
    """The hash in Python integers, from its description."""
    word = 0xFFFFFFFF

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & word
        x ^= x >> 15
        x = x * 0x846CA68B & word
        return x ^ x >> 16

    key = (seed & word) ^ (number * 0x9E3779B9 & word)
    x = (index & word) ^ key ^ ((index >> 32) * 0x85EBCA6B & word)
    return mix(mix(x) + key + 0x632BE5AB & word)


def test_random_bits_are_the_described_hash():
    indices = [0, 1, 2, 65535, (1 << 32) - 1, 1 << 32, (1 << 40) + 12345]
    for seed, number in ((0, 1), (7, 3), (1 << 31, 100_000)):
        words = multi.random_words(torch.tensor(indices), multi.key_of(seed, number)).tolist()
        assert words == [python_bits(i, seed, number) for i in indices]


def rounded(backend, sizes, offsets, seed=5, number=2):
    """One stochastic step of bfloat16 weights without masters, joined."""
    total = sum(sizes)
    (p, g), zeros = draw(total, total), torch.zeros(total, device=DEVICE)
    parts = [x.split(sizes) for x in (p.bfloat16(), g, zeros.clone(), zeros.clone())]
    params, grads, m, v = ([t.clone() for t in part] for part in parts)
    step(backend, params, grads, m, v, [None] * len(sizes), step=number, stochastic_rounding=True,
         seed=seed, offsets=offsets)
    return torch.cat(params)


@by_backend
def test_the_split_into_tensors_changes_no_bit(backend):
    whole = rounded(backend, [50_000], None)
    assert torch.equal(whole, rounded(backend, [1, 17_000, 32_999], None))
    assert torch.equal(whole, rounded(backend, [40_000, 10_000], [0, 40_000]))
    assert not torch.equal(whole, rounded(backend, [50_000], [1]))
    assert not torch.equal(whole, rounded(backend, [50_000], [1 << 32]))
    assert not torch.equal(whole, rounded(backend, [50_000], None, seed=6))
    # At another step the update differs too, but a few random weights would agree by chance only.
    assert not torch.equal(whole, rounded(backend, [50_000], None, number=3))


def test_backends_draw_the_same_bits():
    results = [rounded(backend, [20_000], [(1 << 33) + 3]) for backend in BACKENDS]
    for other in results[1:]:
        # A weight that lies within a rounding error of its threshold may go the other way.
        assert (results[0] != other).sum() <= 4


def test_rounding_is_right_in_the_mean():
    values = torch.full((1 << 16,), 1.0 + 0.3 * 2**-7)
    got = multi.round_stochastically(values, torch.arange(1 << 16), multi.key_of(1, 1)).float()
    assert set(got.unique().tolist()) == {1.0, 1.0 + 2**-7}
    share = (got > 1).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / (1 << 16)) ** 0.5
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    kept = multi.round_stochastically(special, torch.arange(5), multi.key_of(1, 1))
    torch.testing.assert_close(kept, special.bfloat16(), rtol=0, atol=0, equal_nan=True)


@by_backend
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_touches_nothing(backend, scale):
    params, grads, m, v = draw(5000), draw(5000), draw(5000), [x.abs() for x in draw(5000)]
    before = [t.clone() for t in (*params, *m, *v)]
    step(backend, params, grads, m, v, [None], scale=scale, step=1)
    assert all(torch.equal(a, b) for a, b in zip((*params, *m, *v), before, strict=True))


@pytest.mark.parametrize(("change", "match"), [
    ({"masters": [None, None]}, "1 params but 2 masters"), ({"step": 0}, "step 0"),
    ({"params": [torch.zeros(4, dtype=torch.float16)]}, "needs a float32 master"),
    ({"params": [torch.zeros(4, dtype=torch.float16)], "masters": [torch.zeros(4)],
      "stochastic_rounding": True}, "is for bfloat16"),
    ({"masters": [torch.zeros(4)]}, "its own master"),
    ({"exp_avgs": [torch.zeros(5)]}, r"exp_avgs\[0\]"),
    ({"exp_avgs": [torch.zeros(4, dtype=torch.bfloat16)]}, r"exp_avgs\[0\] is torch.bfloat16"),
    ({"grad_scale": torch.ones(2)}, "grad_scale"), ({"offsets": [1, 2]}, "2 offsets"),
    ({"params": [torch.zeros(8)[::2]]}, "contiguous")])
def test_lists_that_do_not_fit_raise(change, match):
    arguments = {"params": [torch.zeros(4)], "grads": [torch.zeros(4)],
                 "exp_avgs": [torch.zeros(4)], "exp_avg_sqs": [torch.zeros(4)], "masters": [None],
                 "step": 1, "grad_scale": torch.ones(()), **SCALARS, **change}
    with pytest.raises(ValueError, match=match):
        adamw.adamw_step(**arguments)
