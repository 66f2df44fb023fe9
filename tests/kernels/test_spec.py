"""The registry finds the kernels, and their floors are the numbers one would work out by hand."""

from pathlib import Path

import kernel_check as kc
import pytest
import torch

from fastllm.kernels import _spec

ROOT = Path(__file__).parents[2]
BY_NAME = {kernel.name: kernel for kernel in kc.KERNELS}
BF16, FP32 = torch.bfloat16, torch.float32


def test_every_module_is_found():
    files = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert {kernel.public.__module__.rpartition(".")[2] for kernel in kc.KERNELS} == files
    assert len(BY_NAME) == len(kc.KERNELS), "two kernels of one name"


@pytest.mark.parametrize("kernel", kc.KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_says_what_its_tools_need(kernel):
    shapes = (*kernel.test_shapes, *kernel.bench_shapes, *kernel.audit_shapes, *kernel.empty_shapes)
    assert all(len(shape) == len(kernel.axes) for shape in shapes)
    assert any(n > 1 and n % 2 for shape in kernel.test_shapes for n in shape), "no odd size"
    assert kernel.empty_shapes
    assert kernel.bench_shapes
    assert kernel.__module__ == _spec.__name__
    call = kc.make(kernel, kernel.test_shapes[0], FP32)
    assert not (kernel.mutates and call.differentiated())


@pytest.mark.parametrize(("name", "shape", "dtype", "direction", "expected"), [
    ("rms_norm", (16384, 4096), BF16, "forward", 2 * 16384 * 4096 * 2 + 4096 * 2),
    ("rms_norm", (16384, 4096), BF16, "backward", 3 * 16384 * 4096 * 2 + 2 * 4096 * 2),
    ("swiglu", (16384, 14336), BF16, "forward", 1_409_286_144),
    ("swiglu", (16384, 14336), BF16, "backward", 2_348_810_240),
    ("rope", (4, 4096, 32, 8, 128), BF16, "forward", 335_544_320 + 4096 * 128 * 4),
    ("cross_entropy", (8192, 131072), BF16, "forward", 2 * 8192 * 131072 + 12 * 8192),
    ("cross_entropy", (8192, 131072), BF16, "backward", 4 * 8192 * 131072 + 12 * 8192),
    ("adamw", (1, 1_000_000_000), BF16, "forward", 28_000_000_000),
    ("adamw", (1, 1_000_000_000), BF16, "backward", 0),
    ("lion", (1, 1_000_000_000), BF16, "forward", 20_000_000_000),
    ("sgd", (1, 1_000_000_000), BF16, "forward", 20_000_000_000),
    ("adagrad", (1, 1_000_000_000), FP32, "forward", 20_000_000_000),
    ("rmsprop", (1, 1_000_000_000), FP32, "forward", 20_000_000_000),
    ("lamb", (1, 1_000_000_000), BF16, "forward", 40_000_000_000),
])
def test_floors(name, shape, dtype, direction, expected):
    assert BY_NAME[name].floor_bytes(shape, dtype, direction) == expected


@pytest.mark.parametrize(("name", "options", "expected"), [
    ("adamw", {"masters": False}, 22), ("adamw", {"eight_bit": True}, 16 + 1 / 16),
    ("adamw", {"eight_bit": True, "masters": False}, 10 + 1 / 16), ("lion", {"masters": False}, 14),
    ("sgd", {"momentum": 0.0, "masters": False}, 6), ("lamb", {"masters": False}, 32),
    ("rmsprop", {"centered": True, "momentum": 0.9}, 36)])
def test_floors_of_options(name, options, expected):
    shape = (1, 1 << 30)
    assert BY_NAME[name].floor_bytes(shape, BF16, "forward", **options) == expected * (1 << 30)


def test_the_linear_loss_floor_is_six_products():
    kernel = BY_NAME["linear_cross_entropy"]
    shape = (32768, 4096, 131072)
    total = sum(kernel.floor_flops(shape, BF16, direction) for direction in ("forward", "backward"))
    assert total == 6 * 32768 * 4096 * 131072
