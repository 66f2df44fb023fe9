"""Stage 3: when each part of a model has its parameters whole.

A unit is a part that is gathered and released together: every element of the model's outermost
ModuleLists (the blocks of a Transformer), and the root, which is all the rest. The order in which
the first forward enters the units is kept: while one computes, the next one in that order, or in
the backward the one before, is already being gathered. A forward in another order is an error.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.config import RunError, UserError


@dataclass
class Unit:
    """A part of the model and the engine's buckets that hold its parameters."""

    name: str
    module: nn.Module
    params: dict[str, Tensor] = field(default_factory=dict)
    trainable: list[int] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    backward: bool = False
    """Whether its backward has begun since the last forward of the root."""

    @property
    def buckets(self) -> list[int]:
        return [*self.trainable, *self.frozen]


def find_units(model: nn.Module, chosen: Iterable[nn.Module] | None = None) -> list[Unit]:
    """The units of a model, the root first, each with its own parameters by name.

    chosen: modules to take instead of the elements of the outermost ModuleLists. A parameter that
    modules of two units share belongs to the root, which is whole from the forward's beginning to
    the backward's end. Raises UserError for a chosen module that lies in another, or not in the
    model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = list(chosen) if chosen is not None else list(_outermost(model))
    root = Unit("", model)
    units = [root]
    owner: dict[int, Unit] = {}
    for module in modules:
        if id(module) not in names or module is model:
            raise UserError("zero: units must be modules within the model, found "
                            f"{type(module).__name__}")
        unit = Unit(names[id(module)], module)
        units.append(unit)
        for inner in module.modules():
            if id(inner) in owner:
                raise UserError(f"zero: the units {owner[id(inner)].name} and {unit.name} overlap")
            owner[id(inner)] = unit
    users: dict[int, set[str]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            users.setdefault(id(param), set()).add(owner.get(id(module), root).name)
    by_name = {unit.name: unit for unit in units}
    for name, param in model.named_parameters():
        holders = users[id(param)]
        unit = by_name[next(iter(holders))] if len(holders) == 1 else root
        unit.params[name] = param
    return units


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost(child)


class Schedule:
    """Gathers and releases the units of a model around their forward and backward.

    engine: of fastllm.dist, with `release`. prefetch: gather one unit ahead, which needs the same
    order in every forward.
    """

    def __init__(self, engine: Any, units: list[Unit], *, prefetch: bool = True) -> None:
        self.engine, self.units, self.prefetch = engine, units, prefetch
        self.root = units[0]
        self.order: list[Unit] = []
        """The units but the root, as the first forward entered them."""
        self._known = False
        self._at = 0
        self._handles = []
        for unit in units:
            self._handles += [
                unit.module.register_forward_pre_hook(partial(self._enter, unit),
                                                      with_kwargs=True),
                unit.module.register_forward_hook(partial(self._leave, unit))]

    def _enter(self, unit: Unit, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if unit is self.root:
            self._begin()
            self._gather(unit)
            self._ahead(0)
            return
        if not unit.backward:  # else activation checkpointing runs the forward again
            at = self._advance(unit)
            if torch.is_grad_enabled():
                self._watch_inputs(unit, args, kwargs)
            self._gather(unit)
            self._ahead(at + 1)

    def _begin(self) -> None:
        """A forward of the whole model begins."""
        self._known = self._known or bool(self.order)
        self._at = 0
        for unit in self.units:
            unit.backward = False
        self.release(keep=self.root)

    def _advance(self, unit: Unit) -> int:
        """The unit's place in the order. Raises RunError where another one should come here."""
        at, self._at = self._at, self._at + 1
        if not self._known:
            self.order.append(unit)
        elif self.prefetch and (at >= len(self.order) or self.order[at] is not unit):
            wanted = self.order[at].name if at < len(self.order) else "the end"
            raise RunError(f"zero stage 3: the forward came to {unit.name} where the first one "
                           f"came to {wanted}: the next unit is gathered ahead in that order; "
                           "keep the order, or give prefetch=False where every rank changes it "
                           "alike")
        return at

    def _ahead(self, at: int) -> None:
        if self.prefetch and self._known and 0 <= at < len(self.order):
            for number in self.order[at].buckets:
                self.engine.gather_start(number)

    def _gather(self, unit: Unit) -> None:
        for number in unit.buckets:
            self.engine.gather_wait(number)

    def _watch_inputs(self, unit: Unit, args: Any, kwargs: Any) -> None:
        """Release the unit when the gradients of its inputs are there: nothing needs it then."""
        inputs = [x for x in _tensors([args, kwargs]) if x.requires_grad]
        left = {id(x) for x in inputs}

        def arrived(key: int, _grad: Tensor) -> None:
            left.discard(key)
            if not left:
                for number in unit.trainable:
                    self.engine.complete(number)
                for number in unit.frozen:
                    self.engine.release(number)

        for x in {id(x): x for x in inputs}.values():
            x.register_hook(partial(arrived, id(x)))

    def _leave(self, unit: Unit, _module: nn.Module, _args: Any, output: Any) -> None:
        if unit.backward or unit is self.root:
            # The root stays: a loss may read its head, and its first layer ends the backward.
            return
        outputs = [x for x in _tensors(output) if x.requires_grad]
        if torch.is_grad_enabled():
            for x in outputs:
                x.register_hook(partial(self._backward, unit))
        if not (outputs and self._known and unit is self.order[-1]):
            for number in unit.buckets:
                self.engine.release(number)

    def _backward(self, unit: Unit, _grad: Tensor) -> None:
        if unit.backward:
            return
        unit.backward = True
        self._gather(unit)
        if self.prefetch and self._known:
            self._ahead(self.order.index(unit) - 1)

    def release(self, keep: Unit | None = None) -> None:
        """Release what is whole: after an evaluation, or a backward that left parts untouched."""
        for unit in self.units:
            if unit is not keep:
                for number in unit.buckets:
                    self.engine.release(number)

    def gather(self) -> None:
        """Make every parameter whole."""
        for unit in self.units:
            self._gather(unit)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses such as transformers' outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))
