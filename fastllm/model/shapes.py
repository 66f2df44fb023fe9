"""Model shapes by name: what each sets of `ModelConfig`, as a layer that a run may override."""

from collections.abc import Callable
from typing import Any

from fastllm.config import UserError, build, nearest
from fastllm.model.config import ModelConfig

Shape = dict[str, Any]


def demo() -> Shape:
    """5.5M parameters with a vocabulary of 4,096: learns visibly in minutes on two CPU cores."""
    return {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 64, "max_position_embeddings": 1024}


def minimind_26m() -> Shape:
    """MiniMind2-small: 25.83M parameters."""
    return {"vocab_size": 6400, "hidden_size": 512, "intermediate_size": 1408,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 64, "max_position_embeddings": 32768, "rope_theta": 1e6}


def minimind_64m() -> Shape:
    """MiniMind-3: 63.91M parameters, with heads of 96 and QK-norm."""
    return {"vocab_size": 6400, "hidden_size": 768, "intermediate_size": 2432,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 96, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "rms_norm_eps": 1e-6, "qk_norm": True}


def llama_1b() -> Shape:
    """The shape of Llama 3.2 1B: 1.24B parameters."""
    return {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "rope_scaling": _llama3(32.0)}


def llama_8b() -> Shape:
    """The shape of Llama 3.1 8B: 8.03B parameters."""
    return {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "rope_scaling": _llama3(8.0), "tie_word_embeddings": False}


def _llama3(factor: float) -> Shape:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


SHAPES: dict[str, Callable[[], Shape]] = {
    "demo": demo, "minimind-26m": minimind_26m, "minimind-64m": minimind_64m,
    "llama-1b": llama_1b, "llama-8b": llama_8b}


def config(name: str, **changes: Any) -> ModelConfig:
    """The `ModelConfig` of a shape, with fields changed. Raises UserError for an unknown name."""
    if name not in SHAPES:
        raise UserError(f"no model shape '{name}'{nearest(name, list(SHAPES))}; "
                        f"there are: {', '.join(SHAPES)}")
    return build(ModelConfig, {**SHAPES[name](), **changes})
