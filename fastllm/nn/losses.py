"""Cross entropies of logits, and of a hidden state and the head that would make them."""

from typing import Any

import torch
from torch import Tensor

from fastllm import ops


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss over class indices, in float32 whatever the logits are.

    Besides torch's options: z_loss, softcap and logit_scale, as `ops.cross_entropy` has them.
    Where every target is ignored "mean" is 0 (torch: NaN). Raises ValueError for the deprecated
    size_average and reduce, and TypeError for targets that are probabilities.
    """

    def __init__(self, weight: Tensor | None = None, size_average: Any = None,
                 ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
                 label_smoothing: float = 0.0, *, z_loss: float = 0.0,
                 softcap: float | None = None, logit_scale: float = 1.0) -> None:
        _refuse("CrossEntropyLoss", size_average=size_average, reduce=reduce)
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        rows, labels = _rows("CrossEntropyLoss", input, target)
        loss = ops.cross_entropy(
            rows, labels, weight=self.weight, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            logit_scale=self.logit_scale, reduction=self.reduction)
        return loss.view(target.shape) if self.reduction == "none" else loss


class LinearCrossEntropyLoss(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss: the cross entropy of linear(input), logits never stored.

    input (..., in_features), target (...) of class indices. Besides torch's options: z_loss,
    softcap, logit_scale and chunk_size, as `ops.linear_cross_entropy` has them. torch's
    out_features and options are not supported and raise ValueError; probabilities raise TypeError.
    """

    def __init__(self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (),
                 bias: bool = False, device: Any = None, dtype: Any = None,
                 reduction: str = "mean", weight: Tensor | None = None,
                 ignore_index: int | None = None, label_smoothing: float = 0.0,
                 options: Any = None, z_loss: float = 0.0, softcap: float | None = None,
                 logit_scale: float = 1.0, chunk_size: int | None = None) -> None:
        super().__init__()
        _refuse("LinearCrossEntropyLoss", out_features=out_features or None, options=options)
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.num_classes, self.reduction = num_classes, reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap
        self.logit_scale, self.chunk_size = logit_scale, chunk_size

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.shape != input.shape[:-1]:
            raise ValueError(f"LinearCrossEntropyLoss: input {tuple(input.shape)} wants a target "
                             f"{tuple(input.shape[:-1])}, not {tuple(target.shape)}")
        _check_indices("LinearCrossEntropyLoss", target)
        loss = ops.linear_cross_entropy(
            input.reshape(-1, input.shape[-1]), self.linear.weight, target.reshape(-1),
            bias=self.linear.bias, ce_weight=self.weight, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            logit_scale=self.logit_scale, reduction=self.reduction, chunk_size=self.chunk_size)
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: {option} is not supported; use torch.nn.{name}")


def _check_indices(name: str, target: Tensor) -> None:
    if target.is_floating_point():
        raise TypeError(f"{name}: targets are class indices, not probabilities ({target.dtype}); "
                        f"use torch.nn.{name}")


def _rows(name: str, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(C) and (), (N, C) and (N), (N, C, d1, ...) and (N, d1, ...) as (T, C) and (T)."""
    _check_indices(name, target)
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    expected = input.shape[1:] if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape != torch.Size(expected):
        raise ValueError(f"{name}: input {tuple(input.shape)} wants a target {tuple(expected)}, "
                         f"not {tuple(target.shape)}")
    last = input if input.dim() <= 2 else input.movedim(1, -1)
    return last.reshape(-1, classes), target.reshape(-1)
