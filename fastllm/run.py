"""One training run from its configuration: what `pretrain` and `demo` do, in order.

    settings -> data and tokenizer -> model, optimizer, loader -> trainer -> evaluation, samples,
    summary, report, model/

Everything is written under the run's folder; `--resume` finds it there.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllm import checkpoint, config, cpu, data, ops
from fastllm.callbacks import Callback, JsonlWriter, ProgressBar, data_size
from fastllm.checkpoint import CheckpointConfig
from fastllm.config import RunError, UserError
from fastllm.data import DataConfig, EvalSet, Loader, Prepared, Tokenizer, TokenizerConfig
from fastllm.dist import mesh, zero
from fastllm.dist.config import DistConfig
from fastllm.dist.mesh import ALONE, World
from fastllm.evaluate import EvalConfig, evaluate, xz_bits_per_byte
from fastllm.export import export, export_checkpoint
from fastllm.generate import GenerateConfig, generate_text
from fastllm.model import Decoder, ModelConfig, filler, flops_per_token, num_parameters
from fastllm.monitor import Monitor, dtype_name, environment, peak_flops, pick_dtype
from fastllm.objectives import pretrain as objective
from fastllm.objectives.pretrain import PretrainConfig
from fastllm.optim import (
    LossScaler,
    OptimConfig,
    ScheduleConfig,
    describe,
    make_optimizer,
    param_groups,
)
from fastllm.plan import make_plan
from fastllm.process import seed_generators
from fastllm.report import write_report
from fastllm.trainer import TrainConfig, Trainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Fields of the model that may change between an interruption and a resume: weights fit either way.
NOT_IDENTITY = ("recompute", "dropout", "init", "init_std", "scaled_residual_init")


@dataclass(kw_only=True)
class RunConfig:
    """Settings of `pretrain` and `demo`, one section a module."""

    out: str | None = None
    """The run's folder; none: runs/ and the date and time."""
    resume: bool = False
    """Continue the run in --out from its newest good checkpoint (or begin it if it has none)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: PretrainConfig = field(default_factory=PretrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dist: DistConfig = field(default_factory=DistConfig)

    def validate(self) -> None:
        longest = self.model.max_position_embeddings
        if self.train.seq_len > longest:
            raise ValueError(f"train.seq-len {self.train.seq_len} is longer than the model's "
                             f"model.max-position-embeddings {longest}: lower the one or raise "
                             "the other")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out DIR: the folder of the run to continue")


def complete(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer with what follows from it: model and tokenizer share a vocabulary size unless told
    otherwise, and a resumed run takes its own stored settings beneath the given ones."""
    if layer.get("resume") and isinstance(layer.get("out"), str):
        stored = Path(layer["out"]) / "config.yaml"
        if stored.is_file():
            return config.merge(config.from_yaml(stored), layer)
    model, tokenizer = layer.get("model"), layer.get("tokenizer")
    rows = model.get("vocab_size") if isinstance(model, dict) else None
    tokens = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if rows is None and tokens is not None:
        return config.merge({"model": {"vocab_size": tokens}}, layer)
    if tokens is None:
        size = rows if rows is not None else ModelConfig().vocab_size
        return config.merge({"tokenizer": {"vocab_size": size}}, layer)
    return layer


def pretrain(settings: RunConfig) -> dict[str, Any]:
    """Train a model, with the other ranks where torchrun or `launch` started several; returns the
    summary that the run's summary.json holds (on the first rank)."""
    device = pick_device(settings.train.device)
    with mesh.world(device.type, timeout=settings.dist.timeout) as world:
        if device.type == "cuda" and world.size > 1:
            device = torch.device("cuda", world.local_rank)
        return _pretrain(settings, world, device)


def _pretrain(settings: RunConfig, world: World, device: torch.device) -> dict[str, Any]:
    folder = Path(world.gather(settings.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")[0])
    saved = _open_folder(folder, settings.resume, world)
    dtype, why = training_dtype(settings.train.dtype, device)
    own = folder / "tokenizer.json"
    tokenizer = data.load_tokenizer(own) if settings.resume and own.is_file() else None

    def prepare() -> Prepared:
        return prepare_data(settings.data, settings.tokenizer, tokenizer=tokenizer,
                            vocab_size=settings.model.vocab_size)

    prepared = world.first_alone("prepare", prepare) or prepare()  # the others: from the cache
    if settings.tokenizer.path is None:
        # A small text supports fewer tokens than asked for: rows that no token uses are not made.
        settings.model.vocab_size = min(settings.model.vocab_size, prepared.tokenizer.vocab_size)
    if saved:
        _keep_rows(settings.train, saved, world)
    train = settings.train
    plan = make_plan(settings.model, settings.optim, settings.dist, dtype=dtype,
                     tokens=train.batch_size * train.seq_len, grad_accum=train.grad_accum,
                     rank=world.rank, world=world.size, device=device)
    if world.first:
        print(plan.line())
    memory = _Measured(Monitor(device).memory_bytes())
    run = _Run(settings, folder, device, dtype, prepared, world)
    run.say(f"{folder}: {num_parameters(settings.model):,} parameters, {dtype_name(dtype)} "
            f"({why}), {run.total_steps:,} steps of "
            f"{run.rows_a_step * settings.train.seq_len:,} tokens on {device.type}")
    if world.size > 1:
        run.say(f"{world.size} ranks, ZeRO stage {settings.dist.zero}, {run.engine} engine")
    held = run.trainer.optimizer.held_bytes()
    if held != plan.states:
        raise RunError(f"rank {world.rank} holds {held:,} bytes of optimizer states and masters, "
                       f"and should hold {plan.states:,}; this is a defect of the program")
    if world.first:
        run.trainer.callbacks.append(memory)
    run.say(run.groups)
    for line in prepared.summary():
        run.say(line)
    return run.go(saved)


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


class _Run:
    """The parts of one run, joined."""

    def __init__(self, settings: RunConfig, folder: Path, device: torch.device,
                 dtype: torch.dtype, prepared: Prepared, world: World = ALONE) -> None:
        self.settings, self.folder, self.device, self.prepared = settings, folder, device, prepared
        self.world = world
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
        apart = dist.zero == 3 and world.size > 1
        with torch.device("meta" if apart else "cpu"):
            model = Decoder(settings.model, generator=drawn)
        self.model = model.to(dtype) if apart else model.to(device=device, dtype=dtype)
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
        self.trainer = Trainer(
            model=self.model, loader=self.loader, total_steps=self.total_steps,
            optimizer=optimizer, loss=partial(objective.loss, config=settings.loss), train=train,
            schedule=settings.schedule, checkpoints=settings.checkpoint,
            folder=folder / "checkpoints", device=device,
            scaler=LossScaler() if dtype == torch.float16 else None,
            evaluate=self.evaluate if evaluates else None, eval_every=settings.eval.every,
            flops_per_token=flops_per_token(settings.model, train.seq_len),
            peak_flops=peak_flops(device, dtype)[0],
            identity=self.identity(dtype), world=world, zero=self.zero)

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
        model = {key: value for key, value in asdict(self.settings.model).items()
                 if key not in NOT_IDENTITY}
        rows = {"fingerprint": self.prepared.fingerprint, "seq_len": self.settings.train.seq_len,
                "seed": self.settings.train.seed, "pack": self.settings.data.pack}
        return {"model": model, "data": rows, "dtype": dtype_name(dtype),
                "tokenizer": self.prepared.tokenizer.fingerprint}

    def evaluate(self, model: Decoder) -> dict[str, float]:
        return evaluate(model, self.held, self.held.num_bytes, device=self.device,
                        loss=objective.loss, world=self.world)

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
            summary = self.end()
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

    def end(self) -> dict[str, Any]:
        """The summary, after what only all ranks together can do for it."""
        last, written = None, None
        if self.finished:
            if len(self.held) and self.settings.eval.every:
                # A run resumed at its end trains no step, and so has no evaluation yet.
                last = self.trainer.last_evaluation or self.evaluate(self.model.eval())
            if self.zero and self.zero.stage == 3:
                # No rank can run the model alone: each draws the same tokens.
                written = self.continuations()
                self.zero.reshard()
        summary: dict[str, Any] = {}

        def finish() -> None:
            self.write_dispatch()
            summary.update(self.finish(last, written))

        self.world.first_alone("finish", finish)
        return summary

    @property
    def finished(self) -> bool:
        """Whether all steps have been made."""
        return self.trainer.progress.step >= self.total_steps

    def write_inputs(self) -> None:
        """config.yaml, environment.json, dispatch.json, tokenizer.json and the data's account."""
        stored = replace(self.settings, resume=False)
        (self.folder / "config.yaml").write_text(config.to_yaml(stored), encoding="utf-8")
        _json(self.folder / "environment.json", environment(self.device))
        self.write_dispatch()
        _json(self.folder / "data.json", self.prepared.report.to_dict())
        self.prepared.tokenizer.save(self.folder / "tokenizer.json")

    def write_dispatch(self) -> None:
        """dispatch.json, at the start and again after training: what runs attention is measured."""
        _json(self.folder / "dispatch.json", {
            op: {"backend": backend, "reason": reason}
            for op, (backend, reason) in ops.dispatch(self.device).items()})

    def finish(self, last: dict[str, Any] | None,
               written: list[dict[str, str]] | None) -> dict[str, Any]:
        """The summary, with the last evaluation; where the run came to its end also xz's figure,
        continuations (those written already, in stage 3) and model/."""
        progress = self.trainer.progress
        summary: dict[str, Any] = {
            "steps": progress.step, "total_steps": self.total_steps, "tokens": progress.tokens,
            "skipped_steps": progress.skipped, "seconds": progress.seconds,
            "parameters": num_parameters(self.settings.model),
            "stopped_by": self.trainer.stopped_by,
            "best_step": progress.best_step, "finished": self.finished,
        }
        if self.zero:
            summary["sent_bytes"] = self.zero.sent_bytes  # by this rank, in this process
        joules = self.trainer.monitor.energy_joules()
        here = progress.tokens - self.tokens_before  # the monitor knows this process only
        if joules is not None and here:
            summary["joules_per_token"] = joules / here
        if self.finished:
            if last:
                summary |= {key: value for key, value in last.items() if key != "step"}
                summary["xz_bpb"] = xz_bits_per_byte(self.held.texts())
            target, tokenizer = self.folder / "model", self.prepared.tokenizer
            summary["continuations"] = self.continuations() if written is None else written
            if self.zero and self.zero.stage == 3:
                # No rank has the whole model; the last checkpoint has, on the disk.
                saved = checkpoint.load(checkpoint.steps(self.folder / "checkpoints")[-1])
                export_checkpoint(saved, self.settings.model, target, tokenizer=tokenizer)
            else:
                export(self.model, target, tokenizer=tokenizer)
        _json(self.folder / "summary.json", summary)
        return summary

    def continuations(self) -> list[dict[str, str]]:
        """What the model writes after each prompt."""
        settings = self.settings.eval
        prompts = settings.prompts or [" ".join(text.decode("utf-8").split(" ")[:6])
                                       for text in self.held.texts(3)]
        room = self.settings.model.max_position_embeddings - settings.new_tokens
        tokenizer = self.prepared.tokenizer
        prompts = [prompt for prompt in prompts if len(tokenizer.encode(prompt)) + 1 < room]
        if not settings.new_tokens or not prompts:
            return []
        drawn = GenerateConfig(max_new_tokens=settings.new_tokens, temperature=0.8, top_p=0.95,
                               seed=self.settings.train.seed)
        texts = generate_text(self.model.eval(), tokenizer, prompts, drawn,
                              bos_token_id=tokenizer.bos_id, eos_token_ids=[tokenizer.eos_id])
        return [{"prompt": prompt, "text": text}
                for prompt, text in zip(prompts, texts, strict=True)]


def demo(settings: RunConfig) -> None:
    """`demo`: pretrain, then say what came of it; a finished demo is shown again, not run again."""
    settings.out = settings.out or "runs/demo"
    folder = Path(settings.out)
    done, stored = folder / "summary.json", folder / "config.yaml"
    summary = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if summary.get("finished") and stored.read_text(encoding="utf-8") == config.to_yaml(settings):
        print(f"{folder} is finished and nothing changed since; remove it to train again")
    else:
        settings.resume = (folder / "checkpoints").is_dir() and not summary.get("finished")
        summary = pretrain(settings)
    if not summary["finished"]:
        return
    if "val_bpb" in summary:
        print(f"held-out documents: {summary['val_bpb']:.3f} bits per byte; "
              f"xz -9 on the same bytes: {summary['xz_bpb']:.3f}")
    for sample in summary["continuations"]:
        print(f"\n> {sample['prompt']}{sample['text']}")
    print(f"\nrun folder: {folder}  (config.yaml, metrics.jsonl, report.html, checkpoints/, "
          "model/)")
    print(f"try: fastllm-train generate {folder} --prompt 'Return the'")


def pick_device(name: str) -> torch.device:
    """The device by its name; auto is the GPU where there is one. UserError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device cuda: torch sees no GPU here; use cpu, or install a CUDA "
                        "build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def training_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, why) by name; auto goes by the hardware."""
    return pick_dtype(device) if name == "auto" else (DTYPES[name], "asked for")


@contextmanager
def data_progress() -> Iterator[data.Progress]:
    """Within: a progress(stage, done, total) that shows a bar where the output is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def prepare_data(sources: DataConfig, tokenizer_config: TokenizerConfig, *,
                 tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> Prepared:
    """Tokens of the sources, made now or found in the cache; a bar while it lasts."""
    with data_progress() as progress:
        return data.prepare(sources, tokenizer_config, tokenizer=tokenizer,
                            vocab_size=vocab_size, progress=progress)


def _open_folder(folder: Path, resume: bool, world: World = ALONE
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


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n",
                    encoding="utf-8")
