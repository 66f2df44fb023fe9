"""Every optimizer by its name: torch's numbers or the paper's, state bytes, resume, the config."""

import json
import math

import pytest
import torch

from fastllm.config import UserError, as_dict, build
from fastllm.optim import OPTIMIZERS, OptimConfig, make_optimizer
from fastllm.optim.config import DEFAULTS, KEYS

SHAPES = {"embed.weight": (100, 48), "layers.0.up.weight": (100, 64),
          "layers.0.down.weight": (64, 100), "layers.0.norm.weight": (16,), "head.bias": (7,)}
NAMES = sorted(OPTIMIZERS)
by_name = pytest.mark.parametrize("name", NAMES)


def parameters(dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen).to(dtype).requires_grad_()
            for name, shape in SHAPES.items()}


def gradients(step, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES.values()]


def optimizer(name, params, *, seed=0, **settings):
    config = OptimConfig(name=name, **{"grad_clip": None, **settings})
    return make_optimizer(params.items(), config, seed=seed)


def advance(opt, step, *, dtype=torch.float32, lr=1e-2):
    norm = opt.step(lr, gradients(step, dtype))
    opt.applied(math.isfinite(norm.item()))


TORCH = {
    "adamw": [(torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.1}, {})],
    "sgd": [(torch.optim.SGD, {"momentum": 0.9}, {}), (torch.optim.SGD, {"momentum": 0.0}, {}),
            (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {}),
            (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, {})],
    "adagrad": [(torch.optim.Adagrad, {"lr_decay": 0.01, "weight_decay": 0.1}, {}),
                (torch.optim.Adagrad, {"initial_accumulator_value": 0.5},
                 {"initial_accumulator": 0.5})],
    "rmsprop": [(torch.optim.RMSprop, {"alpha": 0.9}, {}),
                (torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, {}),
                (torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "alpha": 0.95}, {})],
}
PEERS = [(name, *case) for name, cases in TORCH.items() for case in cases]


@pytest.mark.parametrize(("name", "peer", "options", "ours"), PEERS,
                         ids=[f"{name}-{'-'.join(options)}" for name, _, options, _ in PEERS])
@pytest.mark.parametrize("steps", [1, 100])
def test_in_fp32_steps_are_torchs(name, peer, options, ours, steps):
    """As near to torch in fp64 as torch in fp32 is, within a factor of two."""
    runs = []
    for dtype in (torch.float64, torch.float32):
        theirs = {n: p.detach().to(dtype).requires_grad_() for n, p in parameters().items()}
        decayed = [p for p in theirs.values() if p.ndim > 1]
        plain = [p for p in theirs.values() if p.ndim == 1]
        decay = options.get("weight_decay", 0.0)
        opt = peer([{"params": decayed, "weight_decay": decay},
                    {"params": plain, "weight_decay": 0.0}], lr=1e-2, **options)
        for step in range(steps):
            for p, g in zip(theirs.values(), gradients(step), strict=True):
                p.grad = g.to(dtype)
            opt.step()
        runs.append(theirs)
    params = parameters()
    settings = {key: value for key, value in options.items() if key in KEYS}
    mine = optimizer(name, params, **{"weight_decay": 0.0, **settings, **ours})
    for step in range(steps):
        advance(mine, step)
    truth, beside = runs
    for n, p in params.items():
        error, theirs = ((x.double() - truth[n]).abs().max() for x in (p, beside[n]))
        assert error <= 2 * theirs + 2e-7, n


def test_lion_is_the_papers():
    params, oracle = parameters(), {n: p.detach().double() for n, p in parameters().items()}
    opt = optimizer("lion", params, betas=(0.9, 0.98), weight_decay=0.1)
    momenta = {n: torch.zeros_like(p) for n, p in oracle.items()}
    for step in range(20):
        advance(opt, step, lr=1e-3)
        for (n, p), g in zip(oracle.items(), gradients(step), strict=True):
            update = torch.sign(0.9 * momenta[n] + 0.1 * g)
            p -= 1e-3 * (update + (0.1 if p.ndim > 1 else 0.0) * p)
            momenta[n] = 0.98 * momenta[n] + 0.02 * g
    for n, p in params.items():
        torch.testing.assert_close(p.double(), oracle[n], rtol=1e-5, atol=1e-6)


def test_lamb_is_the_papers_and_spares_norms():
    params, oracle = parameters(), {n: p.detach().double() for n, p in parameters().items()}
    adam, opt = optimizer("adamw", parameters(), betas=(0.9, 0.999), eps=1e-6,
                          weight_decay=0.0), optimizer("lamb", params)
    m, v = ({n: torch.zeros_like(p) for n, p in oracle.items()} for _ in range(2))
    for step in range(1, 11):
        advance(opt, step), advance(adam, step)
        for (n, p), g in zip(oracle.items(), gradients(step), strict=True):
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            u = m[n] / (1 - 0.9**step) / ((v[n] / (1 - 0.999**step)).sqrt() + 1e-6) + 0.01 * p
            p -= 1e-2 * p.norm() / u.norm() * u
    for (n, p), plain in zip(params.items(), adam.parameters(), strict=True):
        expected = oracle[n] if p.ndim > 1 else plain.double()
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_on_matrices_and_adamw_elsewhere(adjust):
    params, peer = parameters(), parameters()
    opt = optimizer("muon", params, adjust_lr_fn=adjust, weight_decay=0.1)
    inner = [n for n in params if "layers" in n and "norm" not in n]
    assert [n for n, states in zip(opt.names, opt.states, strict=True)
            if "momentum_buffer" in states] == inner
    theirs = torch.optim.Muon([peer[n] for n in inner], lr=1e-2, weight_decay=0.1,
                              adjust_lr_fn=adjust)
    adam = optimizer("adamw", {n: p for n, p in peer.items() if n not in inner})
    for step in range(3):
        advance(opt, step)
        grads = dict(zip(params, gradients(step), strict=True))
        for n in inner:
            peer[n].grad = grads[n]
        theirs.step()
        adam.step(1e-2, [g for n, g in grads.items() if n not in inner])
        adam.applied(True)
    for n, p in params.items():
        # Muon's products are in bf16 on both sides, in another order.
        change = (p - parameters()[n]).norm()
        assert (p - peer[n]).norm() <= (0.03 * change if n in inner else 1e-6), n


def bits(opt):
    tensors, counters = opt.state_dict()
    weights = dict(zip(opt.names, opt.parameters(), strict=True))
    return {name: t.detach().clone() for name, t in {**weights, **tensors}.items()}, counters


def assert_same_bits(a, b):
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


@by_name
@pytest.mark.parametrize(("dtype", "stochastic"), [
    (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True),
    (torch.float16, False)])
def test_state_round_trips_bit_for_bit(name, dtype, stochastic):
    """Four steps equal two, a save through JSON, a load into a fresh optimizer, and two more."""
    def fresh(seed=0):
        return optimizer(name, parameters(dtype, seed), stochastic_rounding=stochastic, seed=11)

    whole, first, second = fresh(), fresh(), fresh(5)
    for step in range(4):
        advance(whole, step, dtype=dtype)
    advance(first, 0, dtype=dtype), advance(first, 1, dtype=dtype)
    tensors, counters = first.state_dict()
    saved = {n: t.clone() for n, t in tensors.items()}
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(saved, json.loads(json.dumps(counters)))
    advance(second, 2, dtype=dtype), advance(second, 3, dtype=dtype)
    assert_same_bits(bits(whole), bits(second))
    assert any(not torch.equal(p, q) for p, q in
               zip(whole.parameters(), parameters(dtype).values(), strict=True))


@by_name
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(name, bad):
    opt = optimizer(name, parameters(torch.bfloat16), grad_clip=1.0)
    advance(opt, 0, dtype=torch.bfloat16)
    before = bits(opt)
    grads = gradients(1, torch.bfloat16)
    grads[1][3, 3] = bad
    assert not opt.step(1e-2, grads).isfinite()
    opt.applied(False)
    assert_same_bits(bits(opt), before)


def test_bytes_of_states():
    """Lion keeps half of AdamW, 8-bit AdamW a quarter (of what is not small)."""
    def states(name, **settings):
        return optimizer(name, params, **settings).state_bytes()

    params = {"w": torch.zeros(512, 512, requires_grad=True)}
    n = 512 * 512
    assert states("adamw") == 8 * n
    assert states("lion") == states("adagrad") == states("sgd") == states("muon") == 4 * n
    assert states("sgd", momentum=0.0) == 0
    assert states("rmsprop", centered=True, momentum=0.9) == 12 * n
    assert states("adamw8bit") == 2 * n + 2 * 4 * n // 256
    params = {"w": torch.zeros(4095, requires_grad=True)}
    assert states("adamw8bit") == states("adamw")


def test_another_optimizers_state_is_refused():
    opt = optimizer("lion", parameters())
    with pytest.raises(UserError, match="the saved run's optimizer is lion, not adamw"):
        optimizer("adamw", parameters()).load_state_dict(*opt.state_dict())


@by_name
def test_config_fills_in_and_round_trips(name):
    config = build(OptimConfig, {"name": name})
    assert {key: getattr(config, key) for key in DEFAULTS[name]} == DEFAULTS[name]
    assert all(getattr(config, key) is None for key in KEYS if key not in DEFAULTS[name])
    assert build(OptimConfig, as_dict(config)) == config


@pytest.mark.parametrize(("layer", "match"), [
    ({"name": "sgd", "betas": [0.9, 0.95]}, "optim.betas is set, but sgd has no such thing"),
    ({"momentum": 0.9}, r"optim.momentum is set, but adamw .*for sgd, rmsprop, muon"),
    ({"name": "lion", "eps": 1e-8}, "optim.eps"), ({"name": "adamw", "ns_steps": 5}, "ns-steps"),
    ({"name": "sgd", "nesterov": True, "momentum": 0}, "optim.nesterov needs"),
    ({"name": "muon", "adjust_lr_fn": "none of these"}, "adjust-lr-fn"),
    ({"name": "adam"}, "did you mean adamw")])
def test_config_names_what_does_not_fit(layer, match):
    with pytest.raises(UserError, match=match):
        build(OptimConfig, layer)


def test_an_optimizer_checks_its_config():
    with pytest.raises(ValueError, match=r"optim\.alpha is set, but lion"):
        optimizer("lion", parameters(), alpha=0.9)
