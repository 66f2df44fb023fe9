"""The loss scale against torch's GradScaler rules."""

import json

import pytest
import torch

from fastllm.optim import AdamW, LossScaler, OptimConfig


def test_backs_off_and_grows_as_torch_does():
    ours = LossScaler(scale=1024.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    weight = torch.ones(1, requires_grad=True)
    opt = torch.optim.SGD([weight], lr=0.0)
    for finite in [True, True, True, True, False, True, True, False, False, True, True, True, True]:
        theirs.scale(weight.sum() * (1.0 if finite else float("inf"))).backward()
        theirs.step(opt)
        theirs.update()
        opt.zero_grad()
        ours.update(finite)
        assert ours.scale == theirs.get_scale()


def test_the_scale_does_not_grow_without_end():
    scaler = LossScaler(growth_interval=1)
    for _ in range(200):
        scaler.update(True)
    assert scaler.scale == 2.0**24


def test_state_goes_through_json():
    scaler, copy = LossScaler(growth_interval=5), LossScaler(growth_interval=5)
    for finite in (False, True, True, True):
        scaler.update(finite)
    copy.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    for _ in range(4):
        scaler.update(True), copy.update(True)
        assert vars(scaler) == vars(copy)


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"growth": 1.0}, {"backoff": 1.0},
                                      {"growth_interval": 0}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match="LossScaler needs"):
        LossScaler(**settings)


def test_fp16_training_survives_an_overflow_and_recovers_small_gradients():
    """A scale that overflows fp16 is halved until the step goes through; then gradients that fp16
    would flush to zero still move the weights."""
    weight = torch.full((64,), 1.0, dtype=torch.float16, requires_grad=True)
    opt = AdamW([("w", weight)], OptimConfig(eps=1e-15, grad_clip=None, weight_decay=0.0))
    scaler = LossScaler(scale=2.0**50)
    skipped = 0
    for _ in range(40):
        # The gradient of a weight is 1e-9, below fp16's smallest number, 6e-8.
        loss = (weight.float() * 1e-9).sum()
        (loss * scaler.scale).backward()
        norm = opt.step(1e-2, unscale=1 / scaler.scale)
        weight.grad = None
        finite = bool(norm.isfinite())
        opt.applied(finite)
        scaler.update(finite)
        skipped += not finite
    assert skipped == 40 - opt.steps
    assert 0 < skipped < 20
    assert (weight < 1.0 - 0.1).all()
