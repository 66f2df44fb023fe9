"""Every kernel of the registry, on every backend that runs here; no op is known by name."""

import ast
import subprocess
import sys
from pathlib import Path

import kernel_check as kc
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ROOT = Path(__file__).parents[2]
by_case = pytest.mark.parametrize(("kernel", "backend"), kc.CASES, ids=kc.IDS)
by_kernel = pytest.mark.parametrize("kernel", kc.KERNELS, ids=lambda kernel: kernel.name)
by_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16],
                                  ids=lambda dtype: str(dtype)[6:])


def middle(kernel):
    """A shape that is neither trivial nor large."""
    return kernel.test_shapes[len(kernel.test_shapes) // 2]


@by_case
@by_type
def test_shapes(kernel, backend, dtype):
    for shape in kernel.test_shapes:
        kc.check(kernel, kc.op_of(kernel, backend), kc.make(kernel, shape, dtype))


@by_case
@by_type
def test_variants(kernel, backend, dtype):
    for options in kernel.variants.values():
        call = kc.make(kernel, middle(kernel), dtype, **options)
        if kc.takes(kernel, backend, call):
            kc.check(kernel, kc.op_of(kernel, backend), call)


@by_case
def test_empty(kernel, backend):
    for shape in kernel.empty_shapes:
        kc.check(kernel, kc.op_of(kernel, backend), kc.make(kernel, shape, torch.float32))


@pytest.mark.parametrize(("kernel", "backend"), [case for case in kc.CASES if not case[0].mutates],
                         ids=[i for i, case in zip(kc.IDS, kc.CASES, strict=True)
                              if not case[0].mutates])
@pytest.mark.parametrize("layout", kc.LAYOUTS)
def test_layouts(kernel, backend, layout):
    """Any strides of the inputs and of the upstream gradients give what contiguous ones give."""
    call = kc.make(kernel, middle(kernel), torch.float32)
    laid = call.map(kc.LAYOUTS[layout])
    op = kc.op_of(kernel, backend)
    kc.check(kernel, op, laid)
    plain = kc.run(kernel, op, call)
    again = kc.run(kernel, op, kc.clone(call), change=kc.LAYOUTS["strided"])
    kc.judge(again, plain, [t.double() for t in plain])


@pytest.mark.parametrize(("kernel", "backend"), [case for case in kc.CASES if case[0].mutates],
                         ids=[i for i, case in zip(kc.IDS, kc.CASES, strict=True)
                              if case[0].mutates])
def test_a_strided_result_is_refused(kernel, backend):
    call = kc.make(kernel, middle(kernel), torch.float32).map(
        lambda t: kc.strided(t) if t.dim() else t)
    with pytest.raises(ValueError, match="contiguous"):
        kc.run(kernel, kc.op_of(kernel, backend), call)


@by_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_show(kernel, backend, bad):
    """What the reference makes of NaN or infinity is never hidden, and does not spread further."""
    if kernel.mutates:
        call = kc.make(kernel, middle(kernel), torch.float32)
        call.tensors()[-2].view(-1)[0] = bad
    else:
        call = kc.make(kernel, middle(kernel), torch.float32)
        for tensor in call.differentiated():
            tensor.data.view(-1)[0] = bad
    beside = kc.run(kernel, kernel.reference, kc.clone(call))
    got = kc.run(kernel, kc.op_of(kernel, backend), call)
    for ours, theirs in zip(got, beside, strict=True):
        if not ours.is_floating_point():
            continue
        assert not (ours.isfinite() & ~theirs.isfinite()).any(), "a bad number was hidden"
        spoilt = ~theirs.isfinite()
        row = spoilt.any(-1, keepdim=True) if spoilt.dim() > 1 else spoilt
        assert not (~ours.isfinite() & ~row).any(), "a bad number spread"


@by_case
def test_same_bits_every_time(kernel, backend):
    call = kc.make(kernel, middle(kernel), torch.bfloat16)
    op = kc.op_of(kernel, backend)
    first, second = (kc.run(kernel, op, kc.clone(call)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@by_kernel
def test_compiles_whole(kernel):
    """torch.compile(fullgraph=True), plain and with the last variant, forward and backward."""
    for options in ({}, *list(kernel.variants.values())[-1:]):
        torch._dynamo.reset()
        call = kc.make(kernel, middle(kernel), torch.float32, **options)
        compiled = torch.compile(kernel.public, fullgraph=True, backend="aot_eager")
        got = kc.run(kernel, compiled, kc.clone(call))
        eager = kc.run(kernel, kernel.public, kc.clone(call))
        kc.judge(got, eager, [t.double() for t in eager])


class Record(TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastllm":
            self.calls.setdefault(function, tree_map(
                lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, args))
        return function(*args, **(kwargs or {}))


@by_kernel
def test_opcheck(kernel):
    """Schema, mutation, fake tensors and tracing of every operator that a call runs."""
    record = Record()
    for options in ({}, *kernel.variants.values()):
        with record:
            kc.run(kernel, kernel.public, kc.make(kernel, kernel.test_shapes[1], torch.float32,
                                                  **options))
    assert record.calls
    for operator, args in record.calls.items():
        functional = not operator._schema.is_mutable
        differentiable = functional and "backward" not in operator.__name__
        prepared = tree_map(
            lambda t, on=differentiable: t.requires_grad_() if on and isinstance(t, torch.Tensor)
            and t.is_floating_point() and t.dim() > 1 else t, args)
        torch.library.opcheck(operator, prepared)


@pytest.mark.parametrize("backend", sorted({backend for _, backend in kc.CASES} - {"reference"}))
def test_offsets_beyond_32_bits(backend):
    """Rows over 2^31 elements apart, in a process of its own: a 32-bit offset would crash it."""
    script = Path(__file__).with_name("far_rows.py")
    done = subprocess.run([sys.executable, str(script), backend], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [k.name for k in kc.KERNELS
                                   if k.overflow_shape and backend in kc.backends(k)]


def test_program_ids_are_widened():
    """tl.program_id is int32: it becomes int64 at once, or only counts a loop."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        fine = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "to":
                fine.add(id(node.value))
            elif isinstance(node, ast.Call) and "range" in (
                    getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
                fine.update(map(id, node.args))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "program_id":
                assert id(node) in fine, f"{path.name}:{node.lineno}: program_id without .to(int64)"


class Tilt(torch.autograd.Function):
    """The identity, whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@by_kernel
def test_the_judge_rejects_wrong_kernels(kernel):
    """A scale off by 1e-4, a sign, and a gradient off by 1e-4 must each fail."""
    call = kc.make(kernel, kernel.test_shapes[-1], torch.float32)
    truth = kc.run(kernel, kernel.reference, kc.upcast(call))
    beside = kc.run(kernel, kernel.reference, kc.clone(call))
    kc.judge(beside, beside, truth)
    for wrong in (lambda t: t * 1.0001, lambda t: -t, lambda t: t.roll(1) if t.dim() else t + 1):
        for i, tensor in enumerate(beside):
            if not tensor.is_floating_point() or not tensor.abs().max() > 0 or tensor.numel() < 2:
                continue
            changed = [*beside[:i], wrong(tensor), *beside[i + 1:]]
            with pytest.raises(AssertionError):
                kc.judge(changed, beside, truth)
    if call.differentiated():
        def tilted(*args, **kwargs):
            tilt = [Tilt.apply(a, 1.0001) if isinstance(a, torch.Tensor) and a.requires_grad else a
                    for a in args]
            return kernel.reference(*tilt, **kwargs)

        with pytest.raises(AssertionError):
            kc.check(kernel, tilted, kc.clone(call))
