"""Rotary position embedding of queries and keys in one launch (rotate-half, as Hugging Face).

q (B, S, Hq, D), k (B, S, Hkv, D) of one type, any strides; cos, sin (S, D/2) or (B, S, D/2),
float32:
    out[..., :D/2] = x1 cos - x2 sin      out[..., D/2:] = x2 cos + x1 sin      (x1, x2 the halves)
in float32, rounded once. The rotation is orthogonal: its backward is itself with sin negated.
Floor, e bytes an element, T = BS tokens: 2eT(Hq + Hkv)D + 8SD/2 either way.
Source: Su et al., "RoFormer", arXiv:2104.09864.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, tl, warps_for

TILE = 2048


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(q)
    cos, sin = (table.to(wide).unsqueeze(-2) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.to(wide).chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)

    return rotate(q), rotate(k)


@jit
def _rotate_heads(x, out, base, to, mask, c, s, head_stride, dim_stride, half,
                  HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """All heads of this program's tokens, TILE_HEADS at a time; tiles are (token, head, half)."""
    lane = tl.arange(0, BLOCK)[None, None, :]
    for first in range(0, HEADS, TILE_HEADS):
        head = first + tl.arange(0, TILE_HEADS)[None, :, None]
        inside = mask & (head < HEADS)
        source = x + base + head * head_stride + lane * dim_stride
        target = out + to + head * (2 * half) + lane
        x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half * dim_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=inside)


@jit
def _kernel(q, k, cos, sin, q_out, k_out, tokens, sequence, half, cos_batch, cos_token, sin_batch,
            sin_token, q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
            BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
            TOKENS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """One program TOKENS tokens, all their heads: cos and sin are read once. Outputs contiguous."""
    # int64: token * stride passes 2^31 in real runs.
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    lane = tl.arange(0, BLOCK)[None, None, :]
    mask = (token < tokens) & (lane < half)
    batch, position = token // sequence, token % sequence
    c = tl.load(cos + batch * cos_batch + position * cos_token + lane, mask=mask, other=0.0)
    s = tl.load(sin + batch * sin_batch + position * sin_token + lane, mask=mask, other=0.0)
    if BACKWARD:
        s = -s
    _rotate_heads(q, q_out, batch * q_batch + position * q_token, token * (Q_HEADS * 2 * half),
                  mask, c, s, q_head, q_dim, half, Q_HEADS, TILE_HEADS, BLOCK)
    _rotate_heads(k, k_out, batch * k_batch + position * k_token, token * (K_HEADS * 2 * half),
                  mask, c, s, k_head, k_dim, half, K_HEADS, TILE_HEADS, BLOCK)


@torch.library.custom_op("fastllm::rope", mutates_args=())
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
            backward: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated forward or backward, contiguous."""
    require("rope", q, k, cos, sin)
    q_out, k_out = _rotate_fake(q, k, cos, sin, backward)
    batch, sequence, q_heads, dim = q.shape
    if not (q.numel() or k.numel()):
        return q_out, k_out
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    tables = [stride for table in (cos, sin)
              for stride in ((0, table.stride(0)) if table.dim() == 2 else table.stride()[:2])]
    block = next_power_of_2(dim // 2)
    tile_heads = min(8, next_power_of_2(max(q_heads, k.shape[2])))
    tile = max(1, min(8, TILE // (tile_heads * block)))
    with torch.cuda.device_of(q):
        _kernel[(cdiv(batch * sequence, tile),)](
            q, k, cos, sin, q_out, k_out, batch * sequence, sequence, dim // 2, *tables,
            *q.stride(), *k.stride(), BACKWARD=backward, Q_HEADS=q_heads, K_HEADS=k.shape[2],
            TOKENS=tile, TILE_HEADS=tile_heads, BLOCK=block,
            num_warps=warps_for(tile * tile_heads * block))
    return q_out, k_out


@_rotate.register_fake
def _rotate_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
                 backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.backward = inputs[4]


def _autograd(ctx, dq: Tensor, dk: Tensor):
    return *_rotate(dq, dk, *ctx.saved_tensors, not ctx.backward), None, None, None


_rotate.register_autograd(_autograd, setup_context=_setup)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, S, Hq, D) and k (B, S, Hkv, D) by cos, sin (S, D/2) or (B, S, D/2), float32.

    Returns new contiguous tensors; q and k may be slices of one projection and are not copied.
    cos and sin get no gradient. Raises ValueError where the shapes do not fit (a table narrower
    than D/2, partial rotation, included).
    """
    batch, sequence, _, dim = q.shape
    half = (sequence, dim // 2)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != dim or k.dtype != q.dtype or dim % 2 or not dim:
        raise ValueError(f"rope: q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} "
                         "must agree in batch, sequence, type and an even head size")
    if cos.shape != sin.shape or cos.shape not in (half, (batch, *half)):
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be "
                         f"{half} or {(batch, *half)}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"rope: cos and sin must be float32, not {cos.dtype} and {sin.dtype}")
    return _rotate(q, k, cos, sin, False)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, per_row: bool = False,
           layout: str = "contiguous") -> Call:
    batch, sequence, q_heads, k_heads, dim = shape
    if layout == "fused":
        both = normal((batch, sequence, q_heads + k_heads, dim), dtype, device, generator,
                      grad=False)
        q, k = (part.requires_grad_() for part in both.split((q_heads, k_heads), 2))
    elif layout == "transposed":
        q, k = (normal((batch, heads, sequence, dim), dtype, device, generator, grad=False)
                .transpose(1, 2).requires_grad_() for heads in (q_heads, k_heads))
    else:
        q, k = (normal((batch, sequence, heads, dim), dtype, device, generator)
                for heads in (q_heads, k_heads))
    position = torch.arange(sequence, device=device, dtype=torch.float64)
    if per_row:  # packed documents: positions restart, so each row has its own
        position = (position + torch.arange(batch, device=device)[:, None]) % 5
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = position[..., None] * frequency
    return Call((q, k, angle.cos().float(), angle.sin().float()))


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    return 2 * dtype.itemsize * batch * sequence * (q_heads + k_heads) * dim + 4 * sequence * dim


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    return 3 * batch * sequence * (q_heads + k_heads) * dim


KERNEL = Kernel(
    name="rope", public=rope, reference=reference, inputs=inputs,
    axes=("batch", "sequence", "num_attention_heads", "num_key_value_heads", "head_dim"),
    test_shapes=((1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (2, 9, 4, 2, 64), (1, 3, 9, 3, 96)),
    empty_shapes=((0, 4, 2, 1, 8), (2, 0, 2, 1, 8)),
    bench_shapes=((8, 2048, 8, 2, 64), (4, 4096, 32, 8, 128)),
    audit_shapes=((1, 16, 8, 2, 64), (1, 16, 32, 8, 128), (1, 16, 8, 2, 96)),
    variants={"positions by row": {"per_row": True}, "slices of one": {"layout": "fused"},
              "transposed": {"layout": "transposed"}},
    overflow_shape=(2, 3, 2, 1, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
