"""Device functions for softmax over tiles (ROWS, BLOCK) of logits, shared by the losses.

All of it is to the base 2, where an exponential is one instruction (tl.exp takes 5). `scale` holds
log2(e) over the temperature and is applied above the peak: differences of logits are exact where
scaled logits would lose digits. A row's statistics are its peak, unscaled, and the log of the sum
of exponentials above it, kept apart: their sum would lose the digits of a row far from zero.
"""

import math

from fastllm.kernels._triton import INTERPRETED, jit, next_power_of_2, tanh, tl, warps_for

TILE = 4096
LN2 = math.log(2.0)


def tiling(vocab: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: short rows share it, long ones loop."""
    block = min(TILE, next_power_of_2(vocab))
    rows = max(1, TILE // block)
    return rows, block, warps_for(rows * block, per_thread=16)


def scales(temperature: float, softcap: float | None) -> tuple[float, float]:
    """(scale, softcap) as the functions below take them."""
    return (softcap or 1.0) / temperature / LN2, softcap or 1.0


if INTERPRETED:
    @jit
    def log2(x):
        return tl.log2(x)
else:
    @jit
    def log2(x):
        """One instruction, to 2^-22, where tl.log2 takes 27."""
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                         dtype=tl.float32, is_pure=True, pack=1)


@jit
def load_rows(source, column, rows, vocab, softcap, SOFTCAP: tl.constexpr):
    """Logits (ROWS, BLOCK) in float32 from pointers (ROWS,), tanh(logits / softcap) where SOFTCAP.
    -inf past a row's end and in rows that are masked off, which are not read."""
    inside = rows[:, None] & (column < vocab)[None, :]
    values = tl.load(source[:, None] + column[None, :], mask=inside,
                     other=-float("inf")).to(tl.float32)
    if SOFTCAP:
        values = tl.where(inside, tanh(values / softcap), -float("inf"))
    return values


@jit
def fold(values, peak, scale):
    """Online softmax: the peak with a tile counted in, the tile above it (scaled), its powers of 2,
    and by how much, as a logarithm, what was summed above the old peak shrinks."""
    higher = tl.maximum(peak, tl.max(values, axis=1))
    # Where all is -inf so far, nothing is subtracted (-inf minus itself is NaN), and sums, which
    # are 0, may shrink by anything finite.
    above = (values - tl.where(higher == -float("inf"), 0.0, higher)[:, None]) * scale
    shift = tl.where(peak == -float("inf"), 0.0, (peak - higher) * scale)
    return higher, above, tl.exp2(above), shift[:, None]


@jit
def level(values, peak, log_sum, scale):
    """Log-probabilities to the base 2, given the rows' statistics."""
    return (values - peak[:, None]) * scale - log_sum[:, None]


@jit
def weigh(weight, value):
    """weight * value where a weight of 0 makes 0 of any value, infinite ones too."""
    return tl.where(weight == 0.0, 0.0, weight * value)
