"""One training run: what every training command does, in order.

    settings -> base, data and tokenizer -> model, optimizer, loader -> trainer -> evaluation,
    samples, summary, report, model/

Everything is written under the run's folder; `--resume` finds it there. What a command does
differently is its `Stage`.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastllm import adapters, checkpoint, config, cpu, data, ops
from fastllm.callbacks import Callback, JsonlWriter, ProgressBar, data_size
from fastllm.config import RunError, UserError
from fastllm.data import EvalSet, Loader, Prepared, Tokenizer
from fastllm.dist import mesh, zero
from fastllm.dist.mesh import ALONE, World
from fastllm.model import Decoder, filler, num_parameters
from fastllm.monitor import Monitor, dtype_name, environment, peak_flops
from fastllm.optim import LossScaler, describe, make_optimizer, param_groups
from fastllm.plan import make_plan
from fastllm.process import seed_generators
from fastllm.report import write_report
from fastllm.run.base import Base, find_base, weights_hash
from fastllm.run.ending import end
from fastllm.run.settings import NOT_IDENTITY, RunConfig, TuneConfig
from fastllm.run.setup import pick_device, prepare_data, training_dtype, write_json
from fastllm.run.stages import Stage, stage_of
from fastllm.trainer import TrainConfig, Trainer


def train(settings: RunConfig) -> dict[str, Any]:
    """Train a model, with the other ranks where torchrun or `launch` started several; returns the
    summary that the run's summary.json holds (on the first rank)."""
    device = pick_device(settings.train.device)
    with mesh.world(device.type, timeout=settings.dist.timeout) as world:
        if device.type == "cuda" and world.size > 1:
            device = torch.device("cuda", world.local_rank)
        return _train(settings, world, device)


def _train(settings: RunConfig, world: World, device: torch.device) -> dict[str, Any]:
    folder = Path(world.gather(settings.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")[0])
    saved = open_folder(folder, settings.resume, world)
    dtype, why = training_dtype(settings.train.dtype, device)
    stage = stage_of(settings)
    base = find_base(settings.from_) if settings.from_ is not None and (
        saved is None or isinstance(settings, TuneConfig)) else None
    tokenizer = _tokenizer(settings, folder, base)
    rows = stage.read(tokenizer) if tokenizer else None

    def prepare() -> Prepared:
        return prepare_data(settings.data, settings.tokenizer, tokenizer=tokenizer,
                            vocab_size=settings.model.vocab_size, rows=rows)

    prepared = world.first_alone("prepare", prepare) or prepare()  # the others: from the cache
    if settings.tokenizer.path is None:
        # A small text supports fewer tokens than asked for: rows that no token uses are not made.
        settings.model.vocab_size = min(settings.model.vocab_size, prepared.tokenizer.vocab_size)
    if saved:
        _keep_rows(settings.train, saved, world)
    plan = make_plan(stage.shape(dtype), settings.optim, settings.dist,
                     stage.micro_batch(prepared), grad_accum=settings.train.grad_accum,
                     rank=world.rank, world=world.size, device=device)
    if world.first:
        print(plan.line())
    memory = _Measured(Monitor(device).memory_bytes())
    run = Run(settings, folder, device, dtype, prepared, world, stage, base)
    run.say(f"{folder}: {num_parameters(settings.model):,} parameters, {dtype_name(dtype)} "
            f"({why}), {run.total_steps:,} steps of "
            f"{run.rows_a_step * stage.row_tokens:,} tokens on {device.type}")
    if world.size > 1:
        run.say(f"{world.size} ranks, ZeRO stage {settings.dist.zero}, {run.engine} engine")
    held = run.trainer.optimizer.held_bytes()
    if held != plan.states:
        raise RunError(f"rank {world.rank} holds {held:,} bytes of optimizer states and masters, "
                       f"and should hold {plan.states:,}; this is a defect of the program")
    if world.first:
        run.trainer.callbacks.append(memory)
    run.say(run.groups)
    for line in [*prepared.summary(), *run.loader.packed.notes]:
        run.say(line)
    return run.go(saved)


def _tokenizer(settings: RunConfig, folder: Path, base: Base | None) -> Tokenizer | None:
    """The tokenizer that is there already; None: pretraining reads or trains one."""
    own = folder / "tokenizer.json"
    if settings.resume and own.is_file():
        return data.load_tokenizer(own)
    if settings.tokenizer.path is not None and (base or isinstance(settings, TuneConfig)):
        return data.load_tokenizer(settings.tokenizer.path, settings.tokenizer)
    return None


def _keep_rows(train: TrainConfig, saved: checkpoint.Checkpoint, world: World) -> None:
    """Set train.grad_accum so that a step has the rows that it had when the run was saved.

    Raises UserError where the ranks' batches do not divide them.
    """
    rows, each = saved.state.get("rows_a_step"), train.batch_size * world.size
    if rows is None or saved.state["world_size"] == world.size:
        return
    if rows % each:
        raise UserError(f"the run's steps have {rows} rows, which {world.size} ranks of "
                        f"train.batch-size {train.batch_size} do not divide: give a "
                        "train.batch-size that does")
    train.grad_accum = rows // each


class _Measured(Callback):
    """Says, after the first step, what memory the run has really taken on the first rank."""

    def __init__(self, before: int) -> None:
        self.before: int | None = before

    def on_step(self, record: dict[str, Any]) -> None:
        if self.before is not None:
            peak = int(record["memory_bytes"])
            print(f"memory a rank, measured: {data_size(peak - self.before)} more than the "
                  f"{data_size(self.before)} before the model was made")
        self.before = None


@dataclass
class _Watch(Callback):
    """Says what the stage has to say of the losses so far, once."""

    look: Any
    losses: list[float]

    def on_step(self, record: dict[str, Any]) -> None:
        if self.look is None:
            return
        self.losses.append(record["loss"])
        if said := self.look(self.losses):
            print(f"warning: {said}")
            self.look = None


class Run:
    """The parts of one run, joined."""

    def __init__(self, settings: RunConfig, folder: Path, device: torch.device,
                 dtype: torch.dtype, prepared: Prepared, world: World = ALONE,
                 stage: Stage | None = None, base: Base | None = None) -> None:
        self.settings, self.folder, self.device, self.prepared = settings, folder, device, prepared
        self.dtype, self.world, self.stage = dtype, world, stage or stage_of(settings)
        self.tokenizer = prepared.tokenizer
        if self.stage.rows:  # the model is used with the template that it was trained with
            self.tokenizer.chat_template = self.stage.rows.encoder.template
        train, dist = settings.train, settings.dist
        torch.manual_seed(train.seed)
        if train.keep_freed_memory and not cpu.keep_freed_memory():
            raise UserError("train.keep-freed-memory: needs the C++ extension and glibc; leave it "
                            "out (fastllm-train info says what is missing)")
        if train.compile and dist.zero == 3 and world.size > 1:
            raise UserError("train.compile does not go with dist.zero 3, whose parameters come and "
                            "go: use dist.zero 2")
        drawn = torch.Generator().manual_seed(train.seed)
        # In stage 3 no rank ever holds the whole model: its parameters are made block by block.
        apart = dist.zero == 3 and world.size > 1 and base is None and self.stage.kind == "text"
        self.base_hash = ""
        self.adapter: adapters.Adapter | None = None
        self.model: nn.Module = self._model(base, drawn, apart)
        seed_generators(train.seed, world)
        self.loader = Loader(prepared, batch_size=train.batch_size, seq_len=train.seq_len,
                             seed=train.seed, num_workers=settings.data.num_workers,
                             rank=world.rank, world_size=world.size,
                             pin_memory=device.type == "cuda")
        self.rows_a_step = train.batch_size * train.grad_accum * world.size
        self.tokens_before = 0
        self.total_steps = train.steps or max(
            1, math.ceil(self.loader.rows_per_epoch * (train.epochs or 1) / self.rows_a_step))
        self.held = EvalSet(prepared, train.seq_len, settings.eval.batch_size or train.batch_size,
                            rank=world.rank, world_size=world.size)
        evaluates = settings.eval.every > 0 and len(self.held) > 0
        if settings.eval.every > 0 and not evaluates:
            self.say("nothing is held out (data.holdout is 0 or there is one document): no "
                     "evaluation")
        self.groups = describe(param_groups(
            self.model.named_parameters(), settings.optim.weight_decay or 0.0,
            decay_embeddings=settings.optim.decay_embeddings))
        self.zero = None
        if world.size > 1:
            self.zero = zero.shard(
                self.model, stage=dist.zero, mesh=world, wire_dtype=dist.wire_dtype,
                param_wire_dtype=dist.param_wire_dtype, average=False,
                bucket_mb=dist.bucket_mb, offload=dist.offload, prefetch=dist.prefetch,
                check=dist.check, backend=dist.engine, device=device,
                fill_parameter=filler(self.model, drawn) if apart else None)
            optimizer = self.zero.inner_optimizer(settings.optim, seed=train.seed)
        else:
            optimizer = make_optimizer(self.model.named_parameters(), settings.optim,
                                       seed=train.seed)
        shared = self.stage.begin(self)
        self.trainer = Trainer(
            model=self.model, loader=self.loader, total_steps=self.total_steps,
            optimizer=optimizer, loss=self.stage.loss, train=train,
            schedule=settings.schedule, checkpoints=settings.checkpoint,
            folder=folder / "checkpoints", device=device,
            scaler=LossScaler() if dtype == torch.float16 else None,
            evaluate=self.evaluate if evaluates else None, eval_every=settings.eval.every,
            patience=settings.eval.patience, eval_on_start=settings.eval.on_start,
            flops_per_token=self.stage.flops_per_token,
            peak_flops=peak_flops(device, dtype)[0],
            identity={**self.identity(dtype), **shared}, world=world, zero=self.zero)
        if world.first and self.stage.look:
            self.trainer.callbacks.append(_Watch(self.stage.look, []))

    def _model(self, base: Base | None, drawn: torch.Generator, apart: bool) -> nn.Module:
        """What is trained: new, or the base with what the stage and an adapter add to it."""
        settings = self.settings
        if base is None:
            with torch.device("meta" if apart else "cpu"):
                decoder = Decoder(settings.model, generator=drawn)
        else:
            decoder = base.build(self.dtype, settings.model)
            self.base_hash = weights_hash(decoder)
        device = torch.device("meta") if apart else self.device
        model, self.adapter = self.stage.assemble(decoder, device, self.dtype)
        if self.adapter:
            count = sum(param.numel() for _, param in self.adapter.named_parameters())
            self.say(f"{self.adapter.config.name}: {count:,} parameters are trained")
        return model

    @property
    def engine(self) -> str:
        """Which of ZeRO's engines runs."""
        return self.zero.engine_kind if self.zero else "no"

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.world.first:
            print(line)

    def identity(self, dtype: torch.dtype) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        settings = self.settings
        model = {key: value for key, value in asdict(settings.model).items()
                 if key not in NOT_IDENTITY}
        rows = {"fingerprint": self.prepared.fingerprint, "seq_len": settings.train.seq_len,
                "seed": settings.train.seed, "pack": settings.data.pack}
        found = {"model": model, "data": rows, "dtype": dtype_name(dtype),
                 "tokenizer": self.tokenizer.fingerprint}
        if isinstance(settings, TuneConfig):
            found["loss"] = asdict(settings.loss)
            if self.adapter:
                found |= {"adapter": asdict(settings.adapter), "base": self.base_hash}
        return found

    def evaluate(self, model: Any) -> dict[str, float]:
        return self.stage.evaluate(self, model)

    def go(self, saved: checkpoint.Checkpoint | None) -> dict[str, Any]:
        """Train to the end or to a signal; write everything that a run folder holds."""
        trainer = self.trainer
        if saved:
            trainer.restore(saved)
            self.tokens_before = trainer.progress.tokens
            self.say(f"resuming {saved.path} at step {saved.step}")
        if self.world.first:
            self.write_inputs()
            trainer.callbacks += [
                JsonlWriter(self.folder / "metrics.jsonl",
                            resume_step=saved.step if saved else None),
                ProgressBar(self.total_steps)]
        try:
            for callback in trainer.callbacks:
                callback.on_start({"step": trainer.progress.step, "total_steps": self.total_steps})
            trainer.run()
            summary = end(self)
            for callback in trainer.callbacks:
                callback.on_end(summary)
        finally:
            for callback in trainer.callbacks:
                callback.close()
            self.loader.close()
        if self.world.first:
            report = write_report(self.folder)
            if not trainer.stopped_by:
                print(f"report: {report}")
        return summary

    @property
    def finished(self) -> bool:
        """Whether all steps have been made, or the run has ended early."""
        progress = self.trainer.progress
        return progress.step >= self.total_steps or progress.ended_early

    def write_inputs(self) -> None:
        """config.yaml, environment.json, dispatch.json, tokenizer.json and the data's account."""
        stored = replace(self.settings, resume=False)
        (self.folder / "config.yaml").write_text(config.to_yaml(stored), encoding="utf-8")
        write_json(self.folder / "environment.json", environment(self.device))
        self.write_dispatch()
        account = self.prepared.report.to_dict()
        account["notes"] = [*account["notes"], *self.loader.packed.notes]
        write_json(self.folder / "data.json", account)
        self.tokenizer.save(self.folder / "tokenizer.json")

    def write_dispatch(self) -> None:
        """dispatch.json, at the start and again after training: what runs attention is measured."""
        write_json(self.folder / "dispatch.json", {
            op: {"backend": backend, "reason": reason}
            for op, (backend, reason) in ops.dispatch(self.device).items()})

def open_folder(folder: Path, resume: bool, world: World = ALONE
                ) -> checkpoint.Checkpoint | None:
    """The run's folder, made if need be, and the checkpoint to continue from."""
    checkpoints = folder / "checkpoints"
    failure: UserError | None = None
    if not resume and checkpoint.steps(checkpoints):
        failure = UserError(f"{folder} already holds a run: add --resume to continue it, or give "
                            "another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failure = UserError(f"cannot make {folder}: {error.strerror}")
    world.together(failure)
    if not resume:
        return None
    saved = checkpoint.newest(checkpoints, world=world)
    if saved is None and world.first:
        print(f"{checkpoints} holds no checkpoint yet: beginning at step 0")
    return saved
