"""Rows of a packing as one batch of tensors that knows where each document begins."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastllm.data.packing import Packing, ranges

IGNORE_INDEX = -100


@dataclass
class Batch:
    """B rows of S positions. Segments are pieces of documents, and each row's padding tail.

    input_ids (B, S) int64. labels (B, S) int64, already shifted: the token after input_ids, -100
    where nothing is trained. position_ids (B, S) int64, from 0 in each segment. cu_seqlens (N+1,)
    int32: where segments begin in the flattened B*S positions, from 0 to B*S. max_seqlen: the
    longest segment. num_tokens: labels that are trained.

    Of data in pairs also: pairs (P, 2) int64, the two segments of each (chosen and rejected; in
    judged data a completion, and one that belongs to another prompt). desirable (P,) bool: the
    judgement. reference (P, 2) float32: what the reference model gives the two segments' trained
    tokens, as a sum of log-probabilities; only where it was computed.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_tokens: int
    num_inputs: int = 0
    """Positions that are not padding."""
    pairs: Tensor | None = None
    desirable: Tensor | None = None
    reference: Tensor | None = None

    @property
    def count(self) -> int:
        """What a step's loss is the mean over: pairs where there are any, else trained tokens."""
        return self.num_tokens if self.pairs is None else len(self.pairs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items()
                                   if isinstance(value, Tensor)}
        return replace(self, **changed)


def collate(tokens: np.ndarray, packing: Packing, rows: np.ndarray, pad_id: int, *,
            trained: np.ndarray | None = None, desirable: np.ndarray | None = None,
            reference: np.ndarray | None = None) -> Batch:
    """The batch of the given rows. tokens (T,) any unsigned type; rows (B,) int, -1: an empty row.

    An empty row is padding throughout, with nothing to train: it fills up the last batch.
    trained (T,): which tokens are labels, all of them by default. Of documents packed in pairs:
    desirable (D,), reference (D,) by the number of the document.
    """
    size, seq_len = len(rows), packing.seq_len
    rows = np.asarray(rows, dtype=np.int64)
    first = packing.row_start[rows]
    count = np.where(rows >= 0, packing.row_start[rows + 1] - first, 0)
    pieces = ranges(first, count)
    length = packing.length[pieces].astype(np.int64)
    row_of = np.repeat(np.arange(size), count)

    used = np.bincount(row_of, weights=length, minlength=size).astype(np.int64)
    before = np.cumsum(length) - length - np.repeat(np.cumsum(used) - used, count)
    begin = row_of * seq_len + before
    target, source = ranges(begin, length), ranges(packing.start[pieces], length)
    tails = np.arange(size) * seq_len + used

    input_ids = np.full(size * seq_len, pad_id, dtype=np.int64)
    labels = np.full(size * seq_len, IGNORE_INDEX, dtype=np.int64)
    input_ids[target] = tokens[source]
    labels[target] = tokens[source + 1]
    num_tokens = len(target)
    if trained is not None:
        wanted = trained[source + 1] != 0
        labels[target[~wanted]] = IGNORE_INDEX
        num_tokens = int(np.count_nonzero(wanted))
    starts = np.sort(np.concatenate([begin, tails[used < seq_len]]))
    cu_seqlens = np.append(starts, size * seq_len)
    lengths = np.diff(cu_seqlens)
    position_ids = ranges(np.zeros_like(lengths), lengths)

    def shaped(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).view(size, seq_len)

    return Batch(shaped(input_ids), shaped(labels), shaped(position_ids),
                 torch.from_numpy(cu_seqlens.astype(np.int32)), int(lengths.max()), num_tokens,
                 len(target),
                 *_of_pairs(packing, pieces, np.searchsorted(starts, begin), desirable, reference))


def _of_pairs(packing: Packing, pieces: np.ndarray, segments: np.ndarray,
              desirable: np.ndarray | None, reference: np.ndarray | None
              ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The fields of a batch of pairs: pieces (P,), and the segment that each of them is."""
    if packing.document is None:
        return None, None, None
    document = packing.document[pieces].reshape(-1, 2)
    pairs = torch.from_numpy(segments.reshape(-1, 2).astype(np.int64))
    return (pairs,
            None if desirable is None else torch.from_numpy(desirable[document[:, 0]] != 0),
            None if reference is None else torch.from_numpy(
                reference[document].astype(np.float32)))
