"""Compiles toy kernels, each with one fault planted, and prints what the audit makes of them.

Started by test_audit.py in a process where the interpreter is off.
"""

import json
import sys

import audit
import torch
from triton.runtime.jit import JITFunction

from fastllm.kernels._triton import jit, tl


@jit
def clean(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2.0, mask=at < n)


@jit
def float64(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float64)
    tl.store(y + at, (value * 2.0 + 1.0).to(tl.bfloat16), mask=at < n)


@jit
def spills(x, y, n, BLOCK: tl.constexpr):
    """A tile of 512 numbers a thread, all needed again after a sum of all."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32)
    tl.store(y + at, (value / tl.sum(value, axis=0)).to(tl.bfloat16), mask=at < n)


@jit
def product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(tl.bfloat16))


x = torch.zeros(1 << 16, dtype=torch.bfloat16)
LAUNCHES = {
    "clean": (clean, (x, x, 4096), {"BLOCK": 1024, "num_warps": 4}),
    "float64": (float64, (x, x, 4096), {"BLOCK": 1024, "num_warps": 4}),
    "spills": (spills, (x, x, 16384), {"BLOCK": 16384, "num_warps": 1}),
    "narrow": (clean, (x[1:], x[1:], 4095), {"BLOCK": 1024, "num_warps": 4}),
    "product": (product, (x, x, x), {"N": 64, "num_warps": 4}),
}

if __name__ == "__main__":
    assert isinstance(clean, JITFunction)
    architectures = [int(arch) for arch in sys.argv[1:]]
    print(json.dumps({name: {arch: audit.examine(*launch, arch) for arch in architectures}
                      for name, launch in LAUNCHES.items()}))
