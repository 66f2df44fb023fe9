"""Models of other formats, written as a folder in Hugging Face layout that every command takes.

GGUF files through the gguf package, and PyTorch's pickled weights: the one place that reads pickle,
and only when a person asks for it by name.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from fastllm.config import UserError

__all__ = ["import_model"]


def import_model(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None,
                 say: Callable[[str], object] = print) -> Path:
    """Write the model and tokenizer of `source` into the folder `target`; returns it.

    Args:
        source: a GGUF file or a folder with one; a .bin, .pt or .pth file beside its config.json,
            or a folder with config.json and pytorch_model.bin or its index.
        target: replaced where it is an earlier export, else it must not exist.
        dtype: of the written weights; None means the smallest that holds all stored values exactly
            (fp32 for a quantised GGUF).
        say: takes one line for each choice that the source left open, such as a padding token.

    Tensors pass one at a time, so the model need not fit into memory. Raises UserError for a source
    that is none of these, is damaged, or holds what `Decoder` is not.
    """
    from fastllm.importing import gguf, pickled

    path = Path(source)
    if not path.exists():
        raise UserError(f"import: there is no {path}")
    if gguf.is_gguf(path):
        return gguf.import_gguf(path, target, dtype, say)
    if path.is_file() and path.suffix == ".safetensors":
        raise UserError(f"{path} needs no import: every command takes its folder, {path.parent}")
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} GGUF files: name one, such as {found[0]}")
    if found:
        return gguf.import_gguf(found[0], target, dtype, say)
    return pickled.import_pickled(path, target, dtype, say)
