"""What the tests of fastllm.dist run on every rank; each function is called in a fresh process."""

import os
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional

from fastllm.dist import mesh, zero
from fastllm.optim import OptimConfig, make_optimizer

VOCAB, WIDTH = 11, 13


class Block(nn.Module):
    """Odd sizes, a parameter of three elements, one of none, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.25, -0.5]))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.fixed = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)

    def forward(self, x):
        y = self.down(functional.gelu(self.up(self.norm(x))))
        return x + self.mix[0] * y + self.mix[1] * y.tanh() * self.fixed \
            + self.mix[2] * x.sin() + self.nothing.sum()


class Model(nn.Module):
    """A head tied to the embedding, blocks in a list."""

    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Parameter(torch.ones(2)) if layers == 1 else None

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.embed.weight)


def make(dtype=torch.float32, layers=3):
    torch.manual_seed(5)
    return Model(layers).to(dtype)


def batches(step, rows, tokens):
    """(rows, 7) ids and labels; tokens: which labels count: even, uneven, one none, none."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (rows, 8), generator=draw)
    labels = ids[:, 1:].clone()
    if tokens == "uneven":
        labels[torch.rand(labels.shape, generator=draw) < 0.6] = -100
    elif tokens == "one rank none":
        labels[:rows // 4] = -100
    elif tokens == "none":
        labels[:] = -100
    return ids[:, :-1], labels


def loss_of(model, ids, labels):
    logits = model(ids)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                                    reduction="sum")


def backward(model, engine, world, step, rows, accum, tokens):
    """One step's gradients: every rank takes its rows, in micro-batches."""
    ids, labels = batches(step, rows, tokens)
    count = max(int((labels != -100).sum()), 1)
    # Micro-batch by micro-batch every rank has its slice, as the Loader shares rows out.
    for i, (x, y) in enumerate(zip(ids.chunk(accum), labels.chunk(accum), strict=True)):
        x, y = x.chunk(world.size)[world.rank], y.chunk(world.size)[world.rank]
        with engine.micro_batch(last=i + 1 == accum):
            (loss_of(model, x, y) / count).backward()
            engine.collect()


@contextmanager
def ranks_of(size):
    """A world of the first `size` ranks; None for the others."""
    with mesh.world("cpu", timeout=60) as whole:
        if size == whole.size:
            yield whole
            return
        group = torch.distributed.new_group(range(size))
        yield mesh.of_group(group) if whole.rank < size else None


def whole_gradients(engine, world):
    """Every parameter's gradient, put together from the ranks' pieces."""
    engine.settle()
    mine = [(piece.name, piece.offset, grad.double().flatten().tolist()) for piece, grad in
            zip(engine.pieces(), engine.gradients(), strict=True)]
    found = {name: torch.zeros(param.numel(), dtype=torch.float64)
             for name, param in engine.model.named_parameters() if param.requires_grad}
    for part in world.gather(mine):
        for name, offset, values in part:
            found[name][offset:offset + len(values)] = torch.tensor(values, dtype=torch.float64)
    return found


def gradient_cells(size, cells, dtype, backend):
    """The gradients of each (stage, accum, tokens): {cell: {name: gradient}}."""
    results = {}
    with mesh.world("cpu", timeout=60) as world:
        assert world.size == size
        for stage, accum, tokens in cells:
            model = make(getattr(torch, dtype))
            engine = zero.shard(model, stage=stage, mesh=world, average=False, bucket_mb=0.004,
                                backend=backend)
            backward(model, engine, world, 1, 32, accum, tokens)
            found = whole_gradients(engine, world)
            engine.close()
            if world.first:
                results[stage, accum, tokens] = found
    return results


def train(stage, steps, dtype, options, optim, accum=1):
    """Weights, losses and states after a few steps: (weights, norms, state bytes, sent bytes)."""
    with mesh.world("cpu", timeout=60) as world:
        model = make(getattr(torch, dtype))
        engine = zero.shard(model, stage=stage, average=False, bucket_mb=0.004, **options)
        optimizer = engine.optimizer(**optim)
        norms = []
        for step in range(steps):
            backward(model, engine, world, step, 16, accum, "uneven")
            optimizer.step()
            norms.append(float(optimizer.grad_norm))
        with engine.gathered():
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        held = sum(t.numel() * t.element_size() for states in optimizer.inner.states
                   for t in states.values())
        return weights, norms, held, engine.sent_bytes, engine.shard_elements()


def alone(steps, dtype, optim, accum=1):
    """The same on one rank with the same optimizer and no engine."""
    model = make(getattr(torch, dtype))
    config = OptimConfig(**optim)
    optimizer = make_optimizer(model.named_parameters(), config)
    for step in range(steps):
        ids, labels = batches(step, 16, "uneven")
        count = max(int((labels != -100).sum()), 1)
        for x, y in zip(ids.chunk(accum), labels.chunk(accum), strict=True):
            (loss_of(model, x, y) / count).backward()
        optimizer.step(config.lr)
        optimizer.applied(True)
        model.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rounds(sync):
    """Stage 0: the gradients of three backwards, exchanged each time or only at the end."""
    with mesh.world("cpu", timeout=60) as world:
        model = make()
        engine = zero.shard(model, stage=0, bucket_mb=0.004)
        for step in range(3):
            ids, labels = batches(step, 4, "even")
            with nullcontext() if sync or step == 2 else engine.no_sync():
                loss_of(model, ids, labels).backward()
        return whole_gradients(engine, world)


def exact_steps(stage, world_size, options):
    """bf16 weights rounded stochastically, from gradients whose sums are exact in any order."""
    with mesh.world("cpu", timeout=60) as world:
        model = make(torch.bfloat16)
        engine = zero.shard(model, stage=stage, average=False, bucket_mb=0.004, **options)
        optimizer = engine.optimizer("adamw", lr=1e-2, stochastic_rounding=True, grad_clip=None,
                                     seed=3)
        draw = torch.Generator().manual_seed(0)
        for _ in range(4):
            whole = {name: torch.randint(-8, 9, (4, *p.shape), generator=draw).to(p.dtype)
                     for name, p in model.named_parameters() if p.requires_grad}
            share = 4 // world.size
            mine = slice(world.rank * share, (world.rank + 1) * share)
            with engine.gathered():
                loss = sum((p * whole[name][mine].sum(0)).sum()
                           for name, p in model.named_parameters() if p.requires_grad)
                loss.backward()
            optimizer.step()
        with engine.gathered():
            return {name: p.detach().clone() for name, p in model.named_parameters()}


def unused_on_one_rank(stage, backend):
    """The error that every rank gets where rank 1's loss does not reach a parameter."""
    with mesh.world("cpu", timeout=60) as world:
        model = make(layers=2)
        engine = zero.shard(model, stage=stage, bucket_mb=0.004, backend=backend)
        optimizer = engine.optimizer("adamw", lr=1e-2)
        if world.rank == 1:
            model.layers[1].mix.requires_grad_(False)
        ids, labels = batches(0, 4, "even")
        loss_of(model, ids, labels).backward()
        before = [piece.tensor.clone() for piece in engine.pieces()]
        try:
            optimizer.step()
        except Exception as error:
            same = all(torch.equal(piece.tensor, old) for piece, old
                       in zip(engine.pieces(), before, strict=True))
            return type(error).__name__, str(error), same
        return None


def different_models():
    """The error of ranks whose models differ."""
    with mesh.world("cpu", timeout=60) as world:
        model = make(layers=2 + world.rank)
        try:
            zero.shard(model, stage=2)
        except Exception as error:
            return type(error).__name__, str(error)
        return None


def different_order(backend):
    """The error of ranks whose collectives come in another order, with check=True."""
    with mesh.world("cpu", timeout=60) as world:
        model = make(layers=2)
        engine = zero.shard(model, stage=3, check=True, backend=backend)
        try:
            with engine.gathered():
                pass
            order = [0, 1] if world.rank == 0 else [1, 0]
            for unit in order:
                model.layers[unit](torch.ones(1, 2, WIDTH))
        except Exception as error:
            return type(error).__name__, str(error)
        return None


def another_forward(prefetch):
    """Stage 3: what happens when the second forward skips a block."""
    with mesh.world("cpu", timeout=60):
        model = make()
        zero.shard(model, stage=3, prefetch=prefetch)
        ids, _ = batches(0, 2, "even")
        with torch.no_grad():
            first = model(ids)
            skipped = model.layers[1]
            del model.layers[1]
            try:
                second = model(ids)
            except Exception as error:
                return type(error).__name__, str(error)
        assert skipped is not None and first.isfinite().all()
        return "no error", bool(second.isfinite().all())


def environment_names():
    return {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def memory_of_stage_3():
    """Bytes of whole parameters alive: at rest, in a forward, and after the backward."""
    with mesh.world("cpu", timeout=60):
        model = make(layers=6)
        engine = zero.shard(model, stage=3)
        held = lambda: sum(engine._engine.full(bucket.number).untyped_storage().nbytes()  # noqa: E731
                           for bucket in engine._buckets)
        seen = []
        for layer in model.layers:
            layer.register_forward_hook(lambda *_: seen.append(held()))
        ids, labels = batches(0, 4, "even")
        rest = held()
        for _ in range(2):  # the first forward learns the order and gathers nothing ahead
            seen.clear()
            loss = loss_of(model, ids, labels)
            loss.backward()
            engine.collect()
        engine.settle()
        total = sum(p.numel() * 4 for p in model.parameters())
        nan = all(bool(p.isnan().all()) for layer in model.layers for p in layer.parameters())
        return rest, max(seen), held(), total, nan


def fp16_overflow(stage):
    """One rank's gradient overflows: (scale before, after, whether any weight changed)."""
    from fastllm.optim import LossScaler

    with mesh.world("cpu", timeout=60) as world:
        model = make(torch.float16)
        engine = zero.shard(model, stage=stage)
        optimizer = engine.optimizer("adamw", lr=1e-2, loss_scale=LossScaler(scale=2.0**10))
        before = [piece.tensor.clone() for piece in engine.pieces()]
        ids, labels = batches(0, 4, "even")
        loss = loss_of(model, ids, labels).float()
        optimizer.scale(loss * (float("inf") if world.rank == 1 else 1.0)).backward()
        optimizer.step()
        same = all(torch.equal(piece.tensor, old)
                   for piece, old in zip(engine.pieces(), before, strict=True))
        first = optimizer.loss_scale.scale
        optimizer.scale(loss_of(model, ids, labels).float() / 64).backward()
        optimizer.step()
        changed = any(not torch.equal(piece.tensor, old)
                      for piece, old in zip(engine.pieces(), before, strict=True))
        return first, same, changed or not before
