"""Modules and optimizers with torch's names and signatures that run fastllm's fused ops."""

from fastllm.nn.layers import Dropout, Embedding, GeGLU, SwiGLU
from fastllm.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from fastllm.nn.norms import LayerNorm, RMSNorm
from fastllm.nn.optimizers import SGD, Adagrad, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adagrad", "AdamW", "CrossEntropyLoss", "Dropout", "Embedding", "GeGLU",
           "LayerNorm", "LinearCrossEntropyLoss", "Lion", "RMSNorm", "RMSprop", "SwiGLU"]
