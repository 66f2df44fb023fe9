"""Rotary position embedding of queries and keys in one launch, and the tables of its angles.

q (B, S, Hq, D), k (B, S, Hkv, D) of one type, or packed (T, H, D), any strides; cos, sin (P, R/2)
or (B, S, R/2), R <= D. Each pair (x1, x2) of a head's first R elements becomes
    x1 cos - x2 sin,  x2 cos + x1 sin
in float32, rounded once; the rest is copied. Pairs are (i, i + R/2), as in Hugging Face's models,
or (2i, 2i + 1) where interleaved. The backward is the transpose: the same with sin negated, also
where the tables carry a factor (YaRN).
Floor, e bytes an element, T tokens: 2eT(Hq + Hkv)D + 4R a row of the tables that is read, either
way, and the position ids or boundaries.
Sources: Su et al., "RoFormer", arXiv:2104.09864; Peng et al., "YaRN", arXiv:2309.00071.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import _rotary as rotary
from fastllm.kernels._rotary import load_angles, load_pairs, store_pairs, turn
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, next_power_of_2, require, tl

# More than any configuration needs: without a number the assembler sometimes spills a few to fit
# one more program on a multiprocessor.
REGISTERS = 96


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *,
              position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
              interleaved: bool = False) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(q)
    rotary.check("rope", q, k, cos, sin, position_ids, cu_seqlens)
    c, s = (rotary.angles(q, table.to(wide), position_ids, cu_seqlens) for table in (cos, sin))
    q_out, k_out = (rotary.rotate(x.to(wide), c, s, interleaved).to(x.dtype) for x in (q, k))
    return q_out, k_out


@jit
def _rotate_heads(x, out, mask, c, s, head_stride, dim_stride, HEADS: tl.constexpr,
                  TILE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                  REST: tl.constexpr, INTERLEAVED: tl.constexpr):
    """All heads of the tokens at x (TOKENS, 1, 1), TILE at a time."""
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[None, :, None]
        inside = mask & (head < HEADS)
        source, target = x + head * head_stride, out + head * DIM
        x1, x2 = load_pairs(source, dim_stride, inside, HALF, BLOCK, INTERLEAVED)
        y1, y2 = turn(x1, x2, c, s)
        store_pairs(target, y1, y2, inside, HALF, BLOCK, INTERLEAVED)
        if REST:
            lane = 2 * HALF + tl.arange(0, REST)[None, None, :]
            rest = tl.load(source + lane * dim_stride, mask=inside & (lane < DIM), other=0.0)
            tl.store(target + lane, rest, mask=inside & (lane < DIM))


@jit
def _kernel(q, k, q_out, k_out, cos, sin, where, sequence, rows, cos_batch, cos_row, sin_batch,
            sin_row, where_a, where_b, steps, blocks, q_batch, q_token, q_head, q_dim, k_batch,
            k_token, k_head, k_dim, POSITIONS: tl.constexpr, BACKWARD: tl.constexpr,
            INTERLEAVED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
            DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
            Q_TILE: tl.constexpr, K_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One program TOKENS tokens, all their heads: cos and sin are read once. Outputs contiguous."""
    # int64: token * stride passes 2^31 in real runs.
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    slot = program % blocks * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    c, s = load_angles(cos, sin, where, sequence, rows, cos_batch, cos_row, sin_batch, sin_row,
                       where_a, where_b, steps, batch, slot, HALF, BLOCK, POSITIONS, BACKWARD)
    mask = slot < sequence
    token = batch * sequence + slot
    _rotate_heads(q + batch * q_batch + slot * q_token, q_out + token * (Q_HEADS * DIM), mask, c,
                  s, q_head, q_dim, Q_HEADS, Q_TILE, DIM, HALF, BLOCK, REST, INTERLEAVED)
    _rotate_heads(k + batch * k_batch + slot * k_token, k_out + token * (K_HEADS * DIM), mask, c,
                  s, k_head, k_dim, K_HEADS, K_TILE, DIM, HALF, BLOCK, REST, INTERLEAVED)


@torch.library.custom_op("fastllm::rope", mutates_args=())
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
            cu_seqlens: Tensor | None, interleaved: bool, backward: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated forward or backward, contiguous."""
    given = [x for x in (position_ids, cu_seqlens) if x is not None]
    require("rope", q, k, cos, sin, *given)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if not (q.numel() or k.numel()):
        return q_out, k_out
    if q.dim() == 3:
        q, k = q[None], k[None]
    batch, sequence, q_heads, dim = q.shape
    half, k_heads = cos.shape[-1], k.shape[2]
    arguments, positions = rotary.places(q, cos, sin, position_ids, cu_seqlens)
    tile = rotary.tiles(q, k, half)
    blocks = cdiv(sequence, tile["TOKENS"])
    with torch.cuda.device_of(q):
        _kernel[(batch * blocks,)](
            q, k, q_out, k_out, *arguments, blocks, *q.stride(), *k.stride(), POSITIONS=positions,
            BACKWARD=backward, INTERLEAVED=interleaved, Q_HEADS=q_heads, K_HEADS=k_heads, DIM=dim,
            HALF=half, REST=next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
            maxnreg=REGISTERS, **tile)
    return q_out, k_out


@_rotate.register_fake
def _rotate_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:6])
    ctx.interleaved, ctx.backward = inputs[6:]


def _autograd(ctx, dq: Tensor, dk: Tensor):
    grads = _rotate(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.backward)
    return *grads, None, None, None, None, None, None


_rotate.register_autograd(_autograd, setup_context=_setup)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None,
         cu_seqlens: Tensor | None = None, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q (B, S, Hq, D) and k (B, S, Hkv, D), or packed (T, H, D), rotated by cos and sin.

    cos, sin: (P, R/2) by position or (B, S, R/2) by token, float32 at best; R <= D elements of a
    head turn, the rest is copied. `rope_tables` makes them. They get no gradient.
    position_ids: (B, S) or (T,), the rows of the tables; by default a token's place in its row.
    cu_seqlens: (N + 1,) boundaries of documents over the B * S tokens: positions start anew at
    each; tokens after the last one are a document too.
    interleaved: pairs are (2i, 2i + 1), as in GPT-J and GLM, rather than (i, i + R/2).

    Returns new contiguous tensors; q and k may be slices of one projection and are not copied. A
    position that the tables lack makes its token NaN (on the cpp backend: IndexError). Raises
    ValueError or TypeError where shapes or types do not fit.
    """
    rotary.check("rope", q, k, cos, sin, position_ids, cu_seqlens)
    return _rotate(q, k, cos, sin, position_ids, cu_seqlens, interleaved, False)


# ----------------------------------------------------------------------------------- tables

_NEEDED = {"default": (), "linear": ("factor",),
           "dynamic": ("factor", "original_max_position_embeddings"),
           "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                      "original_max_position_embeddings"),
           "yarn": ("factor", "original_max_position_embeddings")}
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor",
          "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
          *(key for keys in _NEEDED.values() for key in keys)}


def rope_tables(length: int, dim: int, *, theta: float = 10000.0,
                scaling: Mapping[str, Any] | None = None,
                device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin (length, dim / 2) of `rope`, float32, computed in float64.

    dim: elements of a head that turn (head_dim times partial_rotary_factor). scaling: the content
    of a Hugging Face config's rope_scaling or rope_parameters, whose rope_theta, where given, takes
    the place of `theta`: default, linear, dynamic (for sequences of `length`), llama3 and yarn,
    whose attention factor is in the tables. Raises ValueError for other types and for keys that
    are missing or unknown.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_tables: dim {dim} must be even and positive: pairs turn")
    frequency, factor = _frequencies(length, dim, theta, dict(scaling or {}))
    target = torch.device(device) if device is not None else torch.get_default_device()
    if target.type == "meta":
        empty = torch.empty(length, dim // 2, dtype=torch.float32, device=target)
        return empty, torch.empty_like(empty)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequency)
    # On the CPU whatever the device, so that every device has the same bits.
    return ((angle.cos() * factor).to(torch.float32).to(target),
            (angle.sin() * factor).to(torch.float32).to(target))


def _frequencies(length: int, dim: int, theta: float,
                 scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Radians a position of each pair, (dim / 2,) float64, and what cos and sin are multiplied by.

    linear: Chen et al., arXiv:2306.15595. dynamic: a base that grows with the length ("NTK").
    llama3: waves longer than original / low_freq_factor are stretched by the factor, those shorter
    than original / high_freq_factor stay, in between linearly in original / wavelength.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _NEEDED:
        raise ValueError(f"rope_tables: rope_type {kind!r} is not one of {', '.join(_NEEDED)}")
    missing = [key for key in _NEEDED[kind] if scaling.get(key) is None]
    unknown = sorted(scaling.keys() - _KNOWN)
    if missing or unknown:
        raise ValueError(f"rope_tables: {kind} scaling " + (
            f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"))
    theta = scaling.get("rope_theta") or theta
    stretch, original = (scaling.get(key) or 1 for key in
                         ("factor", "original_max_position_embeddings"))
    pair = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    if kind == "dynamic" and dim > 2:
        longest = max(length, original)
        theta *= (stretch * longest / original - (stretch - 1)) ** (dim / (dim - 2))
    frequency = theta ** (-2 * pair / dim)
    if kind == "linear":
        return frequency / stretch, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / stretch), 1.0
    if kind == "yarn":
        return frequency * _yarn_stretch(pair, dim, theta, scaling), _yarn_factor(scaling)
    return frequency, 1.0


def _yarn_stretch(pair: Tensor, dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """YaRN: pairs that turn over beta_fast times in the original length keep their frequency, those
    of less than beta_slow turns are stretched by the factor, linearly in between."""
    original = scaling["original_max_position_embeddings"]
    first, last = (dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
                   for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    stretched = ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return 1 - stretched + stretched / scaling["factor"]


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """YaRN's factor of cos and sin, which stands for a temperature of the attention."""
    def scale(by: float) -> float:
        return 0.1 * by * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)


# -------------------------------------------------------------------------------- registry


def longest_document(tokens: int) -> int:
    """Tokens of the longest document that `inputs` packs."""
    return tokens // 5 + 1


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, positions: str = "order",
           layout: str = "contiguous", packed: bool = False, rotated: float = 1.0,
           interleaved: bool = False, factor: float = 1.0) -> Call:
    """positions: "order", "rows" (tables by token), "ids" or "documents"; rotated: share of D."""
    batch, sequence, q_heads, k_heads, dim = shape
    if layout == "fused":
        both = normal((batch, sequence, q_heads + k_heads, dim), dtype, device, generator,
                      grad=False)
        q, k = both.split((q_heads, k_heads), 2)
    elif layout == "transposed":
        q, k = (normal((batch, heads, sequence, dim), dtype, device, generator, grad=False)
                .transpose(1, 2) for heads in (q_heads, k_heads))
    else:
        q, k = (normal((batch, sequence, heads, dim), dtype, device, generator, grad=False)
                for heads in (q_heads, k_heads))
    if packed:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
    tokens = q.shape[:-2]
    options: dict[str, Any] = {"interleaved": True} if interleaved else {}
    place = torch.arange(tokens.numel(), device=device).view(tokens)
    if positions == "documents":  # the last one is not closed, as before a tail of padding
        options["cu_seqlens"] = place.flatten()[::longest_document(tokens.numel())].int()
    elif positions == "ids":
        options["position_ids"] = place.flip(-1) % tokens[-1]
    turning = max(2, int(rotated * dim) // 2 * 2)
    cos, sin = (factor * table for table in rope_tables(tokens[-1] + 3 * packed, turning,
                                                        device=device))
    if positions == "rows":
        cos, sin = (table[place % min(5, len(table))] for table in (cos, sin))
    return Call((q.requires_grad_(), k.requires_grad_(), cos, sin), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *,
                positions: str = "order", rotated: float = 1.0, **_: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    tokens, turning = batch * sequence, max(2, int(rotated * dim) // 2 * 2)
    rows = {"rows": tokens, "documents": longest_document(tokens)}.get(positions, sequence)
    where = {"ids": 8 * tokens, "documents": 4 * cdiv(tokens, longest_document(tokens))}
    return (2 * dtype.itemsize * tokens * (q_heads + k_heads) * dim + 4 * rows * turning
            + where.get(positions, 0))


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *, rotated: float = 1.0,
                **_: Any) -> int:
    batch, sequence, q_heads, k_heads, dim = shape
    return 3 * batch * sequence * (q_heads + k_heads) * max(2, int(rotated * dim) // 2 * 2)


KERNEL = Kernel(
    name="rope", public=rope, reference=reference, inputs=inputs,
    axes=("batch", "sequence", "num_attention_heads", "num_key_value_heads", "head_dim"),
    test_shapes=((1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (2, 9, 4, 2, 64), (1, 3, 9, 3, 96)),
    empty_shapes=((0, 4, 2, 1, 8), (2, 0, 2, 1, 8)),
    bench_shapes=((8, 2048, 8, 2, 64), (4, 4096, 32, 8, 64), (4, 4096, 32, 8, 128)),
    traffic_shapes=((2, 128, 8, 2, 64), (2, 2048, 8, 2, 64)),
    audit_shapes=((1, 64, 8, 2, 64), (1, 64, 32, 8, 128), (1, 64, 8, 2, 96)),
    variants={
        "rows of the table": {"positions": "rows"}, "slices of one": {"layout": "fused"},
        "transposed": {"layout": "transposed"}, "position ids": {"positions": "ids"},
        "partial": {"rotated": 0.4}, "attention factor": {"factor": 1.3},
        "interleaved": {"interleaved": True},
        "packed": {"packed": True, "positions": "documents", "layout": "fused"},
        "all together": {"packed": True, "positions": "documents", "rotated": 0.5,
                         "interleaved": True, "layout": "fused"}},
    bench_options={"packed": {"packed": True, "positions": "documents", "layout": "fused"},
                   "interleaved": {"interleaved": True}, "partial": {"rotated": 0.5}},
    overflow_shape=(3, 2, 2, 1, 8),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
