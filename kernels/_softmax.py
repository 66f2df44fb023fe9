"""Device functions for softmax over tiles (ROWS, BLOCK) of logits, shared by the losses.

A row's statistics are its peak and the log of the sum of exponentials above the peak, kept apart:
their sum, the logsumexp, would lose the digits that a row far from zero needs.
"""

from fastllm.kernels._triton import jit, next_power_of_2, tanh, tl, warps_for

TILE = 4096
LONG = 8192


def tiling(vocab: int, long: int = LONG) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: short rows share one, long ones loop."""
    block = min(long, next_power_of_2(vocab))
    rows = max(1, TILE // block)
    return rows, block, warps_for(rows * block, per_thread=16)


@jit
def temper(logits, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in float32 times `scale`; where SOFTCAP, tanh(logits / softcap) times `scale`."""
    values = logits.to(tl.float32)
    if SOFTCAP:
        values = tanh(values / softcap)
    return values * scale


@jit
def load_rows(source, column, rows, vocab, scale, softcap, SOFTCAP: tl.constexpr):
    """Tempered logits (ROWS, BLOCK) from pointers (ROWS,); -inf past a row's end and in rows that
    are masked off, which are not read."""
    inside = rows[:, None] & (column < vocab)[None, :]
    logits = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0)
    return tl.where(inside, temper(logits, scale, softcap, SOFTCAP), -float("inf"))


@jit
def raise_peak(values, peak):
    """The higher of `peak` (ROWS,) and the rows' maxima, an anchor to subtract (0 where that is
    -inf, as -inf minus itself is NaN), and what the old sums shrink by, as a logarithm."""
    higher = tl.maximum(peak, tl.max(values, axis=1))
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    # Sums over nothing but -inf are 0: any finite shift keeps them.
    return higher, anchor, tl.where(peak == -float("inf"), 0.0, peak - anchor)


@jit
def weigh(weight, value):
    """weight * value where a weight of 0 makes 0 of any value, infinite ones too."""
    return tl.where(weight == 0.0, 0.0, weight * value)
