"""RMSNorm and LayerNorm: leaf modules with a 1-D weight and an epsilon, known by what they do."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.patching import _check
from fastllm.patching._instance import Replacement, method_of, own

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")


def find(module: Any) -> Replacement | str | None:
    """What replaces a norm; why nothing does; None for what is no norm."""
    if next(module.children(), None) is not None:
        return None
    names = {name for name, _ in module.named_parameters(recurse=False)}
    epsilon = next((name for name in EPSILONS if hasattr(module, name)), "")
    named = "norm" in type(module).__name__.lower()
    if not names or not names <= {"weight", "bias"} or "weight" not in names or not epsilon:
        return "it is not a norm with a weight and an epsilon" if named else None
    if module.weight.dim() != 1:
        return f"its weight is {tuple(module.weight.shape)}, not one row" if named else None
    whys = []
    for make, by in _CANDIDATES:
        function = make(epsilon)
        try:
            keeps = _compare(module, function)
        except (_check.Differs, RuntimeError, TypeError) as error:
            whys.append(f"{by}: {error}")
        else:
            return Replacement(make(epsilon, keeps), by, method_of(module))
    return f"it computes neither norm ({'; '.join(whys)})"


def _rms(offset: float) -> Callable[..., Callable[..., Tensor]]:
    options = {"offset": offset} if offset else {}

    def make(epsilon: str, keeps: bool = True) -> Callable[..., Tensor]:
        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            x, weight = hidden_states, self.weight
            out = _result_type(x, weight, keeps)
            if out is None:
                return own(self, "forward")(x)
            eps = getattr(self, epsilon)
            if eps is None:  # torch.nn.RMSNorm's default, of the type that it computes in
                eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
            y = ops.rms_norm(x, weight, eps, **options)
            return y if y.dtype == out else y.to(out)
        return forward

    return make


def _layer(epsilon: str, keeps: bool = True) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        out = _result_type(x, weight, keeps)
        if out is None:
            return own(self, "forward")(x)
        y = ops.layer_norm(x, weight, getattr(self, "bias", None), getattr(self, epsilon))
        return y if y.dtype == out else y.to(out)
    return forward


def _result_type(x: Tensor, weight: Tensor, keeps: bool) -> torch.dtype | None:
    """The result's type for a float32 weight beside narrower activations; None: ask the module."""
    if x.dtype == weight.dtype:
        return x.dtype
    if weight.dtype == torch.float32:
        return x.dtype if keeps else torch.float32
    return None


_CANDIDATES = ((_rms(0.0), "ops.rms_norm"), (_rms(1.0), "ops.rms_norm(offset=1)"),
               (_layer, "ops.layer_norm"))


def _compare(module: Any, function: Callable[..., Tensor]) -> bool:
    """Raise Differs unless the function is the module's forward for random parameters, in float32
    and in its own type. Returns whether the module keeps its input's type beside a wider weight."""
    weight = module.weight
    names = [name for name, _ in module.named_parameters(recurse=False)]

    def run(forward: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        twin = copy.copy(module)
        twin._parameters = module._parameters | dict(zip(names, parameters, strict=True))
        return forward(twin, x)

    theirs = type(module).forward
    for dtype in dict.fromkeys((torch.float32, weight.dtype)):
        random = [torch.randn_like(weight, dtype=dtype) for _ in names]
        _check.same(partial(run, function), partial(run, theirs),
                    [_check.tokens(weight.shape[0], weight, dtype), *random])
    wide = [torch.randn_like(weight, dtype=torch.float32) for _ in names]
    narrow = _check.tokens(weight.shape[0], weight, torch.bfloat16)
    try:
        with warnings.catch_warnings(action="ignore"):
            return run(theirs, narrow, *wide).dtype == torch.bfloat16
    except RuntimeError:  # torch's own LayerNorm takes one type only
        return True
