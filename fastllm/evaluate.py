"""Held-out loss in nats a token and in bits per byte, beside what a general compressor needs."""

import lzma
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fastllm.config import UserError
from fastllm.data.collate import Batch
from fastllm.dist.mesh import ALONE, World


@dataclass(kw_only=True)
class EvalConfig:
    every: Annotated[int, Field(ge=0)] = 200
    """Optimizer steps between two evaluations on the held-out documents; the last step always has
    one. 0: never (nothing is evaluated at all)."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    """Rows in a batch of the evaluation; none: train.batch_size."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the finished model continues; empty: the first words of three held-out ones."""
    new_tokens: Annotated[int, Field(ge=0)] = 60
    """Tokens of each continuation; 0: none are made."""


def evaluate(model: Any, batches: Iterable[Batch], num_bytes: int, *, device: torch.device,
             loss: Callable[[Any, Batch], tuple[Tensor, int]], world: World = ALONE
             ) -> dict[str, float]:
    """Loss of `model` over every label of `batches`, this rank's share of them all.

    num_bytes: UTF-8 bytes of the documents' text, the denominator of bits per byte; the loss of the
    end-of-document tokens counts in the numerator, as a compressor must also say where a text ends.
    Returns val_loss (nats a token), val_bpb (bits a byte), val_tokens. Raises UserError if nothing
    is there to evaluate.
    """
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            value, count = loss(model, batch.to(device))
            total += value.double().cpu()
            tokens += count
    nats, tokens = world.gather_numbers([float(total), tokens]).sum(0).tolist()
    if not tokens or not num_bytes:
        raise UserError("no documents to evaluate on: raise --data.holdout, or give more data")
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / num_bytes,
            "val_tokens": int(tokens)}


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of `xz -9` on the documents one after another: what no language model needs."""
    text = b"".join(documents)
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9)) / max(len(text), 1)
