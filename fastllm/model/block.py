"""One pre-norm Transformer block, and how its activations are kept or computed again."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastllm import ops
from fastllm.model.attention import Attention, KVCache
from fastllm.model.config import ModelConfig
from fastllm.model.layers import Linear, RMSNorm, made_again


class MLP(nn.Module):
    """SwiGLU or GeGLU (Shazeer, 2020): down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, bias=config.mlp_bias,
                                   parts={"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.hidden_act = config.hidden_act
        self.recompute = config.recompute

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        hidden = self._gate(both)
        if self.recompute != "none":  # then checkpointing decides what is kept
            return self.down_proj(hidden)
        with made_again(hidden, self._gate, both):  # gate and up are kept anyway
            return self.down_proj(hidden)

    def _gate(self, both: Tensor) -> Tensor:
        if self.hidden_act == "silu":
            return ops.swiglu(both)
        return ops.geglu(both, approximate="tanh")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With sandwich_norms each branch is normed once more before it is added, and the names of norms
    are Gemma 2's: post_attention_layernorm is the second one of attention.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.dropout, self.recompute = config.dropout, config.recompute
        norm = config.hidden_size, config.rms_norm_eps, config.rms_norm_offset
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config)
        self.pre_feedforward_layernorm = RMSNorm(*norm) if config.sandwich_norms else None
        self.post_feedforward_layernorm = RMSNorm(*norm) if config.sandwich_norms else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None = None,
                max_seqlen: int | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, S, hidden_size) to the same; the other arguments are `Attention.forward`'s."""
        if self.recompute == "none" or cache is not None or not torch.is_grad_enabled():
            return self._run(x, cos, sin, cu_seqlens, max_seqlen, cache)
        # The random state is kept and set again, so that dropout drops the same elements twice.
        arguments: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
        if self.recompute == "selective":
            arguments["context_fn"] = _selective_contexts
        return checkpoint(self._run, x, cos, sin, cu_seqlens, max_seqlen, None, **arguments)

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None,
             max_seqlen: int | None, cache: KVCache | None) -> Tensor:
        normed = self.input_layernorm(x)
        with self._made_again(normed, self.input_layernorm, x):
            branch = self.self_attn(normed, cos, sin, cu_seqlens, max_seqlen, cache)
        norm = self.post_attention_layernorm
        if self.pre_feedforward_layernorm is not None:
            branch, norm = norm(branch), self.pre_feedforward_layernorm
        x = x + self._drop(branch)
        normed = norm(x)
        with self._made_again(normed, norm, x):
            branch = self.mlp(normed)
        if self.post_feedforward_layernorm is not None:
            branch = self.post_feedforward_layernorm(branch)
        return x + self._drop(branch)

    def _made_again(self, normed: Tensor, norm: RMSNorm, x: Tensor) -> AbstractContextManager[None]:
        """`made_again` for a norm, whose input is kept anyway; not where checkpointing decides."""
        return made_again(normed, norm, x) if self.recompute == "none" else nullcontext()

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training) if self.dropout else x


# The costly operators, whatever backend runs them. torch.bmm is not among them on purpose: plain
# attention is made of it, and its scores (S x S a head) are what checkpointing is there to drop.
_KEPT = ("::mm", "::addmm", "::linear", "::_linear_pointwise", "attention",
         "lora_linear", "quantized_linear")


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    kept = any(name.endswith(costly) if costly.startswith("::") else costly in name
               for costly in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)
