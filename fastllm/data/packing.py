"""Which tokens share a row: best-fit-decreasing packing, exact and vectorised over equal lengths.

A document of m tokens has m-1 training positions. They are cut into pieces of at most seq_len
positions (the next piece begins with the label that the last one ended with), so every label is
trained exactly once an epoch. Pieces fill rows from the longest down, each into the row with the
least room that still takes it: Johnson, "Near-optimal bin packing algorithms", 1973. A row's places
depend on the lengths alone; the seed and the epoch decide the order of the rows.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows of pieces. Row r holds the pieces row_start[r]:row_start[r+1].

    seq_len: the positions of a row. start: (P,) int64, a piece's first input token in tokens.bin;
    its labels are one further on. length: (P,) int32, its training positions. row_start: (R+1,)
    int64. document: (P,) int64, which of the packed documents it is of; None where none of them
    belong together.
    """

    seq_len: int
    start: np.ndarray
    length: np.ndarray
    row_start: np.ndarray
    document: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1

    @property
    def num_labels(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Trained positions over all positions of the rows: 1.0 is no padding."""
        return self.num_labels / max(self.num_rows * self.seq_len, 1)


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0]..start[0]+count[0]-1, start[1].. and so on as one (sum of count,) int64 array."""
    count = count.astype(np.int64)
    begins = np.cumsum(count) - count
    return np.repeat(start.astype(np.int64) - begins, count) + np.arange(count.sum())


def pieces_of(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into pieces. starts, lengths: (N,) tokens -> (start, length) of the pieces."""
    positions = np.maximum(lengths.astype(np.int64) - 1, 0)
    count = -(-positions // seq_len)
    nth = ranges(np.zeros_like(count), count)
    start = np.repeat(starts.astype(np.int64), count) + nth * seq_len
    length = np.minimum(np.repeat(positions, count) - nth * seq_len, seq_len)
    return start, length.astype(np.int32)


class _Bins:
    """Open rows by the room they have left; room -> rows, and a bit set of the rooms that occur."""

    def __init__(self) -> None:
        self.by_room: dict[int, list[np.ndarray]] = {}
        self.occurs = 0

    def add(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            self.by_room.setdefault(room, []).append(rows)
            self.occurs |= 1 << room

    def tightest(self, length: int) -> int:
        """The least room that takes `length`, 0 if none does."""
        fitting = self.occurs >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def take(self, room: int, most: int) -> np.ndarray:
        """Up to `most` of the rows with exactly this room, no longer open."""
        kept = self.by_room[room]
        rows = kept.pop()
        if len(rows) > most:
            kept.append(rows[most:])
            rows = rows[:most]
        if not kept:
            del self.by_room[room]
            self.occurs ^= 1 << room
        return rows


def best_fit_decreasing(length: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Assigns pieces to rows. length: (P,) in 1..seq_len -> ((P,) row of each piece, rows).

    Equal lengths are placed together: a row of room r takes floor(r / length) of them one after
    another, since after the first it is the tightest row there is. So the work grows with the
    number of different lengths, not of pieces.
    """
    order = np.argsort(-length.astype(np.int64), kind="stable")
    values, counts = np.unique(length, return_counts=True)
    row_of = np.empty(len(length), dtype=np.int64)
    bins, rows, at = _Bins(), 0, 0
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = bins.tightest(value)
            if room:
                each = room // value
                taken = bins.take(room, -(-left // each))
            else:
                room, each = seq_len, seq_len // value
                taken = np.arange(rows, rows + -(-left // each))
                rows += len(taken)
            placed = min(left, len(taken) * each)
            row_of[order[at : at + placed]] = np.repeat(taken, each)[:placed]
            full, rest = divmod(placed, each)
            bins.add(room - each * value, taken[:full])
            if rest:
                bins.add(room - rest * value, taken[full:])
            at, left = at + placed, left - placed
    return row_of, rows


def pack(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int, *, together: bool = True, group: int = 1
) -> Packing:
    """Rows for documents. starts, lengths: (N,) first token and tokens of each, in any order.

    together=False: a piece a row, in the order of the documents.
    group: so many documents one after another stay together, each of 1 to seq_len positions; a row
    then has group * seq_len positions.
    """
    if group > 1:
        return _pack_groups(starts, lengths, seq_len, together, group)
    start, length = pieces_of(starts, lengths, seq_len)
    if not together:
        return Packing(seq_len, start, length, np.arange(len(start) + 1))
    row_of, rows = best_fit_decreasing(length, seq_len)
    order = np.argsort(row_of, kind="stable")
    row_start = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=row_start[1:])
    return Packing(seq_len, start[order], length[order], row_start)


def _pack_groups(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int, together: bool, group: int
) -> Packing:
    positions = lengths.astype(np.int64) - 1
    if len(positions) and not 1 <= positions.min() <= positions.max() <= seq_len:
        raise ValueError(f"grouped documents must have 1 to {seq_len} positions")
    whole = positions.reshape(-1, group).sum(1)
    row_of, rows = (best_fit_decreasing(whole, group * seq_len) if together
                    else (np.arange(len(whole)), len(whole)))
    order = np.argsort(row_of, kind="stable")
    document = (order[:, None] * group + np.arange(group)).reshape(-1)
    row_start = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(group * np.bincount(row_of, minlength=rows), out=row_start[1:])
    return Packing(group * seq_len, starts[document].astype(np.int64),
                   positions[document].astype(np.int32), row_start, document)


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch: (num_rows,) int64, a pure function of its arguments.

    Sorts raw Philox numbers: NumPy promises a bit generator's raw stream for good, and does not
    promise what Generator.permutation makes of it.
    """
    random = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(random, kind="stable")
