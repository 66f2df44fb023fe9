"""Evaluation on questions with known answers: multiple choice by likelihood, exact match by text.

`run_task` is the one way in. Files are the user's own; nothing is downloaded.
"""

from fastllm.tasks.config import TaskConfig
from fastllm.tasks.evaluation import run_task
from fastllm.tasks.result import Metric, TaskResult

__all__ = ["Metric", "TaskConfig", "TaskResult", "run_task"]
