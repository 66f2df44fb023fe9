"""SwiGLU and GeGLU: gated MLPs of separate or packed projections, and experts of stored weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import _check
from fastllm.patching._instance import Replacement, method_of

SEPARATE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
PACKED = (("gate_up_proj", "down_proj"),)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
TANH: Any = {"approximate": "tanh"}


class Gate(NamedTuple):
    """A gated unit's op, and the op that multiplies its result by a weight as well."""

    by: str
    unit: Callable[..., Tensor]
    linear: Callable[..., Tensor]


# By activation, as torch computes it.
GATES: tuple[tuple[Callable[[Tensor], Tensor], Gate], ...] = (
    (F.silu, Gate("ops.swiglu", ops.swiglu, ops.swiglu_linear)),
    (F.gelu, Gate("ops.geglu", ops.geglu, ops.geglu_linear)),
    (partial(F.gelu, **TANH), Gate('ops.geglu(approximate="tanh")', partial(ops.geglu, **TANH),
                                   partial(ops.geglu_linear, **TANH))),
)


def find(module: nn.Module) -> Replacement | str | None:
    """What replaces a gated MLP; why nothing does; None for what is none."""
    act = next((name for name in ACTIVATIONS if callable(getattr(module, name, None))), "")
    if not act:
        return None
    if hasattr(type(module), "_apply_gate"):
        return _experts(module, act)
    for names in (*SEPARATE, *PACKED):
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return _mlp(module, names, act)
    return None


def _mlp(module: nn.Module, names: tuple[str, ...], act: str) -> Replacement | str:
    gate = _gate_of(getattr(module, act), module)
    if isinstance(gate, str):
        return gate
    function = (_packed if len(names) == 2 else _separate)(gate, *names)
    width = getattr(getattr(module, names[0]), "in_features", 0)
    like = _check.first(module)
    if not width:
        return f"{names[0]} does not tell its width"
    try:
        x = _check.tokens(width, like)
        _check.same(partial(function, module), partial(type(module).forward, module), [x])
    except _check.Differs as error:
        return str(error)
    return Replacement(function, gate.by, method_of(module))


def _gate_of(act: Callable[[Tensor], Tensor], module: nn.Module) -> Gate | str:
    """The op whose gate is this activation, judged by its values."""
    like = _check.first(module)
    x = torch.linspace(-8, 8, 257, device=like.device)
    for theirs, gate in GATES:
        try:
            _check.agree("its activation", act(x), theirs(x))
        except _check.Differs:
            continue
        return gate
    return f"its activation {type(act).__name__} is neither SiLU nor GELU"


def _separate(ops: Gate, gate: str, up: str, down: str) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return _product(ops, getattr(self, down), getattr(self, gate)(hidden_states),
                        getattr(self, up)(hidden_states))

    def t5(self: Any, hidden_states: Tensor) -> Tensor:
        h = self.dropout(ops.unit(self.wi_0(hidden_states), self.wi_1(hidden_states)))
        dtype = self.wo.weight.dtype  # kept in float32 in half-precision models, see T5's own
        return self.wo(h if h.dtype == dtype or dtype == torch.int8 else h.to(dtype))

    return t5 if down == "wo" else forward


def _packed(ops: Gate, both: str, down: str) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return _product(ops, getattr(self, down), getattr(self, both)(hidden_states), None)

    return forward


def _product(ops: Gate, down: Any, gate: Tensor, up: Tensor | None) -> Tensor:
    """down(unit(gate, up)). Where down is trained, the unit's result would be kept for that: then
    one op makes it again in its backward."""
    if _check.bare(down) and "forward" not in vars(down) and down.bias is None and (
            down.weight.requires_grad):
        return ops.linear(gate, up, down.weight)
    return down(ops.unit(gate, up))


def _experts(module: nn.Module, act: str) -> Replacement | str | None:
    """transformers' experts call _apply_gate between their two grouped products."""
    if not getattr(module, "has_gate", True):
        return None
    if getattr(module.config, "_experts_implementation", None) == "eager":
        return ("its eager loop multiplies inline; "
                "model.set_experts_implementation('grouped_mm') calls a gate that can be replaced")
    gate = _gate_of(getattr(module, act), module)
    if isinstance(gate, str):
        return gate
    unit = gate.unit

    def function(self: Any, gate_up_out: Tensor) -> Tensor:
        return unit(gate_up_out)

    like = _check.first(module)
    try:
        x = torch.randn(5, 64, device=like.device, dtype=like.dtype)
        _check.same(partial(function, module), partial(type(module)._apply_gate, module), [x])
    except _check.Differs as error:
        return str(error)
    return Replacement(function, gate.by, "_apply_gate")
