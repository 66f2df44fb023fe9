"""AdamW (Loshchilov & Hutter 2019), with moments in fp32 or in 8 bits, and LAMB."""

from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.kernels import _block8 as block8
from fastllm.optim.base import Optimizer, Share, zeros
from fastllm.optim.config import OptimConfig

SMALL = 4096  # elements: the moments of smaller tensors stay in fp32


def _adam(config: OptimConfig) -> dict[str, Any]:
    assert config.betas is not None
    return {"beta1": config.betas[0], "beta2": config.betas[1], "eps": config.eps}


class AdamW(Optimizer):
    """AdamW with decoupled weight decay; 8 bytes of states an element."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        return zeros(param, "exp_avg", "exp_avg_sq")

    def update(self, share: Share) -> None:
        ops.adamw_step(share.params, share.grads, share.state("exp_avg"),
                       share.state("exp_avg_sq"), share.masters, **_adam(self.config),
                       **share.options)


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments and a scale for 256 of them; 2 bytes and 1/32 an element."""

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        if whole < SMALL:
            return super().new_states(name, param, whole)
        blocks = block8.blocks(param.numel())
        return {"exp_avg": torch.zeros_like(param, dtype=torch.int8),
                "exp_avg_sq": torch.zeros_like(param, dtype=torch.uint8),
                "exp_avg_scale": torch.zeros(blocks, device=param.device),
                "exp_avg_sq_scale": torch.zeros(blocks, device=param.device)}

    def update(self, share: Share) -> None:
        coded, wide = share.split(["exp_avg_scale" in states for states in share.states])
        if wide.params:
            super().update(wide)
        if coded.params:
            ops.adamw_step(coded.params, coded.grads, coded.state("exp_avg"),
                           coded.state("exp_avg_sq"), coded.masters, **_adam(self.config),
                           **coded.options, exp_avg_scales=coded.state("exp_avg_scale"),
                           exp_avg_sq_scales=coded.state("exp_avg_sq_scale"))


class LAMB(AdamW):
    """LAMB (You et al. 2020) for parameters with weight decay, AdamW for norms and biases."""

    elementwise = False

    def update(self, share: Share) -> None:
        if share.group.name != "decay":
            return super().update(share)
        ops.lamb_step(share.params, share.grads, share.state("exp_avg"),
                      share.state("exp_avg_sq"), share.masters, **_adam(self.config),
                      **share.options)
