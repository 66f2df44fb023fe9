"""ZeRO: data parallelism in which every rank keeps a part of what DDP keeps whole.

    engine = zero.shard(model, stage=2)
    optimizer = engine.optimizer("adamw", lr=3e-4, grad_clip=1.0)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()

stage 0: gradients are summed over ranks (DDP). 1: optimizer states and fp32 masters are sharded.
2: also the gradients, across accumulation. 3: also the parameters. Every stage sums gradients in
the same order and in fp32, so all of them train to the same bits.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
2020.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm.config import RunError, UserError
from fastllm.dist import collectives, mesh
from fastllm.dist.buckets import (
    Group,
    broadcast,
    group_parameters,
    materialize,
    materialize_buffers,
    places,
    same_models,
)
from fastllm.dist.mesh import World, of_group
from fastllm.dist.partition import Run
from fastllm.dist.python_engine import IN_FLIGHT, Options, to_host
from fastllm.dist.units import Schedule
from fastllm.optim import OptimConfig, Settled, make_optimizer
from fastllm.optim.base import Place
from fastllm.pieces import Piece

STAGES = (0, 1, 2, 3)
WIRES = ("same", "fp32", "bf16", "int8")
PARAM_WIRES = ("same", "int8")
OFFLOADS = ("none", "optimizer", "all")


@dataclass
class _Bucket:
    """The names of a bucket's parameters, and this rank's part of them."""

    number: int
    names: list[str]
    params: list[Tensor]
    owned: list[Run]
    trainable: bool


@dataclass(frozen=True)
class Agreed(Settled):
    """What the ranks agreed on; the norm is NaN where a rank lacks a gradient."""

    unused: Tensor
    """(ranks,) a parameter that a rank's step did not reach, as its place in the model, or -1."""
    name_of: Callable[[int], str]

    def check(self) -> None:
        """Raises RunError, on every rank, naming a parameter that no micro-batch of a rank used."""
        for rank, code in enumerate(self.unused.tolist()):
            if code >= 0:
                raise RunError(
                    f"rank {rank}: {self.name_of(int(code))} had no gradient in this step; freeze "
                    "it with requires_grad_(False), or let the loss reach it on every rank")


def shard(model: nn.Module, *, stage: int, mesh: Any = None, wire_dtype: str = "same",
          param_wire_dtype: str = "same", average: bool = True, bucket_mb: float = 25.0,
          offload: Literal["none", "optimizer", "all"] = "none",
          units: Iterable[nn.Module] | None = None, prefetch: bool = True, overlap: bool = True,
          check: bool = False,
          backend: Literal["auto", "cpp", "python"] = "auto",
          fill_parameter: Callable[[str, Tensor], None] | None = None,
          device: torch.device | None = None,
          watch: Callable[[str | None], None] | None = None) -> "Zero":
    """Shard a model over ranks, in place; call it on every rank, with the same model.

    Args:
        stage: 0 to 3, see above.
        mesh: the ranks: a DeviceMesh of one dimension, a process group, or, by default, all.
        wire_dtype: of gradients between ranks: "same" as the parameter's, "fp32", "bf16", or
            "int8" with a scale for 256 elements and error feedback (4 bytes an element of memory).
            Whatever it is, they are summed in fp32.
        param_wire_dtype: of parameters between ranks, in stage 3: "same", or "int8", a quarter of
            fp32's bytes. The shards stay exact, and are what is trained and saved; what a forward
            and a backward compute with is rounded, alike on every rank.
        average: divide gradients by the number of ranks, as DDP does; False sums.
        bucket_mb: MB of gradients in a bucket, below stage 3. (In stage 3 a unit is a bucket.)
        offload: "optimizer": masters, optimizer states and their step are on the CPU; "all" (stage
            3): also the shards of the parameters.
        units: stage 3: modules to gather at a time; by default each element of the outermost
            ModuleLists.
        prefetch: stage 3: gather the next unit while one computes. Needs the same order of units
            in every forward.
        overlap: go on with the backward while gradients are exchanged; False, to compare: the same
            bits.
        check: compare the name of every collective over ranks before it starts (slow, to debug).
        backend: the engine; "auto" is C++ where the extension was built.
        fill_parameter: (name, tensor) -> None fills a whole parameter, on every rank alike; for a
            model on the meta device, whose buckets are then made one at a time on `device` (the
            CPU), each cut at once. Else rank 0's weights go to all ranks.
        watch: hears what a wait is for, and None when it is over; by default the watchdog of
            `mesh.world`, if the ranks were made there.

    Raises:
        UserError: ranks whose models differ, an impossible option, dtypes other than fp32, bf16,
            fp16 and fp64.
    """
    for name, value, allowed in (("stage", stage, STAGES), ("wire_dtype", wire_dtype, WIRES),
                                 ("param_wire_dtype", param_wire_dtype, PARAM_WIRES),
                                 ("offload", offload, OFFLOADS)):
        if value not in allowed:
            raise UserError(f"zero: {name} is {value!r}, use one of "
                            f"{', '.join(map(str, allowed))}")
    if stage == 0 and offload != "none":
        raise UserError("zero: offload needs stage 1 or more: stage 0 has no shards")
    if stage < 3 and offload == "all":
        raise UserError("zero: offload all needs stage 3: below, parameters are not in shards; use "
                        "optimizer")
    if stage < 3 and param_wire_dtype != "same":
        raise UserError("zero: param_wire_dtype int8 needs stage 3: below, every rank's parameters "
                        "are whole, and would be rounded for good")
    return Zero(model, stage, of_group(mesh), average=average, wire=wire_dtype,
                param_wire=param_wire_dtype, bucket_mb=bucket_mb, offload=offload, units=units,
                prefetch=prefetch, overlap=overlap, check=check, backend=backend,
                fill_parameter=fill_parameter, device=device, watch=watch)


class Zero:
    """A sharded model, see `shard`. Between two steps: backward passes, `settle`, an optimizer's
    update of `pieces` with `gradients`, `publish`; `ZeroOptimizer` does the last four."""

    def __init__(self, model: nn.Module, stage: int, world: World, *, average: bool, wire: str,
                 param_wire: str, bucket_mb: float, offload: str,
                 units: Iterable[nn.Module] | None, prefetch: bool, overlap: bool,
                 check: bool, backend: str,
                 fill_parameter: Callable[[str, Tensor], None] | None, device: torch.device | None,
                 watch: Callable[[str | None], None] | None) -> None:
        self.model, self.stage, self.world, self.offload = model, stage, world, offload
        self.watch: Callable[[str | None], None] = watch or world.watch
        same_models(model, world)
        if fill_parameter is None:
            broadcast(model, world)
        found, groups = group_parameters(model, stage, bucket_mb, units)
        scale = 1.0 / world.size if average else 1.0
        self._engine = collectives.engine(backend, world, Options(
            wire=wire, param_wire=param_wire, scale=scale, native=collectives.is_native(world),
            gather_grads=stage == 0, release=stage == 3, host_shards=offload == "all",
            in_flight=IN_FLIGHT if overlap else 0), self.watch, new_group=stage == 3)
        if check:
            self._engine.check = self._same_collective
        self._buckets: list[_Bucket] = []
        if fill_parameter is not None:
            materialize_buffers(model, device or torch.device("cpu"))
        for group in groups:
            if fill_parameter is not None:
                materialize(model, group, fill_parameter, device or torch.device("cpu"))
            self._add(group)
        self._schedule = Schedule(self._engine, found, prefetch=prefetch) if stage == 3 else None
        self._trainable = [bucket for bucket in self._buckets if bucket.trainable]
        if not self._trainable:
            raise UserError("zero: no parameter of the model has requires_grad")
        self._index = _indices(model)
        self._own = sorted(
            ((self._index[bucket.names[run.parameter]], bucket, run)
             for bucket in self._trainable for run in bucket.owned),
            key=lambda item: (item[0], item[2].offset))
        self._host = self._on_host() if offload != "none" else None

    # ------------------------------------------------------------------------------ construction

    def _add(self, group: Group) -> None:
        names = list(group.params)
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        params = list(group.params.values())
        number = self._engine.add(label, params, group.trainable)
        owned = [run for _, run in group.owned(self.world.rank, self.world.size)]
        self._buckets.append(_Bucket(number, names, params, owned, group.trainable))
        if group.unit is not None:
            (group.unit.trainable if group.trainable else group.unit.frozen).append(number)

    def _on_host(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each trainable bucket: parameters and gradients of this rank's shard, on the CPU."""
        host = {}
        for bucket in self._trainable:
            shard, grad = self._engine.shard(bucket.number), self._engine.grad(bucket.number)
            host[bucket.number] = (shard if self.offload == "all" else to_host(shard),
                                   to_host(grad))
        return host

    # ----------------------------------------------------------------------------------- the step

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within: gradients stay on their rank, summed in fp32, until a backward outside."""
        before, self._engine.local = self._engine.local, True
        try:
            yield
        finally:
            self._engine.local = before

    def micro_batch(self, last: bool) -> Any:
        """A context for the forward and backward of one micro-batch of a step: below stage 2 only
        the last one's gradients are exchanged, from stage 2 on each one's, into the shards."""
        return nullcontext() if last or self.stage >= 2 else self.no_sync()

    def collect(self) -> None:
        """After a micro-batch's backward. (Optional: the next one's first gradient says as much.)
        """
        if not self._engine.local:
            self._engine.close_round()

    def settle(self, *values: float | Tensor) -> Agreed:
        """After the step's last backward: wait for the gradients, and agree on their norm.

        values: numbers, or 0-d tensors, to be summed over ranks on the way.
        """
        square, unused = self._engine.finish()
        device = self._trainable[0].params[0].device
        if device.type != "cpu":  # where the engine must not make the host wait for its sums
            norms = [torch.linalg.vector_norm(self._engine.grad(bucket.number), dtype=torch.float64)
                     for bucket in self._trainable]
            square = torch.stack(norms).square().sum()
        code = -1
        if unused:
            number, place = unused[0]
            bucket = next(b for b in self._trainable if b.number == number)
            code = self._index[bucket.names[place]]
        row = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device)
                           for value in (square, code, *values)])
        table = row[None]
        if self.world.size > 1:
            table = torch.empty(self.world.size, len(row), dtype=torch.float64, device=device)
            self.watch("the exchange of gradient norms")
            mesh.all_gather(table.view(-1), row, self.world.group)
            self.watch(None)
        norm = table[:, 0].sum().sqrt()
        norm = torch.where((table[:, 1] >= 0).any(), torch.nan, norm).float()
        self._gradients_to_host()
        return Agreed(norm, table[:, 2:].sum(0), table[:, 1], self._name_of)

    def _gradients_to_host(self) -> None:
        if self._host is None:
            return
        for number, (_, grad) in self._host.items():
            grad.copy_(self._engine.grad(number), non_blocking=True)
        if self._trainable[0].params[0].is_cuda:
            torch.cuda.current_stream().synchronize()

    def gradients(self) -> list[Tensor]:
        """The summed gradients of `pieces`, in their order, fp32; after `settle`."""
        if self.stage == 0:
            found = {}
            for bucket in self._trainable:
                layout = self._engine.layout(bucket.number)
                for name, param, begin in zip(bucket.names, bucket.params, layout.begins,
                                              strict=True):
                    flat = self._engine.whole_grad(bucket.number)[begin:begin + param.numel()]
                    found[self._index[name]] = flat.view(param.shape)
            return [found[i] for i in sorted(found)]
        return [self._part(bucket, run, gradient=True) for _, bucket, run in self._own]

    def pieces(self) -> list[Piece]:
        """What this rank's optimizer updates, in the model's order: 1-D tensors of the parameters'
        dtype (in stage 0, the parameters)."""
        if self.stage == 0:
            named = dict(self.model.named_parameters())
            return [Piece.whole(name, named[name]) for name in self._index]
        return [Piece(bucket.names[run.parameter], self._part(bucket, run), run.offset,
                      tuple(bucket.params[run.parameter].shape)) for _, bucket, run in self._own]

    def _part(self, bucket: _Bucket, run: Run, gradient: bool = False) -> Tensor:
        if self._host is not None:
            shard = self._host[bucket.number][gradient]
        elif gradient:
            shard = self._engine.grad(bucket.number)
        else:
            shard = self._engine.shard(bucket.number)
        return shard[run.begin:run.begin + run.size]

    def model_pieces(self, *, saving: bool) -> list[Piece]:
        """The model, frozen parameters as well: what this rank is to load, or, saving, to write, so
        that the ranks together write every element once. After loading call `loaded`."""
        whole = [(name, param) for name, param in self.model.named_parameters()
                 if self.stage == 0 or (self.stage < 3 and name not in self._index)]
        found = [] if self.stage == 0 else self.pieces()
        if self.stage < 3:
            writes = self.world.first or not saving
            return found + [Piece.whole(name, param) for name, param in whole if writes]
        for bucket in self._buckets:
            if not bucket.trainable:
                found += [Piece(bucket.names[run.parameter],
                                self._engine.shard(bucket.number)[run.begin:run.begin + run.size],
                                run.offset, tuple(bucket.params[run.parameter].shape))
                          for run in bucket.owned]
        return found

    def places(self) -> dict[str, Place]:
        """For an optimizer of `pieces`, from stage 1 on: where in the model each of them lies."""
        named = dict(self.model.named_parameters())
        return places({name: named[name] for name in self._index},
                      ((bucket.names[run.parameter], run) for _, bucket, run in self._own))

    def publish(self) -> None:
        """After the optimizer's update: the parameters of every rank follow their shards."""
        if self.stage == 0:
            return
        if self._host is not None:
            for number, (shard, _) in self._host.items():
                if self.offload != "all":  # else it is the engine's own
                    self._engine.shard(number).copy_(shard, non_blocking=True)
        self._engine.publish()

    def zero(self) -> None:
        """Forget the gradients: the next step begins."""
        self._engine.zero()

    def loaded(self) -> None:
        """After `model_pieces` were filled from outside: every rank's parameters follow."""
        self.publish()
        self.reshard()

    # ------------------------------------------------------------------------------- other faces

    def optimizer(self, name: str = "adamw", *, seed: int = 0, loss_scale: Any = None,
                  **options: Any) -> "Any":
        """A torch.optim.Optimizer of the sharded parameters: `OptimConfig`'s names and options.

        loss_scale: a fastllm.optim.LossScaler, for fp16; see ZeroOptimizer.scale.
        """
        from fastllm.dist.zero_optimizer import ZeroOptimizer

        return ZeroOptimizer(self, OptimConfig(name=name, **options),  # type: ignore[arg-type]
                             seed=seed, loss_scale=loss_scale)

    def inner_optimizer(self, config: OptimConfig, *, seed: int = 0) -> Any:
        """fastllm's optimizer over `pieces`. UserError for one that needs whole parameters."""
        return make_optimizer([(piece.name, piece.tensor) for piece in self.pieces()], config,
                              seed=seed, places=None if self.stage == 0 else self.places())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within: every parameter is whole and exact on every rank, for whatever is not a forward.
        """
        self._gather_exactly()
        try:
            yield
        finally:
            self.reshard()

    def _gather_exactly(self) -> None:
        if self._schedule:
            self._schedule.release()  # what is whole may have come in int8
            self._engine.exact = True
            self._schedule.gather()
            self._engine.exact = False

    def reshard(self) -> None:
        """Stage 3: give back what is whole, after an evaluation for example."""
        if self._schedule:
            self._schedule.release()

    @property
    def engine_kind(self) -> str:
        """"cpp" or "python"."""
        return self._engine.kind

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has given to the network, by the engine."""
        return self._engine.sent_bytes

    def shard_elements(self) -> int:
        """Elements of this rank's shards of what is trained, paddings included."""
        return sum(self._engine.layout(bucket.number).shard for bucket in self._trainable)

    def close(self) -> None:
        """Take the hooks off the model; its parameters are whole again and stay so."""
        self._gather_exactly()
        if self._schedule:
            self._schedule.close()
        self._engine.close()

    def _name_of(self, code: int) -> str:
        return next(name for name, i in self._index.items() if i == code)

    def _same_collective(self, what: str) -> None:
        """Every rank is about to launch the same collective, or RunError on each, naming two."""
        said = self.world.gather(what)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise RunError(f"the ranks do not go the same way: rank 0 came to {said[0]}, rank "
                               f"{rank} to {other}")


def _indices(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by name -> their place among all of the model."""
    return {name: i for i, (name, param) in enumerate(model.named_parameters())
            if param.requires_grad}
