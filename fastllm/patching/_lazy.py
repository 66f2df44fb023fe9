"""Logits that exist only if something reads them.

A model's forward multiplies its last hidden state by the head, may cap or scale the product, and
hands it to a cross entropy. In the product's place stands a LazyLogits, which notes those few
steps. A cross entropy over it is one `linear_cross_entropy` of the hidden state, and the logits
are never made. Anything else that is done to it first makes the tensor, by the model's own
arithmetic, and goes on with that: whatever reads `output.logits` finds the logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastllm import ops

Step = tuple[str, Any]


class LazyLogits:
    """head(hidden), then the steps; behaves as the tensor that it becomes when it is needed."""

    def __init__(self, hidden: Tensor, head: nn.Linear, steps: Sequence[Step] = ()):
        self.hidden, self.head, self.steps = hidden, head, tuple(steps)
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def tensor(self) -> Tensor:
        """The logits, made once (again, if gradients are wanted only now)."""
        made = self._tensor
        if made is None or (torch.is_grad_enabled() and self.hidden.requires_grad
                            and not made.requires_grad):
            made = F.linear(self.hidden, self.head.weight, self.head.bias)
            for name, value in self.steps:
                made = _STEPS[name](made, value)
            self._tensor = made
        return made

    def _then(self, name: str, value: Any = None) -> Any:
        if self._tensor is not None:
            return _STEPS[name](self._tensor, value)
        return LazyLogits(self.hidden, self.head, (*self.steps, (name, value)))

    def float(self) -> Any:
        return self._then("to", torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype):
            return self._then("to", args[0])
        return self.tensor().to(*args, **kwargs)

    def tanh(self) -> Any:
        return self._then("tanh")

    def contiguous(self) -> Any:
        return self if self._tensor is None else self._tensor.contiguous()

    def view(self, *shape: Any) -> Any:
        return self._fold("view", *shape)

    def reshape(self, *shape: Any) -> Any:
        return self._fold("reshape", *shape)

    def _fold(self, method: str, *shape: Any) -> Any:
        """(-1, vocabulary) folds the tokens into rows; other shapes are the tensor's matter."""
        flat = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        rows = self.hidden.numel() // max(1, self.hidden.shape[-1])
        if self._tensor is None and tuple(flat) in {(-1, self.shape[-1]), (rows, self.shape[-1])}:
            return LazyLogits(self.hidden.reshape(-1, self.hidden.shape[-1]), self.head, self.steps)
        return getattr(self.tensor(), method)(*shape)

    def __mul__(self, other: Any) -> Any:
        return self._then("mul", other) if isinstance(other, (int, float)) \
            else self.tensor() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then("div", other) if isinstance(other, (int, float)) \
            else self.tensor() / other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Sequence[type],
                           args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        if function is F.cross_entropy:
            loss = _loss(*args, **kwargs)
            if loss is not None:
                return loss
        args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, LazyLogits) else x,
                                (tuple(args), dict(kwargs)))
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        made = "made" if self._tensor is not None else "not made"
        return f"LazyLogits({tuple(self.shape)}, {made})"


_STEPS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "to": lambda x, dtype: x.to(dtype), "tanh": lambda x, _: x.tanh(),
    "mul": lambda x, factor: x * factor, "div": lambda x, divisor: x / divisor,
}


def _as_tensor(name: str) -> Callable[..., Any]:
    def method(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)
    return method


for _name in ("getitem", "setitem", "len", "iter", "add", "radd", "sub", "rsub", "rtruediv",
              "matmul", "neg", "pow", "lt", "le", "gt", "ge", "eq", "ne", "array", "imul",
              "itruediv", "iadd", "isub"):
    setattr(LazyLogits, f"__{_name}__", _as_tensor(f"__{_name}__"))
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


def _loss(input: Any, target: Any, weight: Tensor | None = None, size_average: Any = None,
          ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
          label_smoothing: float = 0.0) -> Tensor | None:
    """torch's cross_entropy of lazy logits by the fused op; None where that is another function."""
    options = _options(input.steps) if isinstance(input, LazyLogits) else None
    if options is None or input._tensor is not None or input.dim() != 2 or target.dim() != 1 or (
            target.is_floating_point() or size_average is not None or reduce is not None):
        return None
    if input.head.bias is not None:
        options["bias"] = input.head.bias
    if weight is not None:
        options["ce_weight"] = weight
    return ops.linear_cross_entropy(
        input.hidden, input.head.weight, target, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, **options)


def _options(steps: Sequence[Step]) -> dict[str, Any] | None:
    """The fused op's name for the steps, casts aside: nothing, one scale, or c tanh(x / c)."""
    scales = [(name, 1.0 / value if name == "div" else value)
              for name, value in steps if name != "to"]
    match [name.replace("div", "mul") for name, _ in scales]:
        case []:
            return {}
        case ["mul"]:
            return {"logit_scale": float(scales[0][1])}
        case ["mul", "tanh", "mul"] if abs(scales[0][1] * scales[2][1] - 1) < 1e-6:
            return {"softcap": float(scales[2][1])}
    return None
