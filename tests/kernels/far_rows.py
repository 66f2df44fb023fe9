"""Runs every kernel on matrices whose third row lies more than 2^31 elements after the first.

Started by test_all.py in a process of its own. Memory is one block that the system hands out
lazily, so only the pages that hold the rows are ever real.
"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import kernel_check as kc

# Fits 32 bits, so that only a product with a row's number can overflow them.
ROWS, STRIDE = 3, (1 << 30) + 64
block = torch.empty((ROWS - 1) * STRIDE + (1 << 20), device=kc.DEVICE)


def far(used: list[int], t: torch.Tensor) -> torch.Tensor:
    """t at the block's next free place, with its leading dimension of 3 spread out."""
    if t.dim() < 2 or t.shape[0] != ROWS or not t.is_floating_point():
        return t
    at = used[0]
    used[0] += t[0].numel() + 16
    # A tensor of its own rather than a view, so that autograd sees one version counter each.
    own = torch.empty(0, device=t.device).set_(block.untyped_storage(), at, t.shape,
                                               (STRIDE, *t.stride()[1:]))
    return own.copy_(t)


def main(backend: str) -> None:
    for kernel in kc.KERNELS:
        if not kernel.overflow_shape or backend not in kc.backends(kernel):
            continue
        call = kc.make(kernel, kernel.overflow_shape, torch.float32)
        used = [0]
        spread = call.map(lambda t, used=used: far(used, t))
        assert any(t.stride()[:1] == (STRIDE,) for t in spread.tensors()), kernel.name
        op = kc.op_of(kernel, backend)
        near = kc.run(kernel, op, call)
        got = kc.run(kernel, op, spread, change=lambda t, used=used: far(used, t))
        kc.judge(got, near, [t.double() for t in near])
        print(kernel.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
