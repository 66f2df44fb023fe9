"""Whether two functions compute the same: the test that every replacement passes first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Rounding units by which results may differ: a fused op rounds once, where modules round after
# each operation.
UNITS = {torch.float64: 1e4, torch.float32: 64.0, torch.bfloat16: 6.0, torch.float16: 12.0}


class Differs(Exception):
    """The two do not compute the same; says where."""


def agree(name: str, ours: Tensor, theirs: Tensor, units: float = 1.0) -> None:
    """Raise Differs unless ours is theirs up to rounding, judged by the norm of each row."""
    dtype = theirs.dtype
    if ours.shape != theirs.shape or ours.dtype != dtype:
        raise Differs(f"{name} is {tuple(theirs.shape)} {dtype}, ours {tuple(ours.shape)} "
                      f"{ours.dtype}")
    a, b = (x.detach().double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (ours, theirs))
    size = b.norm(dim=-1)
    if not (size.isfinite().all() and size.any()):
        raise Differs(f"{name} is zero or not finite, which shows nothing")
    error = float(((a - b).norm(dim=-1) / size.clamp(min=1e-6 * float(size.max()))).max())
    if not error <= units * UNITS[dtype] * torch.finfo(dtype).eps:
        raise Differs(f"{name} differs from ours by {error:.0e} of its size")


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor],
         inputs: Sequence[Tensor]) -> None:
    """Raise Differs unless both give the same values and the same gradients for all inputs."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out), materialize_grads=True)
        results.append((out, *(grad if grad.any() else None for grad in grads)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if (a is None) != (b is None):
            raise Differs("its gradient is not zero where ours is, or the reverse")
        if a is not None:
            agree("its output" if i == 0 else "its gradient", a, b)


def tokens(width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Six rows of random numbers of three sizes, the smallest where epsilons matter."""
    scale = torch.tensor([1.0, 1e-3, 20.0], device=like.device)[:, None]
    rows = torch.randn(2, 3, width, device=like.device) * scale
    return rows.to(dtype or like.dtype)


def first(module: nn.Module) -> Tensor:
    """A tensor that tells the module's device and type: bfloat16 where all weights are packed
    integers, as of quantised layers."""
    tensors = [*module.parameters(), *module.buffers()]
    packed = [torch.empty(0, dtype=torch.bfloat16, device=x.device) for x in tensors[:1]]
    return next((x for x in tensors if x.is_floating_point()), *packed or [torch.empty(0)])


def why_unreadable(module: nn.Module) -> str:
    """Why the module cannot be run here; empty where it can."""
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are on the meta device: patch after loading them"
        if hasattr(parameter, "device_mesh"):
            return "its weights are sharded: patch before sharding"
    return ""


def bare(linear: nn.Module) -> bool:
    """Whether to multiply by a Linear's weight is to call it: no subclass, hook or shard."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
        or linear._backward_pre_hooks or hasattr(linear, "_hf_hook"))
