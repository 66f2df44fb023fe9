"""The decoder-only Transformer: token ids to hidden states, and hidden states to logits.

Shapes: B rows, S tokens a row, H hidden_size, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fastllm import ops
from fastllm.model.attention import KVCache
from fastllm.model.block import Block
from fastllm.model.config import ModelConfig
from fastllm.model.init import init_weights
from fastllm.model.layers import Embedding, Linear, RMSNorm, RotaryTable


class Decoder(nn.Module):
    """A decoder-only language model of any shape that `ModelConfig` can say.

    Built under `torch.device("meta")` it takes no memory; `to_empty` and `init_weights`, or
    `hf.load_weights`, fill it then.

    Args:
        generator: source of the initial weights (CPU); None means torch's own, so that
            `torch.manual_seed` governs them.
        initialize: False leaves the weights as the memory was, for a caller who fills them.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None,
                 initialize: bool = True):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTable(config)
        self.rotary_local = None
        if config.rope_local_base_freq is not None:
            self.rotary_local = RotaryTable(config, local=True)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_offset)
        self.lm_head = None
        self.head_change: Any = None
        """A module that changes the output head: `weight(own)` and `logits(hidden, own)`."""
        self.virtual_tokens = 0
        """Tokens before every document that the caller does not see; a cache has room for them."""
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if initialize and not self.embed_tokens.weight.is_meta:
            init_weights(self, generator)

    def forward(self, input_ids: Tensor, *, position_ids: Tensor | None = None,
                cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm: (B, S, H).

        Args:
            input_ids: (B, S) int64, each below vocab_size.
            position_ids: (B, S) int64, each token's position in its document; None means that
                every row is one document (or goes on from `cache`).
            cu_seqlens: (N + 1,) int32, where documents begin in the B * S tokens laid end to end,
                every row's start among them. A token attends within its document only.
            max_seqlen: length of the longest document of `cu_seqlens`.
            cache: keys and values of earlier tokens; those of input_ids are added to it.

        Raises:
            ValueError: wrong shapes, or a document longer than max_position_embeddings.
        """
        self._check(input_ids, position_ids, cu_seqlens, max_seqlen, cache)
        places: Tensor | slice
        if position_ids is None:
            start = cache.length if cache is not None else 0
            places = slice(start, start + input_ids.shape[1])
        else:
            places = position_ids
        far = self.rotary(places)
        near = far if self.rotary_local is None else self.rotary_local(places)
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            # Rounded to the model's type before the product, as Gemma's own is. It stands here and
            # not in the embedding, which adapters replace.
            x = x * torch.full((), x.shape[-1] ** 0.5, dtype=x.dtype, device=x.device)
        if self.config.dropout:
            x = dropout(x, self.config.dropout, self.training)
        for index, layer in enumerate(self.layers):
            cos, sin = far if self.config.window(index) is None else near
            x = layer(x, cos, sin, cu_seqlens, max_seqlen, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) to (..., V), with the softcap where the config has one."""
        if self.head_change is None:
            logits = ops.linear(hidden, self.lm_head_weight)
        else:
            logits = self.head_change.logits(hidden, self._head())
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def lm_head_weight(self) -> Tensor:
        """The output head, (V, H): the embedding where they are tied."""
        return self._head() if self.head_change is None else self.head_change.weight(self._head())

    def _head(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _check(self, input_ids: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None,
               max_seqlen: int | None, cache: KVCache | None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, S), not {tuple(input_ids.shape)}")
        if position_ids is not None and position_ids.shape != input_ids.shape:
            raise ValueError(f"position_ids {tuple(position_ids.shape)} must have the shape of "
                             f"input_ids {tuple(input_ids.shape)}")
        if cu_seqlens is not None and position_ids is None:
            raise ValueError("cu_seqlens needs position_ids: positions restart in every document")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("a cache holds one document a row: it does not go with cu_seqlens")
        seen = cache.length if cache is not None else 0
        longest = seen + (max_seqlen if max_seqlen is not None else input_ids.shape[1])
        if longest > self.config.max_position_embeddings:
            raise ValueError(f"a document of {longest} tokens is longer than the model's "
                             f"max_position_embeddings {self.config.max_position_embeddings}")
