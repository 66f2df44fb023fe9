"""RoPE: an attention's forward, unchanged, with another rotation among its globals."""

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _check
from fastllm.patching._globals import rebound
from fastllm.patching._instance import Replacement, method_of, put, take_back

NAME = "apply_rotary_pos_emb"
Apply = Callable[..., tuple[Tensor, Tensor]]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
           unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb: q, k (B, heads, S, D), tables (B or 1, S, R) whose two
    halves are equal. unsqueeze_dim 2: q, k (B, S, heads, D)."""
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    half = cos.shape[-1] // 2
    cos, sin = (table[..., :half].float() for table in (cos, sin))
    if cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    q, k = ops.rope(q, k, cos, sin)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def find(module: nn.Module) -> Replacement | str | None:
    """What replaces an attention's forward; why nothing does; None for what has no RoPE."""
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if NAME not in names or not isinstance(forward.__globals__.get(NAME), FunctionType):
        other = next((name for name in names if "rotary_pos" in name or "apply_rope" in name), "")
        return f"its forward calls {other}, not {NAME}" if other else None
    like = _check.first(module)
    try:
        _compare(forward.__globals__[NAME], torch.float32, like)
        _compare(forward.__globals__[NAME], like.dtype, like)
    except (_check.Differs, TypeError, ValueError) as error:
        return f"{NAME}: {error}"
    return Replacement(rotating(forward), "ops.rope", method_of(module))


@cache
def rotating(forward: FunctionType) -> FunctionType:
    return rebound(forward, {NAME: rotate})


def _compare(theirs: Apply, dtype: torch.dtype, like: Tensor) -> None:
    """Raise Differs unless the two rotate alike, heads of q and k unequal in number."""
    options: Any = {"device": like.device, "dtype": dtype}
    q, k = torch.randn(2, 4, 5, 16, **options), torch.randn(2, 2, 5, 16, **options)
    angle = torch.rand(2, 5, 8, device=like.device) * 6
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (angle.cos(), angle.sin()))
    _check.same(lambda q, k: torch.cat(rotate(q, k, cos, sin), 1),
                lambda q, k: torch.cat(theirs(q, k, cos, sin), 1), (q, k))


def watch(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, str]:
    """Run the model with both rotations in each attention, on the tables that it really makes.

    Returns why ours cannot stand for theirs, by path, for the modules where that is so.
    """
    whys = dict.fromkeys(modules, "its forward was not reached in a trial run")

    def both(path: str, theirs: Apply) -> Apply:
        def apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out = theirs(*args, **kwargs)
            try:
                for name, a, b in zip(("query", "key"), rotate(*args, **kwargs), out, strict=True):
                    _check.agree(f"the rotated {name}", a, b)
                whys.pop(path, None)
            except (_check.Differs, TypeError, ValueError) as error:
                whys[path] = str(error)
            return out
        return apply

    for path, module in modules.items():
        forward: Any = type(module).forward
        twin = rebound(forward, {NAME: both(path, forward.__globals__[NAME])})
        put(module, Replacement(twin, "trial", method_of(module)))
    try:
        run()
    except Exception as error:
        return dict.fromkeys(modules, f"the model could not be run on sample ids: {error}")
    finally:
        for module in modules.values():
            take_back(module)
    return whys
