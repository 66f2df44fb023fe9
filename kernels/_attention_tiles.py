"""What the attention kernels share: whose tile it is, which blocks its mask leaves, memory.

The tiles of a launch are a list, one program each, and a GPU begins them in order as it has room.
The list runs through as many heads at a time as have keys and values that fit the L2 cache
together, and in them from the longest tile of a causal mask to the shortest: the short ones fill
the gaps at the end. (Programs that loop over the list need some 45 more registers, and spill.)

Packed sequences lie behind each other in (T, heads, D). The tokens after the last of them are one
more sequence, the tail, that sees nothing. A plan says where in the list each sequence's tiles
begin, so sequences without tokens cost nothing.
"""

from fastllm.kernels._triton import jit, tanh, tl

# ------------------------------------------------------------------------------- tiles of a launch


@jit
def plan_kernel(bounds, starts, sequences, tokens, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One program: starts[i] is how many tiles of BLOCK tokens lie before sequence i."""
    before = 0
    tl.store(starts, 0)
    for first in range(0, sequences + 1, CHUNK):
        i = first + tl.arange(0, CHUNK)
        begin = tl.load(bounds + i, mask=i <= sequences, other=0)
        end = tl.load(bounds + i + 1, mask=i < sequences, other=tokens)
        tiles = tl.where(i <= sequences, tl.cdiv(tl.maximum(end - begin, 0), BLOCK), 0)
        tl.store(starts + 1 + i, before + tl.cumsum(tiles, 0), mask=i <= sequences)
        before += tl.sum(tiles, 0)


@jit
def _sequence_of(starts, row, sequences, steps):
    """The sequence, or the tail, whose tiles hold a row of the list."""
    low = row * 0
    high = low + sequences
    for _ in range(steps):
        middle = (low + high + 1) // 2
        further = tl.load(starts + middle) <= row
        low = tl.where(further, middle, low)
        high = tl.where(further, high, middle - 1)
    return low


@jit
def locate(tile, rows, pairs, span, heads, starts, own_bounds, other_bounds, sequences, steps,
           own_tokens, other_tokens, PACKED: tl.constexpr, REVERSED: tl.constexpr):
    """(batch, head, block, first own token, own, first other token, others) of a tile.

    own and others: positions of the tile's sequence on its own axis and on the other one. REVERSED:
    the last blocks of a sequence come first.
    """
    group = tile // (rows * span)
    inside = tile - group * rows * span
    size = tl.minimum(span, pairs - group * span)
    row, pair = inside // size, group * span + inside % size
    if PACKED:
        sequence = _sequence_of(starts, row, sequences, steps)
        after = tl.minimum(sequence + 1, sequences)
        own_first, other_first = tl.load(own_bounds + sequence), tl.load(other_bounds + sequence)
        own = tl.where(sequence < sequences, tl.load(own_bounds + after), own_tokens) - own_first
        others = tl.load(other_bounds + after) - other_first
        block = row - tl.load(starts + sequence)
        if REVERSED:
            block = tl.load(starts + sequence + 1) - 1 - row
        return row * 0, pair, block, own_first, own, other_first, others
    block = rows - 1 - row if REVERSED else row
    zero = row * 0
    return pair // heads, pair % heads, block, zero, zero + own_tokens, zero, zero + other_tokens


# ------------------------------------------------------------------------------------------ masks


@jit
def visible_range(first, own, others, left, right, BLOCK: tl.constexpr, STEP: tl.constexpr,
                  LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """What positions [first, first + BLOCK) of `own` see of `others`, in blocks of STEP.

    Position i sees j where i + others - own - left <= j <= i + others - own + right; LEFT and RIGHT
    say whether there are such bounds. Returns (begin, whole, partial, end): blocks from `whole` to
    `partial` are full and seen entirely by every position, the others need the mask.
    """
    shift = others - own
    last = tl.minimum(first + BLOCK, own) - 1
    begin = first * 0
    end = begin + others
    whole, partial = begin, end
    if RIGHT:
        end = tl.minimum(end, tl.maximum(last + shift + right + 1, 0))
        partial = tl.minimum(partial, tl.maximum(first + shift + right + 1, 0))
    if LEFT:
        begin = tl.minimum(tl.maximum(first + shift - left, 0), end) // STEP * STEP
        whole = tl.cdiv(tl.maximum(last + shift - left, 0), STEP) * STEP
    return begin, whole, partial // STEP * STEP, end


@jit
def horizon(position, own, others, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The first and the last position of `others` that each position sees; none beyond `own`."""
    lowest = position * 0
    highest = lowest + (others - 1)
    if RIGHT:
        highest = tl.minimum(highest, position + (others - own + right))
    if LEFT:
        lowest = position + (others - own - left)
    return tl.where(position < own, lowest, others), tl.where(position < own, highest, -1)


@jit
def within(position, lowest, highest, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Whether positions, in shapes that broadcast, lie at or after `lowest` where LOW, and at or
    before `highest` where HIGH."""
    if LOW and HIGH:
        return (position >= lowest) & (position <= highest)
    return position >= lowest if LOW else position <= highest


@jit
def squash(x, PRECISE: tl.constexpr):
    """tanh, to a few ulp where PRECISE, else to 1e-7, which takes half the instructions."""
    if PRECISE:
        return tanh(x)
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))


# ----------------------------------------------------------------------------------------- memory


# An address is a scalar, which a loop carries on, and offsets that stay as they are. Worked out by
# row, it would have the compiler widen rows to 64 bits, and with them every comparison of a mask.


@jit
def load_tile(base, rows, stride, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) of a head from the row at `base` on; zeros beyond `rows` and beyond DIM."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    # int64: token * stride passes 2^31 in real batches.
    at = base + (row.to(tl.int64)[:, None] * stride + column[None, :])
    return tl.load(at, mask=(row < rows)[:, None] & (column < DIM)[None, :], other=0.0)


@jit
def fetch_tile(base, rows, stride, descriptor, batch, head, first, DIM: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """As `load_tile`, or the same from row `first` on by a descriptor, which knows the bounds."""
    if TMA:
        return descriptor.load([batch, head, first, 0]).reshape(ROWS, WIDTH)
    return load_tile(base, rows, stride, DIM, ROWS, WIDTH)


@jit
def load_numbers(base, rows, other, ROWS: tl.constexpr):
    """A number a row, (ROWS,) from `base` on; `other` beyond `rows`."""
    row = tl.arange(0, ROWS)
    return tl.load(base + row, mask=row < rows, other=other)


@jit
def store_tile(base, value, rows, stride, descriptor, batch, head, first, DIM: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Write (ROWS, WIDTH) to where `fetch_tile` would read it."""
    value = value.to(base.dtype.element_ty)
    if TMA:
        descriptor.store([batch, head, first, 0], value.reshape(1, 1, ROWS, WIDTH))
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        tl.store(base + (row.to(tl.int64)[:, None] * stride + column[None, :]), value,
                 mask=(row < rows)[:, None] & (column < DIM)[None, :])
