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


@jit
def serialized(a, b, c, steps, N: tl.constexpr, INNER: tl.constexpr):
    """A second product is added to the sum of a loop of them, in more registers than there are:
    Hopper's then wait for each other."""
    row, inner = tl.arange(0, N), tl.arange(0, INNER)
    total = tl.zeros((N, N), tl.float32)
    for step in range(steps):
        k = step * INNER + inner
        total = tl.dot(tl.load(a + row[:, None] * 256 + k[None, :]),
                       tl.load(b + k[:, None] + row[None, :] * 256), total)
    left = tl.load(a + row[:, None] * 16 + tl.arange(0, 16)[None, :])
    right = tl.load(b + tl.arange(0, 16)[:, None] * N + row[None, :])
    total += 0.5 * tl.dot(left, right)
    tl.store(c + row[:, None] * N + row[None, :], total.to(tl.bfloat16))


x = torch.zeros(1 << 16, dtype=torch.bfloat16)
LAUNCHES = {
    "clean": (clean, (x, x, 4096), {"BLOCK": 1024, "num_warps": 4}),
    "float64": (float64, (x, x, 4096), {"BLOCK": 1024, "num_warps": 4}),
    "spills": (spills, (x, x, 16384), {"BLOCK": 16384, "num_warps": 1}),
    "narrow": (clean, (x[1:], x[1:], 4095), {"BLOCK": 1024, "num_warps": 4}),
    "serialized": (serialized, (x, x, x, 4), {"N": 128, "INNER": 64, "num_warps": 4}),
    "product": (product, (x, x, x), {"N": 64, "num_warps": 4}),
}

if __name__ == "__main__":
    assert isinstance(clean, JITFunction)
    architectures = [int(arch) for arch in sys.argv[1:]]
    print(json.dumps({name: {arch: audit.examine(*launch, arch) for arch in architectures}
                      for name, launch in LAUNCHES.items()}))
