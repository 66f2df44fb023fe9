"""Which parameters weight decay touches.

Decay pulls weights towards zero, which regularises matrices; on a norm's gain or a bias it only
biases the scale of the activations, so those are left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ParamGroup:
    """Parameters that share one weight decay. `positions` index the optimizer's own order."""

    name: str
    weight_decay: float
    names: list[str] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def numel(self) -> int:
        """Elements in all parameters of the group."""
        return sum(param.numel() for param in self.params)


def decays(name: str, dimensions: int, *, decay_embeddings: bool = True) -> bool:
    """Whether weight decay applies: matrices and larger, except norms and, if asked, embeddings."""
    words = name.lower()
    if dimensions < 2 or "norm" in words or words.endswith("bias"):
        return False
    return decay_embeddings or not any(word in words for word in ("embed", "wte", "wpe"))


def param_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float, *,
                 decay_embeddings: bool = True,
                 shapes: Mapping[str, tuple[int, ...]] | None = None,
                 may_be_empty: bool = False) -> list[ParamGroup]:
    """The groups "decay" and "no_decay" (those that are not empty) of the trainable parameters.

    shapes: of whole parameters, by name, where pieces of them are given.
    Raises ValueError for a parameter or a name that comes twice, or when nothing is trainable.
    """
    decay, no_decay = ParamGroup("decay", weight_decay), ParamGroup("no_decay", 0.0)
    seen: dict[int, str] = {}
    position = 0
    for name, param in named_parameters:
        if not param.requires_grad and name not in (shapes or {}):
            continue
        if id(param) in seen or name in seen.values():
            raise ValueError(f"parameter {name} comes twice (first as "
                             f"{seen.get(id(param), name)}): it would be updated twice a step")
        seen[id(param)] = name
        dimensions = len((shapes or {}).get(name, param.shape))
        group = decay if decays(name, dimensions, decay_embeddings=decay_embeddings) else no_decay
        group.names.append(name)
        group.params.append(param)
        group.positions.append(position)
        position += 1
    if not seen and not may_be_empty:
        raise ValueError("there is no parameter with requires_grad to optimize")
    return [group for group in (decay, no_decay) if group.params]


def describe(groups: list[ParamGroup]) -> str:
    """One line a group: weight decay, tensors, parameters, and the names (patterns) it holds."""
    lines = []
    for group in groups:
        patterns = list(dict.fromkeys(_pattern(name) for name in group.names))
        shown = ", ".join(patterns[:8]) + (", ..." if len(patterns) > 8 else "")
        lines.append(f"{group.name:<9} weight_decay {group.weight_decay:<6g} "
                     f"{len(group.params):>4} tensors {group.numel():>14,} parameters: {shown}")
    return "\n".join(lines)


def _pattern(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` as `model.layers.*.mlp.up_proj.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
