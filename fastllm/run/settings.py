"""The settings of the training commands: each module's own Config, composed."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastllm import config
from fastllm.adapters import AdapterConfig
from fastllm.checkpoint import CheckpointConfig
from fastllm.config import UserError
from fastllm.data import DataConfig, TokenizerConfig
from fastllm.data.chat import ChatConfig
from fastllm.dist.config import DistConfig
from fastllm.evaluate import EvalConfig
from fastllm.model import ModelConfig
from fastllm.objectives.preference import PreferenceConfig
from fastllm.objectives.pretrain import PretrainConfig
from fastllm.objectives.reward import RewardConfig
from fastllm.objectives.sft import SftConfig
from fastllm.optim import OptimConfig, ScheduleConfig
from fastllm.run.base import find_base, layer_of
from fastllm.trainer import TrainConfig

# Fields of the model that may change between an interruption and a resume, or from a base to the
# run that begins with it: weights fit either way.
NOT_IDENTITY = ("recompute", "dropout", "init", "init_std", "scaled_residual_init")


From = Annotated[str | None, tyro.conf.arg(name="from")]
"""A setting whose name is a word of Python's."""


@dataclass(kw_only=True)
class RunConfig:
    """Settings of `pretrain` and `demo`, one section a module."""

    out: str | None = None
    """The run's folder; none: runs/ and the date and time."""
    resume: bool = False
    """Continue the run in --out from its newest good checkpoint (or begin it if it has none)."""
    from_: From = None
    """--from: the model to begin with, a run, a Hugging Face folder or a .gguf file. Its shape and
    its tokenizer are this run's. The learning rate warms up again, as schedule.warmup says."""
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
        if self.eval.load_best and not self.checkpoint.best:
            raise ValueError("eval.load-best takes the best checkpoint, and checkpoint.best is "
                             "false: leave one of them out")


@dataclass(kw_only=True)
class TuneConfig(RunConfig):
    """What the commands after pretraining have in common."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def validate(self) -> None:
        super().validate()
        if self.from_ is None and self.tokenizer.path is None:
            raise ValueError("--from MODEL is missing: the model to begin with (or, to begin with "
                             "none, --tokenizer.path)")
        if self.adapter.name != "none":
            if self.from_ is None:
                raise ValueError(f"adapter.name {self.adapter.name} needs --from MODEL: an adapter "
                                 "changes a model that is trained")
            if self.dist.zero == 3:
                raise ValueError("dist.zero 3 does not go with an adapter, whose few parameters "
                                 "there is no need to shard: use dist.zero 2")


@dataclass(kw_only=True)
class SftRun(TuneConfig):
    """Settings of `sft`."""

    loss: SftConfig = field(default_factory=SftConfig)


@dataclass(kw_only=True)
class PreferenceRun(TuneConfig):
    """Settings of `dpo`."""

    loss: PreferenceConfig = field(  # type: ignore[assignment]
        default_factory=PreferenceConfig)
    reference: str | None = None
    """The model whose log-probabilities are the reference; none: the one that training begins
    with."""


@dataclass(kw_only=True)
class RewardRun(TuneConfig):
    """Settings of `reward`."""

    loss: RewardConfig = field(default_factory=RewardConfig)  # type: ignore[assignment]

    def validate(self) -> None:
        super().validate()
        if self.adapter.name != "none":
            raise ValueError(f"adapter.name {self.adapter.name} does not go with `reward`, which "
                             "trains the whole model and its score: leave it out")


# What suits a stage, where neither preset nor person says otherwise: (whole model, adapter).
_RATES: dict[type, tuple[float, float]] = {
    SftRun: (2e-5, 2e-4), PreferenceRun: (1e-6, 5e-6), RewardRun: (1e-5, 1e-4)}


def complete(layer: dict[str, Any], cls: type[RunConfig] = RunConfig) -> dict[str, Any]:
    """The layer with what follows from it.

    A resumed run takes its own stored settings beneath the given ones. With --from, the model's
    shape and tokenizer are the base's. Without, model and tokenizer share a vocabulary size unless
    told otherwise. The stages after pretraining have their own learning rates and evaluations.
    """
    layer = config.normalise(layer)
    if layer.get("resume") and isinstance(layer.get("out"), str):
        stored = Path(layer["out"]) / "config.yaml"
        if stored.is_file():
            return config.merge(config.from_yaml(stored), layer)
    layer = _stage(layer, cls)
    start = layer.get("from_")
    if isinstance(start, str):
        return _from_base(layer, start)
    model, tokenizer = layer.get("model"), layer.get("tokenizer")
    rows = model.get("vocab_size") if isinstance(model, dict) else None
    tokens = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if rows is None and tokens is not None:
        return config.merge({"model": {"vocab_size": tokens}}, layer)
    if tokens is None:
        size = rows if rows is not None else ModelConfig().vocab_size
        return config.merge({"tokenizer": {"vocab_size": size}}, layer)
    return layer


def _stage(layer: dict[str, Any], cls: type[RunConfig]) -> dict[str, Any]:
    """The layer on top of what suits the stage."""
    if cls not in _RATES:
        return layer
    adapter = layer.get("adapter")
    adapted = isinstance(adapter, dict) and adapter.get("name", "none") != "none"
    return config.merge({"optim": {"lr": _RATES[cls][adapted], "weight_decay": 0.0},
                         "schedule": {"warmup": 0.1 if cls is PreferenceRun else 0.03}}, layer)


def _from_base(layer: dict[str, Any], start: str) -> dict[str, Any]:
    """The layer on top of what the base decides; UserError where the two contradict."""
    found = find_base(start)
    if found.adapter:
        raise UserError(f"--from {start} is an adapter: merge it first (fastllm-train merge "
                        f"{start} --out DIR)")
    merged = config.merge(layer_of(found), layer)
    given = config.build(ModelConfig, merged["model"])
    for spec in dataclasses.fields(ModelConfig):
        ours, base = getattr(given, spec.name), getattr(found.config, spec.name)
        if spec.name not in (*NOT_IDENTITY, "max_position_embeddings") and ours != base:
            raise UserError(f"model.{config.flag(spec.name)} is {ours}, and {start} has {base}: "
                            "with --from the shape is the base's; leave it out")
    return merged
