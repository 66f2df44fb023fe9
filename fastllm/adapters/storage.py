"""An adapter's folder: adapter_config.json and adapter_model.safetensors, PEFT's where it can be.

What PEFT has no word for (that the base was in 4 bits) is in the metadata of the safetensors file.
Nothing here reads pickle.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastllm import files
from fastllm.adapters.config import ALL_LINEAR, LINEAR, TARGETS, AdapterConfig
from fastllm.config import UserError, build

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = "fastllm"
_PEFT = {"LORA": "lora", "PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning",
         "PREFIX_TUNING": "prefix"}
# Fields of PEFT's configs that say nothing of what the saved adapter computes. Any other one that
# is set, and that is not read below, is refused.
_SILENT = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
           "peft_type", "peft_version", "layers_pattern", "megatron_core", "qalora_group_size",
           "eva_config", "corda_config", "lora_ga_config", "prompt_tuning_init",
           "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
           "encoder_dropout", "encoder_num_layers", "encoder_reparameterization_type",
           "encoder_hidden_size", "init_weights", "prefix_projection", "token_dim",
           "num_attention_heads", "num_layers"}
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
         "num_virtual_tokens", "bias", "init_lora_weights", "num_transformer_submodules"}
# Other first values (PiSSA and its like) take their part from the base's weights: the file fits a
# changed base.
_PLAIN_FIRST_VALUES = (True, False, None, "gaussian", "orthogonal", "eva")


def write(folder: str | Path, tensors: dict[str, Tensor], described: dict[str, Any],
          config: AdapterConfig, base: str) -> Path:
    """Write the two files into a folder, made where it is missing; returns it.

    Each appears whole or not at all, the config last. Raises UserError where that fails.
    """
    folder = Path(folder)
    values = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True,
              **described}
    metadata = {}
    if config.name == "qlora":
        metadata[_KEY] = json.dumps({"name": "qlora", "block_size": config.block_size,
                                     "double_quant": config.double_quant})
    slots = [files.Slot(name, tensor.dtype, tuple(tensor.shape))
             for name, tensor in tensors.items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{WEIGHTS}.tmp"
        files.write_safetensors(temporary, slots, (tensor.contiguous() for tensor in
                                                   tensors.values()), metadata)
        files.sync(temporary)
        files.rename(temporary, folder / WEIGHTS)
        temporary = folder / f".{CONFIG}.tmp"
        files.write_file(temporary, (json.dumps(values, indent=2) + "\n").encode())
        files.rename(temporary, folder / CONFIG)
        files.sync(folder)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}"
                        ) from None
    return folder


def base_of(folder: str | Path) -> str:
    """The name or path of the model that an adapter's folder belongs to.

    Raises UserError where the folder does not say.
    """
    path = Path(folder) / CONFIG
    base = files.read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path does not name the adapter's model: "
                        "write its path there")
    return base


def read_config(folder: str | Path) -> AdapterConfig:
    """The method and its options that a folder says, ours or PEFT's.

    Raises UserError, naming the file and the field, for a method or an option that there is not.
    """
    path = Path(folder) / CONFIG
    values = files.read_json(path)

    def refuse(why: str) -> NoReturn:
        raise UserError(f"{path}: {why}")

    if values.get("fastllm_type") == "bottleneck":
        layer: dict[str, Any] = {"name": "bottleneck",
                                 "bottleneck_size": values.get("bottleneck_size")}
    else:
        kind = values.get("peft_type")
        if kind not in _PEFT:
            refuse(f"peft_type '{kind}' is not supported; there are: {', '.join(_PEFT)}")
        for key, value in values.items():
            if value and key not in _SILENT | _READ:
                refuse(f"{key} = {value} is not supported")
        layer = {"name": _PEFT[kind]}
        if kind == "LORA":
            layer |= _low_rank(values, refuse)
            layer |= json.loads(_metadata(folder).get(_KEY, "{}"))
        else:
            layer["virtual_tokens"] = values.get("num_virtual_tokens")
            if values.get("num_transformer_submodules", 1) not in (1, None):
                refuse("it is an encoder-decoder's: num_transformer_submodules is not 1")
    try:
        return build(AdapterConfig, layer)
    except UserError as error:
        refuse(str(error))


def read_tensors(folder: str | Path, wanted: dict[str, Tensor], bases: dict[str, Tensor]
                 ) -> dict[str, Tensor]:
    """The tensors of a folder, by name, cast to the dtype of those wanted.

    wanted: names and shapes. bases: tensors of the model that a file may hold beside them, by
    their name there.

    Raises UserError, naming tensor and file, for one that is missing, left over, of another shape,
    or of the model but with other values.
    """
    from safetensors import SafetensorError, safe_open

    path = _weights(folder)
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if name in bases:
                    if not torch.equal(tensor.to(bases[name]), bases[name]):
                        raise UserError(f"{path}: tensor {name} differs from the model's own: the "
                                        "adapter belongs to another model")
                    continue
                if name not in wanted:
                    raise UserError(f"{path}: tensor {name} has no place in this model")
                if tensor.shape != wanted[name].shape:
                    raise UserError(f"{path}: tensor {name} is {tuple(tensor.shape)}, the model's "
                                    f"is {tuple(wanted[name].shape)}")
                found[name] = tensor.to(wanted[name].dtype)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: lacks tensor {name}")
    return found


def _low_rank(values: dict[str, Any], refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    """The options of a PEFT LoraConfig."""
    targets = values.get("target_modules")
    if targets == ALL_LINEAR:
        targets = list(LINEAR)
    if not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        refuse(f"target_modules {targets} must be a list of some of {', '.join(TARGETS)}")
    if values.get("bias", "none") != "none":
        refuse(f"bias = {values['bias']} is not supported; only none is")
    if values.get("init_lora_weights", True) not in _PLAIN_FIRST_VALUES:
        refuse(f"init_lora_weights = {values['init_lora_weights']} changes the base model; convert "
               "the adapter to plain LoRA with PEFT")
    return {"name": "dora" if values.get("use_dora") else "lora", "rank": values.get("r", 8),
            "alpha": values.get("lora_alpha", 8), "dropout": values.get("lora_dropout", 0.0),
            "rslora": values.get("use_rslora", False),
            "targets": sorted(targets, key=TARGETS.index)}


def _weights(folder: str | Path) -> Path:
    path = Path(folder) / WEIGHTS
    if path.is_file():
        return path
    pickled = Path(folder) / "adapter_model.bin"
    hint = (f"; {pickled.name} is pickle, which is never loaded: save it as safetensors with PEFT"
            if pickled.is_file() else "")
    raise UserError(f"{folder}: there is no {WEIGHTS}{hint}")


def _metadata(folder: str | Path) -> dict[str, str]:
    path = _weights(folder)
    try:
        return files.read_slots(path)[1]
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
