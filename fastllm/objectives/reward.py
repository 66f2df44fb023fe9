"""The loss of a pairwise reward model, after Bradley and Terry (1952).

    P(chosen over rejected) = sigmoid(r_c - r_r)
    loss = -log sigmoid(r_c - r_r) + center_coefficient * (r_c + r_r)^2

r_c, r_r: rewards of the two answers of a pair (Ouyang et al., "Training language models to follow
instructions with human feedback", arXiv:2203.02155; here every pair has weight 1). Only differences
of rewards are trained; the second term keeps their mean at 0 (Eisenstein et al., "Helping or
Herding?", arXiv:2312.09244). Where a reward is read: `fastllm.model.reward`.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastllm.config import UserError
from fastllm.data.collate import Batch
from fastllm.objectives.sequences import ahead


@dataclass(kw_only=True)
class RewardConfig:
    """The terms of the loss."""

    center_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards around 0; 0.01 is usual,
    0: rewards may drift."""


def loss(model: Any, batch: Batch, config: RewardConfig | None = None) -> tuple[Tensor, int]:
    """Sum of the loss over the pairs (fp32, 0-d) and their number. model: a `RewardModel`.

    Raises UserError for a batch without pairs.
    """
    total, count, _ = loss_and_measures(model, batch, config)
    return total, count


@torch.no_grad()
def measure(model: Any, batch: Batch, config: RewardConfig | None = None) -> dict[str, Tensor]:
    """Sums over the pairs (fp32, 0-d), without gradients: loss, accuracy (pairs with r_c > r_r),
    margin (r_c - r_r), chosen_rewards, rejected_rewards. Raises UserError as `loss`."""
    total, _, sums = loss_and_measures(model, batch, config)
    return {"loss": total, **sums}


def loss_and_measures(model: Any, batch: Batch, config: RewardConfig | None = None
                      ) -> tuple[Tensor, int, dict[str, Tensor]]:
    """`loss`, and `measure` but for its loss, of one forward: for a training step's record."""
    losses, rewards = _losses(model, batch, config or RewardConfig())
    chosen, rejected = rewards.detach().unbind(1)
    return losses.sum(), batch.count, {
        "accuracy": ahead(chosen, rejected), "margin": (chosen - rejected).sum(),
        "chosen_rewards": chosen.sum(), "rejected_rewards": rejected.sum()}


def _losses(model: Any, batch: Batch, config: RewardConfig) -> tuple[Tensor, Tensor]:
    """The loss of each pair (P,) and its rewards (P, 2)."""
    if batch.pairs is None:
        raise UserError("a reward model is trained on pairs and this batch has none: give rows "
                        "with chosen and rejected answers")
    hidden = model(batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens,
                   max_seqlen=batch.max_seqlen)
    rewards = model.scores(hidden, batch.cu_seqlens)[batch.pairs]
    chosen, rejected = rewards.unbind(1)
    losses = -logsigmoid(chosen - rejected)
    if config.center_coefficient:
        losses = losses + config.center_coefficient * (chosen + rejected).square()
    return losses, rewards
