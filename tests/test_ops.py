"""Which backend runs what, and the ops that have no kernel of their own yet."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastllm import cpu, ops
from fastllm.kernels import _spec, _triton
from fastllm.kernels import attention as _attention
from fastllm.ops import _dispatch, _plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
HAVE_CPP = DEVICE == "cpu" and cpu.available()


def backends(op):
    """The backends that can run an op on this machine."""
    return [name for name in ops.BACKENDS
            if not _dispatch.why_not(op, name, torch.device(DEVICE))]


def for_each(*names):
    return pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in names
                                                       for backend in backends(op)])


# ----------------------------------------------------------------------------------- dispatch


def test_auto_on_cpu_tensors():
    for op, (backend, reason) in ops.dispatch("cpu").items():
        if "cpp" not in _dispatch.TABLE[op].backends:
            assert (backend, reason) == ("reference", f"{op} has no cpp implementation")
        elif cpu.available() or op == "linear":
            assert backend == "cpp", op
        else:
            assert backend == "reference", op
            assert "fastllm._C" in reason
        assert reason


def test_auto_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler was found")
    table = ops.dispatch("cpu")
    assert table["rms_norm"] == ("reference", "no compiler was found")
    assert table["linear"][0] == "cpp"  # torch itself has that product
    with ops.use_backend("cpp", "swiglu"), pytest.raises(
            RuntimeError, match="swiglu: the cpp backend cannot run on cpu: no compiler was found"):
        ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))


def test_auto_on_other_devices():
    cuda = ops.dispatch("cuda")
    kernels = {kernel.public.__name__ for kernel in _spec.kernels()}
    # kl_div is jsd at its two ends.
    assert {op for op, (backend, _) in cuda.items() if backend == "triton"} == {*kernels, "kl_div"}
    assert cuda["linear"] == ("reference", "the vendor's matrix product")
    assert {backend for backend, _ in ops.dispatch("meta").values()} == {"reference"}
    x = torch.empty(2, 8, device="meta")
    assert ops.rms_norm(x, torch.empty(8, device="meta")).shape == (2, 8)


def test_float64_takes_the_reference():
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(ops.swiglu, (x, x.detach().flip(0).requires_grad_()))
    labels = torch.tensor([1, -100, 7], device=DEVICE)
    assert torch.autograd.gradcheck(lambda w: ops.embedding(labels.clamp(min=0) // 4, w), (x,))
    assert torch.autograd.gradcheck(lambda t: ops.cross_entropy(
        t, labels, label_smoothing=0.1, z_loss=0.01, softcap=3.0, reduction="mean"), (x,))
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(
        h, w, labels, chunk_size=2, reduction="none"), (x, torch.randn(
            9, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)))


def test_a_backend_that_was_asked_for_and_cannot_run_raises(monkeypatch):
    x = torch.ones(1, 2)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with ops.use_backend("triton", "swiglu"), pytest.raises(
            RuntimeError, match=r"swiglu: the triton backend cannot run on cpu: .*INTERPRET"):
        ops.swiglu(x, x)
    with ops.use_backend("triton"), pytest.raises(
            RuntimeError, match=r"linear: the triton backend .*: linear has no triton"):
        ops.linear(x, x)
    meta = torch.empty(1, 2, device="meta")
    with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="take CPU tensors, not meta"):
        ops.swiglu(meta, meta)


def test_a_cuda_tensor_without_triton_raises(monkeypatch):
    monkeypatch.setattr(_triton, "_MISSING", "triton cannot be imported")
    reason = _dispatch.why_not("rms_norm", "triton", torch.device("cuda"))
    assert reason == "triton cannot be imported"
    assert ops.dispatch("cuda")["rms_norm"][0] == "triton"  # and not, quietly, the reference


def test_an_option_that_cpp_lacks_takes_the_reference():
    def scaled(x, *, factor=1.0, bias=None):
        return "triton"

    scaled_op = _dispatch.face(scaled, cpp=lambda x: "cpp", cpp_lacks=("factor", "bias"),
                               reference=lambda x, **_: "reference")
    x = torch.ones(2)
    try:
        if HAVE_CPP:
            assert scaled_op(x) == scaled_op(x, factor=1.0, bias=None) == "cpp"
            assert ops.dispatch("cpu")["scaled"][1] == "CPU tensors; reference with factor, bias"
            with ops.use_backend("cpp", "scaled"), pytest.raises(
                    RuntimeError, match="scaled: the cpp backend cannot run on cpu: it has no b"):
                scaled_op(x, bias=x)
        assert scaled_op(x, factor=2.0) == scaled_op(x, bias=x) == "reference"
    finally:
        del _dispatch.TABLE["scaled"]


def test_faces_carry_the_kernels_documentation():
    for kernel in _spec.kernels():
        op = getattr(ops, kernel.public.__name__)
        assert op.__doc__ == kernel.public.__doc__
        assert inspect.signature(op) == inspect.signature(kernel.public)


def test_settings_nest_and_are_restored():
    before = ops.dispatch("cpu")
    with ops.use_backend("reference"):
        assert set(ops.dispatch("cpu").values()) == {("reference", "asked for")}
        with ops.use_backend("auto", "rope"):
            assert ops.dispatch("cpu")["rope"] == before["rope"]
            assert ops.dispatch("cpu")["swiglu"][0] == "reference"
        with pytest.raises(ZeroDivisionError), ops.use_backend("cpp", "rope"):
            _ = 1 / 0
        assert ops.dispatch("cpu")["rope"][0] == "reference"
    assert ops.dispatch("cpu") == before
    ops.set_backend("rope", "reference")
    assert ops.dispatch("cpu")["rope"][0] == "reference"
    ops.set_backend("rope", "auto")
    assert ops.dispatch("cpu") == before


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="no op 'rms'"):
        ops.set_backend("rms", "triton")
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        ops.set_backend("rope", "cuda")


# ------------------------------------------------------------- attention as plain torch runs it


def qkv(*shapes):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=DEVICE).requires_grad_()
            for shape in shapes]


@pytest.mark.parametrize("options", [
    {}, {"scale": 0.3}, {"window": (4, 1)}, {"softcap": 2.0}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (3, 9), (9, 3), (4, 0)])
def test_plain_attention(options, causal, queries, keys):
    """torch's own attention where it has the options, and by the definition where not."""
    tensors = qkv((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    results = []
    for function in (_plain.attention, _attention.reference):
        out = function(*tensors, causal=causal, **options)
        out = out[0] if isinstance(out, tuple) else out
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_of_packed_sequences(causal):
    tensors = qkv((12, 4, 8), (14, 2, 8), (14, 2, 8))
    bounds = [torch.tensor(x, device=DEVICE) for x in ([0, 3, 3, 8, 11], [0, 5, 7, 9, 13])]
    options = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    ours = _plain.attention(*tensors, causal=causal, **options)
    theirs = _attention.reference(*tensors, causal=causal, **options)
    torch.testing.assert_close(ours, theirs)
    assert not ours[11:].any()
    torch._dynamo.reset()
    with ops.use_backend("reference", "attention"):
        whole = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(*tensors, causal=causal, **options), theirs)


# ------------------------------------------------------------------------ norm and matrix product


@for_each("grad_norm")
def test_grad_norm(op, backend):
    generator = torch.Generator(DEVICE).manual_seed(0)
    grads = [torch.randn(size, generator=generator, device=DEVICE).to(dtype) for size, dtype in (
        ((300, 401), torch.float32), ((5,), torch.bfloat16), ((0, 3), torch.float32),
        ((9000,), torch.float16))]
    with ops.use_backend(backend, op):
        norm = ops.grad_norm(grads)
        exact = torch.cat([g.double().flatten() for g in grads]).norm()
        assert norm.shape == ()
        assert norm.dtype == torch.float32
        assert abs(norm.item() / exact.item() - 1) < 1e-6
        assert ops.grad_norm([]).item() == 0
        assert ops.grad_norm([torch.tensor([3.0, float("nan")], device=DEVICE)]).isnan()
        assert ops.grad_norm([torch.full((3,), 1e15, device=DEVICE)]).item() == pytest.approx(
            3**0.5 * 1e15)


@for_each("grad_norm")
def test_grad_norm_does_not_depend_on_threads(op, backend):
    grads = [torch.randn(70_001, generator=torch.Generator().manual_seed(i)).to(DEVICE) * 10**i
             for i in range(3)]
    before = torch.get_num_threads()
    norms = set()
    try:
        with ops.use_backend(backend, op):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                norms.add(ops.grad_norm(grads).item())
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


@for_each("linear")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(op, backend, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
                       .requires_grad_() for shape in ((2, 5, 24), (7, 24), (7,)))
    with ops.use_backend(backend, op):
        for arguments in ((x, weight), (x, weight, bias)):
            ours, theirs = ops.linear(*arguments), F.linear(*arguments)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(torch.autograd.grad(ours.sum(), arguments),
                                       torch.autograd.grad(theirs.sum(), arguments))


# ------------------------------------------------------------------------------ across backends


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "cross_entropy"])
def test_backends_agree(op):
    """The same call gives the same numbers whichever backend runs it."""
    x = torch.randn(6, 40, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    second = {"rms_norm": torch.ones(40, device=DEVICE), "swiglu": x.flip(0),
              "cross_entropy": torch.arange(6, device=DEVICE)}[op]
    results = []
    for backend in backends(op):
        with ops.use_backend(backend, op):
            results.append(getattr(ops, op)(x, second))
    assert len(results) >= 2
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_adamw_of_nothing():
    ops.adamw_step([], [], [], [], [], lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0,
                   step=1, grad_scale=torch.ones((), device=DEVICE))
