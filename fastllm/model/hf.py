"""Decoders to and from Hugging Face folders (config.json, safetensors) of the families that
`hf_config` names.

Weights stream tensor by tensor both ways, so beside the model only one tensor is held. Nothing here
reads pickle. A tensor that is missing, left over or of another shape is a `UserError` that names it
and its file.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm import files
from fastllm.config import UserError
from fastllm.model.config import ModelConfig
from fastllm.model.decoder import Decoder
from fastllm.model.hf_config import ARCHITECTURES as ARCHITECTURES
from fastllm.model.hf_config import CONFIG as CONFIG
from fastllm.model.hf_config import DTYPES, config_from_hf, config_to_hf
from fastllm.model.hf_config import architecture as architecture
from fastllm.model.layers import named_parts

WEIGHTS, GENERATION = "model.safetensors", "generation_config.json"
INDEX = WEIGHTS + ".index.json"
# Old Llama files hold RoPE's frequencies, which follow from the config.
_DERIVED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")


def hf_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, as a view of the model's parameters."""
    for name, tensor in named_parts(model):  # a reward model has its decoder within it, and a score
        outside = name.startswith(("lm_head.", "score."))
        yield name if outside else f"model.{name.removeprefix('decoder.')}", tensor


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder."""
    path = Path(folder) / CONFIG
    return config_from_hf(files.read_json(path), str(path))


def load(folder: str | Path, *, dtype: torch.dtype | None = None,
         device: torch.device | str = "cpu", **changes: Any) -> Decoder:
    """A `Decoder` with the config and weights of a Hugging Face folder.

    Args:
        dtype: of the weights; None means the one that config.json names (fp32 where it names none).
        changes: fields of `ModelConfig` that config.json cannot say, such as dropout and recompute.
    """
    path = Path(folder) / CONFIG
    values = files.read_json(path)
    config = dataclasses.replace(config_from_hf(values, str(path)), **changes)
    if dtype is None:
        named = values.get("dtype", values.get("torch_dtype")) or "float32"
        known = {text: kind for kind, text in DTYPES.items()}
        if named not in known:
            raise UserError(f"{path}: dtype '{named}' is not supported; "
                            f"there are: {', '.join(known)}")
        dtype = known[named]
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: Decoder, folder: str | Path) -> None:
    """Fill every parameter of `model` from the folder's safetensors, one file or sharded.

    Values are cast to the parameters' dtype. Raises UserError naming tensor and file.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    wanted = dict(hf_tensors(model))
    heads: list[Path] = []
    for path, expected in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name in sorted(expected - names if expected is not None else ()):
                    raise UserError(f"{path}: lacks tensor {name}, which {INDEX} says it holds")
                for name in sorted(names):
                    if model.lm_head is None and name == "lm_head.weight":
                        heads.append(path)
                    elif not is_derived(name):
                        _copy(file, name, wanted, path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    if wanted:
        name = next(iter(wanted))
        raise UserError(f"{folder}: lacks tensor {name} {tuple(wanted[name].shape)}"
                        + (f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""))
    for path in heads:
        # Some files hold the tied head a second time. A different one would be lost in silence.
        with safe_open(path, framework="pt") as file:
            head, embedding = file.get_tensor("lm_head.weight"), model.embed_tokens.weight
        if not torch.equal(head.to(embedding), embedding):
            raise UserError(f"{path}: tensor lm_head.weight differs from model.embed_tokens.weight "
                            f"though {CONFIG} ties them")


def _copy(file: Any, name: str, wanted: dict[str, Tensor], path: Path) -> None:
    """Copy one tensor of a file into its place and take it off the list."""
    if name not in wanted:
        raise UserError(f"{path}: tensor {name} has no place in this model, "
                        "or comes twice")
    shape = tuple(file.get_slice(name).get_shape())
    if shape != tuple(wanted[name].shape):
        raise UserError(f"{path}: tensor {name} is {shape}, the model's is "
                        f"{tuple(wanted[name].shape)}")
    wanted.pop(name).copy_(file.get_tensor(name))


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The files that hold the weights, each with the tensors that an index says it holds."""
    if (folder / WEIGHTS).is_file():
        return [(folder / WEIGHTS, None)]
    index = folder / INDEX
    if not index.is_file():
        pickled = next((p.name for pattern in ("*.bin", "*.pth", "*.pt")
                        for p in sorted(folder.glob(pattern))), None)
        hint = (f"; {pickled} may be pickle, which is never loaded: write it anew with "
                f"fastllm-train import {folder} --out DIR" if pickled else "")
        raise UserError(f"{folder}: there is no {WEIGHTS} and no {INDEX}{hint}")
    return [(path, names) for path, names in indexed_files(index)]


def indexed_files(index: Path) -> list[tuple[Path, set[str]]]:
    """The files beside an index, each with the names of the tensors that it says they hold.

    Raises UserError for an index without them, one that leaves its folder, and a missing file.
    """
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    held: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: '{name}' is not the name of a file beside it")
        held.setdefault(name, set()).add(tensor)
    for name in held:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: named by {index.name}, but there is no such "
                            "file")
    return [(index.parent / name, tensors) for name, tensors in sorted(held.items())]


def is_derived(name: str) -> bool:
    """Whether a tensor of this name follows from the config, so that a file may also hold it."""
    return _DERIVED.search(name) is not None


def stop_tokens(folder: str | Path) -> list[int]:
    """Ids that end a text by the folder's generation_config.json: one, several or none."""
    path = Path(folder) / GENERATION
    if not path.is_file():
        return []
    named = files.read_json(path).get("eos_token_id")
    return [] if named is None else [int(token) for token in
                                     (named if isinstance(named, list) else [named])]


def save(model: Decoder, folder: str | Path, *, dtype: torch.dtype | None = None,
         bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None,
         pad_token_id: int | None = None) -> None:
    """Write model.safetensors, config.json and generation_config.json into an existing folder.

    Args:
        dtype: of the written weights; None means the model's own.
    """
    write(model, model.parameters(), folder, dtype=dtype or model.embed_tokens.weight.dtype,
          bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)


def write(model: Any, weights: Iterable[Tensor], folder: str | Path, *, dtype: torch.dtype,
          **tokens: Any) -> None:
    """`save` for weights that may lie elsewhere than in `model`, which may be on meta.

    model: a `Decoder` or a `RewardModel`.
    weights: every parameter in the model's order; each is asked for when the one before is written.
    tokens: bos_token_id, eos_token_id and pad_token_id, each an id or None.
    """
    folder = Path(folder)
    config = config_to_hf(model.config, dtype=dtype, **tokens) | getattr(model, "hf_config", {})
    # A fused weight's parts are its rows in order, so the data are those of the parameters.
    slots = [files.Slot(name, dtype, tuple(part.shape)) for name, part in hf_tensors(model)]
    files.write_safetensors(folder / WEIGHTS, slots,
                            (weight.detach().to("cpu", dtype) for weight in weights))
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, {"_from_model_config": True, **tokens})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
