"""Loss scaling for fp16: gradients of fp16 underflow below 6e-8, so the loss is multiplied first.

The optimizer already refuses a step whose gradient norm is not finite (see adamw.py), and the
trainer reads that norm once a step. So the scale is an ordinary number on the host: no second check
of the gradients, no synchronisation of its own.
"""

from typing import Any

MAX_SCALE = 2.0**24


class LossScaler:
    """A loss scale that backs off after an overflow and grows after a quiet stretch.

    Use: multiply the loss by `scale` before backward, pass `unscale=1 / scale` to `AdamW.step`, and
    call `update(finite)` once the norm was read. By default every factor is a power of two, so
    scaling and unscaling are exact.
    """

    def __init__(self, *, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5,
                 growth_interval: int = 2000) -> None:
        if not (scale > 0 and growth > 1 and 0 < backoff < 1 and growth_interval > 0):
            raise ValueError(f"LossScaler needs scale > 0, growth > 1, 0 < backoff < 1 and "
                             f"growth_interval > 0; found {scale}, {growth}, {backoff}, "
                             f"{growth_interval}")
        self.scale = scale
        self.growth, self.backoff, self.growth_interval = growth, backoff, growth_interval
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """After every step: whether its gradient norm was finite."""
        if not finite:
            self.scale *= self.backoff
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale = min(self.scale * self.growth, MAX_SCALE)
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of `state_dict`."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
