"""Decoder-only Transformers: shape, layers, initial weights, Hugging Face names."""

from fastllm.model.attention import KVCache
from fastllm.model.config import (
    ModelConfig,
    RopeScaling,
    flops_per_token,
    matmul_parameters,
    num_parameters,
)
from fastllm.model.decoder import Decoder
from fastllm.model.init import filler, init_weights

__all__ = ["Decoder", "KVCache", "ModelConfig", "RopeScaling", "filler", "flops_per_token",
           "init_weights", "matmul_parameters", "num_parameters"]
