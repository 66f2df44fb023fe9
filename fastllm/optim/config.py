"""What the command line and a YAML file say of the optimizer.

One flat section: a key that several optimizers have means the same in each, its default is the
named optimizer's own, and a key that the named one has not is refused.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Literal["adamw", "adamw8bit", "lion", "sgd", "adagrad", "rmsprop", "lamb", "muon"]

_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": _ADAMW,
    "adamw8bit": _ADAMW,
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adagrad": {"eps": 1e-10, "lr_decay": 0.0, "initial_accumulator": 0.0, "weight_decay": 0.0},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False,
                "weight_decay": 0.0},
    "lamb": {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
    "muon": {**_ADAMW, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw",
             "ns_steps": 5},
}
"""The keys that each optimizer has beside those that all have, with their defaults."""
KEYS = sorted({key for own in DEFAULTS.values() for key in own})


@dataclass(kw_only=True)
class OptimConfig:
    name: Name = "adamw"
    """The optimizer. adamw8bit keeps its moments in 8 bits; muon is for matrices, and AdamW takes
    embeddings, head, norms and biases there."""
    lr: Positive = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Fraction, Fraction] | None = None
    """adamw, adamw8bit, lamb, muon: decay of the running mean of the gradient and of its square;
    lion: what the sign sees of the momentum, and the momentum's decay. Default 0.9 and 0.95 (lion
    0.99, lamb 0.999)."""
    eps: Positive | None = None
    """All but lion and sgd: added to the root of the second moment. Default 1e-8 (lamb 1e-6,
    adagrad 1e-10)."""
    weight_decay: NotNegative | None = None
    """Never on norms and biases. Decoupled, default 0.1 (lamb 0.01); in sgd, adagrad and rmsprop an
    L2 penalty, default 0."""
    momentum: Fraction | None = None
    """sgd (default 0.9), rmsprop (0), muon (0.95)."""
    dampening: Fraction | None = None
    """sgd: how much less of the gradient joins the momentum."""
    nesterov: bool | None = None
    """sgd, muon: look ahead along the momentum. Default: muon does."""
    alpha: Fraction | None = None
    """rmsprop: decay of the running mean of the square, default 0.99."""
    centered: bool | None = None
    """rmsprop: divide by the variance rather than by the second moment."""
    lr_decay: NotNegative | None = None
    """adagrad: divides the rate by 1 + lr_decay * (step - 1)."""
    initial_accumulator: NotNegative | None = None
    """adagrad: where the sums of squares start."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """muon: scale of a matrix's update: sqrt(max(1, rows / columns)), or as large as AdamW's, so
    that one learning rate suits both (default)."""
    ns_steps: Annotated[int, Field(gt=0, lt=100)] | None = None
    """muon: Newton-Schulz steps, default 5."""
    decay_embeddings: bool = True
    """Whether weight decay touches embeddings."""
    grad_clip: Positive | None = 1.0
    """Largest global L2 norm of the gradient; none: no clipping."""
    stochastic_rounding: bool = False
    """bf16 parameters without fp32 masters: 4 bytes a parameter less."""

    def __post_init__(self) -> None:
        for key, default in DEFAULTS.get(self.name, {}).items():
            if getattr(self, key) is None:
                setattr(self, key, default)

    def validate(self) -> None:
        own = DEFAULTS[self.name]
        for key in KEYS:
            if getattr(self, key) is not None and key not in own:
                have = ", ".join(name for name, keys in DEFAULTS.items() if key in keys)
                raise ValueError(f"optim.{key.replace('_', '-')} is set, but {self.name} has no "
                                 f"such thing: leave it out (it is for {have})")
        if self.name == "sgd" and self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("optim.nesterov needs optim.momentum above 0 and optim.dampening 0, "
                             f"found {self.momentum} and {self.dampening}")
