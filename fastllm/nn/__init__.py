"""Modules and optimizers with torch's names and signatures that run fastllm's fused ops."""

from fastllm.nn.layers import Dropout, Embedding, GeGLU, SwiGLU
from fastllm.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from fastllm.nn.norms import LayerNorm, RMSNorm
from fastllm.nn.optimizers import SGD, Adagrad, AdamW, AdamW8bit, Lamb, Lion, Muon, RMSprop

__all__ = ["SGD", "Adagrad", "AdamW", "AdamW8bit", "CrossEntropyLoss", "Dropout", "Embedding",
           "GeGLU", "Lamb", "LayerNorm", "LinearCrossEntropyLoss", "Lion", "Muon", "RMSNorm",
           "RMSprop", "SwiGLU"]
