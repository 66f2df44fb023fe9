"""Next-token prediction on packed documents."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fastllm import ops
from fastllm.data.collate import Batch
from fastllm.model import Decoder


@dataclass(kw_only=True)
class PretrainConfig:
    """Terms of the loss beside the cross entropy; evaluation leaves them at their defaults."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-sum-exp of the logits, against their drifting (1e-4 in PaLM)."""
    chunk_size: Annotated[int, Field(gt=0)] | None = None
    """Tokens whose logits are held at a time; null leaves it to the operator."""


def loss(model: Decoder, batch: Batch, config: PretrainConfig | None = None) -> tuple[Tensor, int]:
    """Sum of the loss over the trained tokens (fp32, 0-d) and their number.

    The sum, not the mean: a step's gradient divides by the trained tokens of all its micro-batches.
    Labels are shifted already, and -100 marks a token that is not trained. The logits are never
    held whole: the output head and the cross entropy are one operator over chunks of tokens.
    """
    config = config or PretrainConfig()
    hidden = model(batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens,
                   max_seqlen=batch.max_seqlen)
    total = ops.linear_cross_entropy(
        hidden.flatten(0, 1), model.lm_head_weight, batch.labels.flatten(),
        label_smoothing=config.label_smoothing, z_loss=config.z_loss,
        softcap=model.config.final_logit_softcapping, chunk_size=config.chunk_size, reduction="sum")
    return total, batch.num_tokens
