"""What the command line and a YAML file say of the adapter: one flat section `adapter`.

An option that the named method has not is refused where it is set to anything but its default.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Name = Literal["none", "lora", "dora", "qlora", "prompt", "p-tuning", "prefix", "bottleneck"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (*LINEAR, "embed_tokens", "lm_head")
ALL_LINEAR = "all-linear"

_LOW_RANK = ("rank", "alpha", "rslora", "dropout", "targets")
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (), "lora": _LOW_RANK, "dora": _LOW_RANK,
    "qlora": (*_LOW_RANK, "block_size", "double_quant"),
    "prompt": ("virtual_tokens",), "p-tuning": ("virtual_tokens", "encoder_hidden_size"),
    "prefix": ("virtual_tokens",), "bottleneck": ("bottleneck_size",)}
"""The options that each method has."""


@dataclass(kw_only=True)
class AdapterConfig:
    """A parameter-efficient method: which few parameters are trained beside a frozen model."""

    name: Name = "none"
    """The method. none: every parameter of the model is trained. lora, dora and qlora change
    matrices by a product of rank r; prompt, p-tuning and prefix put learned tokens before every
    document; bottleneck adds a small network after attention and MLP."""
    rank: Annotated[int, Field(gt=0)] = 16
    """lora, dora, qlora: rank r of a matrix's change."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """lora, dora, qlora: the change is scaled by alpha / rank."""
    rslora: bool = False
    """lora, dora, qlora: scale by alpha / sqrt(rank), with which the change of a large rank keeps
    its size (Kalajdzievski, 2023)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """lora, dora, qlora: probability, in training, of dropping an element of what the change
    reads. Not for embed_tokens, which reads token ids, nor with lm_head."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR))
    """lora, dora, qlora: the matrices that are changed: q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj, down_proj (all-linear: these seven), embed_tokens, lm_head."""
    block_size: Annotated[int, Field(gt=0)] = 64
    """qlora: weights of the frozen projections that share a scale, 32, 64, 128 or 256; it divides
    their columns."""
    double_quant: bool = True
    """qlora: keep these scales in 8 bits too."""
    virtual_tokens: Annotated[int, Field(gt=0)] = 20
    """prompt, p-tuning, prefix: learned tokens before every document. They count towards
    max_position_embeddings."""
    encoder_hidden_size: Annotated[int, Field(gt=0)] | None = None
    """p-tuning: width of the MLP that makes the learned tokens; null: the model's hidden_size."""
    bottleneck_size: Annotated[int, Field(gt=0)] = 64
    """bottleneck: width of the added networks."""

    def target_names(self) -> list[str]:
        """The matrices that are changed, `all-linear` spelt out."""
        names = [name for target in self.targets
                 for name in (LINEAR if target == ALL_LINEAR else (target,))]
        return list(dict.fromkeys(names))

    @property
    def scale(self) -> float:
        """What the product of rank r is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def validate(self) -> None:
        own = OPTIONS[self.name]
        fresh = AdapterConfig()
        for spec in dataclasses.fields(self):
            key = spec.name
            if key not in ("name", *own) and getattr(self, key) != getattr(fresh, key):
                have = ", ".join(name for name, keys in OPTIONS.items() if key in keys)
                raise ValueError(f"adapter.{key.replace('_', '-')} is set, but adapter.name "
                                 f"{self.name} has no such thing: leave it out (it is for {have})")
        for target in self.target_names():
            if target not in TARGETS:
                raise ValueError(f"adapter.targets: there is no '{target}'; use some of "
                                 f"{', '.join((ALL_LINEAR, *TARGETS))}")
        if "targets" in own and not self.targets:
            raise ValueError("adapter.targets is empty: name at least one matrix")
        if self.dropout and "lm_head" in self.target_names():
            raise ValueError(
                f"adapter.dropout {self.dropout} does not go with lm_head in adapter.targets, "
                "since the loss takes the head as one matrix: set it to 0 or leave lm_head out")
