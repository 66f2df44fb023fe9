"""Optimizers, weight-decay groups, learning-rate schedules, loss scaling, accumulation."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fastllm.optim.accumulate import GradAccumulator, Settled
from fastllm.optim.adamw import LAMB, AdamW, AdamW8bit
from fastllm.optim.base import Optimizer, Place
from fastllm.optim.config import OptimConfig
from fastllm.optim.groups import ParamGroup, describe, param_groups
from fastllm.optim.muon import Muon
from fastllm.optim.rules import SGD, Adagrad, Lion, RMSprop
from fastllm.optim.scaler import LossScaler
from fastllm.optim.schedules import ScheduleConfig, lr_at

__all__ = ["LAMB", "OPTIMIZERS", "SGD", "Adagrad", "AdamW", "AdamW8bit", "GradAccumulator", "Lion",
           "LossScaler", "Muon", "OptimConfig", "Optimizer", "ParamGroup", "Place",
           "RMSprop", "ScheduleConfig", "Settled", "describe", "lr_at", "make_optimizer",
           "param_groups"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW, "adamw8bit": AdamW8bit, "lion": Lion, "sgd": SGD, "adagrad": Adagrad,
    "rmsprop": RMSprop, "lamb": LAMB, "muon": Muon}


def make_optimizer(named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig, *,
                   seed: int = 0, places: Mapping[str, Place] | None = None) -> Optimizer:
    """The optimizer that `config` names; places: where given pieces of parameters lie."""
    return OPTIMIZERS[config.name](named_parameters, config, seed=seed, places=places)
