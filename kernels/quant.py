"""Weights in blocks of 4 or 8 bits, and the linear layers that read them (QLoRA's frozen base).

A block is `block_size` consecutive numbers of a row of the weight (N, K), K a multiple of it, with
one absmax. NF4 stores each number as the index of the nearest of 16 quantiles of a normal
distribution, times absmax; INT8 as round(127 w / absmax). double_quant stores NF4's absmaxes
themselves in 8 bits: their mean is taken off, and 256 of them share a float32 scale. Dequantised
weights are rounded once to x's type and the product is then an ordinary one in that type.
Bits a weight at block_size 64: NF4 4 + 0.127 (4.5 without double_quant), INT8 8.5.
Few rows read the weight in its packed form, tile by tile; many rows make the 16-bit weight once and
leave the product to the vendor's library, which is faster at it (FUSED_ROWS says where).
Floor: 2TNK FLOPs either way (the weight has no gradient); x, the packed weight and y once.
Source: Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.kernels import _gemm
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, autocast, normal
from fastllm.kernels._triton import cdiv, jit, require, tl

GROUP = 256  # absmaxes that share a scale under double_quant
# Making the 16-bit weight costs 4 bytes a weight of traffic, reading the packed one about half the
# product's rate again: at 3 TB/s and 700 TFLOP/s the two meet near 1000 rows.
FUSED_ROWS = 1024
CODES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
         -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class NF4(NamedTuple):
    """A weight (N, K) in NF4."""

    packed: Tensor
    """(N, K / 2) uint8: byte j of a block holds number j high and number j + block_size / 2 low."""
    absmax: Tensor
    """(N, K / block_size): float32, or int8 under double_quant."""
    scale: Tensor | None
    """Under double_quant (blocks / 256,) float32: absmax = int8 * scale + mean."""
    mean: Tensor | None
    """Under double_quant (1,) float32."""
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


class Int8(NamedTuple):
    """A weight (N, K) in 8 bits."""

    values: Tensor
    """(N, K) int8."""
    absmax: Tensor
    """(N, K / block_size) float32."""
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


Quantized = NF4 | Int8


def _blocks(op: str, weight: Tensor, block_size: int) -> Tensor:
    """The weight as (N, blocks, block_size) float32."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{op}: weight {tuple(weight.shape)} {weight.dtype} must be (N, K) floats")
    if block_size not in (32, 64, 128, 256) or weight.shape[1] % block_size:
        raise ValueError(f"{op}: block_size {block_size} must be 32, 64, 128 or 256 and divide "
                         f"the weight's {weight.shape[1]} columns")
    return weight.detach().float().unflatten(1, (weight.shape[1] // block_size, block_size))


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4:
    """weight (N, K) of any float type in NF4; K must be a multiple of block_size (32 to 256)."""
    blocks = _blocks("quantize_nf4", weight, block_size)
    absmax = blocks.abs().amax(-1)
    scale = mean = None
    stored = absmax
    if double_quant and absmax.numel():
        mean = absmax.mean().reshape(1)
        flat = torch.nn.functional.pad((absmax - mean).reshape(-1), (0, -absmax.numel() % GROUP))
        groups = flat.view(-1, GROUP)
        scale = groups.abs().amax(-1) / 127
        stored = (groups / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8).reshape(-1)
        stored = stored[:absmax.numel()].view(absmax.shape)
        # Codes are chosen for the absmax that will be read back.
        absmax = _absmax(NF4(blocks, stored, scale, mean, block_size))
    code_book = torch.tensor(CODES, device=weight.device)
    borders = (code_book[1:] + code_book[:-1]) / 2
    codes = torch.bucketize(blocks / absmax.clamp(min=1e-30)[..., None], borders).to(torch.uint8)
    first, second = codes.chunk(2, -1)
    return NF4(((first << 4) | second).flatten(1), stored, scale, mean, block_size)


def quantize_int8(weight: Tensor, *, block_size: int = 64) -> Int8:
    """weight (N, K) of any float type in INT8; K must be a multiple of block_size (32 to 256)."""
    blocks = _blocks("quantize_int8", weight, block_size)
    absmax = blocks.abs().amax(-1)
    values = (blocks * (127 / absmax.clamp(min=1e-30))[..., None]).round().to(torch.int8)
    return Int8(values.flatten(1), absmax, block_size)


def _absmax(quantized: NF4) -> Tensor:
    """(N, K / block_size) absmaxes of an NF4 weight, float32."""
    if quantized.scale is None or quantized.mean is None:
        return quantized.absmax
    stored = quantized.absmax.reshape(-1)
    group = torch.arange(stored.numel(), device=stored.device) // GROUP
    wide = stored * quantized.scale[group] + quantized.mean
    return wide.view(quantized.absmax.shape)


def dequantize_reference(quantized: Quantized, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if isinstance(quantized, Int8):
        wide = quantized.values.unflatten(1, (quantized.absmax.shape[1], quantized.block_size))
        return (wide * (quantized.absmax / 127)[..., None]).flatten(1).to(dtype)
    absmax = _absmax(quantized)
    code_book = torch.tensor(CODES, device=absmax.device, dtype=torch.float32).to(absmax.dtype)
    packed = quantized.packed.unflatten(1, (absmax.shape[1], quantized.block_size // 2)).int()
    codes = torch.cat((packed >> 4, packed & 15), -1)
    return (code_book[codes] * absmax[..., None]).flatten(1).to(dtype)


def linear_reference(x: Tensor, quantized: Quantized, *, bias: Tensor | None = None) -> Tensor:
    weight = dequantize_reference(quantized, dtype=x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@jit
def _nf4_kernel(packed, absmax, group_scale, mean, out, blocks, DOUBLE: tl.constexpr,
                HALF: tl.constexpr, BLOCKS: tl.constexpr):
    """One program BLOCKS blocks, wherever their rows begin and end."""
    # int64: 2^31 weights are a large layer, not an impossible one.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    mask = block < blocks
    scale = _gemm.nf4_absmax(absmax, group_scale, mean, block, mask, DOUBLE)
    code = tl.load(packed + block * HALF + lane, mask=mask, other=0).to(tl.int32)
    target = out + block * (2 * HALF) + lane
    kind = out.dtype.element_ty
    tl.store(target, (_gemm.nf4_value(code >> 4) * scale).to(kind), mask=mask)
    tl.store(target + HALF, (_gemm.nf4_value(code & 15) * scale).to(kind), mask=mask)


@jit
def _int8_kernel(values, absmax, out, blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """One program BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, SIZE)[None, :]
    mask = block < blocks
    scale = tl.load(absmax + block, mask=mask, other=0.0) * (1.0 / 127.0)
    value = tl.load(values + block * SIZE + lane, mask=mask, other=0).to(tl.float32) * scale
    tl.store(out + block * SIZE + lane, value.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastllm::dequantize", mutates_args=())
def _dequantize(parts: list[Tensor], block_size: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) that `parts` (see `parts_of`) stand for."""
    require("dequantize", *parts)
    parts = [part.contiguous() for part in parts]
    out = _dequantize_fake(parts, block_size, dtype)
    count = out.numel() // block_size
    if count:
        tile = max(1, 4096 // block_size)
        with torch.cuda.device_of(out):
            if parts[0].dtype == torch.int8:
                _int8_kernel[(cdiv(count, tile),)](*parts, out, count, SIZE=block_size,
                                                   BLOCKS=tile, num_warps=8)
            else:
                double = len(parts) == 4
                packed, absmax, scale, mean = parts if double else (*parts, parts[1], parts[1])
                _nf4_kernel[(cdiv(count, tile),)](
                    packed, absmax, scale, mean, out, count, DOUBLE=double, HALF=block_size // 2,
                    BLOCKS=tile, num_warps=8)
    return out


@_dequantize.register_fake
def _dequantize_fake(parts: list[Tensor], block_size: int, dtype: torch.dtype) -> Tensor:
    rows, stored = parts[0].shape
    columns = stored if parts[0].dtype == torch.int8 else 2 * stored
    return parts[0].new_empty((rows, columns), dtype=dtype)


def parts_of(quantized: Quantized) -> list[Tensor]:
    """The tensors of a quantised weight, as our operators take them."""
    return [part for part in quantized if isinstance(part, Tensor)]


def dequantize(quantized: Quantized, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight (N, K) that an NF4 or Int8 stands for, in dtype."""
    return _dequantize(parts_of(quantized), quantized.block_size, dtype)


def product(x: Tensor, parts: list[Tensor], block_size: int, transposed: bool,
            bias: Tensor | None = None) -> Tensor:
    """x (T, .) @ w.T (transposed) or x @ w for a quantised weight; inside our operators only."""
    if x.shape[0] > FUSED_ROWS:
        weight = _dequantize(parts, block_size, x.dtype)
        return torch.nn.functional.linear(x, weight if transposed else weight.t(), bias)
    if parts[0].dtype == torch.int8:
        return _gemm.product(x, parts[0].contiguous(), transposed=transposed, bias=bias,
                             absmax=parts[1].contiguous(), block=block_size)
    packed, absmax, *rest = (part.contiguous() for part in parts)
    scale, mean = rest or (None, None)
    return _gemm.nf4_product(x, packed, absmax, scale, mean, block_size, transposed=transposed,
                             bias=bias)


@torch.library.custom_op("fastllm::quantized_linear", mutates_args=())
def _linear(x: Tensor, parts: list[Tensor], block_size: int, transposed: bool,
            bias: Tensor | None) -> Tensor:
    """x (T, K) @ w.T + bias (transposed), or x (T, N) @ w."""
    require("quantized_linear", x, *parts)
    return product(x, parts, block_size, transposed, None if bias is None else bias.contiguous())


@_linear.register_fake
def _linear_fake(x: Tensor, parts: list[Tensor], block_size: int, transposed: bool,
                 bias: Tensor | None) -> Tensor:
    rows, stored = parts[0].shape
    columns = stored if parts[0].dtype == torch.int8 else 2 * stored
    return x.new_empty((x.shape[0], rows if transposed else columns))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.block_size, ctx.transposed = inputs[2:4]
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype


def _autograd(ctx, dy: Tensor):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _linear(dy, list(ctx.saved_tensors), ctx.block_size, not ctx.transposed, None)
    if ctx.needs_input_grad[4]:
        dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, [None] * len(ctx.saved_tensors), None, None, dbias


_linear.register_autograd(_autograd, setup_context=_setup)


def check(op: str, x: Tensor, quantized: Quantized, bias: Tensor | None) -> None:
    """Raise for shapes and types that do not fit."""
    rows, columns = quantized.shape
    if x.shape[-1:] != (columns,) or (bias is not None and bias.shape != (rows,)):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"{op}: x {tuple(x.shape)} and bias {shape} do not fit a weight of "
                         f"({rows}, {columns})")


def nf4_linear(x: Tensor, quantized: NF4, *, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ w.T + bias for a frozen NF4 weight (N, K): (..., N) in x's type.

    Gradients for x and bias. Under autocast x is cast to its type.
    """
    check("nf4_linear", x, quantized, bias)
    return _public(x, quantized, bias)


def int8_linear(x: Tensor, quantized: Int8, *, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ w.T + bias for a frozen INT8 weight (N, K): (..., N) in x's type.

    Gradients for x and bias. Under autocast x is cast to its type.
    """
    check("int8_linear", x, quantized, bias)
    return _public(x, quantized, bias)


def _public(x: Tensor, quantized: Quantized, bias: Tensor | None) -> Tensor:
    (x,) = autocast(x)
    flat = x.reshape(-1, quantized.shape[1])
    y = _linear(flat, parts_of(quantized), quantized.block_size, True, bias)
    return y.view(*x.shape[:-1], quantized.shape[0])


def _inputs(shape: Shape, device, generator, quantize: Any, options: dict[str, Any]) -> Quantized:
    rows, columns = shape
    weight = normal((rows, columns), torch.float32, device, generator, grad=False,
                    scale=columns**-0.5)
    weight.view(-1, 32)[:1] = 0.0  # a block of zeros has absmax 0
    if quantize is quantize_int8:
        options.pop("double_quant", None)
    return quantize(weight, **{"block_size": 64 if columns % 64 == 0 else 32, **options})


def dequantize_inputs(shape: Shape, dtype: torch.dtype, device, generator, *,
                      quantize: Any = quantize_nf4, **options: Any) -> Call:
    return Call((_inputs(shape, device, generator, quantize, options),), {"dtype": dtype})


def linear_inputs(shape: Shape, dtype: torch.dtype, device, generator, *, bias: bool = False,
                  quantize: Any = quantize_nf4, **options: Any) -> Call:
    tokens, rows, columns = shape
    x = normal((tokens, columns), dtype, device, generator)
    extra = {"bias": normal((rows,), dtype, device, generator)} if bias else {}
    return Call((x, _inputs((rows, columns), device, generator, quantize, options)), extra)


def int8_inputs(*args: Any, **options: Any) -> Call:
    return linear_inputs(*args, quantize=quantize_int8, **options)


def stored_bytes(rows: int, columns: int, *, quantize: Any = quantize_nf4,
                 double_quant: bool = True, block_size: int | None = None, **_: Any) -> int:
    """Bytes of a quantised weight."""
    blocks = rows * columns // (block_size or (64 if columns % 64 == 0 else 32))
    if quantize is quantize_int8:
        return rows * columns + 4 * blocks
    absmax = blocks + 4 * cdiv(blocks, GROUP) + 4 if double_quant else 4 * blocks
    return rows * columns // 2 + absmax


def dequantize_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    if direction == "backward":
        return 0
    return stored_bytes(*shape, **options) + dtype.itemsize * shape[0] * shape[1]


def dequantize_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return shape[0] * shape[1] if direction == "forward" else 0


def linear_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    tokens, rows, columns = shape
    return dtype.itemsize * tokens * (rows + columns) + stored_bytes(rows, columns, **options)


def int8_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    return linear_bytes(shape, dtype, direction, quantize=quantize_int8, **options)


def linear_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 2 * shape[0] * shape[1] * shape[2]


LINEAR: dict[str, Any] = {
    "axes": ("tokens", "out_features", "in_features"), "bound": "flops",
    "reference": linear_reference, "floor_flops": linear_flops,
    "test_shapes": ((1, 1, 32), (5, 7, 64), (17, 33, 96), (3, 70, 192)),
    "empty_shapes": ((0, 3, 32),),
    "bench_shapes": ((16, 4096, 4096), (8192, 2048, 2048), (8192, 4096, 4096)),
    "traffic_shapes": ((16, 512, 512), (1536, 256, 512)),
    "audit_shapes": ((16, 256, 256), (128, 256, 256)),
}
KERNELS = (
    Kernel(name="dequantize", public=dequantize, reference=dequantize_reference,
           inputs=dequantize_inputs, axes=("out_features", "in_features"),
           test_shapes=((1, 32), (7, 96), (33, 64), (5, 320)),
           empty_shapes=((0, 32),),
           bench_shapes=((8192, 2048), (14336, 4096)),
           traffic_shapes=((256, 512), (4096, 512)),
           audit_shapes=((64, 4096),),
           variants={"one scale": {"double_quant": False}, "int8": {"quantize": quantize_int8},
                     "short blocks": {"block_size": 32}},
           bench_options={"int8": {"quantize": quantize_int8}},
           floor_bytes=dequantize_bytes, floor_flops=dequantize_flops),
    Kernel(name="nf4_linear", public=nf4_linear, inputs=linear_inputs, floor_bytes=linear_bytes,
           variants={"bias": {"bias": True}, "one scale": {"double_quant": False},
                     "short blocks": {"block_size": 32}}, **LINEAR),
    Kernel(name="int8_linear", public=int8_linear, inputs=int8_inputs, floor_bytes=int8_bytes,
           variants={"bias": {"bias": True}, "short blocks": {"block_size": 32}}, **LINEAR),
)
