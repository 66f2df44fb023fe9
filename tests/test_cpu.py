"""The C++ ops against torch in fp64: err(ours) <= 2 err(torch in the tested dtype) + tiny."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_check import DTYPES, check, plain_attention, run, seeded
from torch import Tensor
from torch.nn import functional

from fastllm import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")

# ------------------------------------------------------------------------------ the elementwise ops


def reference_rms_norm(x, weight, eps=1e-6):
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def reference_rope(q, k, cos, sin):
    def one(x):
        c, s = (t.reshape(-1, x.shape[1], 1, x.shape[3] // 2).to(x.dtype) for t in (cos, sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)
    return one(q), one(k)


def reference_swiglu(gate, up):
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (130, 33), (1, 1), (2, 512), (0, 8)])
def test_rms_norm(dtype, shape):
    x = seeded(*shape, dtype=dtype)
    weight = seeded(shape[-1], dtype=dtype, seed=1)
    check(cpu.rms_norm, reference_rms_norm, [x, weight], dtype)


def test_rms_norm_of_strided_rows():
    whole = seeded(2, 7, 3, 40)
    weight = seeded(16)
    for x in (whole[..., 8:24], whole.transpose(1, 2)[..., :16]):
        assert torch.equal(cpu.rms_norm(x, weight), cpu.rms_norm(x.contiguous(), weight))
    # One weight in fp32 over 16-bit activations, and an expanded gradient.
    y = cpu.rms_norm(whole[..., :16].bfloat16(), weight)
    assert y.dtype == torch.bfloat16
    x = seeded(4, 16).requires_grad_()
    cpu.rms_norm(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hq", "hkv", "d"), [(4, 2, 64), (3, 1, 80), (1, 1, 2), (2, 2, 96)])
def test_rope(dtype, hq, hkv, d):
    fused = seeded(2, 9, hq + 2 * hkv, d, dtype=dtype)
    q, k, _ = fused.split([hq, hkv, hkv], 2)
    for shape in ((2, 9, d // 2), (9, d // 2)):
        angle = seeded(*shape, seed=3) * 5
        cos, sin = angle.cos(), angle.sin()
        check(lambda a, b, cos=cos, sin=sin: cpu.rope(a, b, cos, sin),
              lambda a, b, cos=cos, sin=sin: reference_rope(a, b, cos, sin), [q, k], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 66), (1, 1), (7, 37), (0, 4)])
def test_swiglu(dtype, shape):
    gate_up = seeded(*shape[:-1], 2 * shape[-1], dtype=dtype) * 4
    gate, up = gate_up.chunk(2, -1)
    check(cpu.swiglu, reference_swiglu, [gate, up], dtype)


def test_swiglu_extremes():
    gate = torch.tensor([-1e4, -100.0, -88.5, -0.0, 88.5, 1e4, float("nan")])
    y = cpu.swiglu(gate, torch.ones(7))
    assert torch.allclose(y, functional.silu(gate), equal_nan=True, atol=1e-30)


# ------------------------------------------------------------------------------------------- loss


def reference_cross_entropy(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                            softcap=None, reduction="sum"):
    x = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    loss = functional.cross_entropy(x, labels, ignore_index=ignore_index, reduction="none",
                                    label_smoothing=label_smoothing)
    loss = loss + z_loss * x.logsumexp(-1) ** 2 * (labels != ignore_index)
    if reduction == "none":
        return loss
    return loss.sum() / ((labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)


OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 5.0}, {"reduction": "mean"},
           {"reduction": "none", "ignore_index": 3},
           {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "reduction": "mean"}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy(dtype, options):
    labels = torch.tensor([3, -100, 0, 1002, 7, -100, 500])
    labels = labels.where(labels >= 0, options.get("ignore_index", -100))
    logits = seeded(7, 1003, dtype=dtype) * 3
    for inplace in (False, True):
        check(lambda x, i=inplace: cpu.cross_entropy(x * 1, labels, inplace=i, **options),
              lambda x: reference_cross_entropy(x, labels, **options), [logits], dtype)


def test_cross_entropy_in_one_pass_is_forward_and_backward():
    labels = torch.tensor([0, 5, -100, 40])
    for dtype in DTYPES:
        for options in [(-100, 0.0, 0.0, 0.0), (-100, 0.1, 1e-3, 10.0)]:
            logits = seeded(4, 41, dtype=dtype) * 4
            loss, lse = torch.ops.fastllm_cpu.cross_entropy(logits, labels, *options)
            expected = torch.ops.fastllm_cpu.cross_entropy_backward(
                torch.ones(4), logits, labels, lse, *options)
            got = torch.ops.fastllm_cpu.cross_entropy_with_gradient_(logits, labels, *options)
            assert torch.equal(got, loss)
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
            assert torch.allclose(logits.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_cross_entropy_edges():
    logits = seeded(3, 11).requires_grad_()
    ignored = torch.full((3,), -100)
    for reduction in ("sum", "mean"):
        loss = cpu.cross_entropy(logits, ignored, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0
        assert not grad.any()
    with pytest.raises(IndexError, match=r"label 11 at row 1 .* vocabulary of 11"):
        cpu.cross_entropy(logits, torch.tensor([0, 11, 2]))
    with pytest.raises(IndexError, match="label -1 "):
        cpu.cross_entropy(logits, torch.tensor([0, 1, -1]))
    assert cpu.cross_entropy(seeded(0, 5), torch.empty(0, dtype=torch.long)) == 0
    assert cpu.cross_entropy(torch.full((1, 5), float("nan")), torch.tensor([0])).isnan()
    loss = cpu.cross_entropy(logits * 1, torch.tensor([0, 1, 2]), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten"):
        loss.backward()


# ----------------------------------------------------------------------------- what holds for all


def battery(dtype: torch.dtype) -> list[Tensor]:
    """Values and gradients of every op, on sizes that give several threads work."""
    angle = seeded(150, 32, seed=5)
    labels = torch.arange(150) * 13 % 701
    q, k, v = ([seeded(2, 150, 4, 64, dtype=dtype), *(seeded(2, 150, 2, 64, dtype=dtype, seed=i)
                                                       for i in (1, 2))])
    long = [seeded(1500, h, 16, dtype=dtype, seed=i) for i, h in enumerate((2, 1, 1))]
    packed = {"cu_seqlens_q": torch.tensor([0, 20, 150, 1490]), "window": (700, 60),
              "softcap": 3.0, "return_lse": True}
    cases = [
        (cpu.rms_norm, [seeded(300, 150, dtype=dtype), seeded(150, dtype=dtype)]),
        (lambda q, k: cpu.rope(q, k, angle.cos(), angle.sin()),
         [seeded(2, 150, 4, 64, dtype=dtype), seeded(2, 150, 2, 64, dtype=dtype)]),
        (cpu.swiglu, [seeded(300, 170, dtype=dtype), seeded(300, 170, dtype=dtype, seed=1)]),
        (lambda x: cpu.cross_entropy(x, labels), [seeded(150, 701, dtype=dtype)]),
        (lambda *x: cpu.attention(*x, causal=True), [q, k, v]),
        (lambda *x: cpu.attention(*x[:3], sinks=x[3], **packed), [*long, seeded(2)]),
    ]
    return [x for function, inputs in cases for part in run(function, inputs)[:2] for x in part]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(battery(dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def small_battery() -> None:
    """What the child processes of the next test run: values by the rule, with other code paths."""
    for dtype in DTYPES:
        weight = seeded(33, dtype=dtype)
        check(cpu.rms_norm, reference_rms_norm, [seeded(70, 33, dtype=dtype), weight], dtype)
        x, y = seeded(9, 37, dtype=dtype) * 4, seeded(9, 37, dtype=dtype, seed=1)
        check(cpu.swiglu, reference_swiglu, [x, y], dtype)
        angle = seeded(9, 8)
        check(lambda q, k, a=angle: cpu.rope(q, k, a.cos(), a.sin()),
              lambda q, k, a=angle: reference_rope(q, k, a.cos(), a.sin()),
              [seeded(2, 9, 3, 16, dtype=dtype), seeded(2, 9, 1, 16, dtype=dtype)], dtype)
        for options in OPTIONS:
            check(lambda x, y, o=options: cpu.cross_entropy(x, y, **o),
                  lambda x, y, o=options: reference_cross_entropy(x, y, **o),
                  [seeded(9, 101, dtype=dtype), torch.arange(9)], dtype)
        for d in (64, 80):
            q, k, v = (seeded(1, 97, h, d, dtype=dtype, seed=h) for h in (4, 2, 2))
            check(lambda *x: cpu.attention(*x, causal=True, return_lse=True),
                  lambda *x: plain_attention(*x, causal=True), [q, k, v], dtype)
            options = {"window": (30, 9), "softcap": 2.0}
            check(lambda *x, o=options: cpu.attention(*x[:3], sinks=x[3], return_lse=True, **o),
                  lambda *x, o=options: plain_attention(*x, **o),
                  [q, k, v, seeded(4, dtype=dtype)], dtype)
    print(torch.ops.fastllm_cpu.isa())


@pytest.mark.parametrize(("level", "name"), [("avx2", "avx2"), ("default", "baseline")])
def test_lesser_instruction_sets(level, name):
    here = torch.ops.fastllm_cpu.isa()
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False,
                           env={**os.environ, "ATEN_CPU_CAPABILITY": level,
                                "PYTHONPATH": os.pathsep.join(sys.path)})
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == (name if here != "baseline" else "baseline")


def test_operators_are_well_described():
    x, w = seeded(4, 16), seeded(16)
    q, k = seeded(1, 6, 2, 16), seeded(1, 6, 1, 16)
    ops, labels = torch.ops.fastllm_cpu, torch.tensor([0, 3, -100, 15])
    angle = seeded(6, 8)
    ones = torch.ones(4)
    sinks, options = seeded(2), (-1, 0, 0.25, 0.0)
    alone = (q, k, k, None, None, None, *options)
    cu = torch.tensor([0, 2, 6])
    packed = (q[0], k[0], k[0], cu, cu, sinks, *options)
    out, lse = ops.attention(*alone)
    packed_out, packed_lse = ops.attention(*packed)
    cases = [
        (ops.rms_norm, (x, w, 1e-6)), (ops.rms_norm_backward, (x, x, w, ones)),
        (ops.rope, (q, k, angle, angle, False)), (ops.swiglu, (x, x)),
        (ops.swiglu_backward, (x, x, x)), (ops.attention, alone), (ops.attention, packed),
        (ops.attention_backward, (q, None, *alone[:3], out, lse, *alone[3:])),
        (ops.attention_backward, (q[0], packed_lse, *packed[:3], packed_out, packed_lse,
                                  *packed[3:])),
        (ops.cross_entropy, (x, labels, -100, 0.0, 0.0, 0.0)),
        (ops.cross_entropy_backward, (ones, x, labels, ones, -100, 0.0, 0.0, 0.0)),
        (ops.cross_entropy_backward_, (ones, x.clone(), labels, ones, -100, 0.0, 0.0, 0.0)),
        (ops.cross_entropy_with_gradient_, (x.clone(), labels, -100, 0.0, 0.0, 0.0)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph():
    angle = seeded(6, 8)
    labels = torch.arange(6)

    cu = torch.tensor([0, 2, 6])

    def step(x, weight, sinks):
        q, k, v = x.view(1, 6, 4, 16).split([2, 1, 1], 2)
        q, k = cpu.rope(q, k, angle.cos(), angle.sin())
        z, lse = cpu.attention(q[0], k[0], v[0], cu_seqlens_q=cu, window=(2, 0), softcap=2.0,
                               sinks=sinks, return_lse=True)
        y = (cpu.attention(q, k, v, causal=True) + z * lse.t()[..., None]).flatten(2)
        y = cpu.rms_norm(y, weight)
        return cpu.cross_entropy(cpu.swiglu(*y[0].chunk(2, -1)), labels)

    inputs = [seeded(6, 64), seeded(32), seeded(2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs)[:2], run(step, inputs)[:2], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -------------------------------------------------------------------------------- linear, optimizer


@pytest.mark.parametrize("backend", ["onednn", "torch"])
def test_linear(monkeypatch, backend):
    if backend == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(cpu, "matmul_backend", lambda: (backend, "for the test"))
    for shape, outs in [((3, 5, 70), 33), ((1, 70), 1), ((200, 70), 64)]:
        x, weight, bias = seeded(*shape), seeded(outs, 70, seed=1), seeded(outs, seed=2)
        check(cpu.linear, functional.linear, [x, weight, bias], torch.float32)
        check(cpu.linear, functional.linear, [x, weight], torch.float32)
    wide = seeded(4, 9, 140)
    check(cpu.linear, functional.linear, [wide[..., ::2], seeded(70, 33).t()], torch.float32)
    check(cpu.linear, functional.linear, [wide.transpose(0, 1), seeded(8, 140)], torch.float32)
    assert cpu.linear(seeded(0, 70), seeded(33, 70)).shape == (0, 33)
    half = cpu.linear(seeded(4, 8).bfloat16(), seeded(3, 8).bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.linear(seeded(4, 8), seeded(3, 8)).dtype == torch.bfloat16


def test_matmul_backend_is_a_property_of_the_machine():
    assert cpu.matmul_backend() == cpu._choose_matmul(cpu._vendor())
    for vendor, expected in [("AuthenticAMD", "onednn"), ("GenuineIntel", "torch"), ("", "torch")]:
        name, reason = cpu._choose_matmul(vendor)
        assert name == (expected if torch.backends.mkldnn.is_available() else "torch")
        assert reason


def test_linear_under_other_precision_settings_is_exact_by_default():
    x, weight = seeded(64, 512), seeded(64, 512, seed=1)
    truth = x.double() @ weight.double().t()
    assert (cpu.linear(x, weight).double() - truth).abs().max() < 5e-4


def test_adamw_step_and_grad_norm():
    weight, grad = seeded(300), seeded(300, seed=1)
    expected = weight.clone().requires_grad_()
    expected.grad = grad * 0.5
    torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    moments = torch.zeros(300), torch.zeros(300)
    cpu.adamw_step([weight], [grad], [moments[0]], [moments[1]], [None], lr=1e-2, beta1=0.9,
                   beta2=0.95, eps=1e-8, weight_decay=0.1, step=1, grad_scale=torch.tensor(0.5))
    assert torch.allclose(weight, expected.detach(), atol=1e-6)
    norm = cpu.grad_norm([grad, grad.bfloat16()])
    truth = torch.cat([grad, grad.bfloat16().float()]).double().norm()
    assert norm.shape == ()
    assert abs(norm.item() - truth.item()) < 1e-5


MEMORY = """
import resource, torch
from fastllm import cpu
kept = cpu.keep_freed_memory()
def fill():
    blocks = [torch.ones(10_000_000) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # until the heap has found its shape
    before = fill()
print(kept, fill() - before)
"""


def test_freed_memory_is_kept_where_asked():
    child = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True,
                           check=True)
    kept, faults = child.stdout.split()
    # 80 MB are 20 thousand pages.
    assert kept == "False" or int(faults) < 2000


STALE = """
import torch
from types import SimpleNamespace as Some
cls = type(torch.ops.fastllm_cpu)
own = cls.__getattr__
def old(self, name):
    if name != "attention" or self.name != "fastllm_cpu":
        return own(self, name)
    {}
cls.__getattr__ = old
from fastllm import cpu, ops
assert not cpu.available() and {!r} in cpu.why_not(), cpu.why_not()
assert ops.dispatch("cpu")["rms_norm"][0] == "reference"
ops.rms_norm(torch.ones(2, 8), torch.ones(8))
"""


@pytest.mark.parametrize(("way", "message"), [
    ("raise AttributeError(name)", "older sources: attention not in it"),
    ("return Some(default=Some(_schema=Some(arguments=[0] * 6)))",
     "older sources: other arguments of attention)")], ids=["no op", "another schema"])
def test_a_stale_extension_says_so_and_the_reference_runs(way, message):
    """An extension built from older sources: one reason, and plain torch in its place."""
    subprocess.run([sys.executable, "-c", STALE.format(way, message)], check=True)


if __name__ == "__main__":
    small_battery()
