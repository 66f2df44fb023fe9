"""Presets: one function each, returning a layer of settings that YAML and flags may override."""

from collections.abc import Callable
from typing import Any

from fastllm.config import UserError, nearest
from fastllm.model import shapes

Layer = dict[str, Any]


def demo() -> Layer:
    """A small English decoder, trained in about three minutes on two CPU cores."""
    return {
        # QK-norm and larger initial weights than a wide model's: both shorten the first plateau.
        "model": {**shapes.demo(), "qk_norm": True, "init_std": 0.06},
        "data": {"format": "python-docs", "holdout": 0.03},
        "train": {"steps": 1200, "batch_size": 8, "seq_len": 256},
        "optim": {"lr": 4e-3, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 100, "min_lr_ratio": 0.02},
        "eval": {"every": 300},
        "checkpoint": {"every": 300},
    }


def minimind_26m() -> Layer:
    """MiniMind2-small's shape and stage defaults, with warm-up, and decay off the norms."""
    return {
        "model": shapes.minimind_26m(),
        "train": {"batch_size": 32, "grad_accum": 8, "seq_len": 340},
        "optim": {"lr": 5e-4},
        "schedule": {"name": "minimind", "warmup": 0.02},
    }


def minimind_64m() -> Layer:
    """MiniMind's 64M shape (head_dim 96, QK-norm)."""
    return {**minimind_26m(), "model": shapes.minimind_64m()}


def minimind_sft() -> Layer:
    """`sft`: MiniMind's full fine-tuning, with packed rows and warm-up."""
    return {
        "train": {"epochs": 2, "batch_size": 16, "seq_len": 768},
        "optim": {"lr": 1e-5},
        "schedule": {"name": "minimind", "warmup": 0.02},
    }


def minimind_lora() -> Layer:
    """`sft`: MiniMind's LoRA, rank 16, on every projection: its own code reaches the square ones
    alone (q_proj and o_proj)."""
    return {
        "adapter": {"name": "lora", "rank": 16, "alpha": 16},
        "train": {"epochs": 10, "batch_size": 32, "seq_len": 340},
        "optim": {"lr": 1e-4},
        "schedule": {"name": "minimind", "warmup": 0.02},
    }


def minimind_dpo() -> Layer:
    """`dpo`: MiniMind's stage but for the learning rate: at its 4e-8 the loss stays at ln 2 (its
    steps are below the rounding of its fp16 weights); 1e-6 is what the field takes."""
    return {
        "loss": {"name": "dpo", "beta": 0.15},
        "train": {"epochs": 1, "batch_size": 4, "seq_len": 1024},
        "optim": {"lr": 1e-6},
        "schedule": {"name": "minimind", "warmup": 0.02},
    }


def llama_1b() -> Layer:
    """Llama-3.2-1B's shape, bf16, with the usual pretraining recipe."""
    return {
        "model": shapes.llama_1b(),
        "train": {"batch_size": 4, "grad_accum": 16, "seq_len": 4096},
        "optim": {"lr": 3e-4, "betas": [0.9, 0.95]},
        "schedule": {"name": "cosine", "warmup": 0.01, "min_lr_ratio": 0.1},
    }


def llama_8b() -> Layer:
    """Llama-3.1-8B's shape."""
    layer = llama_1b()
    return {**layer, "model": shapes.llama_8b(),
            "train": {**layer["train"], "batch_size": 1, "grad_accum": 32, "seq_len": 8192}}


PRESETS: dict[str, Callable[[], Layer]] = {
    "demo": demo, "minimind-26m": minimind_26m, "minimind-64m": minimind_64m,
    "minimind-sft": minimind_sft, "minimind-lora": minimind_lora, "minimind-dpo": minimind_dpo,
    "llama-1b": llama_1b, "llama-8b": llama_8b,
}


def preset(name: str) -> Layer:
    """The layer of a preset. Raises UserError naming the nearest one."""
    if name not in PRESETS:
        raise UserError(f"no preset '{name}'{nearest(name, list(PRESETS))}; "
                        f"there are: {', '.join(PRESETS)}")
    return PRESETS[name]()
