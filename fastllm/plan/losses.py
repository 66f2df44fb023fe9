"""What the losses hold of the logits, which are never whole."""

from typing import Literal

import torch

from fastllm import cpu, ops
from fastllm.adapters.lora import LoraHead
from fastllm.model import Decoder, ModelConfig

Loss = Literal["cross_entropy", "logprobs", "reward"]
"""What reads the last hidden states: `ops.linear_cross_entropy`, `ops.linear_logprobs`, or a reward
model's score, which has no logits."""


def logit_rows(config: ModelConfig, tokens: int, width: int, device: torch.device) -> int:
    """Rows of logits that the loss holds at a time: as many on a CPU, at most as many on a GPU.

    The rule is that of `fastllm.kernels._chunks`: what stays in a CPU's cache; a quarter of a GB,
    or the output head's size, on a GPU.
    """
    row = config.vocab_size * width
    if device.type == "cpu":
        most, multiple = max(512, (20 << 20) // row), 1
    else:
        most, multiple = max(1024, max(256 << 20, row * config.hidden_size) // row), 128
    alike = -(-tokens // -(-tokens // most))  # chunks of equal size, as few as they can be
    return min(tokens, -(-alike // multiple) * multiple)


def loss_bytes(decoder: Decoder, loss: Loss, tokens: int, device: torch.device) -> int:
    """What the loss works with: a chunk of logits, and, in 16 bits, a trained output head's
    gradient in fp32 where chunks add up to it."""
    if loss == "reward":
        return 0
    config, width = decoder.config, decoder.norm.weight.element_size()
    backends = {op: backend for op, (backend, _) in ops.dispatch(device).items()}
    head = config.vocab_size * config.hidden_size
    rows = logit_rows(config, tokens, width, device)
    logits, at_work = rows * config.vocab_size, min(rows, 256) * config.vocab_size
    capped = config.final_logit_softcapping is not None
    held, change = logits * width, decoder.head_change
    trained = isinstance(change, LoraHead) or decoder.lm_head_weight.requires_grad
    if isinstance(change, LoraHead):  # the changed head, and its gradient
        held += head * width * (2 if change.lora.magnitude is None else 3)
    # A GPU may take fewer rows than `rows`, but no chunk of fewer than 1024.
    several = rows < tokens or (device.type != "cpu" and tokens > 1024)
    if loss == "logprobs" and backends["linear_logprobs"] == "reference":
        # Three fp32 forms of the logits, a fourth with a softcap, one in their own type or a
        # gradient; and what a chunk gives the head before it is added to the others'.
        held += logits * ((20 if capped else 16) - width)
        return held + (head * width if trained and several else 0)
    if width < 4 and several and trained:
        held += 4 * head
    backend = backends["linear_cross_entropy"]
    if backend == "reference":  # three fp32 copies and a mask of the rows at work
        held += (16 if capped else 13) * at_work
    elif backend == "cpp" and width == 4 and cpu.matmul_backend()[0] == "onednn":
        # That product takes a copy of the logits at work; for the head's gradient, of all of them
        # transposed, and has no out=.
        held += logits * width + 4 * head if trained else at_work * width
    return held
