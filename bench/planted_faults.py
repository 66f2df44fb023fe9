"""A kernel for each tool of compute-sanitizer with the fault that the tool is to see.

Their names are their own, so that nobody takes the report of one for a finding.
"""

import torch

from fastllm.kernels._triton import jit, tl

FAULTS = {"memcheck": "planted_store", "racecheck": "planted_race", "initcheck": "planted_load",
          "synccheck": "planted_divergence"}
"""The kernel of each tool."""


@jit
def planted_store(x, n, BLOCK: tl.constexpr):
    """Writes one number beyond the n that there are."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 1.0, mask=at < n + 1)


@jit
def planted_load(x, y, n, BLOCK: tl.constexpr):
    """Reads n numbers, which nobody wrote."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


# In Triton every barrier is the compiler's: what lacks one is CUDA C++, compiled at run time.
CUDA = {"racecheck": """extern "C" __global__ void planted_race(int *out) {
    __shared__ volatile int place[64];
    place[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = place[63 - threadIdx.x];
}
""", "synccheck": """extern "C" __global__ void planted_divergence(int *out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = threadIdx.x;
}
"""}
THREADS = {"racecheck": 64, "synccheck": 32}


def plant(tool: str) -> None:
    """Launch the kernel whose fault a tool is to see. Raises where it cannot be compiled."""
    out = torch.zeros(100, device="cuda")
    if tool == "memcheck":
        planted_store[(1,)](out, out.numel(), BLOCK=128)
    elif tool == "initcheck":
        planted_load[(1,)](torch.empty_like(out), out, out.numel(), BLOCK=128)
    else:
        compiled = torch.cuda._compile_kernel(CUDA[tool], FAULTS[tool])
        compiled(grid=(1, 1, 1), block=(THREADS[tool], 1, 1), args=[out.int()])
    torch.cuda.synchronize()
