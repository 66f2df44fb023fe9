"""Training runs for the tests of many ranks; each function is called on every rank."""

import itertools
import json
from pathlib import Path

import tiny
import torch
from sharded_runs import batches, loss_of, make

from fastllm import checkpoint, config, run
from fastllm.data import Loader
from fastllm.dist import mesh, zero
from fastllm.pieces import Piece
from fastllm.trainer import Trainer


def built(world, arguments):
    """The parts of a run of this rank, not yet trained."""
    settings = config.build(run.RunConfig, run.complete(config.from_arguments(arguments)))
    folder = Path(settings.out)
    run.open_folder(folder, settings.resume or (folder / "checkpoints").exists(), world)

    def prepare():
        return run.prepare_data(settings.data, settings.tokenizer,
                                vocab_size=settings.model.vocab_size)

    world.first_alone(f"prepare-{len(checkpoint.steps(folder / 'checkpoints'))}", prepare)
    dtype = run.DTYPES[settings.train.dtype]
    return run.Run(settings, folder, torch.device("cpu"), dtype, prepare(), world)


def resume_everywhere(arguments, steps):
    """Train `steps` steps saving each; then continue each by one step and compare with the next.

    Returns how many of the continued states have every bit of the ones that were not interrupted:
    weights, masters, optimizer states, generators of all ranks, data position, scaler.
    """
    with mesh.world("cpu", timeout=60) as world:
        whole = built(world, arguments)
        whole.trainer.run()
        whole.loader.close()
        saved = checkpoint.steps(whole.trainer.folder)
        assert len(saved) == steps
        equal = 0
        for before, after in itertools.pairwise(saved):
            again = built(world, arguments)
            again.trainer.restore(checkpoint.load(before, world))
            again.trainer._batches = iter(again.loader)
            again.trainer.model.train()
            again.trainer.step()
            again.loader.close()
            expected = checkpoint.load(after, world).state
            parts, counters = again.trainer._parts(saving=True)
            scaler = again.trainer.scaler.state_dict() if again.trainer.scaler else None
            equal += checkpoint.part_hashes(parts, world) == expected["part_hashes"] \
                and again.loader.state_dict() == expected["data"] \
                and counters == expected["optimizer"] and scaler == expected["scaler"]
            if again.zero:
                again.zero.close()
        return equal


def logged_pretrain(arguments, log):
    """The command line, and a line a step of the rows that this rank took; returns its code."""
    step = Trainer.step

    def logging(self):
        loader, accum = self.loader, self.train.grad_accum
        rows = [loader.rows_at(loader.position + i * loader.rows_per_batch).tolist()
                for i in range(accum)]
        record = step(self)
        with open(f"{log}.{self.world.rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([record["step"], self.world.size, rows]) + "\n")
        return record

    Trainer.step = logging
    from fastllm.cli import main

    return main(arguments)


def sample_order(log, ranks=4):
    """step -> the rows that its newest attempt took, in the global order."""
    attempts = {}
    for rank in range(ranks):
        path = Path(f"{log}.{rank}")
        for line in path.read_text().splitlines() if path.exists() else ():
            step, world, rows = json.loads(line)
            attempts.setdefault(step, {}).setdefault(world, {})[rank] = rows
    order = {}
    for step, worlds in attempts.items():
        # Only attempts of all their ranks count: a killed one may have written less.
        whole = [by_rank for world, by_rank in worlds.items() if len(by_rank) == world]
        for by_rank in whole:
            ranked = [by_rank[rank] for rank in sorted(by_rank)]
            rows = [row for micro in zip(*ranked, strict=True) for part in micro for row in part]
            assert order.setdefault(step, rows) == rows, f"step {step} took other rows"
    return order


def fp64_leg(folder, stage, first, last):
    """SGD with momentum in fp64 on pieces, from the newest checkpoint to step `last`.

    What anyone's own loop can do with the engine and the checkpoints: resumed at any world size.
    """
    folder = Path(folder)
    with mesh.world("cpu", timeout=60) as world:
        model = make(torch.float64)
        engine = zero.shard(model, stage=stage, mesh=world, average=False, bucket_mb=0.004)
        momentum = {piece.name: torch.zeros_like(piece.tensor) for piece in engine.pieces()}

        def states():
            return [Piece(piece.name, momentum[piece.name], piece.offset, piece.shape)
                    for piece in engine.pieces()]

        if first:
            saved = checkpoint.newest(folder, world=world)
            assert saved.step == first
            saved.fill("model", engine.model_pieces(saving=False))
            saved.fill("momentum", states())
            engine.loaded()
        for step in range(first, last):
            ids, labels = batches(step, 16, "uneven")
            count = int((labels != -100).sum())
            x, y = ids.chunk(world.size)[world.rank], labels.chunk(world.size)[world.rank]
            (loss_of(model, x, y) / count).backward()
            engine.settle()
            with torch.no_grad():
                for piece, grad in zip(engine.pieces(), engine.gradients(), strict=True):
                    momentum[piece.name].mul_(0.9).add_(grad)
                    piece.tensor.sub_(0.1 * momentum[piece.name])
            engine.publish()
            engine.zero()
        owns = stage > 0 or world.first
        checkpoint.save(folder, last, {"model": engine.model_pieces(saving=True),
                                       "momentum": states() if owns else []}, {}, world)


def peers(kind, arguments):
    """Losses of a few steps of our model under torch's DDP or FSDP2, or our engine."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from fastllm.model import Decoder, ModelConfig
    from fastllm.objectives import pretrain

    with mesh.world("cpu", timeout=60) as world:
        torch.manual_seed(0)
        settings = config.build(run.RunConfig, run.complete(config.from_arguments(arguments)))
        settings.model.dropout = 0.0
        prepared = run.prepare_data(settings.data, settings.tokenizer,
                                    vocab_size=settings.model.vocab_size)
        settings.model.vocab_size = prepared.tokenizer.vocab_size
        model = Decoder(ModelConfig(**vars(settings.model)),
                        generator=torch.Generator().manual_seed(1))
        loader = Loader(prepared, batch_size=8 // world.size, seq_len=32, rank=world.rank,
                            world_size=world.size, num_workers=0)
        engine, wrapped = None, model
        if kind == "fsdp2":
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        elif kind == "ddp":
            wrapped = DistributedDataParallel(Whole(model, pretrain.loss))
        elif kind is not None:
            engine = zero.shard(model, stage=kind)
        if engine:
            optimizer = engine.optimizer("sgd", lr=0.1, momentum=0.0, grad_clip=None)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            batch = next(loader)
            tokens = world.sum(batch.num_tokens)
            loss = wrapped(batch) if kind == "ddp" else pretrain.loss(model, batch)[0]
            (loss * world.size / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(world.gather_numbers([float(loss)]).sum()) / tokens)
        return losses


class Whole(torch.nn.Module):
    """Model and loss as one forward, which is what DDP watches."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return self.loss(self.model, batch)[0]


def tiny_arguments(folder, **changes):
    """`tiny.arguments` without evaluation and samples, in fp32."""
    return tiny.arguments(folder, **{"eval.every": 0, "eval.new_tokens": 0, "train.dtype": "fp32",
                                     "data.num_workers": 0, **changes})


def under_a_limit(megabytes, stage):
    """Three losses of a 50M-parameter model (800 MB of weights, gradients and states) in a process
    that may take so many MB more than it has after it has started."""
    import resource

    from fastllm.model import Decoder, ModelConfig, filler

    with mesh.world("cpu", timeout=60) as world:
        with open("/proc/self/status", encoding="ascii") as file:
            data = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
        limit = data * 1024 + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        shape = ModelConfig(vocab_size=64, hidden_size=448, intermediate_size=1200,
                            num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
                            max_position_embeddings=32)
        drawn = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            model = Decoder(shape)
        engine = zero.shard(model, stage=stage, fill_parameter=filler(model, drawn))
        optimizer = engine.optimizer("adamw", lr=1e-4)
        losses = []
        ids = torch.randint(64, (4, 17), generator=drawn)
        mine = ids[world.rank::world.size]
        for _ in range(3):
            hidden = model(mine[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                model.logits(hidden).flatten(0, 1).float(), mine[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses, sum(p.numel() for p in model.parameters())
