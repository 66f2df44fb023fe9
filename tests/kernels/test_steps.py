"""The step functions beyond the registry's tests: 8-bit moments, Muon's and LAMB's own promises."""

import pytest
import torch
from kernel_check import DEVICE

from fastllm import ops
from fastllm.kernels import _block8 as block8
from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels import muon

by_backend = pytest.mark.parametrize("backend", ["triton", "reference"])
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def draw(*sizes, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=DEVICE) for size in sizes]


def call(op, backend, *args, scale=1.0, step=1, **kwargs):
    with ops.use_backend(backend, op):
        getattr(ops, op)(*args, step=step, grad_scale=torch.tensor(scale, device=DEVICE), **kwargs)


# ------------------------------------------------------------------------------- 8-bit moments


def test_codes_are_near_what_they_stand_for():
    """Between codes 1/127 (1/255) apart in the root: half a step for m, a whole one for sqrt(v)."""
    (m,) = draw(5000)
    m *= torch.logspace(-6, 0, 5000, device=DEVICE)[torch.randperm(5000)]
    codes, scales = (made[0] for made in block8.encoded([m], torch.int8))
    assert codes.dtype == torch.int8 and scales.shape == (20,)
    largest = m.abs()[:4864].view(-1, 256).amax(1)
    assert torch.equal(scales[:19], largest) and scales[19] == m[4864:].abs().max()
    share = (m.abs() / scales.repeat_interleave(256)[:5000]).sqrt()
    found = block8.decode(codes, scales)
    back = (found.abs() / scales.repeat_interleave(256)[:5000]).sqrt()
    assert (share - back).abs().max() <= 0.5 / 127 + 1e-6
    assert (found.sign() * m.sign() >= 0).all()
    v = m.square()
    random = torch.randint(0, 1 << 16, v.shape, device=DEVICE)
    codes, scales = torch.zeros_like(v, dtype=torch.uint8), torch.zeros(20, device=DEVICE)
    block8.encode(v, codes, scales, random)
    back = (block8.decode(codes, scales).sqrt() / scales.repeat_interleave(256)[:5000]).sqrt()
    assert (share - back).abs().max() <= 1 / 255 + 1e-6
    assert (codes > 0).all(), "a second moment became zero"


def test_the_second_moment_is_right_in_the_mean():
    root = torch.full((1 << 14,), 0.3)
    root[::256] = 1.0  # each block's scale
    random = multi.random_words(torch.arange(1 << 14), multi.key_of(3, 1)) & 0xFFFF
    codes, scales = torch.zeros(1 << 14, dtype=torch.uint8), torch.zeros(64)
    block8.encode(root.square(), codes, scales, random)
    exact = 255 * 0.3**0.5
    mean = codes[root < 1].double().mean().item()
    assert abs(mean - exact) < 4 * (0.25 / (1 << 14)) ** 0.5
    assert set(codes[root < 1].tolist()) == {int(exact), int(exact) + 1}


def eight(sizes, seed=0):
    """params, grads, codes and scales before the first step."""
    params, grads = draw(*sizes, seed=seed), draw(*sizes, seed=seed + 1)
    codes = [[torch.zeros_like(p, dtype=kind) for p in params]
             for kind in (torch.int8, torch.uint8)]
    scales = [[p.new_zeros(block8.blocks(p.numel())) for p in params] for _ in range(2)]
    return params, grads, codes, scales


@by_backend
def test_eight_bit_steps_stay_near_fp32_ones(backend):
    sizes = (5000, 300, 1)
    params, grads, codes, scales = eight(sizes)
    wide = [p.clone() for p in params]
    m, v = ([torch.zeros_like(p) for p in wide] for _ in range(2))
    none = [None] * 3
    before = torch.cat(params)
    for number in range(1, 9):
        grads = draw(*sizes, seed=number)
        call("adamw_step", backend, params, grads, *codes, none, **ADAMW, step=number,
             exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1])
        call("adamw_step", backend, wide, grads, m, v, none, **ADAMW, step=number)
    moved = torch.cat(wide) - before
    assert (torch.cat(params) - torch.cat(wide)).norm() < 0.03 * moved.norm()


@by_backend
def test_eight_bit_and_fp32_tensors_share_a_call(backend):
    params, grads, codes, scales = eight((600, 700))
    apart = [p.clone() for p in params]
    wide = [torch.zeros_like(params[1]) for _ in range(2)]
    mixed = [[codes[i][0], wide[i]] for i in range(2)]
    call("adamw_step", backend, params, grads, *mixed, [None] * 2, **ADAMW,
         exp_avg_scales=[scales[0][0], None], exp_avg_sq_scales=[scales[1][0], None])
    call("adamw_step", "reference", apart, grads, *([torch.zeros_like(p) for p in apart]
                                                    for _ in range(2)), [None] * 2, **ADAMW)
    torch.testing.assert_close(params, apart)
    assert codes[0][0].any() and wide[0].any()


def test_eight_bit_backends_agree_to_the_bit():
    found = []
    for backend in ("triton", "reference"):
        params, grads, codes, scales = eight((3000, 257))
        grads[0] *= torch.logspace(-9, 0, 3000, device=DEVICE)[torch.arange(3000) * 7 % 3000]
        for number in (1, 2):
            call("adamw_step", backend, params, grads, *codes, [None] * 2, **ADAMW, step=number,
                 seed=5, exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1])
        assert (codes[1][0] > 0).all(), "a second moment became zero"
        found.append([*codes[0], *codes[1], *scales[0], *scales[1]])
    for a, b in zip(*found, strict=True):
        # On a GPU a value within a rounding error of a boundary may take the next code.
        near = (a.float() - b.float()).abs() > (1e-5 if a.is_floating_point() else 0)
        assert near.sum() <= (0 if DEVICE == "cpu" else 3)


def change(**given):
    params, grads, codes, scales = eight((300,))
    return {"params": params, "grads": grads, "exp_avgs": codes[0], "exp_avg_sqs": codes[1],
            "masters": [None], **ADAMW, "step": 1, "grad_scale": torch.ones((), device=DEVICE),
            "exp_avg_scales": scales[0], "exp_avg_sq_scales": scales[1], **given}


@pytest.mark.parametrize(("given", "match"), [
    ({"exp_avg_scales": None}, "go together"),
    ({"exp_avg_scales": [None]}, r"exp_avg_scales\[0\] and exp_avg_sq_scales\[0\] go together"),
    ({"exp_avg_sq_scales": [torch.zeros(1)]}, r"must be \(2,\) float32"),
    ({"exp_avg_scales": [torch.zeros(2)] * 2}, "1 params but 2 exp_avg_scales"),
    ({"exp_avgs": [torch.zeros(300)]}, r"exp_avgs\[0\] is torch.float32, not int8"),
    ({"exp_avg_scales": None, "exp_avg_sq_scales": None}, "torch.int8, not float32")])
def test_eight_bit_states_that_do_not_fit_are_named(given, match):
    with ops.use_backend("reference", "adamw_step"), pytest.raises(ValueError, match=match):
        ops.adamw_step(**change(**given))


# --------------------------------------------------------------------------------- Muon, LAMB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (96, 33), (33, 96)])
def test_newton_schulz_is_orthogonal_within_its_bound(shape, dtype):
    """Singular values that are not tiny end between 0.65 and 1.25, and keep their vectors."""
    (u,) = draw(shape)
    x = muon.orthogonalised(u[None], muon.COEFFICIENTS, 5, 1e-7, dtype)[0].double()
    left, values, right = torch.linalg.svd(u.double(), full_matrices=False)
    wanted = values / u.double().norm()
    big = wanted > 0.02
    for _ in range(5):
        a, b, c = muon.COEFFICIENTS
        wanted = a * wanted + b * wanted**3 + c * wanted**5
    exact = left @ wanted.diag() @ right
    assert (x - exact).norm() < (1e-4 if dtype == torch.float32 else 0.05) * exact.norm()
    found = (left.T @ x @ right.T).diagonal()[big]
    assert ((found > 0.65) & (found < 1.25)).all(), found


@by_backend
def test_muon_moves_by_orthogonal_steps(backend):
    """From zero momentum a step is lr * scale * f(grad), blind to the gradient's size."""
    (grad,) = draw((40, 24))
    steps = []
    for scale in (1.0, 1e-3):
        params, buffers = [torch.zeros(40, 24, device=DEVICE)], [torch.zeros(40, 24, device=DEVICE)]
        call("muon_step", backend, params, [grad], buffers, [None], lr=0.1, weight_decay=0.0,
             ns_dtype=torch.float32, scale=scale)
        steps.append(params[0])
        torch.testing.assert_close(buffers[0], 0.05 * scale * grad)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
    expected = muon.orthogonalised(grad[None], muon.COEFFICIENTS, 5, 1e-7, torch.float32)[0]
    torch.testing.assert_close(steps[0], -0.1 * (40 / 24) ** 0.5 * expected, rtol=1e-3, atol=1e-5)


@by_backend
def test_lamb_does_not_scale_what_is_zero(backend):
    (grad,) = draw(1000)
    params, m, v = ([torch.zeros(1000, device=DEVICE)] for _ in range(3))
    call("lamb_step", backend, params, [grad], m, v, [None], lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(params[0], -0.1 * grad / (grad.abs() + 1e-6))


@by_backend
def test_lamb_ties_each_tensor_to_its_own_length(backend):
    params, grads = draw(40_000, 1000), draw(40_000, 1000, seed=1)
    params[1] *= 100
    before = [p.clone() for p in params]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    # Without eps the lanes beyond a tensor's end are 0 / 0: they must not reach its norms.
    call("lamb_step", backend, params, grads, m, v, [None] * 2, lr=0.1, eps=0.0)
    for now, then in zip(params, before, strict=True):
        assert (now - then).norm().item() == pytest.approx(0.1 * then.norm().item(), rel=1e-5)


@pytest.mark.parametrize(("op", "states", "options", "match"), [
    ("sgd_step", [None], {"momentum": 0.9}, "sgd_step: momentum 0.9 needs momentum_buffers"),
    ("sgd_step", [[torch.zeros(4, 4)]], {"nesterov": True}, "nesterov needs momentum"),
    ("rmsprop_step", [[torch.zeros(4, 4)], None, None], {"momentum": 0.9}, "needs momentum_buf"),
    ("lion_step", [[torch.zeros(5)]], {}, r"lion_step: exp_avgs\[0\] \(5,\)"),
    ("adagrad_step", [[]], {}, "1 params but 0 state_sums"),
    ("lamb_step", [[torch.zeros(4, 4)]] * 2, {"beta1": 0.9, "step": 0}, "lamb_step: step 0"),
    ("muon_step", [[torch.zeros(4, 4)]], {"adjust_lr_fn": "none"}, "'none' is neither")])
def test_steps_name_what_does_not_fit(op, states, options, match):
    with pytest.raises(ValueError, match=match):
        call(op, "reference", [torch.zeros(4, 4)], [torch.zeros(4, 4)], *states, [None], lr=0.1,
             **options)
    if op == "muon_step":
        with pytest.raises(ValueError, match=r"params\[0\] \(4,\) is not a matrix"):
            call(op, "reference", [torch.zeros(4)], [torch.zeros(4)], [[torch.zeros(4)]], [None],
                 lr=0.1)
