"""Log-probabilities of whole sequences, on packed rows.

    log pi(y | x) = sum over t in y of log pi(y_t | x, y_<t)

x: a document's untrained tokens, y its trained ones (labels that are not -100).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastllm import ops
from fastllm.data.collate import IGNORE_INDEX, Batch


def sequence_logprobs(model: Any, batch: Batch, *, chunk_size: int | None = None
                      ) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each segment's trained tokens, and how many there are.

    model: a `Decoder`. Segments are those of batch.cu_seqlens, padding tails among them. Returns
    sums (N,) float32 in nats and counts (N,) int64; 0 and 0 where nothing is trained. The logits
    are never held whole (chunk_size: tokens whose logits are), the sums are made in float64 in one
    order, and nothing waits for the device.
    """
    hidden = model(batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens,
                   max_seqlen=batch.max_seqlen)
    labels = batch.labels.flatten()
    logp = ops.linear_logprobs(
        hidden.flatten(0, 1), model.lm_head_weight, labels, ignore_index=IGNORE_INDEX,
        softcap=model.config.final_logit_softcapping, chunk_size=chunk_size)
    bounds = batch.cu_seqlens.long()
    # Not index_add, whose order of additions on CUDA is another in every run. unsafe: the offsets
    # are the collator's own, and to check them would wait for the device.
    sums = torch.segment_reduce(logp.double(), "sum", offsets=bounds, unsafe=True)
    trained = pad((labels != IGNORE_INDEX).cumsum(0), (1, 0))
    return sums.float(), trained[bounds[1:]] - trained[bounds[:-1]]


def ahead(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Of how many pairs (P,) the chosen one is above the rejected one, a tie counting half: 0-d."""
    return (chosen > rejected).float().sum() + 0.5 * (chosen == rejected).float().sum()
