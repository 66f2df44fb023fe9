"""Bugs of the kinds that kernels really have, planted one at a time: the suite must catch each.

A copy of kernels/ gets one wrong line, and the tests of that kernel run on the copy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_check as kc
import pytest

ROOT = Path(__file__).parents[2]

# What is wrong, its file, tests that must see it (file: -k expression), the right text, the wrong.
BUGS = [
    ("mask dropped from a store", "_glu.py", "test_all: swiglu-triton and layouts",
     "tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty), mask=mask)\n\n\n"
     "@jit\ndef _backward_kernel",
     "tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty))\n\n\n"
     "@jit\ndef _backward_kernel"),
    ("mask dropped from a load", "dropout.py", "test_all: dropout-triton and shapes",
     "value = tl.load(x + row * x_stride + column * x_step, mask=mask, other=0.0)",
     "value = tl.load(x + row * x_stride + column * x_step)"),
    ("mask reads one column too many", "_norms.py", "test_all: rms_norm-triton and shapes",
     "    column = tl.arange(0, BLOCK)[None, :]\n    inside = column < hidden\n"
     "    if weight is not None:",
     "    column = tl.arange(0, BLOCK)[None, :]\n    inside = column <= hidden\n"
     "    if weight is not None:"),
    ("offsets in 32 bits", "_norms.py", "test_all: beyond_32_bits and triton",
     "        # int64: row * stride passes 2^31 at 2^31 elements, a size that training reaches.\n"
     "        row = tl.cast(tile, tl.int64) * ROWS",
     "        row = tile * ROWS"),
    ("mean not divided by n", "_norms.py", "test_all: rms_norm-triton and shapes",
     "scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / hidden + eps)",
     "scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) + eps)"),
    ("epsilon forgotten", "_norms.py", "test_all: rms_norm-triton and variants",
     "scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / hidden + eps)",
     "scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / hidden)"),
    ("gradient of the residual branch lost", "_norms.py", "test_all: rms_norm-triton and variants",
     "            value += tl.load(dh + row * dh_stride + column, mask=mask, other=0.0)\n"
     "        tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)\n"
     "        if dresidual",
     "            value += 0.0\n"
     "        tl.store(dx + row * hidden + column, value.to(dx.dtype.element_ty), mask=mask)\n"
     "        if dresidual"),
    ("strides swapped", "_norms.py", "test_all: rms_norm-triton and layouts",
     "arguments = (flat, added, gain, shift, y, h, statistics, rows, hidden, flat.stride(0),",
     "arguments = (flat, added, gain, shift, y, h, statistics, rows, hidden, hidden,"),
    ("wrong sign in the backward", "_glu.py", "test_all: swiglu-triton and shapes",
     "slope = inner * (1.0 + g * rate / (1.0 + tl.exp(z)))",
     "slope = inner * (1.0 - g * rate / (1.0 + tl.exp(z)))"),
    ("rotation not undone in the backward", "_rotary.py", "test_all: rope-triton and shapes",
     "    if BACKWARD:", "    if BACKWARD and False:"),
    ("ignore_index skipped", "_cross_entropy.py", "test_all: cross_entropy-triton and not linear",
     "    if label == ignore_index:\n        _ignore(", "    if label == -1:\n        _ignore("),
    ("smoothing over the wrong count", "_cross_entropy.py",
     "test_all: cross_entropy-triton and not linear and variants",
     "slope -= smoothing / vocab * _share", "slope -= smoothing / columns * 2 * _share"),
    ("entropy's gradient without its center", "logprobs.py",
     "test_all: logprobs-triton and variants",
     "center = tl.load(entropy + row, mask=kept, other=0.0) / ln2", "center = 0.0 * log_sum"),
    ("teacher and student swapped", "jsd.py", "test_all: jsd-triton and shapes",
     "part, own = _terms(log_q, log_p, q, tl.exp2(log_p), beta, KIND)",
     "part, own = _terms(log_p, log_q, tl.exp2(log_p), q, beta, KIND)"),
    ("bias correction forgotten", "adamw.py", "test_all: adamw-triton and shapes",
     "(tl.sqrt(v) * growth + eps)", "(tl.sqrt(v) + eps)"),
    ("stochastic rounding always down", "_multi_tensor.py", "test_adamw: bits",
     "    random = random_word(index, key) >> 16", "    random = 0"),
    ("scale missing from one gradient", "lora.py", "test_all: lora_linear-triton and shapes",
     "torch.addmm(db, dy.t(), t, beta=0, alpha=scale, out=db)",
     "torch.addmm(db, dy.t(), t, beta=0, alpha=1.0, out=db)"),
    ("nibbles swapped", "_gemm.py", "test_all: nf4_linear-triton and shapes",
     "first = (nf4_value(code >> 4) * scale)", "first = (nf4_value(code & 15) * scale)"),
    ("last piece of a long run lost", "embedding.py", "test_embedding: runs",
     "beyond = first + tl.cdiv(stop - own, PIECE)", "beyond = first + (stop - own) // PIECE"),
    ("kept values not scaled up", "dropout.py", "test_all: dropout-triton and shapes",
     "value = tl.where(keep, value * scale, 0.0)", "value = tl.where(keep, value, 0.0)"),
    ("diagonal off by one", "_attention_tiles.py", "test_attention: windows_are_masks",
     "highest = tl.minimum(highest, position + (others - own + right))",
     "highest = tl.minimum(highest, position + (others - own + right + 1))"),
    ("masked blocks taken as whole", "_attention_forward.py", "test_attention: windows_are_masks",
     "if (at < whole) | (at >= partial):", "if at < whole:"),
    ("scale missing from dq", "_attention_backward.py", "test_attention: every_width",
     "head64) * DIM, total * scale,", "head64) * DIM, total,"),
    ("sum not rescaled to a new maximum", "_attention_forward.py", "test_attention: every_width",
     "            total = total * decay[:, None]\n", ""),
    ("query heads read another group's keys", "_attention_forward.py",
     "test_attention: every_option",
     "first, kv = block * OWN, head // GROUP", "first, kv = block * OWN, head % (heads // GROUP)"),
    ("lse of the first block for all", "_attention_backward.py", "test_attention: every_width",
     "numbers = row_base + member64 * q_tokens + at64", "numbers = row_base + member64 * q_tokens"),
    ("sink left out of lse", "_attention_forward.py", "test_attention: every_option",
     "weight += tl.where(sink == -float(\"inf\"), 0.0, 1.0)", "weight += 0.0"),
    ("two parts' gradients exchanged", "merge_attention.py",
     "test_all: merge_attention-triton and shapes",
     "tl.store(dlse_a + at, wa * whole + swing, mask=inside)",
     "tl.store(dlse_a + at, wa * whole - swing, mask=inside)"),
    ("second chunk overwrites the first", "_chunks.py",
     "test_all: linear_cross_entropy-triton and variants",
     "self.total[piece].add_(part)", "self.total[piece].copy_(part)"),
]


def suite(house: Path, tests: str) -> subprocess.CompletedProcess:
    file, _, expression = tests.partition(": ")
    environment = os.environ | {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x",
         f"tests/kernels/{file}.py", "-k", expression],
        cwd=house, env=environment, capture_output=True, text=True, timeout=500)


# On a GPU a missing mask writes over a neighbour, and what that comes to is luck.
interpreted = pytest.mark.skipif(kc.DEVICE != "cpu", reason="the interpreter sees every access")


@pytest.fixture
def house(tmp_path):
    """The project with a copy of kernels/ that may be changed."""
    for name in ("setup.py", "pyproject.toml", "bench", "fastllm", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels",
                    ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(("wrong", "file", "tests", "before", "after"), BUGS,
                         ids=[bug[0] for bug in BUGS])
def test_the_text_is_there(wrong, file, tests, before, after):
    """Quick: a bug whose place has moved would be planted nowhere."""
    text = (ROOT / "kernels" / file).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{wrong}: {before!r} is {text.count(before)} times in {file}"
    assert before != after


@interpreted
@pytest.mark.battery
@pytest.mark.parametrize(("wrong", "file", "tests", "before", "after"), BUGS,
                         ids=[bug[0] for bug in BUGS])
def test_the_suite_catches(house, wrong, file, tests, before, after):
    path = house / "kernels" / file
    path.write_text(path.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    done = suite(house, tests)
    caught = done.returncode == 1 and "FAILED" in done.stdout
    assert caught, f"{done.returncode}, not caught: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@interpreted
@pytest.mark.battery
def test_a_sound_copy_passes(house):
    """What fails above fails for its bug."""
    done = suite(house, "test_all: triton and (swiglu or rms_norm) and (shapes or variants)")
    assert done.returncode == 0, done.stdout[-3000:]
