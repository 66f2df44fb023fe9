"""What a run will need of each rank's memory, said before any of it is taken.

Weights, gradients, states and buffers follow from the partition, to the byte; activations are an
estimate for the model's own blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.callbacks import data_size
from fastllm.dist.buckets import group_parameters
from fastllm.dist.config import DistConfig
from fastllm.dist.partition import layout, runs
from fastllm.dist.python_engine import IN_FLIGHT, wide
from fastllm.model import Decoder, ModelConfig
from fastllm.optim import OptimConfig, Place, make_optimizer

LOGITS_CHUNK = 64 << 20
"""Bytes that the loss keeps of logits at a time, about."""


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank."""

    weights: int
    gradients: int
    states: int
    """Optimizer states and fp32 masters."""
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.activations + self.buffers

    def line(self) -> str:
        """One line for a person."""
        parts = ", ".join(f"{name} {data_size(value)}" for name, value in vars(self).items())
        return f"memory a rank, predicted: {data_size(self.total)} ({parts})"


def make_plan(model: ModelConfig, optim: OptimConfig, dist: DistConfig, *, dtype: torch.dtype,
              tokens: int, grad_accum: int, rank: int = 0, world: int = 1) -> Plan:
    """The plan of one rank; nothing is allocated (the model is built on the meta device).

    tokens: in a micro-batch.
    """
    with torch.device("meta"):
        decoder = Decoder(model).to(dtype)
    width, sums = dtype.itemsize, wide(dtype).itemsize
    stage = dist.zero if world > 1 else 0
    numel = sum(param.numel() for param in decoder.parameters())
    activations = activation_bytes(model, tokens, width)
    # 16-bit gradients of several micro-batches are summed beside `grad`, in fp32.
    local = numel * (width + (sums if width < 4 and grad_accum > 1 else 0))
    if world == 1:
        states = _state_bytes(list(decoder.named_parameters()), optim, None)
        return Plan(numel * width, local, states, activations, 0)
    units, groups = group_parameters(decoder, stage, dist.bucket_mb)
    places = [layout([p.numel() for p in group.params.values()], world) for group in groups]
    shards, padded = sum(p.shard for p in places), sum(p.padded for p in places)
    largest = max(place.padded for place in places)
    wire = {"same": width, "fp32": 4, "bf16": 2, "int8": 1.02}[dist.wire_dtype]
    buffers = int((IN_FLIGHT + 1) * (2 - 1 / world) * largest * wire)
    if dist.wire_dtype == "int8":
        buffers += 4 * padded
    pieces, where = [], {}
    index = 0
    starts = {}
    for name, param in decoder.named_parameters():
        starts[name] = index
        index += param.numel()
    for group, place in zip(groups, places, strict=True):
        names = list(group.params)
        for run in runs(place, [rank]):
            name = names[run.parameter]
            pieces.append((name, torch.empty(run.size, dtype=dtype, device="meta")))
            where[name] = Place(tuple(group.params[name].shape), run.offset,
                                starts[name] + run.offset)
    if stage == 0:
        states = _state_bytes(list(decoder.named_parameters()), optim, None)
    else:
        states = _state_bytes(pieces, optim, where)
    weights = padded * width
    gradients = shards * sums + (padded * sums if stage == 0 else 0)
    if stage < 2 and grad_accum > 1:
        gradients += local
    if stage == 3:
        weights = shards * width
        root = sum(place.padded for group, place in zip(groups, places, strict=True)
                   if group.unit is units[0])
        blocks = [place.padded for group, place in zip(groups, places, strict=True)
                  if group.unit is not units[0]]
        # The root stays whole; of the blocks one computes while the next one comes.
        buffers += (root + 2 * max(blocks, default=0)) * width
    if dist.offload != "none":  # what goes to the CPU and back
        buffers += shards * (sums + (width if dist.offload == "optimizer" else 0))
    return Plan(weights, gradients, states, activations, buffers)


def _state_bytes(named: list[tuple[str, Tensor]], optim: OptimConfig,
                 places: dict[str, Place] | None) -> int:
    return make_optimizer(named, optim, places=places).held_bytes()


def activation_bytes(config: ModelConfig, tokens: int, width: int) -> int:
    """What the forward of a micro-batch leaves for the backward, at its peak.

    A block keeps its input, q, k, v before and after rotation, the attention's result and sums, the
    middle of its residual stream, and gate and up; with recomputation its input only (selective:
    and the products), and one block's whole set while it is made again.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.head_size
    keys = (config.num_key_value_heads or heads) * config.head_size
    products = queries + 2 * keys + queries + hidden + 2 * config.intermediate_size
    rotated = queries + keys
    block = width * (hidden + products + rotated) + 4 * heads + 8
    if config.dropout:
        block += 2 * hidden * (width + 1)
    layers = config.num_hidden_layers
    kept = {"none": block * layers,
            "selective": width * (hidden + products) * layers + block,
            "full": width * hidden * layers + block}[config.recompute]
    # The embedding's and the last norm's results, and the loss's gradient of the latter.
    ends = 4 * hidden * width + 16
    logits = min(tokens * config.vocab_size * 4, LOGITS_CHUNK)
    return tokens * (kept + ends) + 2 * logits
