"""How a kernel is judged: against the truth in float64, beside its reference in its own type."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllm import ops
from fastllm.kernels._spec import Call, Kernel, kernels
from fastllm.ops import _dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where an operator of ours runs: a dispatch mode that redispatches to it sees what is inside.
KEY = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, DEVICE.upper()))
# tests/test_ops.py asserts that none is left out.
KERNELS = tuple(kernel for kernel in kernels() if kernel.public.__name__ in ops.OPS)


def backends(kernel: Kernel) -> list[str]:
    """What can run a kernel's op here, beside the reference (which a composition has apart)."""
    names = ["triton"]
    if not _dispatch.why_not(kernel.public.__name__, "cpp", torch.device(DEVICE)):
        names.append("cpp")
    if kernel.composition:
        names.append("reference")
    return names


CASES = [(kernel, backend) for kernel in KERNELS for backend in backends(kernel)]
IDS = [f"{kernel.name}-{backend}" for kernel, backend in CASES]


def takes(kernel: Kernel, backend: str, call: Call) -> bool:
    """Whether a backend has every option of the call."""
    op = _dispatch.TABLE[kernel.public.__name__]
    return backend != "cpp" or not _dispatch.beyond_cpp(op, call.kwargs)


def op_of(kernel: Kernel, backend: str) -> Callable[..., Any]:
    """The op through its public face, on a backend."""
    name = kernel.public.__name__

    def run(*args: Any, **kwargs: Any) -> Any:
        with ops.use_backend(backend, name):
            return getattr(ops, name)(*args, **kwargs)

    return run


def make(kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, draw: int = 0,
         **options: Any) -> Call:
    generator = torch.Generator(DEVICE).manual_seed(draw)
    return kernel.inputs(shape, dtype, DEVICE, generator, **options)


def clone(call: Call) -> Call:
    """The same values in memory of their own, strides kept."""
    return call.map(lambda t: torch.empty_strided(
        t.size(), t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        if 0 not in t.stride() else t.clone(memory_format=torch.preserve_format))


def upcast(call: Call) -> Call:
    return call.map(lambda t: t.double() if t.is_floating_point() else t.clone())


def run(kernel: Kernel, function: Callable[..., Any], call: Call,
        change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """Results and then gradients, for upstream gradients that depend on shapes alone."""
    outputs = kernel.results(function, call)
    results = [output.detach().clone() for output in outputs]
    inputs = call.differentiated()
    if not inputs or kernel.mutates:
        return results
    generator = torch.Generator(DEVICE).manual_seed(7)
    # Every type must see the same upstream values, so they are exact in bfloat16. That of a whole
    # loss is a power of 2: gradients that were made with the loss are scaled by it, not rounded.
    outputs = [output for output in outputs if output.requires_grad]
    drawn = [torch.randn(output.shape, generator=generator, device=DEVICE).bfloat16()
             if output.dim() else torch.full((), 0.5, device=DEVICE) for output in outputs]
    upstream = [change(x.to(output.dtype)) for x, output in zip(drawn, outputs, strict=True)]
    return results + list(torch.autograd.grad(outputs, inputs, upstream))


def judge(got: list[Tensor], beside: list[Tensor], truth: list[Tensor],
          tiny: float = 1e-30) -> None:
    """err(got) <= 2 err(beside) + one correct rounding, in the maximum and the root mean square.

    Of fewer than 16 numbers, both are luck, and a whole rounding unit is allowed. tiny: an error to
    allow on top, as of float32 terms that cancel.
    """
    assert len(got) == len(beside) == len(truth)
    for i, (a, b, c) in enumerate(zip(got, beside, truth, strict=True)):
        assert a.shape == c.shape, f"tensor {i}: {a.shape}, not {c.shape}"
        assert a.dtype == b.dtype, f"tensor {i}: {a.dtype}, not {b.dtype}"
        if not c.numel():
            continue
        if not a.is_floating_point():
            assert torch.equal(a, b) or _same_codes(a, b), f"tensor {i} differs"
            continue
        exact = c.double()
        assert torch.equal(a.isnan(), exact.isnan()), f"tensor {i}: NaN in other places"
        finite = exact.isfinite() & b.isfinite()
        assert torch.equal(a.isfinite(), finite), f"tensor {i}: infinite in other places"
        exact = exact[finite]
        ours, theirs = a[finite].double() - exact, b[finite].double() - exact
        if not exact.numel():
            continue
        rounding, few = torch.finfo(a.dtype).eps, a.numel() < 16
        for name, norm, part in (("largest", lambda t: t.abs().max(), 0.5),
                                 ("mean", lambda t: t.square().mean().sqrt(), 0.125)):
            size = norm(exact)
            allowed = 2 * norm(theirs) + ((1.0 if few else part) * rounding + 1e-6) * size + tiny
            assert norm(ours) <= allowed, (
                f"tensor {i} ({tuple(a.shape)} {a.dtype}): {name} error {norm(ours):.3e}, allowed "
                f"{allowed:.3e} (reference {norm(theirs):.3e}, size {size:.3e})")


def _same_codes(a: Tensor, b: Tensor) -> bool:
    """8-bit codes of float32 numbers whose last bits differ: where such a number lies at the border
    of two codes, which is rare, the codes are neighbours."""
    if a.dtype not in (torch.int8, torch.uint8):
        return False
    apart = (a.int() - b.int()).abs()
    return bool(apart.max() <= 1) and int(apart.sum()) <= 1 + a.numel() // 1000


def check(kernel: Kernel, function: Callable[..., Any], call: Call) -> None:
    """Run function, reference and truth on the call and judge; inputs must stay as they were."""
    truth = run(kernel, kernel.reference, upcast(call))
    beside = run(kernel, kernel.reference, clone(call))
    before = [t.detach().clone() for t in call.tensors()]
    got = run(kernel, function, call)
    judge(got, beside, truth)
    if not kernel.mutates and not call.kwargs.get("inplace"):
        for now, then in zip(call.tensors(), before, strict=True):
            assert _same_bits(now.detach(), then), "an input was changed"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)) and torch.equal(
        a.isnan(), b.isnan())


def strided(t):
    """Every dimension's stride doubled."""
    big = t.new_empty([2 * n for n in t.shape])
    return big[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def permuted(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def padded(t):
    """Rows further apart than they are long, as in a slice of a wider matrix."""
    return t.new_empty((*t.shape[:-1], t.shape[-1] + 3))[..., 1:-2].copy_(t)


def expanded(t):
    return t[:1].expand_as(t) if t.dim() > 1 else t


LAYOUTS = {"strided": strided, "permuted": permuted, "padded": padded, "expanded": expanded}


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned, inside our own ones too."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastllm":
            with self:  # a custom operator's implementation, seen from the inside
                result = function.redispatch(KEY, *args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        # The interpreter moves bytes about; what counts is numbers.
        self.elements = max([self.elements, *(x.numel() for x in found if x.is_floating_point())])
        return result
