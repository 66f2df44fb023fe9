"""torch.optim's optimizers, each step one fused launch over all parameters of a kind.

They are torch.optim.Optimizers: param_groups, closures, state_dict, learning-rate schedulers,
gradient scalers and trainers take them as such. States are float32. A bfloat16 or float16
parameter gets a float32 master, kept in the state, or with stochastic_rounding (bfloat16) none:
its update is then rounded up or down at random, so that the mean is right. The random bits depend
on seed, step and the element's place in the model alone. foreach and fused choose among torch's
implementations and mean nothing here; other options that are not supported raise ValueError.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastllm import ops

Params = Iterable[Any]
Betas = tuple[float, float]


class _Fused(Optimizer):
    """What the optimizers share; a subclass names its op, its states and the op's options."""

    op: Callable[..., Any]

    def __init__(self, params: Params, defaults: dict[str, Any], stochastic_rounding: bool,
                 seed: int, refused: dict[str, Any]) -> None:
        name = type(self).__name__
        for option, value in refused.items():
            if value:
                raise ValueError(f"{name}: {option} is not supported; use torch.optim.{name}")
        for option in ("lr", "weight_decay", "eps"):
            if defaults.get(option, 0.0) < 0:
                raise ValueError(f"{name}: {option} {defaults[option]} is negative")
        for beta in defaults.get("betas", ()):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: a beta is {beta}, not in [0, 1)")
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        super().__init__(params, defaults)

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The op's lists of states by name; None for one that the group does not keep."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The op's keyword arguments."""
        raise NotImplementedError

    def _options_by_tensor(self, members: list[Tensor]) -> dict[str, Any]:
        """The op's keyword arguments that are lists beside the parameters."""
        return {}

    def _first(self, group: dict[str, Any]) -> float:
        """What a state holds before the first step."""
        return 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        offset, offsets = 0, {}
        for group in self.param_groups:
            for p in group["params"]:
                offsets[p] = offset
                offset += p.numel()
        for group in self.param_groups:
            # Parameters that missed some steps for want of a gradient count fewer.
            together: dict[tuple[torch.device, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self._prepare(p, group)
                    together.setdefault((p.device, self.state[p]["step"]), []).append(p)
            for (device, count), members in together.items():
                lists = [name and [self.state[p][name] for p in members]
                         for name in self._states(group)]
                options = self._options(group) | self._options_by_tensor(members)
                type(self).op(
                    members, [p.grad for p in members], *lists,
                    [self.state[p].get("master") for p in members], lr=float(group["lr"]),
                    step=count, grad_scale=torch.ones((), device=device), seed=self.seed,
                    stochastic_rounding=self.stochastic_rounding,
                    offsets=[offsets[p] for p in members], **options)
        return loss

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        """Count the step of one parameter and make what its state lacks."""
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(f"{type(self).__name__}: sparse gradients are not supported; use "
                             f"torch.optim.{type(self).__name__}")
        state = self.state[p]
        state["step"] = int(state.get("step", 0)) + 1
        wide = torch.promote_types(p.dtype, torch.float32)
        for name in self._states(group):
            if name and name not in state:
                state[name] = torch.full_like(p, self._first(group), dtype=wide)
        rounds = self.stochastic_rounding and p.dtype == torch.bfloat16
        if p.dtype != wide and not rounds and "master" not in state:
            state["master"] = p.detach().to(wide)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states stay float32 where torch would cast them to a 16-bit weight's
        type."""
        super().load_state_dict(state_dict)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    dtype = torch.promote_types(value.dtype, torch.float32) \
                        if value.is_floating_point() else value.dtype
                    self.state[p][name] = value.detach().to(p.device, dtype, copy=True)


class AdamW(_Fused):
    """torch.optim.AdamW: Adam with decoupled weight decay."""

    op = ops.adamw_step

    def __init__(self, params: Params, lr: float = 1e-3, betas: Betas = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *,
                 maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 stochastic_rounding: bool = False, seed: int = 0) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            stochastic_rounding, seed, {"amsgrad": amsgrad, "maximize": maximize,
                                        "capturable": capturable,
                                        "differentiable": differentiable})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"],
                "weight_decay": group["weight_decay"]}


class AdamW8bit(AdamW):
    """AdamW whose two moments take one byte each, with a float32 scale a block of 256.

    Parameters of fewer than min_8bit_size elements keep float32 moments, as in bitsandbytes.
    """

    def __init__(self, *args: Any, min_8bit_size: int = 4096, **kwargs: Any) -> None:
        self.min_8bit_size = min_8bit_size
        super().__init__(*args, **kwargs)

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "exp_avg" not in state and p.numel() >= self.min_8bit_size:
            blocks = -(-p.numel() // 256)
            for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                state[name] = torch.zeros_like(p, dtype=dtype)
                state[f"{name}_scale"] = torch.zeros(blocks, device=p.device)
        super()._prepare(p, group)

    def _options_by_tensor(self, members: list[Tensor]) -> dict[str, Any]:
        return {f"{name}_scales": [self.state[p].get(f"{name}_scale") for p in members]
                for name in ("exp_avg", "exp_avg_sq")}


class Lamb(_Fused):
    """LAMB (You et al., arXiv:1904.00962): AdamW with a trust ratio for each tensor.

    Norms and biases, which the ratio should leave alone, go to an AdamW of their own.
    """

    op = ops.lamb_step

    def __init__(self, params: Params, lr: float = 1e-3, betas: Betas = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 1e-2, *,
                 stochastic_rounding: bool = False, seed: int = 0) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            stochastic_rounding, seed, {})

    _states, _options = AdamW._states, AdamW._options


class Muon(_Fused):
    """torch.optim.Muon: momentum made orthogonal, for matrices.

    Embeddings, the head, norms and biases go to an AdamW of their own, as with torch's.
    """

    op = ops.muon_step

    def __init__(self, params: Params, lr: float = 1e-3, weight_decay: float = 0.1,
                 momentum: float = 0.95, nesterov: bool = True,
                 ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
                 eps: float = 1e-7, ns_steps: int = 5, adjust_lr_fn: str | None = None, *,
                 stochastic_rounding: bool = False, seed: int = 0) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                     "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps,
                     "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn},
            stochastic_rounding, seed, {})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer",)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        names = "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"
        return {"adjust_lr_fn": group["adjust_lr_fn"] or "original",
                **{name: group[name] for name in names}}


class Lion(_Fused):
    """Lion (Chen et al., arXiv:2302.06675): the sign of an interpolated momentum, decoupled
    weight decay."""

    op = ops.lion_step

    def __init__(self, params: Params, lr: float = 1e-4, betas: Betas = (0.9, 0.99),
                 weight_decay: float = 0.0, *, stochastic_rounding: bool = False,
                 seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay},
                         stochastic_rounding, seed, {})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg",)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}


class SGD(_Fused):
    """torch.optim.SGD."""

    op = ops.sgd_step

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0.0,
                 dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False, *,
                 maximize: bool = False, foreach: bool | None = None,
                 differentiable: bool = False, fused: bool | None = None,
                 stochastic_rounding: bool = False, seed: int = 0) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("SGD: nesterov needs a momentum and no dampening")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "dampening": dampening,
                     "weight_decay": weight_decay, "nesterov": nesterov},
            stochastic_rounding, seed, {"maximize": maximize, "differentiable": differentiable})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] else None,)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("momentum", "dampening", "nesterov",
                                               "weight_decay")}


class Adagrad(_Fused):
    """torch.optim.Adagrad."""

    op = ops.adagrad_step

    def __init__(self, params: Params, lr: float = 1e-2, lr_decay: float = 0.0,
                 weight_decay: float = 0.0, initial_accumulator_value: float = 0.0,
                 eps: float = 1e-10, foreach: bool | None = None, *, maximize: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 stochastic_rounding: bool = False, seed: int = 0) -> None:
        super().__init__(
            params, {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps,
                     "initial_accumulator_value": initial_accumulator_value},
            stochastic_rounding, seed, {"maximize": maximize, "differentiable": differentiable})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("sum",)

    def _options_by_tensor(self, members: list[Tensor]) -> dict[str, Any]:
        """The op's keyword arguments that are lists beside the parameters."""
        return {}

    def _first(self, group: dict[str, Any]) -> float:
        return group["initial_accumulator_value"]

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("lr_decay", "eps", "weight_decay")}


class RMSprop(_Fused):
    """torch.optim.RMSprop."""

    op = ops.rmsprop_step

    def __init__(self, params: Params, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False,
                 capturable: bool = False, foreach: bool | None = None, maximize: bool = False,
                 differentiable: bool = False, *, stochastic_rounding: bool = False,
                 seed: int = 0) -> None:
        super().__init__(
            params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay,
                     "momentum": momentum, "centered": centered},
            stochastic_rounding, seed, {"capturable": capturable, "maximize": maximize,
                                        "differentiable": differentiable})

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("square_avg", "grad_avg" if group["centered"] else None,
                "momentum_buffer" if group["momentum"] else None)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("alpha", "eps", "weight_decay", "momentum")}
