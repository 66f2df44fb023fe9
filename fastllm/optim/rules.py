"""Optimizers that are one rule for every parameter: Lion, SGD, Adagrad, RMSprop."""

from torch import Tensor

from fastllm import ops
from fastllm.optim.base import Optimizer, Share, zeros


class Lion(Optimizer):
    """Lion (Chen et al. 2023); 4 bytes of states an element. Wants a lower rate than AdamW."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        return zeros(param, "exp_avg")

    def update(self, share: Share) -> None:
        assert self.config.betas is not None
        beta1, beta2 = self.config.betas
        ops.lion_step(share.params, share.grads, share.state("exp_avg"), share.masters,
                      beta1=beta1, beta2=beta2, **share.options)


class SGD(Optimizer):
    """torch.optim.SGD; 4 bytes of states an element with momentum, none without."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        return zeros(param, "momentum_buffer") if self.config.momentum else {}

    def update(self, share: Share) -> None:
        config = self.config
        buffers = share.state("momentum_buffer") if config.momentum else None
        ops.sgd_step(share.params, share.grads, buffers, share.masters,
                     momentum=config.momentum or 0.0, dampening=config.dampening or 0.0,
                     nesterov=bool(config.nesterov), **share.options)


class Adagrad(Optimizer):
    """torch.optim.Adagrad; 4 bytes of states an element."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        states = zeros(param, "state_sum")
        states["state_sum"].fill_(self.config.initial_accumulator or 0.0)
        return states

    def update(self, share: Share) -> None:
        config = self.config
        ops.adagrad_step(share.params, share.grads, share.state("state_sum"), share.masters,
                         lr_decay=config.lr_decay or 0.0, eps=config.eps or 0.0, **share.options)


class RMSprop(Optimizer):
    """torch.optim.RMSprop; 4 bytes of states an element, and 4 for each of momentum and centre."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        kept = [("square_avg", True), ("grad_avg", self.config.centered),
                ("momentum_buffer", self.config.momentum)]
        return zeros(param, *(state for state, wanted in kept if wanted))

    def update(self, share: Share) -> None:
        config = self.config
        ops.rmsprop_step(
            share.params, share.grads, share.state("square_avg"),
            share.state("grad_avg") if config.centered else None,
            share.state("momentum_buffer") if config.momentum else None, share.masters,
            alpha=config.alpha or 0.0, eps=config.eps or 0.0, momentum=config.momentum or 0.0,
            **share.options)
