"""The optimizer of a sharded model for anyone's own loop."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.dist.zero import Zero
from fastllm.optim import LossScaler, OptimConfig


class ZeroOptimizer(torch.optim.Optimizer):
    """fastllm's optimizer on this rank's shards, as a torch.optim.Optimizer.

    `param_groups` ("decay", "no_decay") hold this rank's pieces; learning-rate schedulers set their
    `lr`, which must be one for both. A step whose gradient norm is not finite changes nothing, on
    any rank.

    loss_scale: for fp16: use `scale(loss).backward()`.
    """

    def __init__(self, zero: Zero, config: OptimConfig, *, seed: int = 0,
                 loss_scale: LossScaler | None = None) -> None:
        self.zero_engine, self.loss_scale = zero, loss_scale
        self.inner = zero.inner_optimizer(config, seed=seed)
        self.grad_norm: Tensor | None = None
        """The last step's global gradient norm before clipping, 0-d fp32."""
        by_name = {"decay": config.weight_decay or 0.0, "no_decay": 0.0}
        held = {group.name: group.params for group in self.inner.groups}
        groups: list[dict[str, Any]] = [
            {"params": held.get(name, []), "name": name, "weight_decay": decay}
            for name, decay in by_name.items()]
        super().__init__(groups, {"lr": config.lr})

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip by the global norm and update; every rank's parameters follow. Gradients are gone.

        Raises RunError on every rank where a parameter had no gradient on one of them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) != 1:
            raise ValueError(f"the parameter groups have the learning rates {sorted(rates)}: "
                             "fastllm's optimizers take one")
        zero, scale = self.zero_engine, self.loss_scale.scale if self.loss_scale else 1.0
        settled = zero.settle()
        self.grad_norm = self.inner.step(rates.pop(), zero.gradients(), norm=settled.norm,
                                         unscale=1.0 / scale)
        settled.check()
        finite = math.isfinite(float(self.grad_norm))
        self.inner.applied(finite)
        if self.loss_scale:
            self.loss_scale.update(finite)
        zero.publish()
        zero.zero()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that `step` has not used."""
        self.zero_engine.zero()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: for checkpoints of any number of ranks use fastllm.checkpoint with
        `inner.pieces()`."""
        tensors, counters = self.inner.state_dict()
        return {"tensors": tensors, "counters": counters,
                "param_groups": [{key: value for key, value in group.items() if key != "params"}
                                 for group in self.param_groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of `state_dict`, on the same rank of as many."""
        self.inner.load_state_dict(state["tensors"], state["counters"])
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update(saved)
