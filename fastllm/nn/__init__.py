"""Modules and optimizers with torch's names and signatures that run fastllm's fused ops."""

from fastllm.nn.layers import Dropout, Embedding, GeGLU, SwiGLU
from fastllm.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from fastllm.nn.norms import LayerNorm, RMSNorm

__all__ = ["CrossEntropyLoss", "Dropout", "Embedding", "GeGLU", "LayerNorm",
           "LinearCrossEntropyLoss", "RMSNorm", "SwiGLU"]
