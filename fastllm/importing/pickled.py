"""PyTorch's pickled weights (.bin, .pt, .pth), read without executing what they say.

A pickle can name any function to be called. `weights_only` admits those that make tensors and
containers and refuses every other before it is called; there is no way around it here.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm import export
from fastllm.config import UserError
from fastllm.data.tokenizer import Tokenizer, load_tokenizer
from fastllm.model import Decoder, hf

WEIGHTS = "pytorch_model.bin"
INDEX = WEIGHTS + ".index.json"
SUFFIXES = (".bin", ".pt", ".pth")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where checkpoints keep the weights beside other things.
_NESTED = ("state_dict", "model_state_dict", "model")


def import_pickled(path: Path, target: str | Path, dtype: torch.dtype | None,
                   say: Callable[[str], object]) -> Path:
    """`import_model` of pickled weights beside a config.json."""
    folder = path if path.is_dir() else path.parent
    files = _files(path)
    config = hf.read_config(folder)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file, expected in files:
        found = _read(file)
        for name in sorted(expected - found.keys()):
            raise UserError(f"{file}: lacks tensor {name}, which {INDEX} says it holds")
        for name in sorted(found.keys() & tensors.keys()):
            raise UserError(f"{file}: tensor {name} comes twice, also in {origin[name]}")
        tensors |= found
        origin |= dict.fromkeys(found, file)
    if config.num_hidden_layers > len(tensors):
        raise UserError(f"{folder / hf.CONFIG}: num_hidden_layers is {config.num_hidden_layers}, "
                        f"and there are {len(tensors)} tensors")
    with torch.device("meta"):
        model = Decoder(config)
    _check(model, tensors, origin, folder)
    tokenizer, template = _tokenizer(folder, say)
    return export.export_weights(model, _values(model, tensors), target, tokenizer, template,
                                 dtype or _widest(tensors), hf.stop_tokens(folder))


def _files(path: Path) -> list[tuple[Path, set[str]]]:
    """The pickles of a source, each with the tensors that an index says it holds."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"import does not know {path}: it takes .gguf, "
                            f"{', '.join(SUFFIXES)}, or a folder")
        return [(path, set())]
    if (path / WEIGHTS).is_file():
        return [(path / WEIGHTS, set())]
    if (path / INDEX).is_file():
        return hf.indexed_files(path / INDEX)
    single = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(single) > 1:
        raise UserError(f"{path} holds {len(single)} pickles and no {INDEX}: name one, such as "
                        f"{single[0]}")
    if single:
        return [(single[0], set())]
    if (path / hf.WEIGHTS).is_file() or (path / hf.INDEX).is_file():
        raise UserError(f"{path} needs no import: every command takes it as it is")
    raise UserError(f"{path} holds neither a .gguf file nor {WEIGHTS} nor {INDEX}")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name; of a new one they are mapped, not read."""
    try:
        # A file of before torch 1.6 is one pickle after another, which cannot be mapped.
        loaded = torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path),
                            map_location="cpu")
    except Exception as error:  # torch raises whatever a broken or hostile file leads it to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: torch refuses it as a file of weights alone, and nothing in it "
                        f"was executed ({reason[0][:200]}); ask its author for safetensors"
                        ) from None
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor by name")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}, on "
                            f"{tensor.device}: weights are dense tensors of floats")
        # A stride of 0 makes a few bytes look like terabytes.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {name} repeats its elements: it says "
                            f"{tensor.nbytes} bytes and holds "
                            f"{tensor.untyped_storage().nbytes()}")
    return loaded


def _check(model: Decoder, tensors: dict[str, Tensor], origin: dict[str, Path],
           folder: Path) -> None:
    """Refuse weights that are not those of the model, by the first name that is wrong."""
    wanted = {name: tuple(tensor.shape) for name, tensor in hf.hf_tensors(model)}
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{folder}: lacks tensor {name} {shape}")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{origin[name]}: tensor {name} is {tuple(tensors[name].shape)}, "
                            f"the model's is {shape}")
    for name in tensors.keys() - wanted.keys():
        tied = name == "lm_head.weight"
        if tied and torch.equal(tensors[name], tensors["model.embed_tokens.weight"]):
            continue
        if not hf.is_derived(name):
            raise UserError(f"{origin[name]}: tensor {name} " + (
                f"differs from model.embed_tokens.weight though {hf.CONFIG} ties them" if tied
                else "has no place in this model"))


def _values(model: Decoder, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    for name, _ in hf.hf_tensors(model):
        yield tensors[name]


def _widest(tensors: dict[str, Tensor]) -> torch.dtype:
    """The smallest type that holds every tensor exactly."""
    found = {tensor.dtype for tensor in tensors.values()}
    widest = found.pop()
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    return widest


def _tokenizer(folder: Path, say: Callable[[str], object]
               ) -> tuple[Tokenizer | None, str | None]:
    """(tokenizer, chat template) of the folder, None where it has none."""
    if not (folder / export.TOKENIZER).is_file():
        say(f"{folder} has no {export.TOKENIZER}: the model is written without a tokenizer")
        return None, None
    template: Any = None
    beside, own = folder / export.TOKENIZER_CONFIG, folder / "chat_template.jinja"
    if own.is_file():
        template = own.read_text(encoding="utf-8")
    elif beside.is_file():
        template = json.loads(beside.read_text(encoding="utf-8")).get("chat_template")
    return load_tokenizer(folder), template if isinstance(template, str) else None
