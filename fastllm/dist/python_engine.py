"""The engine of ZeRO in plain PyTorch: for where there is no compiler, and the oracle of the C++ one.

An engine owns the buckets: flat storage of parameters and gradients that is sharded over the ranks.
It knows nothing of modules, optimizers or steps; fastllm.dist.zero tells it when to gather and to
finish. csrc/engine.cpp has the same interface, the same order of collectives and the same sums, so
the two give the same gradients bit for bit, and ranks may even differ in which one they run.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.dist.int8 import dequantize_int8, quantize_int8
from fastllm.dist.mesh import Gather, reduce_scatter, start_gather
from fastllm.dist.partition import Layout, Run, layout, runs, sent_order

IN_FLIGHT = 2
"""Reduce-scatters under way while backward goes on: each holds two buffers of a bucket's size."""


@dataclass(frozen=True)
class Options:
    """How the engine exchanges gradients.

    wire: dtype of gradients on the wire: "same" as the parameter, or "fp32", "bf16", "int8".
    param_wire: of parameters: "same", or, with release, "int8".
    scale: what every sum over ranks is multiplied by.
    native: reduce in the process group (NCCL); else all-to-all and a sum in fp32 here.
    gather_grads: the sums go to all ranks as soon as they are made (stage 0).
    release: parameters are gathered and released (stage 3); else whole at all times.
    host_shards: with release, shards of parameters are on the CPU until they are gathered.
    """

    wire: str = "same"
    param_wire: str = "same"
    scale: float = 1.0
    native: bool = False
    gather_grads: bool = False
    release: bool = False
    host_shards: bool = False
    in_flight: int = IN_FLIGHT


@dataclass
class Bucket:
    """What an engine keeps of one bucket."""

    name: str
    params: list[Tensor]
    layout: Layout
    full: Tensor
    """(padded,) the parameters, whole; without memory where they are released."""
    shard: Tensor
    """(shard,) this rank's part of it: a view of `full`, or memory of its own in stage 3."""
    trainable: bool
    wire: torch.dtype = torch.float32
    runs: list[list[Run]] = field(default_factory=list)
    """Of each parameter in the buffer that is sent."""
    grad: Tensor | None = None
    """(shard,) the summed gradients of this rank's part, fp32 (fp64 for fp64 parameters)."""
    whole_grad: Tensor | None = None
    """(padded,) the sums of all ranks, where they are gathered; `grad` is a part of it then."""
    grad_gather: Gather | None = None
    """Under way."""
    error: Tensor | None = None
    """(padded,) fp32: what int8 left unsent so far."""
    summed: bool = False
    """Whether `grad` holds an earlier micro-batch of this step."""
    square: float = 0.0
    kept: dict[int, Tensor] = field(default_factory=dict)
    """fp32 sums of micro-batches whose gradients were not exchanged, by parameter."""
    seen: set[int] = field(default_factory=set)
    """Parameters whose gradient of this micro-batch is in `buffer`."""
    reached: set[int] = field(default_factory=set)
    """Parameters that had a gradient in this step."""
    buffer: Tensor | None = None
    whole: bool = True
    gathering: Gather | None = None
    """The all-gather of the parameters, under way."""
    narrow: Tensor | None = None
    """The parameters in int8 while they come."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU; pinned, where it comes from a GPU."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


class PythonEngine:
    """See the module. watch: hears what a wait is for, and None when it is over."""

    kind = "python"

    def __init__(self, rank: int, world: int, gather_group: Any, reduce_group: Any,
                 options: Options, watch: Callable[[str | None], None] | None = None) -> None:
        self.rank, self.world, self.options = rank, world, options
        self.gather_group, self.reduce_group = gather_group, reduce_group
        self.watch = watch or (lambda what: None)
        self.local = False
        """Whether gradients stay here, to be exchanged with those of a later micro-batch."""
        self.exact = False
        """Whether parameters are gathered as they are even if param_wire is int8."""
        self.check: Callable[[str], None] | None = None
        """Called with what is about to be launched."""
        self.sent_bytes = 0
        """Given to the network by this rank so far."""
        self._buckets: list[Bucket] = []
        self._order: list[int] = []
        self._next = 0
        self._open = False
        self._rounds = 0
        self._flying: deque[tuple[int, Any, Tensor, Tensor]] = deque()
        self._handles: list[Any] = []

    # ------------------------------------------------------------------------------ construction

    def add(self, name: str, params: Sequence[Tensor], trainable: bool) -> int:
        """Lay parameters of one dtype and device out as a bucket, their data moved into it.

        Returns the bucket's number. Trainable buckets are reduced in the order they are added in:
        add first whose gradients come first.
        """
        first = params[0]
        place = layout([param.numel() for param in params], self.world)
        full = torch.zeros(place.padded, dtype=first.dtype, device=first.device)
        low = self.rank * place.shard
        bucket = Bucket(name, list(params), place, full, full[low:low + place.shard], trainable)
        for param, begin in zip(params, place.begins, strict=True):
            view = full[begin:begin + param.numel()].view(param.shape)
            view.copy_(param.detach())
            param.data = view
        number = len(self._buckets)
        self._buckets.append(bucket)
        if self.options.release:
            bucket.shard = to_host(bucket.shard) if self.options.host_shards \
                else bucket.shard.clone()
            self.release(number)
        if trainable:
            self._prepare_gradients(number, bucket)
        return number

    def _prepare_gradients(self, number: int, bucket: Bucket) -> None:
        first = bucket.params[0]
        wires = {"same": first.dtype, "fp32": torch.float32, "bf16": torch.bfloat16,
                 "int8": torch.uint8}
        bucket.wire = wires[self.options.wire]
        if first.dtype == torch.float64:
            bucket.wire = torch.float64
        order = list(range(self.world)) if self._is_native(bucket) \
            else sent_order(self.world, self.rank)
        bucket.runs = [[] for _ in bucket.params]
        for run in runs(bucket.layout, order):
            bucket.runs[run.parameter].append(run)
        place = bucket.layout
        bucket.grad = torch.zeros(
            place.padded if self.options.gather_grads else place.shard, dtype=wide(first.dtype),
            device=first.device)
        if self.options.gather_grads:
            bucket.whole_grad = bucket.grad
            bucket.grad = bucket.grad[self.rank * place.shard:(self.rank + 1) * place.shard]
        if self.options.wire == "int8":
            bucket.error = torch.zeros(bucket.layout.padded, device=first.device)
        self._order.append(number)
        for i, param in enumerate(bucket.params):
            self._handles.append(param.register_post_accumulate_grad_hook(
                lambda param, number=number, i=i: self._arrived(number, i, param)))

    def _is_native(self, bucket: Bucket) -> bool:
        return self.options.native and bucket.wire in (torch.float32, torch.float64)

    def layout(self, number: int) -> Layout:
        return self._buckets[number].layout

    def shard(self, number: int) -> Tensor:
        """(shard,) this rank's part of a bucket's parameters."""
        return self._buckets[number].shard

    def full(self, number: int) -> Tensor:
        """(padded,) a bucket's parameters, as far as they are gathered."""
        return self._buckets[number].full

    def grad(self, number: int) -> Tensor:
        """(shard,) this rank's part of a bucket's gradients, after `finish`."""
        grad = self._buckets[number].grad
        assert grad is not None
        return grad

    def whole_grad(self, number: int) -> Tensor:
        """(padded,) a bucket's gradients, after `finish`; with gather_grads."""
        grad = self._buckets[number].whole_grad
        assert grad is not None
        return grad

    # --------------------------------------------------------------------------------- gradients

    @torch.no_grad()
    def _arrived(self, number: int, i: int, param: Tensor) -> None:
        """A parameter's gradient is whole for this micro-batch."""
        bucket = self._buckets[number]
        grad = param.grad
        assert grad is not None
        bucket.reached.add(i)
        if self.local:
            if grad.dtype != wide(grad.dtype):
                if i in bucket.kept:
                    bucket.kept[i].add_(grad)
                else:
                    bucket.kept[i] = grad.to(wide(grad.dtype))
                param.grad = None
            return
        if i in bucket.seen:
            self.close_round()
        self._pack(bucket, i, grad)
        param.grad = None
        self._open = True
        if len(bucket.seen) == len(bucket.params):
            if self.options.release:
                self.release(number)
            self._launch_ready()

    def _pack(self, bucket: Bucket, i: int, grad: Tensor | None) -> None:
        """A gradient (None: nothing) and what was kept of it into the buffer that is sent."""
        if bucket.buffer is None:
            like = wide(bucket.params[0].dtype) if bucket.wire == torch.uint8 else bucket.wire
            bucket.buffer = torch.zeros(bucket.layout.padded, dtype=like,
                                        device=bucket.grad.device)  # type: ignore[union-attr]
        kept = bucket.kept.pop(i, None)
        if kept is not None:
            grad = kept if grad is None else kept.add_(grad)
        bucket.seen.add(i)
        if grad is None:
            return
        flat = grad.reshape(-1)
        for run in bucket.runs[i]:
            bucket.buffer[run.begin:run.begin + run.size].copy_(
                flat[run.offset:run.offset + run.size])

    def _launch_ready(self) -> None:
        """Launch, in order, every bucket that is whole."""
        while self._next < len(self._order):
            number = self._order[self._next]
            bucket = self._buckets[number]
            if len(bucket.seen) < len(bucket.params):
                return
            self._launch(number, bucket)
            self._next += 1

    def _launch(self, number: int, bucket: Bucket) -> None:
        if bucket.layout.shard == 0:
            return
        if self.check:
            self.check(f"reduce-scatter of {bucket.name}")
        buffer, bucket.buffer = bucket.buffer, None
        assert buffer is not None
        if bucket.wire == torch.uint8:
            buffer = self._quantize(bucket, buffer)
        own = buffer.numel() // self.world
        work = None
        if self._is_native(bucket):
            received = torch.empty(own, dtype=buffer.dtype, device=buffer.device)
            if self.world == 1:
                received.copy_(buffer)
            else:
                work = reduce_scatter(received, buffer, self.reduce_group, async_op=True)
        else:
            received = torch.empty(own * (self.world - 1), dtype=buffer.dtype,
                                   device=buffer.device)
            if self.world > 1:
                splits = [0 if rank == self.rank else own for rank in range(self.world)]
                work = dist.all_to_all_single(received, buffer[:own * (self.world - 1)], splits,
                                              splits, group=self.reduce_group, async_op=True)
        self.sent_bytes += own * (self.world - 1) * buffer.element_size()
        self._flying.append((number, work, buffer, received))
        while len(self._flying) > self.options.in_flight:
            self._land()

    def _quantize(self, bucket: Bucket, buffer: Tensor) -> Tensor:
        """The buffer in int8 with a scale a block; what that loses is added to the next one."""
        assert bucket.error is not None
        return quantize_int8(buffer, bucket.error)

    def _land(self) -> None:
        """Wait for the oldest reduce-scatter and sum what came."""
        number, work, buffer, received = self._flying.popleft()
        bucket = self._buckets[number]
        self._await_grad(bucket)  # of an earlier micro-batch
        self.watch(f"reduce-scatter of {bucket.name}")
        if work is not None:
            work.wait()
        self.watch(None)
        assert bucket.grad is not None
        if self._is_native(bucket):
            chunks = [received]
        else:
            own = buffer.numel() // self.world
            chunks = list(received.split(own)) if self.world > 1 else []
            chunks.insert(self.rank, buffer[-own:])
        if bucket.wire == torch.uint8:
            chunks = [dequantize_int8(chunk) for chunk in chunks]
        # In order of rank, each sum rounded to fp32: the same bits as csrc/reduce.cpp.
        total = chunks[0].to(bucket.grad.dtype, copy=True)
        for chunk in chunks[1:]:
            total += chunk
        total *= self.options.scale
        if bucket.summed:
            bucket.grad += total
        else:
            bucket.grad.copy_(total)
        bucket.summed = True
        if bucket.grad.device.type == "cpu":
            bucket.square = float(bucket.grad.double().square().sum())
        if self.options.gather_grads:
            if self.check:
                self.check(f"all-gather of the gradients of {bucket.name}")
            assert bucket.whole_grad is not None
            bucket.grad_gather = self._all_gather(bucket.whole_grad, bucket.grad)
            if not self.options.in_flight:
                self._await_grad(bucket)

    def _await_grad(self, bucket: Bucket) -> None:
        if bucket.grad_gather is not None:
            self.watch(f"all-gather of the gradients of {bucket.name}")
            bucket.grad_gather.wait()
            bucket.grad_gather = None
            self.watch(None)

    @torch.no_grad()
    def complete(self, number: int) -> None:
        """No more gradients of a bucket will come in this micro-batch.

        A parameter without one takes part with zeros, so that no rank waits for it.
        """
        bucket = self._buckets[number]
        if self.local:
            if self.options.release:
                self.release(number)
            return
        for i, param in enumerate(bucket.params):
            if i not in bucket.seen:
                self._pack(bucket, i, param.grad)
                param.grad = None
        self._open = True
        if self.options.release:
            self.release(number)
        self._launch_ready()

    def close_round(self) -> None:
        """The end of a micro-batch whose gradients are exchanged: launch what is left."""
        local, self.local = self.local, False
        for number in self._order[self._next:]:
            self.complete(number)
        self.local = local
        for number in self._order:
            self._buckets[number].seen.clear()
        self._next, self._open = 0, False
        self._rounds += 1

    @torch.no_grad()
    def finish(self) -> tuple[float, list[tuple[int, int]]]:
        """After the last micro-batch: (sum of squares of this rank's gradients, on a CPU; the
        parameters that none of the step's micro-batches reached, as (bucket, place))."""
        if self._open:
            self.close_round()
        if not self._rounds or self._has_kept():
            self.close_round()
        while self._flying:
            self._land()
        buckets = [(number, self._buckets[number]) for number in self._order]
        for _, bucket in buckets:
            self._await_grad(bucket)
        unused = [(number, i) for number, bucket in buckets
                  for i, param in enumerate(bucket.params)
                  if param.numel() and i not in bucket.reached]
        return sum(bucket.square for _, bucket in buckets), unused

    def _has_kept(self) -> bool:
        return any(bucket.kept or any(param.grad is not None for param in bucket.params)
                   for bucket in (self._buckets[number] for number in self._order))

    def zero(self) -> None:
        """Forget the step's gradients."""
        for number in self._order:
            bucket = self._buckets[number]
            bucket.summed, bucket.square = False, 0.0
            bucket.kept.clear()
            bucket.reached.clear()
            for param in bucket.params:
                param.grad = None
        self._rounds = 0

    # -------------------------------------------------------------------------------- parameters

    @torch.no_grad()
    def gather_start(self, number: int) -> None:
        """Begin to make a bucket's parameters whole; nothing where they are, or are coming."""
        bucket = self._buckets[number]
        if bucket.whole or bucket.gathering is not None:
            return
        if self.check:
            self.check(f"all-gather of {bucket.name}")
        size = bucket.layout.padded * bucket.full.element_size()
        bucket.full.untyped_storage().resize_(size)
        shard = bucket.shard.to(bucket.full.device, non_blocking=True)
        if self.options.param_wire != "int8" or self.exact:
            bucket.gathering = self._all_gather(bucket.full, shard)
            return
        # What is sent in int8 is what every rank computes with, this one too.
        narrow = quantize_int8(shard)
        bucket.narrow = narrow.new_empty(narrow.numel() * self.world)
        bucket.gathering = self._all_gather(bucket.narrow, narrow)

    @torch.no_grad()
    def gather_wait(self, number: int) -> None:
        """Make a bucket's parameters whole."""
        bucket = self._buckets[number]
        if bucket.whole:
            return
        self.gather_start(number)
        self._await(bucket)
        bucket.whole = True
        for param, begin in zip(bucket.params, bucket.layout.begins, strict=True):
            param.data = bucket.full[begin:begin + param.numel()].view(param.shape)

    @torch.no_grad()
    def release(self, number: int) -> None:
        """Give the memory of a bucket's whole parameters back. They read as NaN until gathered."""
        bucket = self._buckets[number]
        if not bucket.whole and bucket.gathering is None:
            return
        if bucket.gathering is not None:
            self._await(bucket)
        for param in bucket.params:
            nothing = torch.full((), torch.nan, dtype=param.dtype, device=param.device)
            param.data = nothing.expand(param.shape)
        # Not a smaller tensor: views that autograd saved for the backward are of this storage.
        bucket.full.untyped_storage().resize_(0)
        bucket.whole = False

    @torch.no_grad()
    def publish(self) -> None:
        """After an optimizer changed the shards: every rank's parameters follow."""
        trainable = [self._buckets[number] for number in self._order]
        if self.options.release:
            for number in self._order:
                self.release(number)
            return
        for bucket in trainable:
            if self.check:
                self.check(f"all-gather of {bucket.name}")
            bucket.gathering = self._all_gather(bucket.full, bucket.shard)
        for bucket in trainable:
            self._await(bucket)
            torch.autograd.graph.increment_version(bucket.params)

    def _await(self, bucket: Bucket) -> None:
        self.watch(f"all-gather of {bucket.name}")
        if bucket.gathering is not None:
            bucket.gathering.wait()
        bucket.gathering = None
        self.watch(None)
        if bucket.narrow is not None:
            bucket.full.copy_(dequantize_int8(bucket.narrow))
            bucket.narrow = None

    def _all_gather(self, full: Tensor, shard: Tensor) -> Gather:
        """full <- the shards of all ranks. shard may be this rank's part of it."""
        self.sent_bytes += shard.numel() * (self.world - 1) * shard.element_size()
        return start_gather(full, shard, self.rank, self.world, self.gather_group,
                            native=self.options.native)

    def close(self) -> None:
        """Remove the hooks. Parameters stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
