"""What a kernel tells its tools, and the registry that finds every kernel of this folder.

Tests, benchmarks and audits read only this: none of them knows an op by name, so a new kernel is
one new file that ends in `KERNEL = Kernel(...)`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Shape = tuple[int, ...]
Direction = Literal["forward", "backward"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """The arguments of one call; tensors that a gradient is due for have requires_grad set."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs)))
                if isinstance(leaf, Tensor)]

    def differentiated(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.requires_grad]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with every tensor changed; requires_grad is carried over."""

        def apply(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            changed = change(leaf.detach())
            return changed.requires_grad_() if leaf.requires_grad else changed

        args, kwargs = tree_map(apply, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)


@dataclass(frozen=True)
class Kernel:
    """One op: what computes it, what is right, what to try it on, and the least it could cost."""

    name: str
    """The op's name, that of its module unless the module holds several."""
    public: Callable[..., Any]
    """The Triton-backed public function; `fastllm.ops` has one of the same name and signature."""
    reference: Callable[..., Any]
    """The same in plain PyTorch: float32 inside (float64 for float64 arguments)."""
    inputs: Callable[..., Call]
    """inputs(shape, dtype, device, generator, **options) -> Call; options are a variant's."""
    test_shapes: tuple[Shape, ...]
    """Small shapes: each non-empty, odd and single-element ones among them."""
    bench_shapes: tuple[Shape, ...]
    """Shapes of models, those of about 1 and 8 billion parameters among them; the largest last."""
    axes: tuple[str, ...]
    """What each number of a shape means."""
    floor_bytes: Callable[..., int]
    """floor_bytes(shape, dtype, direction, **options): the fewest bytes that the direction must
    move between memory and the chip; options are those given to `inputs`."""
    floor_flops: Callable[..., int]
    """floor_flops(shape, dtype, direction, **options): its fewest floating-point operations."""
    traffic_shapes: tuple[Shape, ...] = ()
    """Shapes of about 256 and of 4,096 rows: bytes are counted at each and gated at the last."""
    bench_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of `inputs` that change what a call costs, by a readable name: timed, metered and
    compiled ahead of time beside the plain call."""
    bound: Literal["bytes", "flops"] = "bytes"
    """Which of its floors binds the op on a GPU; the traffic of those bound by bytes is gated."""
    above_floor: Mapping[str, str] = field(default_factory=dict)
    """Why a direction cannot be at its floor, by "forward", "backward" or "OPTIONS backward"."""
    audit_shapes: tuple[Shape, ...] = ()
    """Real widths with few rows: cheap to build, and they select the configurations that ship."""
    narrow_access: Mapping[str, str] = field(default_factory=dict)
    """Why a Triton function, by name, cannot read or write its 16-bit rows 128 bits at a time."""
    empty_shapes: tuple[Shape, ...] = ()
    """Shapes with a zero in them that the op takes."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of `inputs` worth testing, by a readable name; the plain call is always tested."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Types that `inputs` makes."""
    mutates: bool = False
    """Whether the call's tensors, rather than a return value, carry the result."""
    overflow_shape: Shape | None = None
    """A shape whose matrices have three rows: tests lay the last over 2^31 elements after the
    first, at a stride that fits 32 bits itself."""
    composition: bool = False
    """Whether the op is made of other kernels and matrix products, without a launch of its own."""

    def results(self, function: Callable[..., Any], call: Call) -> list[Tensor]:
        """Run `function` on the call; the tensors that carry the result, in a fixed order."""
        returned = function(*call.args, **call.kwargs)
        if self.mutates:
            return call.tensors()
        return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of this folder, by file; modules with a leading underscore are left out.

    A file with one op ends in KERNEL, a file with a family of them in KERNELS.
    """
    package = __name__.rpartition(".")[0]
    names = sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)])
                   if not found.name.startswith("_"))
    found: list[Kernel] = []
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        found += getattr(module, "KERNELS", None) or [module.KERNEL]
    return tuple(found)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a matrix product takes them: in the autocast type where autocast is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64
                 else tensor for tensor in tensors)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type a reference computes in: float64 where an argument is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def normal(shape: Shape, dtype: torch.dtype, device: Any, generator: torch.Generator | None, *,
           grad: bool = True, scale: float = 1.0) -> Tensor:
    """Normal numbers drawn in float32 and rounded to `dtype`, so that every type sees the same."""
    drawn = torch.randn(shape, generator=generator, device=device) * scale
    return drawn.to(dtype).requires_grad_(grad)
