"""A toy kernel whose variants have one fault each, and what bench/audit_calls.py makes of them.

Started by test_audit.py in a process where the interpreter is off.
"""

import resource
from argparse import Namespace

import audit_calls
import torch

from fastllm.kernels._spec import Call, Kernel
from fastllm.kernels._triton import jit, tl


@jit
def product(x, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(x + at, tl.dot(tl.load(x + at), tl.load(x + N * N + at)).to(tl.bfloat16))


@jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), nowhere)  # noqa: F821


def launch(x, fault):
    if fault == "broken":
        broken[(1,)](x, N=64)
    product[(1, 65536 if fault == "grid" else 1)](x, N=256 if fault == "shared" else 64,
                                                  num_warps=8)
    if fault == "raises":
        raise ValueError("because")


def inputs(shape, dtype, device, generator, fault=""):
    return Call((torch.randn(shape, generator=generator).to(dtype), fault))


FAULTS = {name: {"fault": name} for name in ("broken", "grid", "shared", "raises")}
KERNEL = Kernel(
    name="toy", public=launch, reference=launch, inputs=inputs, test_shapes=((2, 3), (4, 5)),
    # 12 GB of numbers, were they written.
    bench_shapes=((1 << 15, 1 << 16),), axes=("rows", "columns"), floor_bytes=lambda: 0,
    floor_flops=lambda: 0, variants=FAULTS, dtypes=(torch.bfloat16,), mutates=True)

if __name__ == "__main__":
    audit_calls.kernels = lambda: (KERNEL,)
    print(audit_calls.examine("toy", 0, Namespace(arch=90, every=False, count=False, processes=1)))
    print("kilobytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
