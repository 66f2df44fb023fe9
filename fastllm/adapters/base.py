"""What every method has: a frozen model with a few parameters more, and a switch.

Parameters are added to modules of the model under names of their own; those of the model keep
theirs. First values are drawn from a generator a parameter, seeded by seed and name, on the CPU in
fp32: they depend neither on order nor on device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastllm.adapters import storage
from fastllm.adapters.config import AdapterConfig
from fastllm.config import UserError
from fastllm.model import Decoder
from fastllm.model.init import generator_of


class Switch(nn.Module):
    """A module of an adapter, which may be switched off."""

    active = True


class Adapter:
    """A method as applied to a model; made by `fastllm.adapters.apply` or `load`.

    config, model: as given. The model's own parameters require no gradient any more, the added
    ones do, and nothing else does.
    """

    mergeable: ClassVar[bool] = False
    """Whether the change can be folded into the model's own weights."""

    def __init__(self, model: Decoder, config: AdapterConfig, *, seed: int = 0,
                 **options: Any) -> None:
        config.validate()
        if any(isinstance(module, Switch) for module in model.modules()):
            raise UserError("the model has an adapter already: merge it first, or take another "
                            "copy of the model")
        self.model, self.config, self.seed = model, config, seed
        self.quantization_error: float | None = None
        """qlora: root mean square of what 4 bits changed in the frozen projections, over that of
        their weights."""
        own = {id(parameter) for parameter in model.parameters()}
        model.requires_grad_(False)
        with torch.no_grad():
            self._attach(**options)
        self._names = [name for name, parameter in model.named_parameters()
                       if id(parameter) not in own]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters under the names that they have in `model.named_parameters()`."""
        found = dict(self.model.named_parameters())
        for name in self._names:
            yield name, found[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the model is the one below the adapter (of qlora: with its weights in 4 bits).

        Nothing in it can be trained then, so gradients are off: a backward would also have to find
        the switches as its forward did.
        """
        switches = [module for module in self.model.modules() if isinstance(module, Switch)]
        virtual = self.model.virtual_tokens
        for switch in switches:
            switch.active = False
        self.model.virtual_tokens = 0
        try:
            with torch.no_grad():
                yield
        finally:
            for switch in switches:
                switch.active = True
            self.model.virtual_tokens = virtual

    def save(self, folder: str | Path, *, base: str) -> Path:
        """Write adapter_config.json and adapter_model.safetensors; returns the folder.

        They are PEFT's files where PEFT has the method. The folder is made where it is missing;
        other files in it stay.

        Args:
            base: name or path of the model that the adapter belongs to.

        Raises UserError where the disk cannot be written.
        """
        return storage.write(folder, dict(self.tensors()), self.described(), self.config, base)

    @torch.no_grad()
    def merge(self) -> Decoder:
        """Fold the change into the model's weights, in place, and take the adapter off.

        The model is a plain `Decoder` again, with the names that it had and parameters that
        require gradients. Sums are made in fp32 and rounded once to the model's dtype. A tied head
        that was changed apart from the embedding becomes a head of its own.
        Of qlora the weights are those of 4 bits, `quantization_error` away from the original ones,
        plus the change.

        Raises UserError for a method whose change is no change of weights.
        """
        self.check_mergeable()
        self._merge()
        self._names = []
        self.model.requires_grad_(True)
        return self.model

    def check_mergeable(self) -> None:
        """Raise UserError for a method whose change is no change of weights."""
        if not self.mergeable:
            raise UserError(f"an adapter of {self.config.name} cannot be merged, since it is no "
                            "change of the model's weights: keep the adapter's folder beside the "
                            "model")

    # What a method says of itself.

    def _attach(self) -> None:
        raise NotImplementedError

    def _merge(self) -> None:
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a file holds: PEFT's name and tensor."""
        raise NotImplementedError

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of a file, whose names and shapes are those of `tensors()`."""
        for name, tensor in self.tensors():
            tensor.detach().copy_(tensors[name])

    def described(self) -> dict[str, Any]:
        """The method's part of adapter_config.json."""
        raise NotImplementedError

    # What methods share.

    def draw(self, name: str, shape: tuple[int, ...] | torch.Size, std: float) -> Tensor:
        """Normal numbers, fp32 on the CPU, that follow from the seed and the name."""
        return torch.empty(shape, device="cpu").normal_(0, std, generator=self.generator(name))

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator that follows from the seed and the name."""
        return generator_of(f"{self.seed}/{name}")

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return self.model.norm.weight
