"""fastllm.nn beside torch.nn and torch.optim: the same results, or a refusal that names itself."""

import copy

import pytest
import torch
from torch import nn

from fastllm import nn as fnn

REFUSED = [
    (lambda: fnn.Embedding(4, 2, max_norm=1.0), "max_norm"),
    (lambda: fnn.Embedding(4, 2, sparse=True), "sparse"),
    (lambda: fnn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
    (lambda: fnn.Dropout(0.1, inplace=True), "inplace"),
    (lambda: fnn.GeGLU("sigmoid"), "approximate"),
    (lambda: fnn.SwiGLU()(torch.ones(2, 3)), "swiglu"),
    (lambda: fnn.CrossEntropyLoss(size_average=True), "size_average"),
    (lambda: fnn.CrossEntropyLoss()(torch.ones(2, 3), torch.ones(2, 3)), "probabilities"),
    (lambda: fnn.CrossEntropyLoss()(torch.ones(2, 3), torch.ones(3).long()), "wants a target"),
    (lambda: fnn.LinearCrossEntropyLoss(2, 3, out_features=(4,)), "out_features"),
    (lambda: fnn.LinearCrossEntropyLoss(2, 3)(torch.ones(5, 2), torch.ones(5)), "probabilities"),
    (lambda: fnn.RMSNorm(4)(torch.ones(2, 3)), "last dimensions"),
    (lambda: fnn.AdamW([torch.ones(1)], amsgrad=True), "amsgrad"),
    (lambda: fnn.SGD([torch.ones(1)], maximize=True), "maximize"),
    (lambda: fnn.RMSprop([torch.ones(1)], capturable=True), "capturable"),
    (lambda: fnn.SGD([torch.ones(1)], nesterov=True), "momentum"),
    (lambda: fnn.AdamW([torch.ones(1)], betas=(0.9, 1.0)), "beta"),
    (lambda: fnn.AdamW([torch.ones(1)], lr=-1.0), "lr"),
]


@pytest.mark.parametrize(("make", "word"), REFUSED, ids=[word for _, word in REFUSED])
def test_what_is_not_supported_is_named(make, word):
    with pytest.raises((ValueError, TypeError), match=word):
        make()


# ---------------------------------------------------------------------------------- modules


def same(ours, theirs, *inputs, tolerance=1e-5):
    """Equal values, and equal gradients for floating-point inputs and for parameters."""
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = module(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        grads = [x.grad for x in (*leaves, *module.parameters()) if x.requires_grad]
        results.append([out.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def twins(ours, theirs):
    """Both with one state, which each takes from the other: the names are the same."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", [
    {}, {"eps": 0.1}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [6, (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms(name, shape, options):
    torch.manual_seed(0)
    pair = twins(getattr(fnn, name)(shape, **options), getattr(nn, name)(shape, **options))
    same(*pair, torch.randn(4, 5, *((shape,) if isinstance(shape, int) else shape)))


def test_layer_norm_without_bias():
    same(*twins(fnn.LayerNorm(6, bias=False), nn.LayerNorm(6, bias=False)), torch.randn(4, 6))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_add_the_residual(name):
    torch.manual_seed(0)
    norm, plain = twins(getattr(fnn, name)((2, 3)), getattr(nn, name)((2, 3)))
    x, residual = torch.randn(2, 5, 2, 3)
    y, total = norm(x, residual, prenorm=True)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, plain(x + residual))
    torch.testing.assert_close(norm(x, residual), plain(x + residual))


def test_rms_norm_offset():
    norm = fnn.RMSNorm(6, offset=1.0)
    assert not norm.weight.any()  # as Gemma's start
    same(norm, nn.RMSNorm(6), torch.randn(4, 6))


def test_gated_units():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 4)
    both = torch.cat((gate, up), -1)
    for ours, act in ((fnn.SwiGLU(), nn.SiLU()), (fnn.GeGLU(), nn.GELU()),
                      (fnn.GeGLU("tanh"), nn.GELU("tanh"))):
        torch.testing.assert_close(ours(gate, up), act(gate) * up)
        torch.testing.assert_close(ours(both), act(gate) * up)


@pytest.mark.parametrize("padding", [None, 1, -1])
def test_embedding(padding):
    torch.manual_seed(0)
    pair = fnn.Embedding(5, 3, padding), nn.Embedding(5, 3, padding)
    same(*twins(*pair), torch.tensor([[0, 1, 4], [1, 1, 0]]))
    weight = torch.randn(5, 3)
    assert torch.equal(fnn.Embedding.from_pretrained(weight).weight, weight)


def test_dropout():
    torch.manual_seed(0)
    drop, x, residual = fnn.Dropout(0.25), torch.ones(64, 64), torch.full((64, 64), 2.0)
    y = drop(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(y, drop(x)), "each call draws anew"
    torch.manual_seed(0)
    assert torch.equal(y, drop(x)), "from torch's generator"
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(drop(x, residual), x + residual)


@pytest.mark.parametrize("options", [
    {}, {"reduction": "none"}, {"reduction": "sum"}, {"ignore_index": 2},
    {"label_smoothing": 0.1}, {"weight": torch.tensor([0.5, 1.0, 2.0, 0.1])},
    {"weight": torch.tensor([0.5, 1.0, 2.0, 0.1]), "label_smoothing": 0.2, "ignore_index": 0}],
    ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("shape", [(4,), (6, 4), (2, 4, 3), (2, 4, 3, 2)], ids=str)
def test_cross_entropy(shape, options):
    torch.manual_seed(0)
    target = torch.randint(0, 4, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    target[target == options.get("ignore_index")] = 1 if len(shape) == 1 else -100
    if "ignore_index" in options:
        target[target == -100] = options["ignore_index"]
    same(fnn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options), torch.randn(shape),
         target)


@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 3},
    {"weight": torch.rand(7)}], ids=lambda options: ",".join(options) or "plain")
def test_linear_cross_entropy(options):
    torch.manual_seed(0)
    ours = fnn.LinearCrossEntropyLoss(5, 7, **options)
    head = copy.deepcopy(ours.linear)
    loss = nn.CrossEntropyLoss(**{k: v for k, v in options.items() if k != "bias"})
    plain = nn.Sequential(head)
    plain.forward = lambda x, target: loss(head(x), target)  # type: ignore[method-assign]
    same(ours, plain, torch.randn(6, 5), torch.randint(0, 7, (6,)))
    if hasattr(nn, "LinearCrossEntropyLoss"):
        assert ours.state_dict().keys() == nn.LinearCrossEntropyLoss(5, 7, **options).state_dict(
            ).keys()


def test_every_target_ignored_is_zero():
    ignored = torch.full((3,), -100)
    assert fnn.CrossEntropyLoss()(torch.randn(3, 4), ignored) == 0
    assert fnn.LinearCrossEntropyLoss(5, 4)(torch.randn(3, 5), ignored) == 0


# ------------------------------------------------------------------------------- optimizers

OPTIMIZERS = [
    ("AdamW", {}), ("AdamW", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.5, "eps": 1e-3}),
    ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    ("RMSprop", {"alpha": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
]


def model_and_grads(dtype=torch.float32, steps=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    return model, [[torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]


def run(optimizer, model, grads, skip=None, schedule=None):
    for i, step in enumerate(grads):
        for j, (p, grad) in enumerate(zip(model.parameters(), step, strict=True)):
            p.grad = None if (i, j) == skip else grad.clone()
        optimizer.step()
        if schedule:
            schedule.step()


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_optimizer_is_torchs(name, options):
    ours, grads = model_and_grads()
    theirs = copy.deepcopy(ours)
    a = getattr(fnn, name)(ours.parameters(), **options)
    b = getattr(torch.optim, name)(theirs.parameters(), **options)
    for optimizer, model in ((a, ours), (b, theirs)):
        # One parameter without a gradient in one step counts one step less from there on.
        run(optimizer, model, grads, skip=(2, 1),
            schedule=torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]


def test_muon_is_torchs():
    torch.manual_seed(0)
    ours = nn.Linear(24, 16, bias=False)
    theirs, grads = copy.deepcopy(ours), [[torch.randn(16, 24)] for _ in range(5)]
    for options in ({}, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}):
        run(fnn.Muon(ours.parameters(), lr=0.05, **options), ours, grads)
        run(torch.optim.Muon(theirs.parameters(), lr=0.05, **options), theirs, grads)
        # Newton-Schulz runs in bfloat16 in both; the moves agree to its rounding.
        torch.testing.assert_close(ours.weight, theirs.weight, atol=4e-3, rtol=0.02)


def test_adamw_in_8_bits():
    """Large tensors keep a byte a moment, small ones are AdamW's."""
    torch.manual_seed(0)
    ours = nn.Linear(96, 64)
    theirs, start = copy.deepcopy(ours), ours.weight.detach().clone()
    grads = [[torch.randn(64, 96), torch.randn(64)] for _ in range(20)]
    optimizer = fnn.AdamW8bit(ours.parameters(), lr=1e-2)
    run(optimizer, ours, grads)
    run(fnn.AdamW(theirs.parameters(), lr=1e-2), theirs, grads)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-5)
    moved = (theirs.weight - start).norm()
    assert 0 < (ours.weight - theirs.weight).norm() < 0.05 * moved
    assert optimizer.state[ours.weight]["exp_avg"].dtype == torch.int8
    assert optimizer.state[ours.bias]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lamb", "Lion", "SGD", "Adagrad",
                                  "RMSprop", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_resumes_bitwise(name, dtype):
    whole, grads = model_and_grads(dtype, steps=6)
    if name == "Muon":
        for layer in whole:
            layer.bias = None
        grads = [step[::2] for step in grads]
    part = copy.deepcopy(whole)
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    if name == "AdamW8bit":
        options["min_8bit_size"] = 0
    make = lambda model: getattr(fnn, name)(model.parameters(), **options)  # noqa: E731
    run(make(whole), whole, grads)
    first = make(part)
    run(first, part, grads[:3])
    second = make(part)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, part, grads[3:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(),
                                                 strict=True))


def test_bfloat16_keeps_a_float32_master():
    narrow, grads = model_and_grads(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    run(fnn.AdamW(narrow.parameters()), narrow, grads)
    run(torch.optim.AdamW(wide.parameters()), wide, [[g.float() for g in s] for s in grads])
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())


def test_stochastic_rounding_needs_no_master():
    model, grads = model_and_grads(torch.bfloat16)
    optimizer = fnn.AdamW(model.parameters(), stochastic_rounding=True)
    run(optimizer, model, grads)
    states = [optimizer.state[p] for p in model.parameters()]
    assert all("master" not in state and state["exp_avg"].dtype == torch.float32
               for state in states)


def test_state_of_torchs_adamw_is_taken():
    ours, grads = model_and_grads()
    theirs = copy.deepcopy(ours)
    b = torch.optim.AdamW(theirs.parameters())
    run(b, theirs, grads[:2])
    ours.load_state_dict(theirs.state_dict())
    a = fnn.AdamW(ours.parameters())
    a.load_state_dict(b.state_dict())
    run(a, ours, grads[2:])
    run(b, theirs, grads[2:])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_closure_and_groups():
    model, _ = model_and_grads()
    optimizer = fnn.Lion([{"params": model[0].parameters(), "lr": 0.0},
                          {"params": model[1].parameters()}], lr=0.01)
    before = [p.clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
