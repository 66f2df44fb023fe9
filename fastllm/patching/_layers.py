"""Embedding and Dropout of torch.nn, and the embeddings that scale what they look up."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _check
from fastllm.patching._instance import Replacement, method_of


def find_embedding(module: nn.Module) -> Replacement | str | None:
    """What replaces an embedding; why nothing does; None for what is none."""
    if not isinstance(module, nn.Embedding):
        return None
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"{option} is set"
    ids = torch.tensor([[0, 1, 0], [2, 1, 3]], device=module.weight.device) % module.num_embeddings
    theirs = partial(type(module).forward, module)
    for function, by in ((_embed, "ops.embedding"), (_embed_scaled, "ops.embedding, scaled")):
        if function is _embed_scaled and not hasattr(module, "embed_scale"):
            continue
        try:
            _check.agree("its output", function(module, ids), theirs(ids))
        except _check.Differs as error:
            why = str(error)
        else:
            return Replacement(function, by, method_of(module))
    return why


def _embed(self: Any, input: Tensor) -> Tensor:
    return ops.embedding(input, self.weight, padding_idx=self.padding_idx)


def _embed_scaled(self: Any, input: Tensor) -> Tensor:
    scale = self.embed_scale
    scale = scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale
    return ops.embedding(input, self.weight, padding_idx=self.padding_idx) * scale


def find_dropout(module: nn.Module) -> Replacement | str | None:
    """What replaces a dropout; why nothing does; None for what is none."""
    if not isinstance(module, nn.Dropout):
        return None
    if type(module).forward is not nn.Dropout.forward:
        return "its forward is not torch.nn.Dropout's"
    return "inplace is set" if module.inplace else Replacement(
        _drop, "ops.dropout", method_of(module))


def _drop(self: Any, input: Tensor) -> Tensor:
    return ops.dropout(input, self.p, training=True) if self.training and self.p else input
