"""Learned keys and values before every document's own, in every layer.

Source: Li & Liang, "Prefix-Tuning", arXiv:2101.00190, without its reparameterisation (PEFT's
default). The learned keys are what attention meets: RoPE and QK-norm do not touch them. The
positions of real tokens begin at v, the number of learned ones, as in PEFT.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.adapters import virtual
from fastllm.adapters.base import Adapter, Switch
from fastllm.model import Decoder


class Prefix(Switch):
    """The keys and values (v, Hkv, D) of one layer, as `Attention.prefix`."""

    def __init__(self, tokens: int, heads: int, head_size: int, like: Tensor):
        super().__init__()
        self.key = nn.Parameter(like.new_zeros(tokens, heads, head_size))
        self.value = nn.Parameter(like.new_zeros(tokens, heads, head_size))

    def forward(self, key: Tensor, value: Tensor, cu_seqlens: Tensor | None,
                max_seqlen: int | None) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
        """Keys and values (B, S, Hkv, D) with the learned ones, the keys' cu_seqlens, the longest.

        Packed ones come back as one row of B * S + N * v.
        """
        if not self.active:
            return key, value, None, max_seqlen
        count = self.key.shape[0]
        if cu_seqlens is None:
            key, value = (torch.cat((own.expand(x.shape[0], *own.shape), x), dim=1)
                          for own, x in ((self.key, key), (self.value, value)))
            return key, value, None, None
        rows, ahead, longer = virtual.places(cu_seqlens, count, key.shape[0] * key.shape[1])
        documents = cu_seqlens.shape[0] - 1
        key, value = (virtual.between(x.flatten(0, 1), own.repeat(documents, 1, 1), rows,
                                      ahead)[None]
                      for own, x in ((self.key, key), (self.value, value)))
        return key, value, longer, None if max_seqlen is None else max_seqlen + count


def _prefixes(model: Decoder) -> list[Prefix]:
    """Of every layer in order."""
    return [module for module in model.modules() if isinstance(module, Prefix)]


def _before(model: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    """`Decoder.forward`'s arguments with positions that begin after the prefix; a new cache is
    given the prefix."""
    count = model.virtual_tokens
    ids, others = virtual.begin(model, args, kwargs)
    positions, cache = others.get("position_ids"), others.get("cache")
    if not count or ids.dim() != 2:
        return None
    if cache is not None:
        if not cache.length:
            for number, prefix in enumerate(_prefixes(model)):
                cache.append(number, *(own.expand(ids.shape[0], *own.shape)
                                       for own in (prefix.key, prefix.value)))
            cache.advance(count)
        if positions is not None:
            others["position_ids"] = positions + count
        return (ids,), others
    longest = others.get("max_seqlen") or ids.shape[1]
    limit = model.config.max_position_embeddings
    if count + longest > limit:
        raise ValueError(f"a document of {longest} tokens after a prefix of {count} is longer than "
                         f"the model's max_position_embeddings {limit}")
    if positions is None and others.get("cu_seqlens") is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if positions is not None:
        others["position_ids"] = positions + count
    return (ids,), others


class PrefixAdapter(Adapter):
    """prefix. First values are normal with the model's init_std."""

    def _attach(self) -> None:
        model, count = self.model, self.config.virtual_tokens
        layers: Any = model.layers
        for number, layer in enumerate(layers):
            made = Prefix(count, model.config.kv_heads, model.config.head_size, self.like)
            for name, parameter in made.named_parameters():
                parameter.copy_(self.draw(f"layers.{number}.{name}", parameter.shape,
                                          model.config.init_std))
            layer.self_attn.prefix = made
        model.virtual_tokens = count
        model.register_forward_pre_hook(_before, with_kwargs=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        # (v, layers * 2 * Hkv * D): each layer's keys, then its values.
        both = [torch.stack((prefix.key, prefix.value), 1) for prefix in _prefixes(self.model)]
        yield "prompt_embeddings", torch.stack(both, 1).flatten(1)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        prefixes = _prefixes(self.model)
        shape = prefixes[0].key.shape
        whole = tensors["prompt_embeddings"].view(shape[0], len(prefixes), 2, *shape[1:])
        for number, prefix in enumerate(prefixes):
            prefix.key.copy_(whole[:, number, 0])
            prefix.value.copy_(whole[:, number, 1])

    def described(self) -> dict[str, Any]:
        shape, config = self.model.config, self.config
        return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": config.virtual_tokens,
                "token_dim": shape.kv_heads * shape.head_size,
                "num_attention_heads": shape.kv_heads, "num_layers": shape.num_hidden_layers,
                "num_transformer_submodules": 1, "prefix_projection": False,
                "encoder_hidden_size": shape.kv_heads * shape.head_size}
