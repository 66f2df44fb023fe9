"""Attention masks as ops.attention takes them: bounds of the window, boundaries of sequences.

transformers makes the mask once a forward, by the function that AttentionMaskInterface keeps under
the attention's name, and hands it to every layer. Ours returns a `Mask` where the pattern is causal
or whole, with or without a window, padding or packed documents, and transformers' own mask else.
No host waits for a GPU here.
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.patching._globals import innermost, names_in, rebound
from fastllm.patching._instance import Replacement, foreign, method_of

NAME = "fastllm"
NATIVE = ("sdpa", "eager")
MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_bidirectional_mask",
          "create_bidirectional_sliding_window_mask")
METHODS = ("forward", "_create_attention_masks")
CUSTOM = ("or_mask_function", "and_mask_function", "block_sequence_ids")
HOLES = ("fastllm: an attention mask has padding between tokens, which cannot be seen without "
         "waiting for the GPU; fastllm.patch(model, skip=('attention',)) runs such batches")


class Mask(NamedTuple):
    """What each query sees: keys from `left` before to `right` after it (-1: no bound), the last
    query being at the last key, within its sequence."""

    native: "Native"
    left: int
    right: int
    padded: bool = False
    queries: Tensor | None = None
    """(N + 1,) int32: where sequences begin among the B * Sq queries; None: each row is one."""
    keys: Tensor | None = None
    """The same for the B * Sk keys."""

    def contiguous(self) -> Tensor | None:
        """generate() makes masks ahead for a static cache, and wants tensors."""
        return self.native()


class Native:
    """Makes transformers' own mask, once a forward."""

    def __init__(self, make: Callable[[], Tensor | None]):
        self.make = make
        self.made: tuple[Tensor | None, ...] = ()

    def __call__(self) -> Tensor | None:
        if torch.compiler.is_compiling():
            return self.make()
        self.made = self.made or (self.make(),)
        return self.made[0]


class Asking:
    """Stands for a config in one call of transformers, which asks it whose mask to make."""

    def __init__(self, config: Any, position_ids: Tensor | None, plain: bool):
        self._attn_implementation = NAME
        self.native = config._attn_implementation
        self.is_causal = getattr(config, "is_causal", True)
        self.sliding_window = getattr(config, "sliding_window", None)
        self.position_ids, self.plain = position_ids, plain


def mask(**given: Any) -> Any:
    """AttentionMaskInterface's function, with its arguments: a Mask, or transformers' own."""
    from transformers import masking_utils

    asking = given["config"]
    if isinstance(asking, Asking):
        own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[asking.native]
        native = Native(partial(own, **given))
    else:  # without a mask, ours aligns the last query and key, sdpa the first
        own = masking_utils.sdpa_mask
        native = Native(partial(own, **{**given, "allow_is_causal_skip": False}))
    packed = _is_packed(asking, given)
    bounds = _bounds(asking, given, packed)
    if bounds is None:
        return native()
    queries, keys, padding = given["q_length"], given["kv_length"], given["attention_mask"]
    bounded = bounds != (-1, -1)
    begin, first = given["q_offset"], given["kv_offset"]
    if bounded and (isinstance(begin, Tensor) or first + keys != begin + queries):
        return native()  # a cache that has room for more
    if packed:
        ends = _documents(asking.position_ids.expand(given["batch_size"], -1))
        return Mask(native, *bounds, False, ends, ends)
    if padding is not None:
        padding = padding[:, first:first + keys]
        if padding.shape[1] != keys or (bounded and queries != keys):
            return native()
        if padding.device.type == "cpu" and not torch.compiler.is_compiling():
            if padding.all():
                padding = None
            elif not _whole(padding):
                return native()
        else:
            torch._assert_async(_whole(padding), HOLES)
    if padding is None:
        return Mask(native, *bounds)
    return Mask(native, *bounds, True, *_runs(padding, queries, bounded))


def _is_packed(asking: Any, given: dict[str, Any]) -> bool:
    """Whether transformers saw several documents in a row, by their position_ids alone."""
    return (isinstance(asking, Asking) and asking.plain and asking.position_ids is not None
            and asking.position_ids.dim() == 2 and given["attention_mask"] is None
            and not given["allow_is_causal_skip"] and given["q_length"] == given["kv_length"])


def _bounds(asking: Any, given: dict[str, Any], packed: bool) -> tuple[int, int] | None:
    """(left, right) of the pattern; None where it may be another than those that we have."""
    from transformers import masking_utils

    pattern, size = given["mask_function"], given.get("local_size")
    if pattern is masking_utils.causal_mask_function:
        return -1, 0
    if pattern is masking_utils.bidirectional_mask_function:
        return -1, -1
    if size is not None and (size != getattr(asking, "sliding_window", None) or
                             getattr(asking, "attention_chunk_size", None) is not None):
        return None  # chunks have a size as well
    if packed or (given["allow_is_causal_skip"] and size is not None):
        return (-1 if size is None else size - 1), 0
    if given.get("allow_is_bidirectional_skip") and size is not None:
        return size, size
    return None


def _whole(padding: Tensor) -> Tensor:
    """Whether the tokens of each row (B, S) stand together."""
    before = F.pad(padding[:, :-1], (1, 0))
    return ((padding & ~before).sum(1) <= 1).all()


def _runs(padding: Tensor, queries: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Boundaries of queries and keys for rows that are padded in front, behind or both.

    A query that is padding sees nothing where the mask has bounds, and else what all others see.
    """
    rows, keys = padding.shape
    first = padding.int().argmax(1)
    last = first + padding.sum(1)
    none, every = torch.zeros_like(first), torch.full_like(first, queries)
    all_keys = torch.full_like(first, keys)
    row = torch.arange(rows, device=padding.device)[:, None]

    def starts(length: int, *ends: Tensor) -> Tensor:
        return F.pad((torch.stack(ends, 1) + row * length).flatten(), (1, 0)).int()

    if bounded:  # padding of queries, of keys, tokens, padding of queries, of keys
        return (starts(queries, first, first, last, every, every),
                starts(keys, none, first, last, last, all_keys))
    # padding of keys, tokens, padding of keys
    return starts(queries, none, every, every), starts(keys, first, last, all_keys)


def _documents(position_ids: Tensor) -> Tensor:
    """Boundaries of the documents in rows (B, S), each of which starts where positions jump."""
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten()
    place = torch.arange(starts.shape[0], device=starts.device)
    if torch.compiler.is_compiling():  # as many sequences as tokens, most of them empty
        place = torch.where(starts, place, starts.shape[0]).sort().values
    else:  # transformers has waited for these positions already
        place = place[starts]
    return F.pad(place, (0, 1), value=starts.shape[0]).int()


# --------------------------------------------------------------------- who makes masks in a model


def makers(model: nn.Module, others: Collection[str]) -> dict[str, tuple[nn.Module, Replacement]]:
    """The modules that make masks, by path, and what lets them make ours.

    others: paths of attentions that want transformers' own; so whoever makes these is left out.
    """
    found = {}
    for path, module in model.named_modules():
        for name in METHODS:
            method = getattr(type(module), name, None)
            if method is None or not names_in(method).intersection(MAKERS) or (
                    "labels" in inspect.signature(method).parameters):
                continue
            where = method_of(module) if name == "forward" else name
            if not foreign(module, where):
                with suppress(ValueError):  # then it makes transformers' own
                    found[path] = module, Replacement(_asking(method), "", where)
    for path in others:
        found.pop(above(path, found), None)
    return found


def above(path: str, makers: Collection[str]) -> str:
    """The maker of the masks that a module at `path` gets: the nearest above it; or "none"."""
    over = [maker for maker in makers if not maker or path == maker or path.startswith(maker + ".")]
    return max(over, key=len, default="none")


def _asking(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose calls of transformers' mask functions ask for ours."""
    signature = inspect.signature(method)
    given = [True]  # whether the caller gave position_ids: a model's own never hold documents

    def asking(create: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("config")
            if args or getattr(config, "_attn_implementation", "") not in NATIVE:
                return create(*args, **kwargs)
            if not given[0]:
                kwargs["position_ids"] = None
            plain = kwargs.get("allow_is_causal_skip", True) and all(
                kwargs.get(name) is None for name in CUSTOM)
            asked = Asking(config, kwargs.get("position_ids"), plain)
            return create(**{**kwargs, "config": asked})
        return make

    names = innermost(method).__globals__
    twin = rebound(method, {name: asking(names[name]) for name in MAKERS if name in names})
    if "position_ids" not in signature.parameters:
        return twin

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = signature.bind_partial(self, *args, **kwargs).arguments if args else kwargs
        given[0] = mine.get("position_ids") is not None
        try:
            return twin(self, *args, **kwargs)
        finally:
            given[0] = True

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = method.__doc__
    return forward
