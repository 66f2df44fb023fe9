"""Attention: transformers' AttentionInterface with ops.attention under the name "fastllm".

A patched instance gets a copy of its class's forward in which the table of attention functions is
ours, and the modules that make masks make those of `_masks`. Configs stay as they are. What the op
does not have runs the model's own function, with transformers' own mask.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _masks, _rope
from fastllm.patching._globals import names_in, rebound
from fastllm.patching._instance import Replacement, method_of
from fastllm.patching._masks import NAME, NATIVE, Mask

TABLE = "ALL_ATTENTION_FUNCTIONS"
BY = "ops.attention"
WIDEST = 256  # elements of a head that the kernel takes
OTHERS = ("position_bias", "head_mask", "cache", "block_table")
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
Function = Callable[..., tuple[Tensor, Tensor | None]]


def register() -> None:
    """Enter ops.attention into transformers as the attention implementation "fastllm".

    Afterwards `from_pretrained(..., attn_implementation="fastllm")` and
    `model.set_attn_implementation("fastllm")` take it; `patch` does not need either.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, partial(attend, NAME, _own))
    AttentionMaskInterface.register(NAME, _masks.mask)


# --------------------------------------------------------------------------- the attention itself


def attend(kind: str, theirs: Function, module: nn.Module, query: Tensor, key: Tensor,
           value: Tensor, attention_mask: Any = None,
           **options: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, Hq, Sq, D), key, value (B, Hkv, Sk, D), result
    (B, Sq, Hq, D) and None for the weights.

    kind: the implementation that the model's config names, theirs: its function, which runs where
    ops.attention has not what is asked for.
    """
    query, key, value = _autocast(query, key, value)
    if beyond(kind, module, query, key, value, attention_mask, options):
        if isinstance(attention_mask, Mask):
            if attention_mask.queries is None and _lengths(options):
                attention_mask = _dense(attention_mask, query, key, options)
                if kind == "eager":
                    attention_mask = _added(attention_mask, query.dtype)
            else:
                attention_mask = attention_mask.native()
        return theirs(module, query, key, value, attention_mask, **options)
    return fused(kind, module, query, key, value, attention_mask, options), None


def beyond(kind: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
           options: Mapping[str, Any]) -> str:
    """What of a call ops.attention has not; empty where it has all."""
    if isinstance(mask, Tensor):
        return "mask of its own"
    if options.get("dropout"):
        return "dropout of probabilities"
    for name in OTHERS:
        if options.get(name) is not None:
            return name
    if options.get("output_attentions", getattr(module.config, "output_attentions", False)):
        return "output_attentions"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of several types"
    if query.shape[-1] != key.shape[-1] or value.shape[-1] > key.shape[-1] or (
            query.shape[1] % key.shape[1]):
        return "heads of unequal width or number"
    if query.device.type == "cuda" and query.shape[-1] > WIDEST:
        return f"heads of more than {WIDEST} elements"
    aligned = query.shape[2] in (1, key.shape[2])
    if mask is None and kind == "sdpa" and not aligned and _causal(kind, module, options):
        return "causal mask that aligns the first query and key"
    return ""


def _causal(kind: str, module: Any, options: Mapping[str, Any]) -> bool:
    """Whether a call without a mask is causal; to an eager function it never is."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return bool(causal) and kind != "eager"


def _lengths(options: Mapping[str, Any]) -> bool:
    return all(options.get(name) is not None for name in LENGTHS)


def fused(kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
          mask: Mask | None, options: Mapping[str, Any]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    (rows, queries), keys, width = q.shape[:2], k.shape[1], v.shape[-1]
    if width < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - width))
    asked: dict[str, Any] = {"scale": options.get("scaling"), "softcap": options.get("softcap"),
                             "sinks": options.get("s_aux")}
    if mask is not None:
        asked["window"] = mask.left, mask.right
    elif _causal(kind, module, options) and queries > 1:
        asked["window"] = -1, 0
    if mask is None and kind == NAME and options.get("sliding_window"):
        left = options["sliding_window"] - 1  # transformers counts the token itself
        asked["window"] = left, asked.get("window", (-1, left))[1]
    if mask is not None and mask.queries is not None:
        asked |= {"cu_seqlens_q": mask.queries, "cu_seqlens_k": mask.keys}
        if mask.padded:
            asked |= {"max_seqlen_q": queries, "max_seqlen_k": keys}
    elif _lengths(options):
        asked |= {"cu_seqlens_q": options[LENGTHS[0]], "cu_seqlens_k": options[LENGTHS[1]]}
        for name, length in (("max_seqlen_q", "max_length_q"), ("max_seqlen_k", "max_length_k")):
            if isinstance(options.get(length), int):
                asked[name] = options[length]
    else:
        return ops.attention(q, k, v, **asked)[..., :width]
    out = ops.attention(*(x.flatten(0, 1) for x in (q, k, v)), **asked)
    return out.unflatten(0, (rows, queries))[..., :width]


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as autocast hands them to torch's own attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _dense(mask: Mask, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> Tensor:
    """(1, 1, Sq, Sk) bool: the mask of one row that cu_seq_lens cut."""
    if query.shape[0] != 1:
        raise ValueError("attention: cu_seq_lens are for one row of sequences where dropout or "
                         f"another option needs a mask; there are {query.shape[0]}")
    of, place = [], []
    for name, count in zip(LENGTHS, (query.shape[2], key.shape[2]), strict=True):
        ends = options[name][1:].contiguous()
        token = torch.arange(count, device=query.device, dtype=ends.dtype)
        of.append(torch.bucketize(token, ends, right=True))
        last = ends[of[-1].clamp(max=ends.shape[0] - 1)]
        place.append(token - last)  # from the end, where queries and keys are aligned
    distance = place[1][None, :] - place[0][:, None]
    seen = of[0][:, None] == of[1][None, :]
    if mask.right >= 0:
        seen = seen & (distance <= mask.right)
    if mask.left >= 0:
        seen = seen & (distance >= -mask.left)
    return seen[None, None]


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as eager functions add it to the scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _own(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
         **options: Any) -> tuple[Tensor, Tensor | None]:
    """What a model loaded with "fastllm" runs beyond the op: its file's eager function where SDPA
    lacks an option, else SDPA."""
    from transformers import AttentionInterface

    lacks = [name for name in ("softcap", "s_aux", "output_attentions") if options.get(name)
             is not None and options[name] is not False]
    if not lacks:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"attention: {type(module).__name__} has no function for {lacks[0]}")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = _added(attention_mask, query.dtype)
    return eager(module, query, key, value, attention_mask, **options)


# ------------------------------------------------------------------------------------ replacement


class Table:
    """Stands for ALL_ATTENTION_FUNCTIONS, `own`, in a patched forward."""

    def __init__(self, own: Any, around: Callable[[str, Function], Function]):
        self.own, self.around = own, around

    def get_interface(self, name: str, default: Function) -> Function:
        """What runs for the implementation that the config names, now or since set by the user."""
        theirs = self.own.get_interface(name, default)
        return self.around(name, theirs) if name in NATIVE else theirs


def _around(kind: str, theirs: Function) -> Function:
    return partial(attend, kind, theirs)


def find(module: Any) -> Replacement | str | None:
    """What replaces the forward of an attention; why nothing does; None for what is none."""
    forward = type(module).forward
    names = names_in(forward)
    if TABLE not in names:
        return None
    if "get_interface" not in names:
        return f"its forward does not ask {TABLE} for an interface"
    kind = getattr(module.config, "_attn_implementation", None)
    if kind not in NATIVE:
        return f"its attention implementation is {kind!r}, not sdpa or eager"
    if kind == "eager" and "output_attentions" in inspect.signature(forward).parameters:
        return "its forward does not say whether the eager function's weights are wanted"
    return Replacement(attending(forward, False), BY, method_of(module))


@cache
def attending(forward: FunctionType, rope: bool) -> FunctionType:
    """A copy of a forward that runs ops.attention; rope: and ops.rope."""
    return running(forward, _around, rope)


def running(forward: FunctionType, around: Callable[[str, Function], Function],
            rope: bool) -> FunctionType:
    names = {TABLE: Table(forward.__globals__[TABLE], around)}
    return rebound(forward, {**names, _rope.NAME: _rope.rotate} if rope else names)
