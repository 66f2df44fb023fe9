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
    on_start: bool = False
    """Evaluate also before the first step: what the run begins from."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    """Rows in a batch of the evaluation; none: train.batch_size."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the finished model continues; empty: the first words of three held-out ones."""
    new_tokens: Annotated[int, Field(ge=0)] = 60
    """Tokens of each continuation; 0: none are made."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Early stopping: end the run after so many evaluations without a lower held-out loss; 0:
    never."""
    load_best: bool = False
    """At the end take the weights of the evaluation with the lowest held-out loss, not the last
    ones."""

    def validate(self) -> None:
        if not self.every and (self.patience or self.load_best or self.on_start):
            raise ValueError("eval.patience, eval.load-best and eval.on-start go by evaluations, "
                             "and eval.every is 0: give it a number of steps")


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


def evaluate_pairs(model: Any, batches: Iterable[Batch], *, device: torch.device,
                   measure: Callable[[Any, Batch], dict[str, Tensor]], world: World = ALONE
                   ) -> dict[str, float]:
    """What `measure` says of every pair of `batches`, this rank's share of them all.

    measure: (model, batch) -> sums over the batch's pairs by name, loss and accuracy among them.
    Returns their means as val_loss, val_accuracy and so on, and val_pairs. Raises UserError if
    nothing is there to evaluate.
    """
    sums: dict[str, Tensor] = {}
    pairs = 0
    with torch.no_grad():
        for batch in batches:
            for name, value in measure(model, batch.to(device)).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) \
                    + value.double().cpu()
            pairs += batch.count
    # The same names on every rank: each has as many batches as the others.
    *totals, pairs = world.gather_numbers([*map(float, sums.values()), pairs]).sum(0).tolist()
    if not pairs:
        raise UserError("no pairs to evaluate on: raise --data.holdout, or give more data")
    return {**{f"val_{name}": total / pairs for name, total in zip(sums, totals, strict=True)},
            "val_pairs": int(pairs)}


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of `xz -9` on the documents one after another: what no language model needs."""
    text = b"".join(documents)
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9)) / max(len(text), 1)
