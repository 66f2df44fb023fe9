"""Virtual tokens before every document: where they go, plain and packed.

A batch is packed where `cu_seqlens` (N + 1,) says where its N documents begin among the B * S
tokens laid end to end. With v virtual tokens before each the lengths of all grow by v, so nothing
here waits for the device: sizes follow from shapes, places from cu_seqlens.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.model import Decoder


def places(cu_seqlens: Tensor, virtual: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where things lie once `virtual` tokens stand before each of N documents of `tokens` in all.

    Returns (of the real tokens (tokens,) int64, of the virtual ones (N * virtual,) int64, the new
    cu_seqlens (N + 1,) int32), in tokens + N * virtual places.
    """
    device, documents = cu_seqlens.device, cu_seqlens.shape[0] - 1
    bounds = cu_seqlens + virtual * torch.arange(documents + 1, device=device)
    token = torch.arange(tokens, device=device)
    document = torch.bucketize(token, cu_seqlens[1:].long(), right=True).clamp(max=documents - 1)
    ahead = (bounds[:-1, None] + torch.arange(virtual, device=device)).flatten()
    return token + virtual * (document + 1), ahead.long(), bounds.int()


def between(real: Tensor, ahead: Tensor, at_real: Tensor, at_virtual: Tensor) -> Tensor:
    """(tokens + N * virtual, ...) of the real tokens (tokens, ...), and of the virtual ones
    (N * virtual, ...) of the same type, each at its places.

    Its gradient is made of look-ups, so that it is the same in every run.
    """
    out = real.new_empty((real.shape[0] + ahead.shape[0], *real.shape[1:]))
    return out.index_copy(0, at_real, real).index_copy(0, at_virtual, ahead)


def begin(model: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
          ) -> tuple[Tensor, dict[str, Any]]:
    """(input_ids, the other arguments) of a call of `Decoder.forward`."""
    others = dict(kwargs)
    ids = args[0] if args else others.pop("input_ids")
    return ids, others
