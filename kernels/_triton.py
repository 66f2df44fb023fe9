"""The one place that imports Triton, and the device functions that several kernels share.

Without Triton everything still imports; launching a kernel then raises a RuntimeError that says
so. With `TRITON_INTERPRET=1` set before this import the kernels run on CPU tensors, and
`_interpreter` first mends what the interpreter gets wrong.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    _MISSING = f"triton cannot be imported ({error}); install it with: pip install 'triton>=3.6'"

    class _Absent:
        """Stands for any name of Triton's: lets kernels be defined, refuses to run them."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(_MISSING)

    triton = tl = _Absent()
    TensorDescriptor = _Absent()
    INTERPRETED = False
else:
    _MISSING = ""
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    if INTERPRETED:
        from fastllm.kernels import _bounds, _interpreter

        _interpreter.install()

jit = triton.jit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORD = 0xFFFFFFFF


def why_not(device: torch.device) -> str:
    """Why Triton kernels cannot run on tensors of `device`; an empty string where they can."""
    if _MISSING:
        return _MISSING
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return ""
    if device.type == "cpu":
        return "Triton runs on CPU tensors only under TRITON_INTERPRET=1, set before it is imported"
    return f"there are no Triton kernels for {device.type} tensors"


def require(op: str, *tensors: Tensor) -> None:
    """Raise for what no kernel of ours takes: a device without Triton, mixed devices, float64."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{op}: all tensors must be on {device}, one is on {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {tensor.dtype} is not one of float32, bfloat16, float16 "
                            "(the kernels compute in float32)")
    reason = why_not(device)
    if reason:
        raise RuntimeError(f"{op}: {reason}")


def addresses(*lists: Sequence[Tensor]) -> tuple[list[list[int]], bool]:
    """A row of addresses a list, for a table that the next launches read, and whether every one is
    a multiple of 16."""
    rows = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    if INTERPRETED:
        _bounds.expose(tensor for tensors in lists for tensor in tensors)
    return rows, all(address % 16 == 0 for row in rows for address in row)


def rows_of(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N) with unit stride along N: a view where strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU (an H100's where there is none), for what no bit depends on."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# What is compiled for where there is no GPU: tests and the audit set it.
TARGET = 90


def architecture(device: torch.device) -> int:
    """A GPU's compute capability times ten; TARGET where there is none."""
    if device.type != "cuda":
        return TARGET
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def warps_for(elements: int, per_thread: int = 8, most: int = 32) -> int:
    """Warps that give each thread about `per_thread` elements of a tile."""
    return max(1, min(most, next_power_of_2(cdiv(elements, 32 * per_thread))))


@jit
def tanh(x):
    """tanh in fp32 to a few ulp, without libdevice (which the interpreter cannot run)."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    # Near zero 1 - e cancels, so the odd Taylor series takes over; at 0.3 its next term is 6e-8.
    s = x * x
    near = x * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * (
        0.021869488 + s * -0.0088632355)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@jit
def mix(x):
    """lowbias32, a bijection of uint32 that spreads every input bit over every output bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def mix_reference(x: Tensor) -> Tensor:
    """`mix` of numbers below 2^32 held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
