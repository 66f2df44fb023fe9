"""Whether a merged model still computes what the adapter and its base did."""

import torch
from torch import Tensor

from fastllm.adapters.base import Adapter
from fastllm.model import Decoder

ROUNDINGS = 4
"""How many roundings of the largest logit a branch is allowed, see `difference_bound`."""


def largest_difference(before: Tensor, after: Tensor) -> float:
    """The largest absolute difference of two tensors of logits of one shape; nan where one is nan.

    Raises ValueError for other shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"logits {tuple(before.shape)} and {tuple(after.shape)} do not compare")
    return float((before.double() - after.double()).abs().max())


def difference_bound(before: Tensor, model: Decoder) -> float:
    """What merging may change in the logits `before` by rounding, in their units.

    The merged weight is rounded once to the dtype (eps), and the products sum their K terms in
    fp32 in another way (eps32 sqrt(K), K the widest sum). Each of the 2 * layers branches and the
    head differ by a few of these; they are independent and add up as the square root of their
    number. The logits carry the hidden state's relative error, so the bound is
    4 (eps + eps32 sqrt(K)) sqrt(2 layers + 1) max|logit|.
    A change that was lost or folded in wrongly moves the logits by its own effect, which is not of
    the size of a rounding for an adapter that learned anything.
    """
    config = model.config
    branches = 2 * config.num_hidden_layers + 1
    terms = max(config.hidden_size, config.intermediate_size)
    rounding = torch.finfo(model.norm.weight.dtype).eps + (
        torch.finfo(torch.float32).eps * terms**0.5)
    return ROUNDINGS * rounding * branches**0.5 * float(before.abs().max())


@torch.no_grad()
def merge_check(adapter: Adapter, input_ids: Tensor) -> tuple[float, float]:
    """Merge, and return (the largest difference of the logits, what rounding explains of it).

    input_ids: (B, S) int64, on the model's device. The model is in eval mode for it, and merged
    after it whatever the figures say.

    Raises UserError, before anything is changed, for a method that cannot be merged.
    """
    adapter.check_mergeable()
    model, training = adapter.model, adapter.model.training
    model.eval()
    before = model.logits(model(input_ids))
    bound = difference_bound(before, model)
    adapter.merge()
    after = model.logits(model(input_ids))
    model.train(training)
    return largest_difference(before, after), bound
