"""Parameter-efficient methods, put on a `Decoder` from outside.

    adapter = apply(model, AdapterConfig(name="lora", rank=16))
    ... train what adapter.named_parameters() gives ...
    adapter.save("folder", base="the/model")     # PEFT's files
    adapter.merge()                              # or: load(Decoder, "folder") elsewhere

A model with an adapter is called as before, packed batches and generation included.
"""

from pathlib import Path

import torch

from fastllm.adapters import storage
from fastllm.adapters.base import Adapter
from fastllm.adapters.bottleneck import BottleneckAdapter
from fastllm.adapters.config import AdapterConfig
from fastllm.adapters.low_rank import LowRankAdapter
from fastllm.adapters.merging import difference_bound, largest_difference, merge_check
from fastllm.adapters.prefix import PrefixAdapter
from fastllm.adapters.prompt import PromptAdapter
from fastllm.adapters.storage import base_of
from fastllm.config import UserError
from fastllm.model import Decoder

__all__ = ["METHODS", "Adapter", "AdapterConfig", "apply", "base_of", "difference_bound",
           "largest_difference", "load", "merge_check"]

METHODS: dict[str, type[Adapter]] = {
    "lora": LowRankAdapter, "dora": LowRankAdapter, "qlora": LowRankAdapter,
    "prompt": PromptAdapter, "p-tuning": PromptAdapter, "prefix": PrefixAdapter,
    "bottleneck": BottleneckAdapter}


def apply(model: Decoder, config: AdapterConfig, *, seed: int = 0) -> Adapter:
    """Freeze every parameter of `model` and add those of the method, in the model's dtype.

    model: with its weights loaded; it is changed in place. Of `model.named_parameters()` those
    that require a gradient are then exactly the adapter's, under names that the model had not.
    seed: of their first values.

    Raises UserError for options that the method has not, a model that has an adapter, and (qlora)
    weights that the blocks of 4 bits do not fit.
    """
    if config.name == "none":
        raise UserError("adapter.name is none: name a method, one of " + ", ".join(METHODS))
    try:
        return METHODS[config.name](model, config, seed=seed)
    except ValueError as error:  # of AdapterConfig.validate
        raise UserError(str(error)) from None


@torch.no_grad()
def load(model: Decoder, folder: str | Path) -> Adapter:
    """Put the adapter of a folder on `model`, the base that it was trained on.

    The folder is one that `Adapter.save` wrote, or PEFT for LoRA (rsLoRA, DoRA), prompt tuning,
    p-tuning and prefix tuning. Files of p-tuning hold the virtual tokens without the MLP that made
    them: they are loaded as such.

    Raises UserError, naming file and field or tensor, for what this model cannot take.
    """
    config = storage.read_config(folder)
    options = {"encoder": False} if config.name == "p-tuning" else {}
    bases = {"base_model.model.model.embed_tokens.base_layer.weight": model.embed_tokens.weight,
             "base_model.model.lm_head.base_layer.weight": model.lm_head_weight}
    adapter = METHODS[config.name](model, config, **options)
    adapter.fill(storage.read_tensors(folder, dict(adapter.tensors()), bases))
    return adapter
