"""fastllm.optim.AdamW against torch.optim.AdamW, on every CPU backend that this machine has."""

import json
import math

import pytest
import torch

from fastllm import cpu, ops
from fastllm.config import UserError, as_dict, build
from fastllm.optim import AdamW, OptimConfig

BACKENDS = ["reference", "cpp"] if cpu.available() else ["reference"]
SHAPES = {"embed.weight": (50, 16), "layers.0.up.weight": (33, 16), "layers.0.norm.weight": (16,),
          "head.bias": (7,)}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen).to(dtype).requires_grad_()
            for name, shape in SHAPES.items()}


def gradients(step, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES.values()]


def optimizer(params, *, seed=0, **settings):
    defaults = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "grad_clip": None}
    return AdamW(params.items(), OptimConfig(**{**defaults, **settings}), seed=seed)


def advance(opt, step, *, dtype=torch.float32, lr=1e-2, unscale=1.0):
    norm = opt.step(lr, gradients(step, dtype), unscale=unscale)
    opt.applied(math.isfinite(norm.item()))
    return norm


def bits(opt):
    tensors, counters = opt.state_dict()
    return {**{name: param.detach().clone() for name, param in
               zip(opt.names, opt.parameters(), strict=True)},
            **{name: tensor.clone() for name, tensor in tensors.items()}}, counters


def assert_same_bits(a, b):
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


def run_torch(dtype, steps, lr):
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in parameters().items()}
    decay = [p for p in params.values() if p.ndim > 1]
    plain = [p for p in params.values() if p.ndim == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                             {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.99))
    for step in range(steps):
        for p, g in zip(params.values(), gradients(step), strict=True):
            p.grad = g.to(dtype)
        for group in opt.param_groups:
            group["lr"] = lr(step)
        opt.step()
    return params


def test_a_hundred_steps_are_as_near_to_fp64_as_torch_is():
    def lr(step):
        return 1e-2 * (1 - step / 120)

    truth, peer = run_torch(torch.float64, 100, lr), run_torch(torch.float32, 100, lr)
    params = parameters()
    opt = optimizer(params)
    for step in range(100):
        advance(opt, step, lr=lr(step))
    assert opt.steps == 100
    for name, p in params.items():
        error = (p.double() - truth[name]).abs().max()
        peer_error = (peer[name].double() - truth[name]).abs().max()
        assert error <= 2 * peer_error + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_follow_an_fp32_run_of_their_masters(dtype):
    low, wide = parameters(dtype), {n: p.detach().float().requires_grad_()
                                    for n, p in parameters(dtype).items()}
    opt, oracle = optimizer(low), optimizer(wide)
    for step in range(20):
        opt.step(1e-2, gradients(step, dtype))
        oracle.step(1e-2, [g.float() for g in gradients(step, dtype)])
        opt.applied(True), oracle.applied(True)
    for (name, p), master in zip(low.items(), opt.masters, strict=True):
        assert torch.equal(master, wide[name])
        assert torch.equal(p, wide[name].to(dtype))


def test_clipping_is_torchs():
    params, peer = parameters(), parameters()
    opt = optimizer(params, grad_clip=0.5, weight_decay=0.0)
    theirs = torch.optim.AdamW(peer.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        norm = advance(opt, step)
        for p, g in zip(peer.values(), gradients(step), strict=True):
            p.grad = g
        expected = torch.nn.utils.clip_grad_norm_(list(peer.values()), 0.5)
        theirs.step()
        torch.testing.assert_close(norm, expected)
    # Adam is blind to the scale of its gradients but for their ratios between steps, so also look
    # at the first moment, which is not.
    assert opt.states[0]["exp_avg"].norm() < 0.5
    for name, p in params.items():
        torch.testing.assert_close(p, peer[name], rtol=1e-5, atol=1e-6)


def test_a_norm_below_the_limit_clips_nothing():
    clipped, free = optimizer(parameters(), grad_clip=1e6), optimizer(parameters())
    advance(clipped, 0), advance(free, 0)
    assert_same_bits(bits(clipped), bits(free))


def test_unscale_undoes_a_loss_scale_exactly():
    plain, scaled = optimizer(parameters(), grad_clip=1.0), optimizer(parameters(), grad_clip=1.0)
    for step in range(3):
        a = advance(plain, step)
        b = scaled.step(1e-2, [g * 1024 for g in gradients(step)], unscale=1 / 1024)
        scaled.applied(True)
        assert torch.equal(a, b)
    assert_same_bits(bits(plain), bits(scaled))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_non_finite_gradient_changes_nothing_and_does_not_count(bad, dtype, clip):
    opt = optimizer(parameters(dtype), grad_clip=clip)
    advance(opt, 0, dtype=dtype)
    before = bits(opt)
    grads = gradients(1, dtype)
    grads[1][3, 3] = bad
    norm = opt.step(1e-2, grads)
    assert not norm.isfinite()
    opt.applied(bool(norm.isfinite()))
    assert_same_bits(bits(opt), before)
    assert opt.steps == 1
    straight = optimizer(parameters(dtype), grad_clip=clip)
    advance(straight, 0, dtype=dtype), advance(straight, 2, dtype=dtype)
    advance(opt, 2, dtype=dtype)
    assert_same_bits(bits(opt), bits(straight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_state_round_trips_bit_for_bit(dtype, stochastic):
    """Four steps equal two, a save through JSON, a load into a fresh optimizer, and two more."""
    whole = optimizer(parameters(dtype), stochastic_rounding=stochastic, seed=11)
    for step in range(4):
        advance(whole, step, dtype=dtype)
    first = optimizer(parameters(dtype), stochastic_rounding=stochastic, seed=11)
    advance(first, 0, dtype=dtype), advance(first, 1, dtype=dtype)
    tensors, counters = first.state_dict()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    second_params = parameters(dtype, seed=5)
    second = optimizer(second_params, stochastic_rounding=stochastic)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(saved, json.loads(json.dumps(counters)))
    advance(second, 2, dtype=dtype), advance(second, 3, dtype=dtype)
    assert_same_bits(bits(whole), bits(second))


def test_stochastic_rounding_has_no_masters_and_does_not_depend_on_the_groups():
    opts = [optimizer(parameters(torch.bfloat16), stochastic_rounding=True, seed=3,
                      weight_decay=0.0, decay_embeddings=embeddings)
            for embeddings in (True, False)]
    assert [g.names for g in opts[0].groups] != [g.names for g in opts[1].groups]
    for opt in opts:
        assert opt.masters == [None] * 4
        advance(opt, 0, dtype=torch.bfloat16)
    assert_same_bits(bits(opts[0]), bits(opts[1]))
    other = optimizer(parameters(torch.bfloat16), stochastic_rounding=True, seed=4)
    advance(other, 0, dtype=torch.bfloat16)
    assert not torch.equal(other.parameters()[0], opts[0].parameters()[0])


def test_stochastic_rounding_keeps_updates_that_nearest_would_lose():
    """A hundred steps of 1e-3 up from 1.0, where bf16 numbers lie 2^-7 apart."""
    weight = torch.ones(2000, dtype=torch.bfloat16).requires_grad_()
    opt = optimizer({"w": weight}, stochastic_rounding=True, weight_decay=0.0)
    grad = -torch.ones(2000, dtype=torch.bfloat16)
    for _ in range(100):
        opt.step(1e-3, [grad])
        opt.applied(True)
    assert weight.float().mean().item() == pytest.approx(1.1, abs=2e-3)


def test_parameters_without_a_gradient_stay():
    params = parameters()
    opt = optimizer(params)
    before = params["head.bias"].detach().clone()
    grads = gradients(0)
    opt.step(1e-2, [*grads[:3], None])
    opt.applied(True)
    assert torch.equal(params["head.bias"], before)
    assert not torch.equal(params["embed.weight"], parameters()["embed.weight"])
    opt.step(1e-2, [None, None, None, grads[3]])  # one whole group without a gradient
    opt.applied(True)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        opt.step(1e-2, [None] * 4)
    with pytest.raises(ValueError, match="expected 4 gradients, one per parameter, found 3"):
        opt.step(1e-2, grads[:3])


def test_param_grad_is_the_default_and_may_be_transposed():
    params = parameters()
    opt, given = optimizer(params), optimizer(parameters())
    grads = gradients(0)
    for p, g in zip(params.values(), grads, strict=True):
        p.grad = g.t().contiguous().t() if g.ndim == 2 else g
    opt.step(1e-2), given.step(1e-2, grads)
    opt.applied(True), given.applied(True)
    assert_same_bits(bits(opt), bits(given))


def test_frozen_parameters_are_left_out():
    params = parameters()
    params["embed.weight"].requires_grad_(False)
    assert optimizer(params).names == ["layers.0.up.weight", "layers.0.norm.weight", "head.bias"]


def test_applied_must_follow_every_step():
    opt = optimizer(parameters())
    opt.step(1e-2, gradients(0))
    with pytest.raises(RuntimeError, match="call AdamW"):
        opt.step(1e-2, gradients(1))


def test_sync_masters_takes_weights_loaded_later():
    params = parameters(torch.bfloat16)
    opt = optimizer(params)
    with torch.no_grad():
        for p in params.values():
            p.fill_(2.0)
    opt.sync_masters()
    assert all((master == 2).all() for master in opt.masters)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match=r"w is torch\.float64"):
        optimizer({"w": torch.zeros(2, dtype=torch.float64, requires_grad=True)})
    with pytest.raises(ValueError, match=r"w is torch\.float16: stochastic rounding"):
        optimizer({"w": torch.zeros(2, dtype=torch.float16, requires_grad=True)},
                  stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"w \(3, 2\) has strides \(1, 3\)"):
        optimizer({"w": torch.zeros(2, 3).t().requires_grad_()})


def test_a_state_of_another_run_is_refused_whole():
    opt = optimizer(parameters(torch.bfloat16))
    tensors, counters = opt.state_dict()
    before = bits(opt)
    missing = {n: t + 1 for n, t in tensors.items() if n != "master.head.bias"}
    with pytest.raises(UserError, match=r"master\.head\.bias is not in the saved state"):
        opt.load_state_dict(missing, counters)
    extra = {**{n: t + 1 for n, t in tensors.items()}, "exp_avg.other": torch.zeros(1)}
    with pytest.raises(UserError, match=r"exp_avg\.other is not in this run"):
        opt.load_state_dict(extra, counters)
    wrong = {**tensors, "exp_avg.head.bias": torch.zeros(8)}
    with pytest.raises(UserError, match=r"exp_avg.head.bias is torch.float32 \(8,\)"):
        opt.load_state_dict(wrong, counters)
    assert_same_bits(bits(opt), before)


def test_config_is_strict_and_round_trips():
    config = build(OptimConfig, {"lr": "1e-3", "betas": [0.9, 0.95], "grad_clip": "none"})
    assert (config.lr, config.betas, config.grad_clip) == (1e-3, (0.9, 0.95), None)
    assert build(OptimConfig, as_dict(config)) == config
    for bad in ({"lr": 0}, {"betas": [0.9, 1.0]}, {"betas": [0.9]}, {"name": "adam"}, {"eps": 0},
                {"weight_decay": -1}, {"grad_clip": 0}):
        with pytest.raises(UserError):
            build(OptimConfig, bad)
