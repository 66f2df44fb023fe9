"""A folder in Hugging Face layout that transformers loads without remote code.

The folder appears whole or not at all: everything is written and synced under a temporary name
beside it, which is then renamed.
"""

import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.checkpoint import Checkpoint
from fastllm.config import UserError
from fastllm.data.tokenizer import Tokenizer
from fastllm.files import sync
from fastllm.model import Decoder, ModelConfig, hf
from fastllm.model.reward import RewardModel

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# How transformers splits the text of every Qwen2 folder, whatever its tokenizer.json says.
_QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def export(model: Decoder | RewardModel, folder: str | Path, *, tokenizer: Tokenizer | None = None,
           chat_template: str | None = None, dtype: torch.dtype | None = None,
           stop_ids: Collection[int] = ()) -> Path:
    """Write model and tokenizer into `folder`, replacing an earlier export; returns it.

    A reward model is written with its score in place of the head. The architecture follows from
    the config, such as Llama, Qwen2 (bias) or Qwen3 (QK-norm).

    Args:
        tokenizer: its files, and the ids of its bos, eos and pad; None writes the model alone.
        chat_template: jinja text for `apply_chat_template`, kept with the tokenizer; None means
            the tokenizer's own, if it has one.
        dtype: of the written weights; None means the model's own.
        stop_ids: tokens besides eos that end a text, such as the one that ends a turn.

    Raises UserError for a model that none of the architectures holds, a tokenizer that has more
    tokens than the model or that transformers would read otherwise, a folder that holds other
    files, and a disk that cannot be written.
    """
    return export_weights(model, model.parameters(), folder, tokenizer, chat_template,
                   dtype or next(model.parameters()).dtype, stop_ids)


def export_checkpoint(saved: Checkpoint, config: ModelConfig, folder: str | Path, *,
                      tokenizer: Tokenizer | None = None, chat_template: str | None = None,
                      dtype: torch.dtype | None = None, stop_ids: Collection[int] = ()) -> Path:
    """`export` of a checkpoint's weights, straight from its files to the folder's.

    One tensor is in memory at a time, and the result is that of the whole model to the byte.
    Raises UserError also where the checkpoint's weights are not those of `config`.
    """
    with torch.device("meta"):
        model = Decoder(config)
    stored, wanted = saved.layout.get("model", {}), dict(model.named_parameters())
    for name in [*wanted, *stored]:
        if name not in stored or name not in wanted or stored[name].shape != wanted[name].shape:
            raise UserError(f"{saved.path}: tensor {name} is not as the model's settings say; "
                            "config.yaml belongs to another run")
    weights = (saved.tensor("model", name) for name in wanted)
    return export_weights(model, weights, folder, tokenizer, chat_template,
                   dtype or stored["embed_tokens.weight"].dtype, stop_ids)


def export_weights(model: Decoder | RewardModel, weights: Iterable[Tensor], folder: str | Path,
            tokenizer: Tokenizer | None, chat_template: str | None, dtype: torch.dtype,
            stop_ids: Collection[int]) -> Path:
    """`export` of a model whose weights, in the order of its parameters, may lie elsewhere."""
    kind = hf.architecture(model.config)
    target = Path(folder)
    _check_replaceable(target)
    temporary = target.with_name(f".{target.name}.tmp")
    ids: dict[str, int | list[int] | None] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than the "
                            f"model's vocab_size {model.config.vocab_size}")
        more = sorted(set(stop_ids) - {tokenizer.eos_id})
        ids = {"bos_token_id": tokenizer.bos_id,
               "eos_token_id": [tokenizer.eos_id, *more] if more else tokenizer.eos_id,
               "pad_token_id": tokenizer.pad_id}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if tokenizer is not None:
            _save_tokenizer(tokenizer, temporary, kind, model.config.max_position_embeddings,
                            chat_template)
        hf.write(model, weights, temporary, dtype=dtype, **ids)
        _replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, kind: str, max_length: int,
                    chat_template: str | None) -> None:
    """The tokenizer's two files, its config with what belongs to the model."""
    tokenizer.save(folder)
    path = folder / TOKENIZER_CONFIG
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = max_length
    if chat_template is not None:
        settings["chat_template"] = chat_template
    if kind == "qwen2":
        _check_qwen2_rules(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")))
        # Left out, transformers adds <|endoftext|>, a token that the model may have no row for.
        settings["unk_token"] = tokenizer.eos_token
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_qwen2_rules(tokenizer: dict[str, Any]) -> None:
    """Refuse a tokenizer.json that transformers would not follow in a Qwen2 folder.

    There it takes vocabulary and merges alone, and splits and normalises (NFC) as Qwen2 does.
    """
    splitter = tokenizer.get("pre_tokenizer") or {}
    rules = splitter.get("pretokenizers", [splitter])
    pattern = (rules[0].get("pattern") or {}).get("Regex", "")
    normalizer = (tokenizer.get("normalizer") or {"type": "NFC"})["type"]
    if pattern.replace("{1,1}", "") != _QWEN2_PATTERN or normalizer != "NFC":
        raise UserError(
            "transformers reads every Qwen2 model's tokenizer by Qwen2's rules, and this one has "
            "others: train it with tokenizer.max_digits 1, or the model without attention_bias")


def _check_replaceable(target: Path) -> None:
    """Refuse a folder that holds anything but an earlier export: it would be lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file: name a folder to export to")
    ours = {hf.CONFIG, hf.WEIGHTS, hf.GENERATION, TOKENIZER, TOKENIZER_CONFIG}
    for path in sorted(target.iterdir()):
        if path.name not in ours:
            raise UserError(f"{target} holds {path.name}, which an export would remove: "
                            "name another folder")


def _replace(temporary: Path, target: Path) -> None:
    """Sync everything in `temporary`, then put it where `target` is."""
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        # A folder that is not empty cannot be renamed over: it steps aside first.
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
