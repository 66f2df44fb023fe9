"""Products with logits that are never all in memory: how much to hold, and how to add up.

    held, tile = rows(tokens, width, vocab, hidden.element_size())
    gathered = Sum((vocab, width), hidden, terms=cdiv(tokens, held))
    for held_rows in spans(tokens, held):
        linear(hidden[held_rows], weight, bias, out=logits)       # then logits -> their gradient
        gathered.add(logits.t(), hidden[held_rows])               # float32 over the chunks
    dweight = gathered.result()                                   # rounded once

A matmul is matmul(a, b, out): it writes a @ b.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastllm.kernels._triton import cdiv

Matmul = Callable[[Tensor, Tensor, Tensor], None]

# An H100: what a copy and a large bfloat16 product reach, and what starting a chunk's dozen
# kernels costs. Ratios matter here, and those of other data-centre GPUs are close to it.
BYTES_A_SECOND = 3.0e12
FLOPS_A_SECOND = 7.0e14
SECONDS_A_CHUNK = 3.0e-5
# The additions of all chunks but the first may cost this part of the three products.
OVERHEAD = 0.1
# Below this a chunk is not worth dividing; a product of fewer rows leaves multiprocessors idle.
SMALL = 256 << 20
TIGHT = 32 << 20
LEAST = 1024
# A CPU's products stop gaining at these rows, and so many bytes of logits stay in its cache.
CPU_TILE = 256
CPU_HELD = 512
CPU_CACHE = 20 << 20
# Rows of a float32 sum that a 16-bit product on a CPU is added to at once, through the cache.
PIECE = 1024


def spans(length: int, step: int) -> Iterator[slice]:
    """[0, length) in slices of `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def even(length: int, most: int, multiple: int = 128) -> int:
    """The step that divides `length` into as few and as equal chunks as `most` allows."""
    if length <= most:
        return max(length, 1)
    step = cdiv(length, cdiv(length, most))
    return min(cdiv(step, multiple) * multiple, most)


def step(length: int, other: int, width: int, itemsize: int, *, tight: bool = False,
         least: int = LEAST) -> int:
    """How much of `length` a chunk of logits (length x other, inner size width) covers on a GPU.

    Each chunk multiplies (its part x width x other, three times) and adds to a float32 sum
    (other x width), which is read and written: a part so long that the additions cost OVERHEAD of
    the products is long enough. A chunk takes no more memory than the matrix (other x width) that
    it is multiplied with, or SMALL; with `tight`, than either it or TIGHT.
    """
    addition = 8 * other * width / BYTES_A_SECOND + SECONDS_A_CHUNK
    product = 6 * other * width / FLOPS_A_SECOND
    enough = int(addition / (OVERHEAD * max(product, 1e-30)))
    matrix = other * width * itemsize
    room = min(TIGHT, matrix) if tight else max(SMALL, matrix)
    fits = room // max(1, other * itemsize)
    return even(length, max(least, min(enough, fits) // 128 * 128))


def rows(tokens: int, width: int, vocab: int, itemsize: int, *, chunk_size: int | None = None,
         cached: bool = False, tight: bool = False) -> tuple[int, int]:
    """Rows of logits (tokens, vocab) to hold, and rows of them to make and consume at once.

    On a GPU the two are one. `cached`: on a CPU the rows at work should stay in the cache, and
    additions into the large sum be few, so several tiles are held. chunk_size overrides.
    """
    if cached:
        held = chunk_size or even(tokens, max(CPU_HELD, CPU_CACHE // max(1, vocab * itemsize)), 1)
        held = min(held, max(tokens, 1))
        return held, min(held, CPU_TILE)
    held = chunk_size or step(tokens, vocab, width, itemsize, tight=tight,
                              least=LEAST // 2 if tight else LEAST)
    held = min(held, max(tokens, 1))
    return held, held


def columns(tokens: int, width: int, vocab: int, itemsize: int, *,
            chunk_size: int | None = None) -> int:
    """Columns of logits (tokens, vocab) to hold where all tokens are taken at once.

    chunk_size rows over the whole vocabulary are as much memory as this many columns.
    """
    if chunk_size:
        return max(1, min(vocab, chunk_size * vocab // max(tokens, 1)))
    return step(vocab, tokens, width, itemsize, tight=True)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """torch's a @ b into out."""
    torch.mm(a, b, out=out)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor,
           matmul: Matmul = product) -> None:
    """hidden @ weight.T + bias into out, rounded to its type once."""
    if bias is None:
        matmul(hidden, weight.t(), out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


class Sum:
    """The sum of products a @ b over chunks, in float32 (float64), in like's type at the end.

    One term is written in like's type at once: a product rounds its own float32 sum. `into`, a
    float32 matrix of that shape, is added to instead, and then is the result.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, terms: int,
                 into: Tensor | None = None, matmul: Matmul = product) -> None:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.dtype = like.dtype if into is None else wide
        self.matmul, self.started = matmul, into is not None
        self.total = like.new_empty(shape, dtype=like.dtype if terms == 1 else wide) \
            if into is None else into

    def add(self, a: Tensor, b: Tensor) -> None:
        """total += a @ b; the first term overwrites what a fresh total held."""
        total, first = self.total, not self.started
        self.started = True
        if total.dtype == a.dtype and first:
            self.matmul(a, b, total)
        elif total.dtype == a.dtype and self.matmul is product:
            torch.addmm(total, a, b, out=total)
        elif total.is_cuda and total.dtype != a.dtype:
            # cuBLAS adds a 16-bit product to a float32 matrix without rounding in between, and
            # with beta 0 ignores what the memory held.
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
        else:
            self._add_pieces(a, b, first)

    def _add_pieces(self, a: Tensor, b: Tensor, first: bool) -> None:
        """Where no product adds: each term is rounded to its type, their sum stays wide."""
        length, width = self.total.shape
        block = a.new_empty((min(PIECE, length), width))
        for piece in spans(length, PIECE):
            part = block[: piece.stop - piece.start]
            self.matmul(a[piece], b, part)
            if first:
                self.total[piece].copy_(part)
            else:
                self.total[piece].add_(part)

    def result(self) -> Tensor:
        """The sum; zeros where nothing was added."""
        return (self.total if self.started else self.total.zero_()).to(self.dtype)
