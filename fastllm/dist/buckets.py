"""Which parameters share a bucket, and that every rank has the same ones."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm.config import UserError
from fastllm.dist.mesh import World
from fastllm.dist.partition import Layout, Run, fill, layout, runs
from fastllm.dist.units import Unit, find_units
from fastllm.optim import Place

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Group:
    """The parameters of one bucket by name, of one dtype and device; in stage 3, of one unit."""

    params: dict[str, Tensor]
    trainable: bool
    unit: Unit | None = None

    def layout(self, world: int) -> Layout:
        """Of the bucket over `world` ranks."""
        return layout([param.numel() for param in self.params.values()], world)

    def owned(self, rank: int, world: int) -> list[tuple[str, Run]]:
        """By name, what one of `world` ranks owns, where it lies in that rank's shard."""
        names = list(self.params)
        found = [(names[run.parameter], run) for run in runs(self.layout(world), [rank])]
        if rank == 0:  # a parameter without elements is the first rank's
            found += [(name, Run(i, 0, 0, 0)) for i, (name, param)
                      in enumerate(self.params.items()) if not param.numel()]
        return found


def group_parameters(model: nn.Module, stage: int, bucket_mb: float,
                     units: Iterable[nn.Module] | None = None) -> tuple[list[Unit], list[Group]]:
    """The units of a model (stage 3; else none) and its buckets, as gradients come: the last first.

    Below stage 3 frozen parameters are in no bucket. Raises UserError for a dtype that cannot be
    sharded.
    """
    named = dict(model.named_parameters())
    for name, param in named.items():
        if param.dtype not in DTYPES and (param.requires_grad or stage == 3):
            raise UserError(f"zero: {name} is {param.dtype}; float32, bfloat16, float16 and "
                            "float64 can be sharded")
    groups = []
    if stage < 3:
        trainable = {name: p for name, p in reversed(named.items()) if p.requires_grad}
        for chosen in _by_kind(trainable):
            names = list(chosen)
            sizes = [param.numel() * param.element_size() for param in chosen.values()]
            groups += [Group({names[i]: chosen[names[i]] for i in some}, True)
                       for some in fill(sizes, int(bucket_mb * 1e6))]
        return [], groups
    found = find_units(model, units)
    for unit in [*reversed(found[1:]), found[0]]:
        groups += [Group(chosen, next(iter(chosen.values())).requires_grad, unit)
                   for chosen in _by_kind(unit.params)]
    return found, groups


def places(trained: Mapping[str, Tensor], pieces: Iterable[tuple[str, Run]]) -> dict[str, Place]:
    """For an optimizer of pieces of parameters, at most one of each: where in the model they lie.

    trained: the parameters that are trained, in the model's order.
    """
    starts, total = {}, 0
    for name, param in trained.items():
        starts[name] = total
        total += param.numel()
    return {name: Place(tuple(trained[name].shape), run.offset, starts[name] + run.offset)
            for name, run in pieces}


def _by_kind(params: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parameters apart by dtype, device and whether they are trained."""
    kinds: dict[tuple[torch.dtype, torch.device, bool], dict[str, Tensor]] = {}
    for name, param in params.items():
        kinds.setdefault((param.dtype, param.device, param.requires_grad), {})[name] = param
    return list(kinds.values())


@torch.no_grad()
def materialize(model: nn.Module, group: Group, fill_parameter: Callable[[str, Tensor], None],
                device: torch.device) -> None:
    """Give a group's parameters on the meta device memory, and the values of `fill_parameter`."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, held in module.named_parameters(recurse=False):
            owners.setdefault(id(held), []).append((module, leaf))
    for name, param in list(group.params.items()):
        made = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=device),
                            requires_grad=param.requires_grad)
        for module, leaf in owners[id(param)]:
            module.register_parameter(leaf, made)
        group.params[name] = made
        fill_parameter(name, made)


def materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Modules that hold nothing but buffers, such as tables, make them on the device."""
    for module in model.modules():
        buffers = list(module.buffers(recurse=False))
        if buffers and all(buffer.is_meta for buffer in buffers):
            module.to_empty(device=device, recurse=False)


def same_models(model: nn.Module, world: World) -> None:
    """UserError on every rank, naming the first parameter that differs between two of them."""
    mine = [f"{name} {param.dtype} {tuple(param.shape)}"
            f"{'' if param.requires_grad else ' frozen'}"
            for name, param in model.named_parameters()]
    everyone = world.gather(mine)
    for rank, other in enumerate(everyone):
        for ours, theirs in zip(everyone[0], other, strict=False):
            if ours != theirs:
                raise UserError(f"zero: the ranks' models differ: rank 0 has {ours}, rank {rank} "
                                f"has {theirs}")
        if len(other) != len(everyone[0]):
            raise UserError(f"zero: the ranks' models differ: rank 0 has {len(everyone[0])} "
                            f"parameters, rank {rank} has {len(other)}")


@torch.no_grad()
def broadcast(model: nn.Module, world: World) -> None:
    """Rank 0's parameters and buffers to every rank."""
    if world.size == 1:
        return
    first = 0 if world.group is None else dist.get_global_rank(world.group, 0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.numel():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, first, group=world.group)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)
