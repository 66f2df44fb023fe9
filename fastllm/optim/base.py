"""What every optimizer is: unscale, clip, update and write-back over all parameters of a model.

Computed in fp32 whatever the dtype of the parameters. bf16 and fp16 parameters have an fp32 master
beside them; bf16 ones may instead be rounded stochastically, without a master.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastllm import ops
from fastllm.config import UserError
from fastllm.kernels._block8 import blocks
from fastllm.optim.config import OptimConfig
from fastllm.optim.groups import ParamGroup, param_groups
from fastllm.pieces import Piece

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """Where a piece of a parameter lies."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: int
    """Of the piece's first element in it."""
    start: int
    """Of the piece's first element among all parameters of the model."""


@dataclass
class Share:
    """Some of the parameters in one step, as the step functions of `ops` take them."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    masters: list[Tensor | None]
    offsets: list[int]
    group: ParamGroup
    common: dict[str, Any]
    """lr, step, grad_scale, stochastic_rounding and seed."""

    def state(self, name: str) -> list[Tensor]:
        """One state of every parameter."""
        return [states[name] for states in self.states]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that every step function has."""
        return {**self.common, "weight_decay": self.group.weight_decay, "offsets": self.offsets}

    def split(self, first: Sequence[bool]) -> tuple["Share", "Share"]:
        """Those where `first` is true, and the others."""
        def chosen(wanted: bool) -> Share:
            at = [i for i, yes in enumerate(first) if yes == wanted]
            return Share([self.params[i] for i in at], [self.grads[i] for i in at],
                         [self.states[i] for i in at], [self.masters[i] for i in at],
                         [self.offsets[i] for i in at], self.group, self.common)

        return chosen(True), chosen(False)


class Optimizer:
    """Global-norm clipping, fp32 masters, and a gate against non-finite gradients.

    named_parameters: those with requires_grad are optimized; contiguous, fp32, bf16 or fp16, all on
    one device. Masters are copies made here: build the optimizer after the weights are loaded, or
    call `sync_masters`.
    seed: of stochastic rounding, which depends on it, on the step and on an element's place among
    all parameters in the given order; not on threads, groups or splits.
    places: by name, where the parameters lie of which only pieces are given (a rank's own).

    A step is `norm = step(lr, gradients)` and, when the host has read the norm, `applied(finite)`.
    Where the norm is not finite, `step` leaves weights and states bitwise as they were: the device
    decides that by itself. The host learns of it from the norm, and `applied(False)` keeps the step
    from counting.

    A subclass says which states a parameter has (`new_states`) and how some parameters are updated
    (`update`).
    """

    elementwise: ClassVar[bool] = True
    """Whether an element's update depends on nothing but itself, so that pieces can be updated."""

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig, *,
                 seed: int = 0, places: Mapping[str, Place] | None = None) -> None:
        config.validate()
        if places is not None and not self.elementwise:
            raise UserError(f"optim.name {config.name} needs whole parameters, and dist.zero 1 to "
                            "3 shards them: use dist.zero 0, or another optimizer")
        self.config, self.seed = config, seed
        shapes = {name: place.shape for name, place in (places or {}).items()}
        self.groups = param_groups(named_parameters, config.weight_decay or 0.0,
                                   decay_embeddings=config.decay_embeddings, shapes=shapes,
                                   may_be_empty=places is not None)
        ordered = sorted((position, name, param) for group in self.groups for position, name, param
                         in zip(group.positions, group.names, group.params, strict=True))
        self.names = [name for _, name, _ in ordered]
        self._params = [param for _, _, param in ordered]
        for name, param in zip(self.names, self._params, strict=True):
            self._check(name, param)
        self.places = [Place(tuple(param.shape), 0, index) for param, index in
                       zip(self._params, _offsets(self._params), strict=True)] \
            if places is None else [places[name] for name in self.names]
        self.offsets = [place.start for place in self.places]
        self.states = [self.new_states(name, param, prod(place.shape)) for name, param, place in
                       zip(self.names, self._params, self.places, strict=True)]
        """Of each parameter, by name; a state's name is its name in the checkpoint too."""
        self.masters = [self._master(param) for param in self._params]
        self.steps = 0
        """Steps that changed the weights."""
        self._unsettled = False

    def new_states(self, name: str, param: Tensor, whole: int) -> dict[str, Tensor]:
        """The states of a parameter, or of a piece of one of `whole` elements, before any step."""
        raise NotImplementedError

    def update(self, share: Share) -> None:
        """Update some parameters of one group, and their states and masters, in place."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """The optimized parameters, in the order of `gradients`."""
        return list(self._params)

    def state_bytes(self) -> int:
        """Memory of the states, without the masters."""
        return sum(tensor.numel() * tensor.element_size()
                   for states in self.states for tensor in states.values())

    def held_bytes(self) -> int:
        """Memory of the states and the masters."""
        return self.state_bytes() + sum(master.numel() * master.element_size()
                                        for master in self.masters if master is not None)

    @torch.no_grad()
    def step(self, lr: float, gradients: Sequence[Tensor | None] | None = None, *,
             unscale: float = 1.0, norm: Tensor | None = None) -> Tensor:
        """One update; returns the global L2 norm of the gradients times `unscale`, 0-d fp32.

        gradients: one for each of `parameters()`, fp32 or 16-bit, left unchanged; None leaves its
        parameter alone. By default every `param.grad`.
        unscale: multiplies every gradient first (1 / loss scale).
        norm: of the gradients before it, 0-d fp32, where other ranks hold some of them.
        Raises RuntimeError if `applied` was not called since the last step.
        """
        if self._unsettled:
            raise RuntimeError(f"call {type(self).__name__}.applied(finite) after every step: the "
                               "number of the next one counts the steps that changed the weights")
        given = [param.grad for param in self._params] if gradients is None else gradients
        if len(given) != len(self._params):
            raise ValueError(f"expected {len(self._params)} gradients, one per parameter, found "
                             f"{len(given)}")
        grads = {i: grad.contiguous() for i, grad in enumerate(given) if grad is not None}
        if norm is None:
            if not grads:
                raise ValueError("no parameter has a gradient: call backward before step")
            norm = ops.grad_norm(list(grads.values()))
        norm = norm * unscale
        common = {"lr": lr, "step": self.steps + 1, "grad_scale": self._grad_scale(norm, unscale),
                  "stochastic_rounding": self.config.stochastic_rounding, "seed": self.seed}
        for group in self.groups:
            at = [i for i in group.positions if i in grads]
            if at:
                self.update(Share([self._params[i] for i in at], [grads[i] for i in at],
                                  [self.states[i] for i in at], [self.masters[i] for i in at],
                                  [self.offsets[i] for i in at], group, common))
        self._unsettled = True
        return norm

    def applied(self, finite: bool) -> None:
        """Settle the last step: `finite` is whether its norm was finite, so that it took place."""
        self.steps += finite
        self._unsettled = False

    @torch.no_grad()
    def sync_masters(self) -> None:
        """Take the parameters' present values as the masters, after weights were loaded."""
        for param, master in zip(self._params, self.masters, strict=True):
            if master is not None:
                master.copy_(param)

    def pieces(self) -> list[Piece]:
        """States and masters under their names in a checkpoint, as pieces of the whole ones."""
        found = []
        for name, states, master, place in zip(self.names, self.states, self.masters, self.places,
                                               strict=True):
            every = dict(states) if master is None else {**states, "master": master}
            for state, tensor in every.items():
                offset, shape = place.offset, place.shape
                if state.endswith("_scale"):  # a number a block, of which pieces hold whole ones
                    offset, shape = blocks(offset), (blocks(prod(shape)),)
                found.append(Piece(f"{state}.{name}", tensor, offset, shape))
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, counters ready for JSON). The tensors are the live ones, not copies."""
        tensors: dict[str, Tensor] = {}
        for name, states, master in zip(self.names, self.states, self.masters, strict=True):
            tensors |= {f"{state}.{name}": tensor for state, tensor in states.items()}
            if master is not None:
                tensors[f"master.{name}"] = master
        return tensors, self.counters()

    def counters(self) -> dict[str, Any]:
        """What the optimizer knows beside its tensors, ready for JSON."""
        return {"name": self.config.name, "steps": self.steps, "seed": self.seed}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Undo of `counters`. Raises UserError for those of another optimizer."""
        self._same_name(counters)
        self.steps, self.seed = int(counters["steps"]), int(counters["seed"])
        self._unsettled = False

    def _same_name(self, counters: dict[str, Any]) -> None:
        if counters["name"] != self.config.name:
            raise UserError(f"the saved run's optimizer is {counters['name']}, not "
                            f"{self.config.name}: give --optim.name {counters['name']}")

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Undo of `state_dict`, bit for bit.

        Raises UserError for the state of another optimizer, or naming the first tensor that is
        missing, unknown or of another shape or dtype; nothing is changed then.
        """
        self._same_name(counters)
        own, _ = self.state_dict()
        for name in [*own, *tensors]:
            if name not in tensors or name not in own:
                where = "the saved state" if name not in tensors else "this run"
                raise UserError(f"optimizer state {name} is not in {where}: the model, the dtype "
                                "or a setting of optim differs from the saved run's")
            mine, saved = own[name], tensors[name]
            if mine.shape != saved.shape or mine.dtype != saved.dtype:
                raise UserError(f"optimizer state {name} is {saved.dtype} {tuple(saved.shape)} in "
                                f"the saved run and {mine.dtype} {tuple(mine.shape)} here")
        for name, mine in own.items():
            mine.copy_(tensors[name])
        self.load_counters(counters)

    def _grad_scale(self, norm: Tensor, unscale: float) -> Tensor:
        """unscale times the clip coefficient, on the device; NaN if the norm is not finite."""
        scale = torch.full_like(norm, unscale)
        if self.config.grad_clip is not None:
            # The small term is torch.nn.utils.clip_grad_norm_'s.
            scale = scale * (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        # An infinite norm would clip to zero and pass for a finite step.
        return torch.where(norm.isfinite(), scale, math.nan)

    def _master(self, param: Tensor) -> Tensor | None:
        if param.dtype == torch.float32 or self.config.stochastic_rounding:
            return None
        return param.detach().to(torch.float32, copy=True)

    def _check(self, name: str, param: Tensor) -> None:
        if param.dtype not in DTYPES:
            raise ValueError(f"{name} is {param.dtype}: {type(self).__name__} takes float32, "
                             "bfloat16 or float16")
        if self.config.stochastic_rounding and param.dtype == torch.float16:
            raise ValueError(f"{name} is torch.float16: stochastic rounding is for bfloat16")
        if not param.is_contiguous():
            raise ValueError(f"{name} {tuple(param.shape)} has strides {param.stride()}: "
                             f"{type(self).__name__} takes contiguous parameters")


def zeros(param: Tensor, *names: str) -> dict[str, Tensor]:
    """fp32 states of a parameter's shape."""
    return {name: torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            for name in names}


def _offsets(params: Sequence[Tensor]) -> list[int]:
    """Each parameter's first global element index."""
    found, total = [], 0
    for param in params:
        found.append(total)
        total += param.numel()
    return found
