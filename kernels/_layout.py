"""How elementwise kernels walk memory: one flat run where all is contiguous, else tiles of rows."""

from torch import Tensor

from fastllm.kernels._triton import cdiv, jit, next_power_of_2, rows_of, tl, warps_for

TILE = 4096


def matrix_of(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N), a view where strides allow, else a copy.

    Columns lie 1 apart, or 0 in an expanded tensor such as the gradient of a sum.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) in (0, 1) or rows.shape[-1] == 1 else rows.contiguous()


def matrices(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Tensors (..., N) of one shape as matrices: one long row where all are contiguous.

    Columns lie 1 apart, only those of x also 0.
    """
    if all(tensor.is_contiguous() for tensor in (x, *others)):
        return [tensor.reshape(1, -1) for tensor in (x, *others)]
    return [matrix_of(x), *(rows_of(tensor) for tensor in others)]


def tiling(rows: int, columns: int) -> tuple[int, dict[str, int]]:
    """The number of programs, and the launch's blocks, ROWS, BLOCK and num_warps.

    A tile has about TILE elements. Its width is a power of two that fills rows without waste, such
    as 128 columns of 32 rows for 1408 = 11 * 128 columns; 128 columns keep accesses whole.
    """
    block = min(TILE, next_power_of_2(columns))
    if rows > 1 and columns > 128:
        block = min(block, max(128, columns & -columns))
    tall = TILE // block if rows > 1 else 1
    blocks = cdiv(columns, block)
    warps = warps_for(tall * block, per_thread=16)
    return cdiv(rows, tall) * blocks, {"blocks": blocks, "ROWS": tall, "BLOCK": block,
                                       "num_warps": warps}


@jit
def tile_of(blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (ROWS, 1) and columns (1, BLOCK); `blocks` tiles lie side by side."""
    # Divided in 32 bits, which is several times faster, and then widened: row * stride passes
    # 2^31 in real runs.
    program = tl.program_id(0).to(tl.int32)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column
