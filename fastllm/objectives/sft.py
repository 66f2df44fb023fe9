"""Supervised fine-tuning: next-token prediction on the tokens of the answers.

NEFTune (Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv:2310.05914)
adds noise to the embeddings in training:

    x + alpha / sqrt(L * H) * u,    u uniform in [-1, 1], drawn anew for each of the L * H numbers

L: tokens of the document, H: hidden_size, alpha: 5 to 15 in the paper. In packed rows each document
has its own L; transformers takes the padded length of the batch for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastllm.config import UserError
from fastllm.data.collate import Batch
from fastllm.objectives import pretrain
from fastllm.objectives.pretrain import PretrainConfig


@dataclass(kw_only=True)
class SftConfig(PretrainConfig):
    """Terms of the loss beside the cross entropy; evaluation leaves them at their defaults."""

    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune: scale of the noise on the embeddings in training, 5 to 15 in the paper; 0: none."""


def loss(model: Any, batch: Batch, config: SftConfig | None = None) -> tuple[Tensor, int]:
    """Sum of the loss over the trained tokens (fp32, 0-d) and their number, as `pretrain.loss`.

    model: a `Decoder`; the noise comes from torch's own generator of its device, and only while the
    model is in training mode. Raises UserError for noise under adapters that put virtual tokens
    before documents.
    """
    config = config or SftConfig()
    if not config.neftune_alpha or not model.training:
        return pretrain.loss(model, batch, config)
    with _noise(model.embed_tokens, batch, config.neftune_alpha):
        return pretrain.loss(model, batch, config)


@contextmanager
def _noise(embedding: nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """Within, what `embedding` gives for the batch has NEFTune's noise."""
    bounds = batch.cu_seqlens.long()
    place = torch.arange(batch.input_ids.numel(), device=bounds.device)
    segment = torch.bucketize(place, bounds[1:], right=True)
    length = bounds.diff()[segment].view(batch.input_ids.shape)

    @torch.compiler.disable  # a graph would be made anew for every batch, whose lengths it holds
    def add(_module: nn.Module, _args: Any, x: Tensor) -> Tensor:
        if x.shape[:-1] != length.shape:
            raise UserError("loss.neftune-alpha does not go with an adapter of virtual tokens "
                            "(prompt, p-tuning), which have no noise of their own: leave it out")
        scale = alpha * (length[..., None] * x.shape[-1]).float().rsqrt()
        # Drawn in fp32: bf16 has 128 numbers between 1/2 and 1.
        noise = torch.rand(x.shape, device=x.device, dtype=torch.float32) * 2 - 1
        return x + (noise * scale).to(x.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
