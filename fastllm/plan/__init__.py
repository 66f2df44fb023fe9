"""What a run will need of each rank's memory, said before any of it is taken.

Weights, gradients, states and buffers follow from the model, built on the meta device, and from the
partition, to the byte; activations from what every operator keeps for its backward, to a few
percent (`fastllm.plan.activations`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastllm.callbacks import data_size
from fastllm.dist.buckets import Group, group_parameters, places
from fastllm.dist.config import DistConfig
from fastllm.dist.partition import Layout
from fastllm.dist.python_engine import IN_FLIGHT, wide
from fastllm.dist.units import Unit
from fastllm.optim import OptimConfig, Place, make_optimizer
from fastllm.plan.activations import MicroBatch, activation_bytes
from fastllm.plan.losses import Loss

__all__ = ["Loss", "MicroBatch", "Plan", "activation_bytes", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank."""

    trained: int
    """Weights that are trained, with the paddings of their buckets."""
    frozen: int
    """Weights that are not: in their dtype, or in 4 bits with their scales."""
    tables: int
    """What the model holds beside weights: RoPE's cos and sin."""
    gradients: int
    states: int
    """Optimizer states and fp32 masters."""
    activations: int
    """At their peak, when few gradients are there yet: the total is a little more than the need."""
    buffers: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def line(self) -> str:
        """One line for a person."""
        weights = {"trained weights": self.trained, "frozen weights": self.frozen} \
            if self.frozen else {"weights": self.trained}
        others = {name: value for name, value in vars(self).items()
                  if name not in ("trained", "frozen")}
        parts = ", ".join(f"{name} {data_size(value)}"
                          for name, value in {**weights, **others}.items())
        return f"memory a rank, predicted: {data_size(self.total)} ({parts})"


def make_plan(model: nn.Module, optim: OptimConfig, dist: DistConfig, batch: MicroBatch, *,
              grad_accum: int, rank: int = 0, world: int = 1,
              device: torch.device | None = None) -> Plan:
    """The plan of one rank; nothing is allocated.

    model: what is trained, on the meta device: a `Decoder`, one with an adapter, or a
    `RewardModel`, in the dtype of training. device: where it will be; None is the GPU where there
    is one, else the CPU.
    """
    named = dict(model.named_parameters())
    trained: dict[str, Tensor] = {
        name: param for name, param in named.items() if param.requires_grad}
    dtype = next(iter(trained.values())).dtype
    # 4-bit weights are buffers; tables that follow from the config are in no state dict.
    saved = model.state_dict(keep_vars=True).values()
    frozen = _held(tensor for tensor in saved if not tensor.requires_grad)
    tables = _held([*named.values(), *model.buffers()]) - _held(saved)
    local = sum(param.numel() for param in trained.values()) * _local_gradient(dtype, grad_accum)
    activations = activation_bytes(model, batch, device)
    if world == 1:
        states = _state_bytes(list(trained.items()), optim, None)
        return Plan(_held(trained.values()), frozen, tables, local, states, activations, 0)
    units, groups = group_parameters(model, dist.zero, dist.bucket_mb)
    buckets = _Buckets([(group, group.layout(world)) for group in groups],
                       units[0] if units else None)
    gradients = buckets.summed(dist.zero) * wide(dtype).itemsize
    if dist.zero < 2 and grad_accum > 1:
        gradients += local
    states = _rank_state_bytes(trained, groups, optim, dist.zero, rank, world)
    weights = (buckets.shards if dist.zero == 3 else buckets.padded) * dtype.itemsize
    return Plan(weights, frozen, tables, gradients, states, activations,
                _buffer_bytes(buckets, dist, dtype, world))


def _held(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------ what is sharded


@dataclass(frozen=True)
class _Buckets:
    """The buckets of a model over ranks, and their sizes in elements."""

    laid_out: list[tuple[Group, Layout]]
    root: Unit | None
    """Stage 3: what is no block's."""

    @property
    def shards(self) -> int:
        """Of one rank."""
        return sum(layout.shard for _, layout in self.laid_out)

    @property
    def padded(self) -> int:
        return sum(layout.padded for _, layout in self.laid_out)

    def summed(self, stage: int) -> int:
        """Of whose gradients a rank has the sums over ranks: in stage 0 everybody's."""
        return self.padded if stage == 0 else self.shards

    @property
    def largest(self) -> int:
        return max(layout.padded for _, layout in self.laid_out)

    @property
    def gathered(self) -> int:
        """Stage 3: the root stays whole; of the blocks one computes while the next one comes."""
        root = sum(layout.padded for group, layout in self.laid_out if group.unit is self.root)
        blocks = [layout.padded for group, layout in self.laid_out if group.unit is not self.root]
        return root + 2 * max(blocks, default=0)


def _local_gradient(dtype: torch.dtype, grad_accum: int) -> int:
    """Bytes of an element's gradient on a rank by itself: 16-bit ones of several micro-batches are
    summed beside `grad`, in fp32."""
    summed = dtype.itemsize < 4 and grad_accum > 1
    return dtype.itemsize + (wide(dtype).itemsize if summed else 0)


def _buffer_bytes(buckets: _Buckets, dist: DistConfig, dtype: torch.dtype, world: int) -> int:
    """What is on its way between ranks, what int8 left unsent, and stage 3's gathered parameters;
    with offload what goes to the CPU and back."""
    width = dtype.itemsize
    wire = {"same": width, "fp32": 4, "bf16": 2, "int8": 1.02}[dist.wire_dtype]
    held = int((IN_FLIGHT + 1) * (2 - 1 / world) * buckets.largest * wire)
    if dist.wire_dtype == "int8":
        held += 4 * buckets.padded
    if dist.zero == 3:
        held += buckets.gathered * width
        if dist.param_wire_dtype == "int8":
            held += int(buckets.largest * 1.02)
    if dist.offload != "none":
        held += buckets.shards * (wide(dtype).itemsize
                                  + (width if dist.offload == "optimizer" else 0))
    return held


def _rank_state_bytes(trained: dict[str, Tensor], groups: list[Group], optim: OptimConfig,
                      stage: int, rank: int, world: int) -> int:
    """Of the optimizer over what one rank updates: everything in stage 0, else its shards."""
    if stage == 0:
        return _state_bytes(list(trained.items()), optim, None)
    mine = [piece for group in groups for piece in group.owned(rank, world)]
    tensors = [(name, trained[name].new_empty(run.size)) for name, run in mine]
    return _state_bytes(tensors, optim, places(trained, mine))


def _state_bytes(named: list[tuple[str, Tensor]], optim: OptimConfig,
                 where: dict[str, Place] | None) -> int:
    return make_optimizer(named, optim, places=where).held_bytes()
