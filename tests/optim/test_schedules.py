"""Schedules against tables worked out by hand and against torch's schedulers."""

import math

import pytest
import torch

from fastllm.config import UserError, build
from fastllm.optim import ScheduleConfig, lr_at
from fastllm.optim.schedules import warmup_steps


def table(total, base=1.0, **settings):
    config = build(ScheduleConfig, {"warmup": 0, **settings})
    return [lr_at(step, total, base, config) for step in range(total)]


def torch_table(total, make):
    weight = torch.zeros(1, requires_grad=True)
    opt = torch.optim.SGD([weight], lr=1.0)
    schedule = make(opt)
    rates = []
    for _ in range(total):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("settings", "expected"), [
    ({"name": "constant"}, [1, 1, 1, 1]),
    ({"name": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
    ({"name": "constant", "warmup": 0.5}, [0.5, 1, 1, 1]),
    ({"name": "linear"}, [1, 0.75, 0.5, 0.25]),
    ({"name": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4]),
    ({"name": "linear", "warmup": 2}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ({"name": "cosine"}, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
    ({"name": "cosine", "min_lr_ratio": 0.1, "warmup": 1}, [1, 1, 0.55]),
    ({"name": "step", "step_size": 2, "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
    ({"name": "step", "step_size": 1, "gamma": 0.1, "min_lr_ratio": 0.05}, [1, 0.1, 0.05, 0.05]),
    ({"name": "wsd", "decay": 0.5}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ({"name": "wsd", "decay": 0.25, "warmup": 2, "min_lr_ratio": 0.5},
     [0.5, 1, 1, 1, 1, 1, 1, 0.75]),
    ({"name": "minimind"}, [1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55,
                            0.1 + 0.45 * (1 - math.sqrt(0.5))]),
])
def test_tables_by_hand(settings, expected):
    assert table(len(expected), **settings) == pytest.approx(expected, rel=1e-12)


def test_torchs_schedulers():
    schedulers = torch.optim.lr_scheduler
    for settings, make in [
        ({"name": "cosine", "min_lr_ratio": 0.1},
         lambda opt: schedulers.CosineAnnealingLR(opt, 50, eta_min=0.1)),
        ({"name": "linear", "min_lr_ratio": 0.3},
         lambda opt: schedulers.LinearLR(opt, 1.0, 0.3, total_iters=50)),
        ({"name": "step", "step_size": 7, "gamma": 0.8},
         lambda opt: schedulers.StepLR(opt, 7, gamma=0.8)),
    ]:
        assert table(50, **settings) == pytest.approx(torch_table(50, make), rel=1e-9), settings


def test_minimind_is_its_formula_at_any_base():
    expected = [5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 37))) for t in range(37)]
    assert table(37, base=5e-4, name="minimind") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "step", "cosine", "wsd", "minimind"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 5.0, 100.0])
@pytest.mark.parametrize("total", [1, 2, 20, 99])
def test_shape_of_every_schedule(name, warmup, total):
    config = ScheduleConfig(name=name, warmup=warmup, step_size=3 if name == "step" else None)
    rates = [lr_at(step, total, 2.0, config) for step in range(total)]
    ramp = min(warmup_steps(total, config), total)
    assert all(0 <= rate <= 2 for rate in rates) and rates[0] > 0
    assert rates[:ramp] == sorted(rates[:ramp])
    assert rates[ramp:] == sorted(rates[ramp:], reverse=True)
    if ramp < total:
        assert rates[ramp] == 2.0
    assert lr_at(total + 5, total, 2.0, config) == lr_at(total, total, 2.0, config)


def test_bad_settings_are_named():
    for settings, message in [
        ({"name": "step"}, "needs schedule.step-size"),
        ({"warmup": 2.5}, "neither a fraction"),
        ({"name": "minimind", "min_lr_ratio": 0.2}, "contradicts the minimind"),
        ({"name": "cosin"}, "did you mean cosine"),
        ({"min_lr_ratio": 1.5}, "min-lr-ratio"),
        ({"warmup": -1}, "warmup"),
    ]:
        with pytest.raises((UserError, ValueError), match=message):
            build(ScheduleConfig, settings).validate()
    with pytest.raises(ValueError, match="step -1 of 10"):
        lr_at(-1, 10, 1.0, ScheduleConfig())
