"""Muon (Jordan 2024) for the matrices inside a model, AdamW for everything else."""

from typing import Any

from torch import Tensor

from fastllm import ops
from fastllm.optim.adamw import AdamW
from fastllm.optim.base import Share, zeros
from fastllm.optim.groups import decays

HEADS = {"lm_head", "head", "output", "embed_out", "score", "classifier"}


def takes(name: str, param: Tensor) -> bool:
    """Whether a parameter is a matrix between activations: no embedding and no output head."""
    inner = decays(name, param.ndim, decay_embeddings=False) and not HEADS & set(name.split("."))
    return param.ndim == 2 and inner


class Muon(AdamW):
    """Muon, 4 bytes of states an element, and AdamW, 8, where `takes` is false."""

    elementwise = False

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        if takes(name, param):
            return zeros(param, "momentum_buffer")
        return super().new_states(name, param, whole)

    def update(self, share: Share) -> None:
        matrices, rest = share.split(["momentum_buffer" in states for states in share.states])
        if rest.params:
            super().update(rest)
        if matrices.params:
            config = self.config
            options: dict[str, Any] = {
                "momentum": config.momentum, "nesterov": config.nesterov,
                "ns_steps": config.ns_steps, "adjust_lr_fn": config.adjust_lr_fn}
            ops.muon_step(matrices.params, matrices.grads, matrices.state("momentum_buffer"),
                          matrices.masters, **options, **matrices.options)
