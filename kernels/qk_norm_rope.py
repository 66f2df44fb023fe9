"""RMSNorm of every query and key head, then their rotation, in one launch (Qwen3, Gemma 3).

q (B, S, Hq, D), k (B, S, Hkv, D) of one type, or packed (T, H, D), any strides; weights (D,); with
rope the rotation of `rope`, partial and interleaved ones included:
    out = rope(x / sqrt(mean(x^2) + eps) * (weight + offset))
in float32, rounded once (the models round between norm and rotation too). The backward reads q and
k again and makes their norms anew, which costs no byte; the weights' gradients are gathered in a
constant number of partial sums, in an order that only shapes decide.
Floor, e bytes an element, T tokens: forward 2eT(Hq + Hkv)D, backward 3eT(Hq + Hkv)D, and the tables
as in `rope`.
Sources: Henry et al., "Query-Key Normalization for Transformers", arXiv:2010.04245; rope's.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _norms
from fastllm.kernels import _rotary as rotary
from fastllm.kernels import rope as plain
from fastllm.kernels._rotary import load_angles, load_pairs, store_pairs, turn
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, tl

# Programs of the backward, each with a partial sum of the weights' gradients: two thousand warps,
# about what keeps an H100's memory busy, and no property of the GPU at hand.
PARTIALS = 512
COLUMNS = 32


def reference(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
              *, eps: float = 1e-6, offset: float = 0.0, position_ids: Tensor | None = None,
              cu_seqlens: Tensor | None = None, interleaved: bool = False
              ) -> tuple[Tensor, Tensor]:
    _check(q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
    wide = compute_dtype(q)
    c, s = (rotary.angles(q, table.to(wide), position_ids, cu_seqlens) for table in (cos, sin))

    def one(x: Tensor, weight: Tensor) -> Tensor:
        value = x.to(wide)
        normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
        return rotary.rotate(normed * (weight.to(wide) + offset), c, s, interleaved).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


@jit
def _load_gain(weight, offset, HALF: tl.constexpr, BLOCK: tl.constexpr,
               INTERLEAVED: tl.constexpr):
    """weight + offset of the two sides of pairs, (1, 1, BLOCK) each."""
    one = tl.arange(0, 1)[:, None, None]
    first, second = load_pairs(weight + one, 1, one == 0, HALF, BLOCK, INTERLEAVED)
    return first + offset, second + offset


@jit
def _forward_heads(x, out, weight, mask, c, s, eps, offset, head_stride, dim_stride,
                   HEADS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
                   BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
                   INTERLEAVED: tl.constexpr):
    """All heads of the tokens at x (TOKENS, 1, 1), TILE at a time; REST pairs of them stay."""
    gain1, gain2 = _load_gain(weight, offset, HALF, BLOCK, INTERLEAVED)
    if REST:
        gain3, gain4 = _load_gain(weight + 2 * HALF, offset, REST, REST_BLOCK, INTERLEAVED)
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[None, :, None]
        inside = mask & (head < HEADS)
        source, target = x + head * head_stride, out + head * (2 * HALF + 2 * REST)
        x1, x2 = load_pairs(source, dim_stride, inside, HALF, BLOCK, INTERLEAVED)
        squares = tl.sum(x1 * x1 + x2 * x2, axis=2, keep_dims=True)
        if REST:
            x3, x4 = load_pairs(source + 2 * HALF * dim_stride, dim_stride, inside, REST,
                                REST_BLOCK, INTERLEAVED)
            squares += tl.sum(x3 * x3 + x4 * x4, axis=2, keep_dims=True)
        scale = 1.0 / tl.sqrt(squares / (2 * HALF + 2 * REST) + eps)
        y1, y2 = turn(x1 * scale * gain1, x2 * scale * gain2, c, s)
        store_pairs(target, y1, y2, inside, HALF, BLOCK, INTERLEAVED)
        if REST:
            store_pairs(target + 2 * HALF, x3 * scale * gain3, x4 * scale * gain4, inside, REST,
                        REST_BLOCK, INTERLEAVED)


@jit
def _forward_kernel(q, k, q_out, k_out, q_weight, k_weight, cos, sin, where, sequence, rows,
                    cos_batch, cos_row, sin_batch, sin_row, where_a, where_b, steps, blocks, eps,
                    offset, q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
                    POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, Q_HEADS: tl.constexpr,
                    K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                    REST: tl.constexpr, REST_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
                    Q_TILE: tl.constexpr, K_TILE: tl.constexpr):
    """One program TOKENS tokens, all their heads: cos and sin are read once. Outputs contiguous."""
    # int64: token * stride passes 2^31 in real runs.
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    slot = program % blocks * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    c, s = load_angles(cos, sin, where, sequence, rows, cos_batch, cos_row, sin_batch, sin_row,
                       where_a, where_b, steps, batch, slot, HALF, BLOCK, POSITIONS, False)
    mask = slot < sequence
    token = batch * sequence + slot
    to = token * (2 * HALF + 2 * REST)
    _forward_heads(q + batch * q_batch + slot * q_token, q_out + to * Q_HEADS, q_weight, mask, c,
                   s, eps, offset, q_head, q_dim, Q_HEADS, Q_TILE, HALF, BLOCK, REST, REST_BLOCK,
                   INTERLEAVED)
    _forward_heads(k + batch * k_batch + slot * k_token, k_out + to * K_HEADS, k_weight, mask, c,
                   s, eps, offset, k_head, k_dim, K_HEADS, K_TILE, HALF, BLOCK, REST, REST_BLOCK,
                   INTERLEAVED)


@jit
def _over_heads(sums):
    """(TOKENS, HEADS, N) summed to (1, 1, N)."""
    return tl.sum(tl.sum(sums, axis=1, keep_dims=True), axis=0, keep_dims=True)


@jit
def _backward_heads(dy, x, dx, partial, weight, cos, sin, where, sequence, rows, cos_batch,
                    cos_row, sin_batch, sin_row, where_a, where_b, steps, blocks, tiles, eps,
                    offset, dy_batch, dy_token, dy_head, dy_dim, x_batch, x_token, x_head, x_dim,
                    POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTS: tl.constexpr,
                    HEADS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
                    BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
                    TOKENS: tl.constexpr):
    """All heads of every num_programs-th tile of TOKENS tokens; the weight's gradient over them is
    gathered in registers and leaves once, to `partial`."""
    dim = 2 * HALF + 2 * REST
    gain1, gain2 = _load_gain(weight, offset, HALF, BLOCK, INTERLEAVED)
    sum1 = tl.zeros((TOKENS, TILE, BLOCK), dtype=tl.float32)
    sum2 = tl.zeros((TOKENS, TILE, BLOCK), dtype=tl.float32)
    if REST:
        gain3, gain4 = _load_gain(weight + 2 * HALF, offset, REST, REST_BLOCK, INTERLEAVED)
        sum3 = tl.zeros((TOKENS, TILE, REST_BLOCK), dtype=tl.float32)
        sum4 = tl.zeros((TOKENS, TILE, REST_BLOCK), dtype=tl.float32)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = tl.cast(number, tl.int64)
        batch = tile // blocks
        slot = tile % blocks * TOKENS + tl.arange(0, TOKENS)[:, None, None]
        c, s = load_angles(cos, sin, where, sequence, rows, cos_batch, cos_row, sin_batch, sin_row,
                           where_a, where_b, steps, batch, slot, HALF, BLOCK, POSITIONS, True)
        for first in range(0, HEADS, TILE):
            head = first + tl.arange(0, TILE)[None, :, None]
            inside = (slot < sequence) & (head < HEADS)
            source = x + batch * x_batch + slot * x_token + head * x_head
            above = dy + batch * dy_batch + slot * dy_token + head * dy_head
            target = dx + ((batch * sequence + slot) * HEADS + head) * dim
            x1, x2 = load_pairs(source, x_dim, inside, HALF, BLOCK, INTERLEAVED)
            d1, d2 = load_pairs(above, dy_dim, inside, HALF, BLOCK, INTERLEAVED)
            d1, d2 = turn(d1, d2, c, s)
            squares = tl.sum(x1 * x1 + x2 * x2, axis=2, keep_dims=True)
            if REST:
                x3, x4 = load_pairs(source + 2 * HALF * x_dim, x_dim, inside, REST, REST_BLOCK,
                                    INTERLEAVED)
                d3, d4 = load_pairs(above + 2 * HALF * dy_dim, dy_dim, inside, REST, REST_BLOCK,
                                    INTERLEAVED)
                squares += tl.sum(x3 * x3 + x4 * x4, axis=2, keep_dims=True)
            # Where there is no head the sums must not meet 0 * inf, which eps = 0 would make.
            scale = tl.where(inside, 1.0 / tl.sqrt(squares / dim + eps), 0.0)
            x1, x2 = x1 * scale, x2 * scale  # the normed head, of which d is the gradient
            sum1 += d1 * x1
            sum2 += d2 * x2
            d1, d2 = d1 * gain1, d2 * gain2
            along = tl.sum(d1 * x1 + d2 * x2, axis=2, keep_dims=True)
            if REST:
                x3, x4 = x3 * scale, x4 * scale
                sum3 += d3 * x3
                sum4 += d4 * x4
                d3, d4 = d3 * gain3, d4 * gain4
                along += tl.sum(d3 * x3 + d4 * x4, axis=2, keep_dims=True)
            along = along / dim
            store_pairs(target, (d1 - x1 * along) * scale, (d2 - x2 * along) * scale, inside, HALF,
                        BLOCK, INTERLEAVED)
            if REST:
                store_pairs(target + 2 * HALF, (d3 - x3 * along) * scale,
                            (d4 - x4 * along) * scale, inside, REST, REST_BLOCK, INTERLEAVED)
    if WEIGHTS:
        one = tl.arange(0, 1)[:, None, None]
        store_pairs(partial + one, _over_heads(sum1), _over_heads(sum2), one == 0, HALF, BLOCK,
                    INTERLEAVED)
        if REST:
            store_pairs(partial + 2 * HALF + one, _over_heads(sum3), _over_heads(sum4), one == 0,
                        REST, REST_BLOCK, INTERLEAVED)


@jit
def _backward_kernel(dq_out, dk_out, q, k, dq, dk, partial, q_weight, k_weight, cos, sin, where,
                     sequence, rows, cos_batch, cos_row, sin_batch, sin_row, where_a, where_b,
                     steps, blocks, tiles, eps, offset, dq_batch, dq_token, dq_head, dq_dim,
                     dk_batch, dk_token, dk_head, dk_dim, q_batch, q_token, q_head, q_dim, k_batch,
                     k_token, k_head, k_dim, POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr,
                     WEIGHTS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
                     HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
                     REST_BLOCK: tl.constexpr, TOKENS: tl.constexpr, Q_TILE: tl.constexpr,
                     K_TILE: tl.constexpr):
    """A fixed number of programs, each over its share of the tokens: first q, then k, so that one
    weight and one gathered gradient are in registers at a time.

    A program's row of `partial` (programs, 2, D) needs no zeroing: all of it is written.
    """
    dim = 2 * HALF + 2 * REST
    here = partial + tl.program_id(0).to(tl.int64) * (2 * dim)
    _backward_heads(dq_out, q, dq, here, q_weight, cos, sin, where, sequence, rows, cos_batch,
                    cos_row, sin_batch, sin_row, where_a, where_b, steps, blocks, tiles, eps,
                    offset, dq_batch, dq_token, dq_head, dq_dim, q_batch, q_token, q_head, q_dim,
                    POSITIONS, INTERLEAVED, WEIGHTS, Q_HEADS, Q_TILE, HALF, BLOCK, REST,
                    REST_BLOCK, TOKENS)
    _backward_heads(dk_out, k, dk, here + dim, k_weight, cos, sin, where, sequence, rows,
                    cos_batch, cos_row, sin_batch, sin_row, where_a, where_b, steps, blocks, tiles,
                    eps, offset, dk_batch, dk_token, dk_head, dk_dim, k_batch, k_token, k_head,
                    k_dim, POSITIONS, INTERLEAVED, WEIGHTS, K_HEADS, K_TILE, HALF, BLOCK, REST,
                    REST_BLOCK, TOKENS)


def _shape(q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    """What shapes say to both kernels, for q, k (B, S, heads, D).

    At 128 registers four programs share a multiprocessor, and nothing spills; without a number the
    assembler sometimes spills a few to fit one more. Partial rotation holds twice the tiles.
    """
    half = cos.shape[-1]
    rest = q.shape[-1] // 2 - half
    return {"Q_HEADS": q.shape[2], "K_HEADS": k.shape[2], "HALF": half, "REST": rest,
            "REST_BLOCK": next_power_of_2(rest), **rotary.tiles(q, k, half),
            "maxnreg": 255 if rest else 128}


@torch.library.custom_op("fastllm::qk_norm_rope", mutates_args=())
def _forward(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
             position_ids: Tensor | None, cu_seqlens: Tensor | None, eps: float, offset: float,
             interleaved: bool) -> tuple[Tensor, Tensor]:
    """q and k normed and rotated, contiguous."""
    given = [x for x in (position_ids, cu_seqlens) if x is not None]
    require("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, *given)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if not (q.numel() or k.numel()):
        return q_out, k_out
    if q.dim() == 3:
        q, k = q[None], k[None]
    arguments, positions = rotary.places(q, cos, sin, position_ids, cu_seqlens)
    shape = _shape(q, k, cos)
    blocks = cdiv(q.shape[1], shape["TOKENS"])
    with torch.cuda.device_of(q):
        _forward_kernel[(q.shape[0] * blocks,)](
            q, k, q_out, k_out, q_weight.contiguous(), k_weight.contiguous(), *arguments, blocks,
            eps, offset, *q.stride(), *k.stride(), POSITIONS=positions, INTERLEAVED=interleaved,
            **shape)
    return q_out, k_out


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("fastllm::qk_norm_rope_backward", mutates_args=())
def _backward(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor,
              k_weight: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
              cu_seqlens: Tensor | None, eps: float, offset: float, interleaved: bool,
              weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq and dk, contiguous, and the weights' gradients (empty where they are not wanted)."""
    grads = _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight, weights)
    dq, dk, q_grad, k_grad = grads
    if not (q.numel() or k.numel()):
        return dq, dk, q_grad.zero_(), k_grad.zero_()
    if q.dim() == 3:
        q, k, dq_out, dk_out = q[None], k[None], dq_out[None], dk_out[None]
    arguments, positions = rotary.places(q, cos, sin, position_ids, cu_seqlens)
    shape = _shape(q, k, cos)
    blocks, dim = cdiv(q.shape[1], shape["TOKENS"]), q.shape[3]
    tiles = q.shape[0] * blocks
    programs = min(PARTIALS, tiles)
    partial = q.new_empty((programs, 2, dim) if weights else (0,), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _backward_kernel[(programs,)](
            dq_out, dk_out, q, k, dq, dk, partial, q_weight.contiguous(), k_weight.contiguous(),
            *arguments, blocks, tiles, eps, offset, *dq_out.stride(), *dk_out.stride(),
            *q.stride(), *k.stride(), POSITIONS=positions, INTERLEAVED=interleaved,
            WEIGHTS=weights, **shape)
        if weights:
            _norms._gather_kernel[(cdiv(dim, COLUMNS),)](
                partial, q_grad, k_grad, programs, dim, WEIGHT=1, BIAS=1, ROWS=64, BLOCK=COLUMNS,
                num_warps=4)
    return grads


@_backward.register_fake
def _backward_fake(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor,
                   k_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_grad, k_grad = (weight.new_empty(weight.shape if rest[-1] else (0,))
                      for weight in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), q_grad, k_grad


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _autograd(ctx, dq_out: Tensor, dk_out: Tensor):
    wanted = ctx.needs_input_grad[2:4]
    dq, dk, *grads = _backward(dq_out, dk_out, *ctx.saved_tensors, *ctx.options, any(wanted))
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return dq, dk, *grads, *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> None:
    rotary.check("qk_norm_rope", q, k, *rest)
    if q.shape[-1] % 2:
        raise ValueError(f"qk_norm_rope: the head size {q.shape[-1]} must be even")
    if q_weight.shape != q.shape[-1:] or k_weight.shape != q.shape[-1:]:
        raise ValueError(f"qk_norm_rope: q_weight {tuple(q_weight.shape)} and k_weight "
                         f"{tuple(k_weight.shape)} must be {tuple(q.shape[-1:])}, a head's size")


def qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
                 sin: Tensor, *, eps: float = 1e-6, offset: float = 0.0,
                 position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
                 interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of q and k by its weight (D,), then `rope`, in one pass either way.

    q (B, S, Hq, D) and k (B, S, Hkv, D), or packed (T, H, D), any strides; the norm goes over all
    of a head, also where only a part of it turns, and multiplies by weight + offset (offset is 1 in
    Gemma). cos, sin, position_ids, cu_seqlens and interleaved are those of `rope`.
    Returns new contiguous tensors. Raises ValueError or TypeError where shapes or types do not fit.
    """
    _check(q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
    return _forward(q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens, eps, offset,
                    interleaved)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, offset: float = 0.0,
           eps: float = 1e-6, weight_dtype: torch.dtype | None = None, scale: float = 1.0,
           **options: Any) -> Call:
    """options: those of rope's inputs."""
    call = plain.inputs(shape, dtype, device, generator, **options)
    q, k = (x if scale == 1.0 else (x.detach() * scale).requires_grad_() for x in call.args[:2])
    weights = [normal(shape[-1:], weight_dtype or dtype, device, generator) for _ in range(2)]
    return Call((q, k, *weights, *call.args[2:]), {"eps": eps, "offset": offset, **call.kwargs})


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *,
                weight_dtype: torch.dtype | None = None, **options: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    weights = 2 * dim * (weight_dtype or dtype).itemsize
    rotation = plain.floor_bytes(shape, dtype, direction, **options)
    if direction == "forward":
        return rotation + weights
    again = dtype.itemsize * batch * sequence * (q_heads + k_heads) * dim
    return rotation + again + 2 * weights


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **options: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    each = 4 if direction == "forward" else 11
    return (plain.floor_flops(shape, dtype, direction, **options)
            + each * batch * sequence * (q_heads + k_heads) * dim)


KERNEL = Kernel(
    name="qk_norm_rope", public=qk_norm_rope, reference=reference, inputs=inputs,
    axes=plain.KERNEL.axes,
    test_shapes=((1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (2, 9, 4, 2, 64), (1, 3, 5, 3, 96)),
    empty_shapes=((0, 4, 2, 1, 8), (2, 0, 2, 1, 8)),
    bench_shapes=((8, 2048, 16, 8, 128), (4, 4096, 32, 8, 128)),
    traffic_shapes=((1, 256, 8, 2, 64), (1, 4096, 8, 2, 64)),
    audit_shapes=((1, 64, 16, 8, 128), (1, 64, 8, 2, 64), (1, 64, 8, 4, 256)),
    variants={
        "offset": {"offset": 1.0, "eps": 0.1}, "fp32 weights": {"weight_dtype": torch.float32},
        "small": {"scale": 1e-4}, "slices of one": {"layout": "fused"},
        "interleaved": {"interleaved": True},
        "packed, partial": {"packed": True, "positions": "documents", "rotated": 0.4,
                            "layout": "fused"}},
    bench_options={"partial": {"rotated": 0.5}},
    overflow_shape=(3, 2, 2, 1, 8), narrow_access=_norms.NARROW,
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
