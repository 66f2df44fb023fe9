"""What a training loop demands of every kernel: no waiting, export, autocast, CUDA graphs."""

import kernel_check as kc
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm import ops
from fastllm.kernels._spec import Call

by_kernel = pytest.mark.parametrize("kernel", kc.KERNELS, ids=lambda kernel: kernel.name)
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal",
         "unique2", "_unique2", "unique_dim", "unique_consecutive"}


def middle(kernel):
    return kernel.test_shapes[len(kernel.test_shapes) // 2]


def all_options(kernel):
    return {"plain": {}, **kernel.variants, **kernel.bench_options}


class NoWaiting(TorchDispatchMode):
    """Fails where an operator would make the host wait for a GPU, inside our own operators too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in args[1] if i is not None)
        assert name not in WAITS and not by_mask, f"{name} waits for the GPU"
        if function.namespace == "fastllm":
            with self:  # a custom operator's implementation, seen from the inside
                return function.redispatch(kc.KEY, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def test_the_mode_sees_waiting():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.sum() > 0),
                 lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()


@by_kernel
def test_nothing_waits_for_the_gpu(kernel):
    """With this an op can be captured in a CUDA graph, and the host runs ahead of the GPU."""
    for options in all_options(kernel).values():
        call = kc.make(kernel, middle(kernel), torch.float32, **options)
        with NoWaiting(), ops.use_backend("triton", kernel.public.__name__):
            kc.run(kernel, kc.op_of(kernel, "triton"), call)


class Wrapped(torch.nn.Module):
    """A function and its options as a module, which is what torch.export takes."""

    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs, **self.options)


@by_kernel
def test_exports(kernel):
    """torch.export captures the op whole, and what it captured gives the same bits."""
    call = kc.make(kernel, middle(kernel), torch.float32).map(lambda t: t.detach().clone())
    call = call.map(lambda t: t.requires_grad_(False))
    tensors = {name: value for name, value in call.kwargs.items()
               if torch.utils._pytree.tree_any(lambda leaf: isinstance(leaf, torch.Tensor), value)}
    options = {name: value for name, value in call.kwargs.items() if name not in tensors}
    wanted = kernel.results(kernel.public, kc.clone(call))
    call = Call(call.args, tensors)
    first = kc.clone(call)
    program = torch.export.export(Wrapped(kernel.public, options), first.args,
                                  dict(first.kwargs), strict=False)
    # One that writes into its arguments is wrapped in an operator of torch's own, and what runs
    # without gradients is a graph within the graph.
    nodes = [node for module in program.graph_module.modules()
             if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes]
    assert any("fastllm" in f"{node.target} {node.args}" for node in nodes), "none of our operators"
    got = kernel.results(program.module(), kc.clone(call))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@by_kernel
def test_runs_under_autocast(kernel):
    """float32 arguments under bfloat16 autocast: finite, close to float32, gradients in float32."""
    if kernel.mutates:
        pytest.skip("updates in place: there is nothing to cast")
    call = kc.make(kernel, middle(kernel), torch.float32)
    plain = kc.run(kernel, kernel.public, kc.clone(call))
    with torch.autocast(kc.DEVICE, torch.bfloat16):
        cast = kc.run(kernel, kernel.public, call)
    for a, b in zip(cast, plain, strict=True):
        if a.is_floating_point() and a.numel() > 1:
            assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm() + 1e-3
    for gradient, tensor in zip(cast[-len(call.differentiated()):], call.differentiated(),
                                strict=False):
        assert gradient.dtype == tensor.dtype


@by_kernel
def test_gradients_of_float64(kernel):
    """gradcheck in float64, through the public face, for every option that is differentiable."""
    shape = min(kernel.test_shapes[1:], key=lambda s: torch.Size(s).numel())
    for name, options in all_options(kernel).items():
        call = kc.upcast(kc.make(kernel, shape, torch.float32, **options))
        inputs = call.differentiated()
        if not inputs or sum(t.numel() for t in inputs) > 600 or "large" in name:
            continue
        # Written in place, the argument is not the leaf that gradcheck moves; and the gradient of a
        # padding row is left out on purpose.
        if call.kwargs.get("inplace") or "padding_idx" in call.kwargs:
            continue

        def function(*tensors, call=call, inputs=inputs):
            places = {id(old): new for old, new in zip(inputs, tensors, strict=True)}
            swapped = torch.utils._pytree.tree_map(lambda leaf: places.get(id(leaf), leaf),
                                                   (call.args, dict(call.kwargs)))
            op = getattr(ops, kernel.public.__name__)
            returned = op(*swapped[0], **swapped[1])
            return tuple(leaf for leaf in torch.utils._pytree.tree_leaves(returned)
                         if isinstance(leaf, torch.Tensor) and leaf.requires_grad)

        assert torch.autograd.gradcheck(function, inputs, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(kc.DEVICE != "cuda", reason="needs an NVIDIA GPU")
@by_kernel
def test_captured_in_a_cuda_graph(kernel):
    """A replay on new values gives what a call on them gives."""
    if kernel.mutates:
        pytest.skip("its step and learning rate are numbers of the host")
    call = kc.make(kernel, middle(kernel), torch.float32)
    fresh = kc.make(kernel, middle(kernel), torch.float32, draw=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            kc.run(kernel, kernel.public, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if kernel.name == "grad_norm":
        with pytest.raises(RuntimeError, match="leave this call out"), torch.cuda.graph(graph):
            kernel.public(*call.args, **call.kwargs)
        return
    with torch.cuda.graph(graph):
        results = kernel.results(kernel.public, call)
    with torch.no_grad():
        for old, new in zip(call.tensors(), fresh.tensors(), strict=True):
            old.copy_(new)
    graph.replay()
    for a, b in zip(results, kernel.results(kernel.public, fresh), strict=True):
        assert torch.equal(a, b)
