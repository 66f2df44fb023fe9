"""The training loop: the only file that knows model, data, optimizer, ranks and checkpoints.

One step: take grad_accum micro-batches, sum their loss over what it counts (trained tokens, or
pairs), divide by their number in the whole step on all ranks, clip by the global norm, update. The
host reads a few numbers (loss, norm) a step, after the update was queued. A non-finite norm leaves
weights and optimizer state untouched, on every rank.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastllm import checkpoint
from fastllm.callbacks import Callback
from fastllm.checkpoint import Checkpoint, CheckpointConfig
from fastllm.config import RunError
from fastllm.data.collate import Batch
from fastllm.data.loader import Loader
from fastllm.dist.mesh import ALONE, World
from fastllm.dist.zero import Zero
from fastllm.monitor import Monitor
from fastllm.optim import GradAccumulator, LossScaler, Optimizer, ScheduleConfig, lr_at
from fastllm.pieces import Piece
from fastllm.process import rng_state, seed_generators, set_rng_state, stop_signals

# A run that skips this many steps in a row will not recover by itself.
MAX_SKIPPED_IN_A_ROW = 25


@dataclass(kw_only=True)
class TrainConfig:
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps. Give steps or epochs; with neither, one epoch."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training documents; may be a fraction."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Rows of seq_len tokens in a micro-batch, on each rank."""
    grad_accum: Annotated[int, Field(gt=0)] = 1
    """Micro-batches in an optimizer step. A run resumed on another number of ranks changes it, so
    that a step keeps its rows."""
    seq_len: Annotated[int, Field(gt=1)] = 512
    """Tokens in a row."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of weights, activations and gradients; masters and optimizer states are always fp32."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of initialisation, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    compile: bool = False
    """torch.compile the model: faster steps after a slow first one."""
    keep_freed_memory: bool = False
    """CPU: keep freed blocks for the next step instead of giving them back to the system. Faster in
    fp32, for more memory."""

    def validate(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs are both set: give one of them")


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    seconds: float = 0.0
    stale: int = 0
    """Evaluations since the best one."""
    ended_early: bool = False
    """Whether the run is over because it no longer became better."""


class Trainer:
    """Runs the steps of one training run.

    loss: (model, batch) -> (sum of the loss over its tokens or pairs, 0-d fp32; their number), and
    perhaps a dict of other such sums, whose means join the step's record.
    evaluate: model -> record with val_loss and more, or None to never evaluate. patience: end after
    so many evaluations without a better val_loss; 0: never. eval_on_start: evaluate before the
    first step; that one never is the best.
    Parameters without requires_grad are taken for the base's: they are in no checkpoint.
    peak_flops: of the device in the dtype of training, for MFU.
    world, zero: the ranks, and the model as sharded over them; zero is None on one rank. loss then
    is this rank's, evaluate's figures are those of all.
    """

    def __init__(self, *, model: nn.Module, optimizer: Optimizer, loader: Loader, total_steps: int,
                 loss: Callable[[Any, Batch], tuple[Any, ...]], train: TrainConfig,
                 schedule: ScheduleConfig, checkpoints: CheckpointConfig, folder: Path,
                 device: torch.device, callbacks: Sequence[Callback] = (),
                 scaler: LossScaler | None = None,
                 evaluate: Callable[[Any], dict[str, float]] | None = None, eval_every: int = 0,
                 patience: int = 0, eval_on_start: bool = False, flops_per_token: float = 0.0,
                 peak_flops: float = math.inf,
                 identity: dict[str, Any] | None = None, world: World = ALONE,
                 zero: Zero | None = None) -> None:
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.total_steps, self.loss, self.train = total_steps, loss, train
        self.schedule, self.checkpoints, self.folder = schedule, checkpoints, folder
        self.device, self.callbacks = device, list(callbacks)
        self.scaler = scaler
        self._evaluate, self.eval_every, self.patience = evaluate, eval_every, patience
        self.eval_on_start = eval_on_start
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.identity = identity or {}
        self.forward = torch.compile(model) if train.compile else model
        self.world, self.zero = world, zero
        self.gradients: GradAccumulator | Zero = zero or GradAccumulator(
            optimizer.parameters(), train.grad_accum)
        self.monitor = Monitor(device)
        self.progress = Progress()
        self.stopped_by: str | None = None
        self.last_evaluation: dict[str, Any] | None = None
        """The newest record of `on_eval` of this process."""
        self._batches: Iterator[Batch] = iter(())
        self._stopped: Callable[[], str | None] = lambda: None
        self._skipped_in_a_row = 0

    def run(self) -> None:
        """Train to `total_steps`, or until SIGTERM or SIGINT; saves a checkpoint either way."""
        self._batches = iter(self.loader)
        saved = self.progress.step
        if self._evaluate and self.eval_on_start and not saved:
            self.evaluate(competes=False)
        self.model.train()
        with stop_signals() as self._stopped:
            while self.progress.step < self.total_steps and not self.progress.ended_early:
                self._tell("on_step", self.step())
                step, last = self.progress.step, self.progress.step == self.total_steps
                if self._evaluate and self.eval_every and (step % self.eval_every == 0 or last) \
                        and self.evaluate() and self.checkpoints.best:
                    saved = self.save(saved)
                if self.world.size == 1:
                    self.stopped_by = self._stopped()
                if self.patience and self.progress.stale >= self.patience:
                    self.progress.ended_early = last = True
                    self._tell("on_message", f"no better for {self.patience} evaluations: ended "
                                             f"after step {step}; the best was step "
                                             f"{self.progress.best_step}")
                if step % self.checkpoints.every == 0 or last or self.stopped_by:
                    saved = self.save(saved)
                if self.stopped_by:
                    self._tell("on_message", f"stopped by {self.stopped_by} after step {step}; "
                                             "continue with --resume")
                    break

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics.jsonl.

        Raises RunError after MAX_SKIPPED_IN_A_ROW steps without a finite gradient.
        """
        start = time.perf_counter()
        self.world.watch.step = self.progress.step + 1
        batches = [next(self._batches) for _ in range(self.train.grad_accum)]
        counts = [[batch.num_inputs or batch.num_tokens, batch.count] for batch in batches]
        table = self.world.gather_numbers([sum(column) for column in zip(*counts, strict=True)])
        tokens, units = (int(total) for total in table.sum(0).tolist())
        scale = self.scaler.scale if self.scaler else 1.0
        loss_sum = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            batch = batch.to(self.device, non_blocking=True)
            with self.gradients.micro_batch(last=i + 1 == len(batches)):
                loss, _, *more = self.loss(self.forward, batch)
                (loss * (scale / max(units, 1))).backward()
                self.gradients.collect()
            loss_sum += loss.detach()
            for name, value in (more[0] if more else {}).items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        lr = lr_at(self.progress.step, self.total_steps, self.optimizer.config.lr, self.schedule)
        # A signal that only some ranks have seen by now must stop all of them after this step.
        settled = self.gradients.settle(loss_sum, float(self._stopped() is not None),
                                        *sums.values())
        norm = self.optimizer.step(lr, self.gradients.gradients(), norm=settled.norm,
                                   unscale=1.0 / scale)
        self.gradients.publish()
        self.gradients.zero()
        # The one time that the host waits.
        self.world.watch("the end of the step")
        loss_value, stop, *others, norm_value = torch.cat(
            [settled.totals, norm.double()[None]]).tolist()
        self.world.watch(None)
        settled.check()
        finite = math.isfinite(norm_value)
        self._count(tokens, finite)
        if stop and self.world.size > 1:
            self.stopped_by = self._stopped() or "a signal to another rank"
        seconds = time.perf_counter() - start
        self.progress.seconds += seconds
        rate = tokens / seconds
        record = {
            "step": self.progress.step, "tokens": self.progress.tokens,
            "loss": loss_value / max(units, 1), "lr": lr, "grad_norm": norm_value,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / (self.peak_flops * self.world.size),
            "memory_bytes": self.monitor.memory_bytes(), "seconds": seconds,
            **self.monitor.sample(),
            **{name: value / max(units, 1) for name, value in zip(sums, others, strict=True)},
        }
        return record if finite else {**record, "skipped": True}

    def evaluate(self, *, competes: bool = True) -> bool:
        """Evaluate on the held-out documents; True if this is the lowest loss so far, among those
        that compete."""
        assert self._evaluate is not None
        self.model.eval()
        result = self._evaluate(self.model)
        if self.zero:
            self.zero.reshard()
        self.model.train()
        self.last_evaluation = {"step": self.progress.step, **result}
        self._tell("on_eval", self.last_evaluation)
        if not competes:
            return False
        better = result["val_loss"] < self.progress.best_loss
        self.progress.stale = 0 if better else self.progress.stale + 1
        if better:
            self.progress.best_loss = result["val_loss"]
            self.progress.best_step = self.progress.step
        return better

    def save(self, saved: int) -> int:
        """Checkpoint this step unless it was the last one saved; returns the step now on disk."""
        step = self.progress.step
        if saved == step:
            return step
        parts, counters = self._parts(saving=True)
        state = {"progress": vars(self.progress), "data": self.loader.state_dict(),
                 "optimizer": counters, "identity": self.identity,
                 "rows_a_step": self.rows_a_step,
                 "scaler": self.scaler.state_dict() if self.scaler else None}
        path = checkpoint.save(self.folder, step, parts, state, self.world)
        checkpoint.retain(self.folder, self.checkpoints.keep, self.progress.best_step, self.world)
        self._tell("on_checkpoint", path, step)
        return step

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: from here on every bit is as if nothing had stopped.

        Raises UserError naming the first thing (model, data, tokenizer) that is not the run's own.
        """
        checkpoint.same_run(self.identity, saved.state["identity"], saved.path)
        self.load_weights(saved)
        parts, _ = self._parts(saving=False)
        self.optimizer.load_counters(saved.state["optimizer"])
        saved.fill("optimizer", parts["optimizer"])
        if self.zero:
            self.zero.loaded()
        if self.scaler and saved.state["scaler"]:
            self.scaler.load_state_dict(saved.state["scaler"])
        self.loader.load_state_dict(saved.state["data"])
        self.progress = Progress(**saved.state["progress"])
        same_ranks = saved.state["world_size"] == self.world.size
        if same_ranks:
            generators = rng_state(self.device, self.world.rank)
            saved.fill("rng", generators)
            set_rng_state(generators, self.device)
        else:
            seed_generators(self.train.seed, self.world, self.progress.step)
        parts, _ = self._parts(saving=True)
        found, kept = checkpoint.part_hashes(parts, self.world), saved.state["part_hashes"]
        for part in parts:
            if found[part] != kept[part] and (same_ranks or part != "rng"):
                raise RunError(f"{saved.path}: the {part} in memory differs from the saved one "
                               "after loading; this is a defect of the program or the machine")

    def load_weights(self, saved: Checkpoint) -> None:
        """Take the model of a checkpoint of this run, and nothing else of it."""
        parts, _ = self._parts(saving=False)
        saved.fill("model", parts["model"])
        if self.zero:
            self.zero.loaded()

    @property
    def rows_a_step(self) -> int:
        """Rows of all ranks' micro-batches in an optimizer step."""
        return self.train.batch_size * self.train.grad_accum * self.world.size

    def _parts(self, *, saving: bool) -> tuple[dict[str, Sequence[Piece]], dict[str, Any]]:
        """(this rank's tensors of a checkpoint by file, the optimizer's counters).

        saving: what this rank writes, so that all of them write everything once.
        """
        if self.zero:
            model = self.zero.model_pieces(saving=saving)
        else:
            model = [Piece.whole(name, p) for name, p in self.model.named_parameters()]
        model = [piece for piece in model if piece.name in self._trained]
        replicated = self.zero is not None and self.zero.stage == 0
        optimizer = self.optimizer.pieces()
        if saving and replicated and not self.world.first:
            optimizer = []
        generators = rng_state(self.device, self.world.rank)
        return {"model": model, "optimizer": optimizer,
                "rng": [Piece.whole(name, tensor) for name, tensor in generators.items()]}, \
            self.optimizer.counters()

    def _count(self, tokens: int, finite: bool) -> None:
        self.progress.step += 1
        self.progress.tokens += tokens
        self.optimizer.applied(finite)
        if self.scaler:
            self.scaler.update(finite)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.progress.skipped += not finite
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise RunError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite gradient "
                           f"(last: step {self.progress.step}); no weight was changed by them: "
                           "lower --optim.lr or look at the data, then --resume")

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)
