"""What every command needs before it begins: the device, the dtype, prepared data."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastllm import data
from fastllm.config import UserError
from fastllm.data import DataConfig, Prepared, Rows, Tokenizer, TokenizerConfig
from fastllm.monitor import pick_dtype

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device by its name; auto is the GPU where there is one. UserError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device cuda: torch sees no GPU here; use cpu, or install a CUDA "
                        "build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def training_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, why) by name; auto goes by the hardware."""
    return pick_dtype(device) if name == "auto" else (DTYPES[name], "asked for")


@contextmanager
def data_progress() -> Iterator[data.Progress]:
    """Within: a progress(stage, done, total) that shows a bar where the output is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def prepare_data(sources: DataConfig, tokenizer_config: TokenizerConfig, *,
                 tokenizer: Tokenizer | None = None, vocab_size: int | None = None,
                 rows: Rows | None = None) -> Prepared:
    """Tokens of the sources, made now or found in the cache; a bar while it lasts."""
    with data_progress() as progress:
        return data.prepare(sources, tokenizer_config, tokenizer=tokenizer,
                            vocab_size=vocab_size, progress=progress, rows=rows)


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a run's folder."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n",
                    encoding="utf-8")
