"""Optimizer, weight-decay groups, learning-rate schedules, loss scaling, accumulation."""

from fastllm.optim.accumulate import GradAccumulator
from fastllm.optim.adamw import AdamW, OptimConfig
from fastllm.optim.groups import ParamGroup, describe, param_groups
from fastllm.optim.scaler import LossScaler
from fastllm.optim.schedules import ScheduleConfig, lr_at

__all__ = ["AdamW", "GradAccumulator", "LossScaler", "OptimConfig", "ParamGroup",
           "ScheduleConfig", "describe", "lr_at", "param_groups"]
