"""The linear loss: how much it holds, how it is divided, and where its gradients go."""

import kernel_check as kc
import pytest
import torch

from fastllm import ops
from fastllm.kernels import _chunks as chunks
from fastllm.kernels import linear_cross_entropy as module

SHAPE = (13, 24, 100)
BACKENDS = [backend for kernel, backend in kc.CASES if kernel is module.KERNEL]
loss_of = {backend: kc.op_of(module.KERNEL, backend) for backend in BACKENDS}


def case(**options):
    call = kc.make(module.KERNEL, SHAPE, torch.float32, **options)
    return *call.args, dict(call.kwargs)


def truth(hidden, weight, labels, upstream=1.0, **options):
    """The gradients of hidden and weight by plain autograd."""
    loss = module.reference(hidden, weight, labels, **options)
    return torch.autograd.grad(loss * upstream, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_division_into_chunks_is_a_matter_of_rounding(chunk, recompute):
    call = kc.make(module.KERNEL, SHAPE, torch.float32, chunk_size=chunk, recompute=recompute)
    kc.check(module.KERNEL, module.linear_cross_entropy, call)


@pytest.mark.parametrize("shape", [(1, 1, 1), (30, 8, 9), (1, 8, 300)])
def test_tokens_fewer_and_more_than_words(shape):
    """The recomputing backward goes by columns or by rows; one of everything is a shape too."""
    for options in ({}, {"recompute": True, "chunk_size": 3}, {"reduction": "none"}):
        call = kc.make(module.KERNEL, shape, torch.float32, biased=True, **options)
        kc.check(module.KERNEL, module.linear_cross_entropy, call)


def test_what_a_gpu_and_a_cpu_hold():
    size = (8192, 4096, 128256)
    held, tile = chunks.rows(*size, 2)
    assert held == tile and held % 128 == 0 and held * size[2] * 2 <= size[1] * size[2] * 2
    assert chunks.rows(2720, 512, 6400, 2) == (2720, 2720), "small logits are one chunk"
    assert chunks.rows(*size, 2, chunk_size=300) == (300, 300)
    assert chunks.rows(*size, 2, tight=True)[0] < held
    assert chunks.columns(*size, 2) * size[0] * 2 <= chunks.TIGHT
    assert chunks.columns(1 << 20, 4096, 128256, 2) == chunks.LEAST
    assert chunks.rows(2720, 512, 6400, 2, cached=True) == (1360, 256)
    assert chunks.rows(5, 16, 10, 4, cached=True) == (5, 5)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_without_gradients_the_logits_are_not_differentiated(monkeypatch, reduction):
    hidden, weight, labels, _ = case()

    def refuse(*args):
        raise AssertionError("a gradient was computed that nobody asked for")

    parts = module.PARTS["triton"]
    monkeypatch.setitem(module.PARTS, "triton", module.Parts(parts.losses, refuse, statistics=3))
    with torch.no_grad():
        loss = module.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(
        loss, module.reference(hidden, weight, labels, reduction=reduction).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_no_product(monkeypatch, backend, recompute, frozen):
    *args, _ = case()
    args[frozen].requires_grad_(False)
    left = args[1 - frozen]
    name = {"triton": "triton", "cpp": "cpp", "reference": "torch"}[backend]
    parts, products = module.PARTS[name], []

    def count(a, b, out):
        products.append(tuple(out.shape))
        chunks.product(a, b, out)

    monkeypatch.setitem(module.PARTS, name, module.Parts(
        **{**vars(parts), "matmul": count}))
    loss = loss_of[backend](*args, recompute=recompute)
    (ours,) = torch.autograd.grad(loss, left)
    (theirs,) = torch.autograd.grad(module.reference(*args), left)
    torch.testing.assert_close(ours, theirs)
    unwanted = (SHAPE[0], SHAPE[1]) if frozen == 0 else (SHAPE[2], SHAPE[1])
    assert unwanted not in products
    assert len(products) == (3 if recompute else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [None, 0.25, "tensor"])
def test_main_grad_is_added_to(backend, reduction, recompute, scale):
    """Over two micro-batches of several chunks, what was there before included."""
    hidden, weight, labels, _ = case()
    main = torch.ones_like(weight, requires_grad=False)
    promised = {None: 1.0, "tensor": 0.5}.get(scale, scale)
    given = torch.tensor(promised, device=hidden.device) if scale == "tensor" else scale
    for _ in range(2):
        loss = loss_of[backend](hidden, weight, labels, reduction=reduction, chunk_size=4,
                                main_grad=main, grad_scale=given, recompute=recompute)
        (loss.sum() * promised).backward()
    dhidden, dweight = truth(hidden, weight, labels, promised,
                             reduction="sum" if reduction == "none" else reduction)
    assert weight.grad is None
    torch.testing.assert_close(main, 1 + 2 * dweight)
    torch.testing.assert_close(hidden.grad, 2 * dhidden)


def test_main_grad_of_16_bit_products_is_float32():
    call = kc.make(module.KERNEL, SHAPE, torch.bfloat16)
    hidden, weight, labels = call.args
    main = torch.zeros(weight.shape, device=weight.device)
    for recompute in (False, True):
        module.linear_cross_entropy(hidden, weight, labels, main_grad=main, chunk_size=5,
                                    recompute=recompute).backward()
    expected = truth(hidden.double().detach().requires_grad_(),
                     weight.double().detach().requires_grad_(), labels)[1]
    assert (main.double() / 2 - expected).norm() < 0.01 * expected.norm()


def test_a_broken_promise_is_noticed():
    hidden, weight, labels, _ = case()
    main = torch.zeros_like(weight, requires_grad=False)
    loss = module.linear_cross_entropy(hidden, weight, labels, main_grad=main, grad_scale=0.5)
    if kc.DEVICE == "cpu":  # on a GPU the assertion would end the process's context
        with pytest.raises(RuntimeError, match="not the grad_scale"):
            loss.backward()
    loss = module.linear_cross_entropy(hidden, weight, labels, main_grad=main, recompute=True)
    (loss * 0.3).backward()  # takes the true factor, and needs no promise


def test_without_gradients_main_grad_is_left():
    hidden, weight, labels, _ = case()
    main = torch.zeros_like(weight, requires_grad=False)
    with torch.no_grad():
        module.linear_cross_entropy(hidden, weight, labels, main_grad=main)
    weight.requires_grad_(False)
    module.linear_cross_entropy(hidden, weight, labels, main_grad=main).backward()
    assert not main.any()


def test_a_second_backward_is_refused_or_right():
    hidden, weight, labels, _ = case()
    loss = module.linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        loss.backward()
    loss = module.linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="recompute=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = module.linear_cross_entropy(hidden, weight, labels, recompute=True)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_of_sequences_keep_their_shape(backend, reduction):
    hidden, weight, labels, _ = case()
    labels[3] = -100
    options = {"reduction": reduction}
    if backend != "cpp":
        options["return_metrics"] = True
    flat = loss_of[backend](hidden[:12], weight, labels[:12], **options)
    deep = loss_of[backend](hidden[:12].view(3, 4, -1), weight, labels[:12].view(3, 4), **options)
    if backend != "cpp":
        assert deep[1].predicted.shape == deep[1].entropy.shape == (3, 4)
        flat, deep = flat[0], deep[0]
    assert deep.shape == ((3, 4) if reduction == "none" else ())
    assert torch.equal(flat, deep.view(flat.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_a_linear_layer(dtype):
    hidden, weight, labels, _ = case()
    bias = torch.zeros(weight.shape[0], device=weight.device, requires_grad=True)
    with torch.autocast(kc.DEVICE, dtype=dtype):
        ours = module.linear_cross_entropy(hidden, weight, labels, bias=bias)
    cast = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    theirs = module.linear_cross_entropy(cast[0], cast[1], labels, bias=cast[2])
    assert ours == theirs
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight, bias)),
                    torch.autograd.grad(theirs, cast), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


@pytest.mark.parametrize("recompute", [False, True])
def test_main_grad_under_compile(recompute):
    hidden, weight, labels, _ = case()
    torch._dynamo.reset()
    mains = [torch.zeros_like(weight, requires_grad=False) for _ in range(2)]

    def step(hidden, main):
        return module.linear_cross_entropy(hidden, weight, labels, main_grad=main, chunk_size=4,
                                           recompute=recompute)

    gradients = [torch.autograd.grad(run(hidden, main), hidden)[0] for run, main in
                 zip((step, torch.compile(step, fullgraph=True, backend="aot_eager")), mains,
                     strict=True)]
    assert torch.equal(*gradients) and torch.equal(*mains) and mains[0].any()


def test_options_that_cpp_lacks_are_not_dropped():
    hidden, weight, labels, _ = case()
    with ops.use_backend("cpp", "linear_cross_entropy"), pytest.raises(
            RuntimeError, match=r"logit_scale|cannot run"):
        ops.linear_cross_entropy(hidden, weight, labels, logit_scale=2.0)


def test_arguments_that_do_not_fit_raise():
    hidden, weight, labels, _ = case()
    refused = module.linear_cross_entropy
    main = torch.zeros_like(weight, requires_grad=False)
    with pytest.raises(ValueError, match="must be"):
        refused(hidden, weight[:, :3], labels)
    with pytest.raises(TypeError, match="bfloat16"):
        refused(hidden.bfloat16(), weight, labels)
    with pytest.raises(TypeError, match=r"bias torch\.float64"):
        refused(hidden, weight, labels, bias=main[:, 0].double())
    for wrong, message in (({"chunk_size": 0}, "chunk_size 0"), ({"bias": main[0]}, "bias"),
                           ({"main_grad": main.bfloat16()}, "main_grad"),
                           ({"grad_scale": 2.0}, "no main_grad"),
                           ({"main_grad": main, "grad_scale": main[0]}, "one number"),
                           ({"reduction": "median"}, "median"),
                           ({"ce_weight": main[0]}, "class weights")):
        with pytest.raises(ValueError, match=message):
            refused(hidden, weight, labels, **wrong)
