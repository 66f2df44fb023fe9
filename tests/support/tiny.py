"""A run small enough for a test: real prose, a two-block model, thirty steps."""

import pydoc_data.topics
from pathlib import Path

SETTINGS = {
    "model": {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 64, "dropout": 0.1},
    "train": {"seq_len": 32, "batch_size": 4, "grad_accum": 2, "steps": 12, "device": "cpu"},
    "optim": {"lr": 3e-3},
    "schedule": {"name": "cosine", "warmup": 3},
    "checkpoint": {"every": 4},
    "eval": {"every": 6, "new_tokens": 8},
    "data": {"holdout": 0.1},
}


def text(folder: Path, topics: int = 12) -> Path:
    """A text file of a few of Python's help topics, documents apart by blank lines."""
    path = folder / "text.txt"
    chosen = [body for _, body in sorted(pydoc_data.topics.topics.items())][:topics]
    path.write_text("\n\n".join(chosen), encoding="utf-8")
    return path


def arguments(folder: Path, **changes: object) -> list[str]:
    """Command-line flags of the tiny run: `**{"train.steps": 3}` changes or adds one."""
    flat = {f"{section}.{key}": value for section, values in SETTINGS.items()
            for key, value in values.items()}
    flat |= {"data.path": text(folder), "data.cache_dir": folder / "cache", "out": folder / "run"}
    flat |= changes
    words: list[str] = []
    for key, value in flat.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words
