"""The model that a command begins with: a run, a Hugging Face folder, an adapter or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastllm import adapters, config, data, importing
from fastllm.checkpoint import Checkpoint, digest, newest
from fastllm.config import UserError
from fastllm.data import Tokenizer
from fastllm.data.once import made_once
from fastllm.data.sources import FileHashes
from fastllm.model import Decoder, ModelConfig, hf

ADAPTER = "adapter_config.json"
HINT = "a run folder, a Hugging Face folder, an adapter's folder or a .gguf file"


@dataclass(frozen=True)
class Base:
    """Where a model's weights, tokenizer and shape are.

    checkpoint: of a run that has no model/ yet. adapter: a folder that goes on top.
    """

    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint | None = None
    adapter: Path | None = None

    def tokenizer(self) -> Tokenizer:
        """As it was saved with the model."""
        return data.load_tokenizer(self.folder)

    def stop_ids(self) -> list[int]:
        """Tokens that end a text, by the folder's generation_config.json."""
        return [] if self.checkpoint else hf.stop_tokens(self.folder)

    def build(self, dtype: torch.dtype | None, shape: ModelConfig | None = None) -> Decoder:
        """The model with its weights, on the CPU. dtype None: as stored. shape: with other dropout,
        recompute or longest document than the stored one. An adapter is not applied."""
        if self.checkpoint is None:
            if dtype is None and shape is None:
                return hf.load(self.folder)
            model = Decoder(shape or self.config, initialize=False)
            model.to(dtype or torch.float32)
            hf.load_weights(model, self.folder)
            return model
        model = Decoder(shape or self.config, initialize=False)
        stored = self.checkpoint.layout["model"]["embed_tokens.weight"].dtype
        model.to(stored)
        self.checkpoint.fill("model", dict(model.named_parameters()))
        return model.to(dtype or stored)


def find_base(path: str | Path) -> Base:
    """Looks at a path and reads configs, not weights; a GGUF file is converted once, to the cache.

    Raises UserError where the path is no model.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".gguf":
        place = _imported(place)
    if not place.is_dir():
        raise UserError(f"no such model: {path} ({HINT})")
    for folder in (place / "model", place):
        if (folder / hf.CONFIG).is_file():
            return Base(folder, hf.read_config(folder))
    for folder in (place / "adapter", place):
        if (folder / ADAPTER).is_file():
            under = adapters.base_of(folder)
            found = find_base(under)
            return Base(found.folder, found.config, found.checkpoint, folder)
    if not (place / "checkpoints").is_dir():
        raise UserError(f"{path} is not a model ({HINT}): it has neither checkpoints/ nor "
                        f"{hf.CONFIG}")
    layer = config.from_yaml(place / "config.yaml")
    if (layer.get("adapter") or {}).get("name", "none") != "none":
        raise UserError(f"{place} trains an adapter and is not finished: end it with --resume")
    saved = newest(place / "checkpoints", print)
    if saved is None:
        raise UserError(f"{place} holds no checkpoint yet: train it first")
    return Base(place, config.build(ModelConfig, layer["model"]), saved)


def open_model(path: str, *, device: torch.device, dtype: torch.dtype | None = None
               ) -> tuple[Decoder, Tokenizer, Base]:
    """Model, tokenizer and where they are from. dtype None: as stored. UserError where the path is
    no model."""
    base = find_base(path)
    model: Decoder = base.build(dtype)
    if base.adapter:
        adapters.load(model, base.adapter)
    return model.to(device).eval(), base.tokenizer(), base


def weights_hash(model: nn.Module) -> str:
    """Hex, of every parameter: what a cache of this model's outputs goes by."""
    return digest({"model": dict(model.named_parameters())})


def _imported(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, in the cache."""
    cache = config.cache_folder() / "models"
    cache.mkdir(parents=True, exist_ok=True)
    hashes = FileHashes(cache / "files.json")
    folder = cache / hashes.of(path, lambda _: None)[:24]
    hashes.save()

    def fault(place: Path) -> str | None:
        return None if (place / "model" / hf.CONFIG).is_file() else "absent"

    def build(place: Path) -> None:
        importing.import_model(path, place / "model")

    if fault(folder):
        print(f"{path}: converting it, once, into {folder}")
    made_once(folder, fault, build)
    return folder / "model"


def layer_of(base: Base) -> dict[str, Any]:
    """What a base decides of a run's settings: the model's shape, and where its tokenizer is."""
    return {"model": config.as_dict(base.config),
            "tokenizer": {"path": str(base.folder), "vocab_size": base.config.vocab_size}}
