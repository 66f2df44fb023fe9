"""Training runs from their settings, stage by stage of a model's life.

    settings   what a person may say of a run          setup    device, dtype, prepared data
    base       the model that a run begins with        stages   what pretrain, sft, dpo and reward
    session    one run, from its settings to model/             do differently
    reference  log-probabilities of the reference model
"""

from fastllm.run.base import Base, find_base, open_model
from fastllm.run.demo import demo
from fastllm.run.session import Run, open_folder, train
from fastllm.run.settings import (
    PreferenceRun,
    RewardRun,
    RunConfig,
    SftRun,
    TuneConfig,
    complete,
)
from fastllm.run.setup import (
    DTYPES,
    data_progress,
    pick_device,
    prepare_data,
    training_dtype,
)

__all__ = ["DTYPES", "Base", "PreferenceRun", "RewardRun", "Run", "RunConfig", "SftRun",
           "TuneConfig", "complete", "data_progress", "demo", "find_base", "open_folder",
           "open_model", "pick_device", "prepare_data", "train", "training_dtype"]
