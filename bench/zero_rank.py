"""The ranks of bench/zero.py's contestants: each builds its own, then does what it is told.

One process imports what they need and forks them all, since imports take longer than a benchmark.
It runs in DeepSpeed's own environment too, which has no fastllm: nothing but torch is imported
until a contestant asks for more. Orders and answers go over pipes, a line each.

The model is a plain Llama-like decoder of torch.nn and SDPA for all, ours included: no peer meets
an op that it does not know, and nothing but the data-parallel machinery differs. In bf16, weights,
activations and gradients are bf16 and each product is made by way of fp32, several times faster
than torch's own bf16 product on a processor that has no bf16 instruction.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, CLIP = 2, 1.0
# A low rate, as in bench/train.py: at a high one Adam amplifies rounding, and any two
# implementations part by that alone.
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
Call = Callable[[], Tensor]


class Product(torch.autograd.Function):
    """x @ weight.T by way of fp32, forward and backward; what is saved stays as narrow as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.to(x.dtype).float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = grad.float()
        of_weight = wide.flatten(0, -2).T @ x.float().flatten(0, -2)
        of_x = wide @ weight.to(x.dtype).float()
        return of_x.to(x.dtype), of_weight.to(x.dtype).to(weight.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return F.linear(x, self.weight)
        return Product.apply(x, self.weight)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, hidden: int, feed: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = Norm(hidden), Norm(hidden)
        self.q, self.k, self.v, self.o = (Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (Linear(hidden, feed, bias=False) for _ in range(2))
        self.down = Linear(feed, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).float().unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v,
                                           is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2).to(x.dtype))
        y = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """(B, S) tokens and labels to the mean cross entropy. dtype: of the activations."""

    def __init__(self, *, hidden: int, feed: int, heads: int, layers: int, vocab: int,
                 tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, feed, heads) for _ in range(layers))
        self.norm = Norm(hidden)
        self.head = Linear(hidden, vocab, bias=False)
        self.head.weight = self.embed.weight
        width = hidden // heads
        angles = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        # Not buffers: a contestant that casts the model to bf16 would cast them too.
        self.angles = angles.cos(), angles.sin()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids).to(self.dtype)
        for layer in self.layers:
            x = layer(x, *self.angles)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


@dataclass(frozen=True)
class Side:
    """A contestant on this rank: one whole step, and the bytes of states and masters it holds."""

    step: Call
    state_bytes: Callable[[], int]


def ours(model: Decoder, loss: Call, stage: int) -> Side:
    """fastllm.dist.zero."""
    from fastllm.dist import zero

    optimizer = zero.shard(model.to(model.dtype), stage=stage).optimizer(
        "adamw", grad_clip=CLIP, **ADAMW)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    inner = optimizer.inner
    return Side(step, lambda: inner.state_bytes() + sum(
        master.nbytes for master in inner.masters if master is not None))


def torch_side(model: nn.Module, run: nn.Module, optimizer: Any, batch: list[Tensor],
               masters: bool) -> Side:
    """The step as torch's users write it. run: the model, as wrapped by a peer."""
    def step() -> Tensor:
        value = run(*batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return value

    return Side(step, lambda: held(getattr(optimizer, "optim", optimizer), masters))


def held(optimizer: torch.optim.Optimizer, masters: bool) -> int:
    """Bytes of the states, and of what the optimizer updates where that is a master."""
    return sum(local(tensor).nbytes for parameter, states in optimizer.state.items()
               for tensor in [*states.values(), *([parameter] if masters else [])]
               if isinstance(tensor, Tensor))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def alone(model: Decoder, batch: list[Tensor]) -> Side:
    """No exchange at all: what the step costs a rank before it is anybody's replica."""
    return torch_side(model, model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW),
                      batch, model.dtype != torch.float32)


def ddp(model: Decoder, batch: list[Tensor], sharded_states: bool) -> Side:
    """DDP; in bf16 over fp32 weights, as under autocast, with bf16 gradients on the wire."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    run = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    if model.dtype != torch.float32:
        # What bf16_compress_hook does; DDP takes that one with NCCL alone.
        def narrow(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            return default_hooks._compress_hook(model.dtype, dist.group.WORLD, bucket)

        run.register_comm_hook(None, narrow)
    if sharded_states:
        optimizer: Any = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True,
            **ADAMW)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return torch_side(model, run, optimizer, batch, model.dtype != torch.float32)


def fsdp(model: Decoder, batch: list[Tensor], reshard: bool) -> Side:
    """FSDP2, a layer at a time. reshard: parameters are given back after the forward (stage 3)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = model.dtype != torch.float32
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
                               "reshard_after_forward": reshard}
    if narrow:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=model.dtype)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return torch_side(model, model, optimizer, batch, narrow)


def deepspeed(model: Decoder, batch: list[Tensor], stage: int, *, bucket: float,
              overlap: bool) -> Side:
    """DeepSpeed with torch's fused AdamW, so that nothing has to be compiled."""
    import deepspeed as peer

    zero: dict[str, Any] = {
        "stage": stage, "overlap_comm": overlap, "contiguous_gradients": True,
        "reduce_bucket_size": int(bucket), "allgather_bucket_size": int(bucket)}
    if stage == 3:
        del zero["allgather_bucket_size"]
        zero["stage3_prefetch_bucket_size"] = int(bucket)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    engine, outer, *_ = peer.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": CLIP,
        "zero_optimization": zero, "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9})

    def step() -> Tensor:
        value = engine(*batch)
        engine.backward(value)
        engine.step()
        return value

    # In fp32 too its optimizer updates copies beside the model's own parameters.
    return Side(step, lambda: held(outer.optimizer, True))


def build(kind: str, stage: int, model: Decoder, batch: list[Tensor],
          settings: dict[str, Any]) -> Side:
    """The contestant of a kind and stage."""
    makers: dict[str, Callable[[], Side]] = {
        "ours": lambda: ours(model, lambda: model(*batch), stage),
        "alone": lambda: alone(model, batch),
        "ddp": lambda: ddp(model, batch, stage == 1),
        "fsdp": lambda: fsdp(model, batch, stage == 3),
        "deepspeed": lambda: deepspeed(model, batch, stage, **settings)}
    return makers[kind]()


def train(task: dict[str, Any], rank: int) -> Callable[[str], dict[str, Any]]:
    """Answers "step" and "state"."""
    torch.manual_seed(0)
    dtype, shape = getattr(torch, task["dtype"]), task["shape"]
    model = Decoder(**shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1 + rank)
    ids = torch.randint(shape["vocab"], (ROWS, shape["tokens"] + 1), generator=generator)
    # The same tokens every step: what the model learns of them shows in the loss at once, and so
    # would a gradient that was not averaged or a step that was not made.
    batch = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
    side = build(task["kind"], task["stage"], model, batch, task.get("settings") or {})

    def answer(line: str) -> dict[str, Any]:
        if line == "state":
            return {"state_bytes": side.state_bytes(), "peak_rss": peak_rss()}
        wall, cpu = time.perf_counter(), time.process_time()
        loss = side.step()
        return {"ms": 1e3 * (time.perf_counter() - wall),
                "cpu_ms": 1e3 * (time.process_time() - cpu), "loss": loss.item()}

    return answer


def peak_rss() -> int:
    """Bytes. Not ru_maxrss, which begins with the size of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines()
                if line.startswith("VmHWM"))


def scatter(task: dict[str, Any], rank: int) -> Callable[[str], dict[str, Any]]:
    """Answers "gloo" and "ours", a reduce-scatter each, and "error gloo" and "error ours".

    Ours is a bucket's way through the engine: packed, exchanged, summed in fp32.
    """
    from fastllm.dist import collectives, mesh
    from fastllm.dist.python_engine import Options

    dtype, world, size = getattr(torch, task["dtype"]), task["world"], task["elements"]

    def given(of: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(of)).to(dtype)

    mine, part = given(rank), slice(rank * size // world, (rank + 1) * size // world)
    narrow, parameter = torch.empty(size // world, dtype=dtype), torch.zeros(size, dtype=dtype)
    parameter.requires_grad_()
    engine = collectives.engine("auto", mesh.of_group(), Options(), lambda what: None,
                                new_group=False)
    bucket = engine.add("bucket", [parameter], True)

    def exchange() -> None:
        parameter.grad = mine
        engine.complete(bucket)
        engine.finish()
        engine.zero()

    runs = {"gloo": (partial(dist.reduce_scatter_single, narrow, mine.clone()), narrow),
            "ours": (exchange, engine.grad(bucket))}

    def answer(line: str) -> dict[str, Any]:
        run, output = runs[line.split()[-1]]
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        took = {"ms": 1e3 * (time.perf_counter() - wall),
                "cpu_ms": 1e3 * (time.process_time() - cpu)}
        if not line.startswith("error"):
            return took
        truth = torch.zeros(size // world, dtype=torch.float64)
        for of in range(world):
            truth += given(of)[part].double()
        return {"error": float((output.double() - truth).abs().max())}

    return answer


def serve(one: dict[str, Any]) -> None:
    """A rank: builds, says its process id, and answers until there are no more orders."""
    task, rank = one["task"], one["rank"]
    errors = os.open(one["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task["world"])}
    with os.fdopen(one["orders"]) as orders, os.fdopen(one["answers"], "w") as answers:
        try:
            dist.init_process_group("gloo", init_method=f"file://{one['store']}", rank=rank,
                                    world_size=task["world"], timeout=timedelta(seconds=300))
            answer = {"train": train, "scatter": scatter}[task["job"]](task, rank)
            print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
            for line in orders:
                print(json.dumps(answer(line.strip())), file=answers, flush=True)
        except BaseException:
            # Before the pipe ends, at which the reason is read.
            traceback.print_exc()
            sys.stderr.flush()


def main() -> None:
    everyone = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.optim",
                 *sys.argv[2:]):
        with suppress(ImportError):  # the contestant that needs it says so
            importlib.import_module(name)
    for one in everyone:
        if os.fork() == 0:
            # A pipe ends when all who hold it have closed it.
            for other in everyone:
                if other is not one:
                    os.close(other["orders"])
                    os.close(other["answers"])
            try:
                serve(one)
            finally:
                os._exit(0)  # the clean-ups of libraries wait for other ranks
    for one in everyone:
        os.close(one["orders"])
        os.close(one["answers"])
    for _ in everyone:
        os.wait()


if __name__ == "__main__":
    main()
