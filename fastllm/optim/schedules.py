"""Learning-rate schedules as pure functions of the step: a resumed run needs no state for them."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

# MiniMind's cosine, lr * (0.1 + 0.45 * (1 + cos(pi t / T))), ends at this part of lr.
MINIMIND_FLOOR = 0.1


@dataclass(kw_only=True)
class ScheduleConfig:
    name: Literal["constant", "linear", "step", "cosine", "wsd", "minimind"] = "cosine"
    """Shape after the warm-up; wsd: stable, then a linear decay over the last steps."""
    warmup: Annotated[float, Field(ge=0)] = 0.02
    """Linear warm-up: below 1 a fraction of all steps, from 1 on a number of steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """After the warm-up the rate never falls below this part of lr."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """wsd: the last part of all steps, in which the rate falls."""
    step_size: Annotated[int, Field(gt=0)] | None = None
    """step: steps between two drops, counted from the end of the warm-up."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: what the rate is multiplied by at a drop."""

    def validate(self) -> None:
        """Raises ValueError for keys that contradict each other."""
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"schedule.warmup: {self.warmup} is neither a fraction below 1 nor a "
                             "whole number of steps")
        if self.name == "step" and self.step_size is None:
            raise ValueError("schedule.name step needs schedule.step-size, the steps between drops")
        if self.name == "minimind" and self.min_lr_ratio > MINIMIND_FLOOR:
            raise ValueError(f"schedule.min-lr-ratio: {self.min_lr_ratio} contradicts the minimind "
                             f"schedule, which ends at {MINIMIND_FLOOR}; use cosine")


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Steps of the warm-up."""
    if config.warmup < 1:
        return round(config.warmup * total_steps)
    return int(config.warmup)


def lr_at(step: int, total_steps: int, base_lr: float, config: ScheduleConfig) -> float:
    """The learning rate of step `step` of `total_steps`, counted from 0.

    The warm-up's steps take base_lr * (step + 1) / warm-up: the first is above zero, the last is
    base_lr. From step `total_steps` on, the rate stays as it is there.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}: step must be >= 0, total_steps >= 1")
    step, warmup = min(step, total_steps), warmup_steps(total_steps, config)
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return base_lr * _ratio(step - warmup, total_steps - warmup, total_steps, config)


def _ratio(step: int, steps: int, total_steps: int, config: ScheduleConfig) -> float:
    """The part of base_lr at `step` of the `steps` after the warm-up."""
    floor = config.min_lr_ratio
    progress = step / steps if steps > 0 else 1.0
    match config.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - floor) * progress
        case "cosine":
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "minimind":
            half = 0.5 * (1.0 - MINIMIND_FLOOR)
            return MINIMIND_FLOOR + half * (1.0 + math.cos(math.pi * progress))
        case "step":
            assert config.step_size is not None, "ScheduleConfig.validate was not called"
            return max(config.gamma ** (step // config.step_size), floor)
        case "wsd":
            falling = min(max(round(config.decay * total_steps), 1), max(steps, 1))
            return 1.0 - (1.0 - floor) * min(max(step - (steps - falling), 0) / falling, 1.0)
