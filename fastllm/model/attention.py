"""Causal grouped-query self-attention, and the cache of keys and values for generation."""

from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.model.config import ModelConfig
from fastllm.model.layers import Linear, RMSNorm


class KVCache:
    """Keys and values of the tokens seen so far, in memory taken once.

    Every row of the batch holds the same number of tokens. Keys are kept after RoPE.

    Args:
        batch_size: rows; capacity: tokens a row.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, *,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        shape = (config.num_hidden_layers, batch_size, capacity, config.kv_heads, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, S, Hkv, D) after what `layer` holds; returns all of it, (B, length + S, Hkv, D).

        `length` moves on only in `advance`, when every layer has put its own.
        """
        end = self.length + key.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row and was given {end}")
        self.keys[layer, :, self.length:end] = key
        self.values[layer, :, self.length:end] = value
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` more tokens a row as seen."""
        self.length += count


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with RoPE and, if asked, QK-norm, a sliding
    window (Beltagy et al., 2020) and a softcap of the scores."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.head_size = config.head_size
        query, key = self.num_heads * self.head_size, self.kv_heads * self.head_size
        self.qkv_proj = Linear(config.hidden_size, bias=config.attention_bias,
                               parts={"q_proj": query, "k_proj": key, "v_proj": key})
        self.o_proj = Linear(query, config.hidden_size, bias=config.attention_output_bias)
        norm = self.head_size, config.rms_norm_eps, config.rms_norm_offset
        self.q_norm = RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm) if config.qk_norm else None
        self.options = _options(config, layer)
        self.prefix: nn.Module | None = None
        """Puts keys and values before every document's own: (k, v, cu_seqlens, max_seqlen) to the
        longer ones. A cache holds them already."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None,
                max_seqlen: int | None, cache: KVCache | None) -> Tensor:
        """(B, S, hidden_size) to the same; cos and sin are (S, D/2) or (B, S, D/2)."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_size))
        q, k, v = heads.split([self.num_heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = ops.qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin,
                                    eps=self.q_norm.eps, offset=self.q_norm.offset)
        else:
            # A view of v would keep the whole projection until the backward; q and k leave it here.
            v = v.contiguous()
            q, k = ops.rope(q, k, cos, sin)
        cu_keys, max_keys = None, max_seqlen
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        elif self.prefix is not None:
            k, v, cu_keys, max_keys = self.prefix(k, v, cu_seqlens, max_seqlen)
        if cu_seqlens is None:
            out = ops.attention(q, k, v, causal=True, **self.options)
        else:
            packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
            out = ops.attention(*packed, causal=True, cu_seqlens_q=cu_seqlens,
                                cu_seqlens_k=cu_keys, max_seqlen_q=max_seqlen,
                                max_seqlen_k=max_keys, **self.options).view(q.shape)
        return self.o_proj(out.flatten(2))


def _options(config: ModelConfig, layer: int) -> dict[str, Any]:
    """What a layer asks of `ops.attention` beyond causal."""
    options: dict[str, Any] = {}
    window = config.window(layer)
    if window is not None:
        options["window"] = (window - 1, 0)     # the window counts the query itself
    if config.attn_logit_softcapping is not None:
        options["softcap"] = config.attn_logit_softcapping
    if config.query_pre_attn_scalar is not None:
        options["scale"] = config.query_pre_attn_scalar ** -0.5
    return options
