"""The one import of Triton: what shows without it, and the device functions' accuracy."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_check import DEVICE

from fastllm.kernels import _triton
from fastllm.kernels._triton import jit, tanh, tl

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from fastllm import ops
from fastllm.kernels._spec import kernels
from fastllm.kernels.swiglu import swiglu
assert len(kernels()) >= 6
x = torch.ones(2, 3)
print(ops.swiglu(x, x).shape)
try:
    swiglu(x, x)
except RuntimeError as error:
    print(error)
"""


def test_everything_imports_without_triton_and_launching_says_why():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    shape, message = done.stdout.splitlines()
    assert shape == "torch.Size([2, 3])"
    assert message.startswith("swiglu: triton cannot be imported")
    assert "pip install 'triton>=3.6'" in message


@jit
def _tanh(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tanh(tl.load(x + at)))


def test_tanh_is_right_to_a_few_ulp():
    n = 8192
    x = torch.cat([torch.linspace(-12, 12, n // 2), torch.logspace(-30, 0, n // 2)]).to(DEVICE)
    out = torch.empty_like(x)
    _tanh[(1,)](x, out, N=n)
    exact = x.double().tanh()
    # A GPU's exponential and quotient are each right to 2 ulp, and their errors add.
    assert ((out - exact).abs() / exact.abs().clamp(min=1e-38)).max() < (
        5e-7 if DEVICE == "cpu" else 1e-6)


def test_rows_are_views_where_strides_allow():
    wide = torch.arange(48.0).view(2, 3, 8)
    assert _triton.rows_of(wide).data_ptr() == wide.data_ptr()
    assert _triton.rows_of(wide[..., :5]).stride() == (8, 1)
    assert _triton.rows_of(wide[..., ::2]).stride(-1) == 1
    assert torch.equal(_triton.rows_of(wide.transpose(0, 1)), wide.transpose(0, 1).reshape(6, 8))


@pytest.mark.parametrize(("elements", "warps"), [(1, 1), (256, 1), (257, 2), (2048, 8),
                                                 (1 << 20, 32)])
def test_warps_for(elements, warps):
    assert _triton.warps_for(elements) == warps
