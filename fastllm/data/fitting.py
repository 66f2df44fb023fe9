"""Which documents of a split are trained on at a row length, and the account of the others.

A document may be longer than a row, or have nothing to train in the part that is kept. Both are
said, with the first places, and the counts add up.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastllm.config import UserError
from fastllm.data.store import TokenDataset

Truncation = Literal["split", "truncate", "drop", "error"]
DEFAULTS: dict[str, Truncation] = {"text": "split", "chat": "truncate", "preference": "drop",
                                   "judged": "drop"}
"""By kind of data. A text goes on in its next piece; a conversation without its end still teaches
its beginning; half an answer says little of which one is better."""
NAMED = 5
"""Places that a message names."""


@dataclass(frozen=True)
class Fitted:
    """The documents that are kept. starts, lengths (N,) in tokens; documents (N,) their numbers in
    the store; notes: lines for the user about the others."""

    starts: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    notes: tuple[str, ...] = ()


def fit(dataset: TokenDataset, seq_len: int, truncation: Truncation) -> Fitted:
    """The documents of a split for rows of seq_len positions (each document of a pair: seq_len).

    A pair is kept or left whole. Raises UserError for a long document under "error", for "split"
    with pairs, and where no document has a token to train.
    """
    if dataset.group > 1 and truncation == "split":
        raise UserError("data.truncation split does not go with preference pairs: use drop, "
                        "truncate or error")
    lengths, notes = dataset.lengths.copy(), []
    keep = np.ones(len(lengths), dtype=bool)
    longer = lengths - 1 > seq_len
    if longer.any() and truncation != "split":
        number, first = int(longer.sum()), _places(dataset, longer)
        said = f"{number:,} of {len(lengths):,} sequences are longer than train.seq-len {seq_len}"
        if truncation == "error":
            raise UserError(f"{said}: {first}; raise train.seq-len, or set data.truncation")
        if truncation == "drop":
            keep &= ~longer
            notes.append(f"{said} and are left out (data.truncation drop): {first}")
        else:
            cut = int((lengths[longer] - 1 - seq_len).sum())
            lengths = np.minimum(lengths, seq_len + 1)
            notes.append(f"{said}: {cut:,} tokens at their ends are cut (data.truncation "
                         "truncate)")
    bare = keep & (dataset.trained_in(lengths) == 0) if dataset.trained is not None \
        else keep & (lengths < 2) & (dataset.group > 1)
    if bare.any():
        notes.append(f"{int(bare.sum()):,} of {len(lengths):,} sequences have no token to train "
                     f"in {seq_len} and are left out: {_places(dataset, bare)}")
        keep &= ~bare
    if dataset.group > 1:
        keep = np.repeat(keep.reshape(-1, dataset.group).all(1), dataset.group)
    if len(keep) and not keep.any():
        raise UserError(f"nothing is left to train on: {'; '.join(notes)}")
    return Fitted(dataset.starts[keep], lengths[keep], dataset.indices[keep], tuple(notes))


def _places(dataset: TokenDataset, which: np.ndarray) -> str:
    """The first places, as `file:line`."""
    found = list(dict.fromkeys(dataset.where(int(index)) for index in
                               np.flatnonzero(which)[:NAMED * dataset.group]))[:NAMED]
    return ", ".join(found) + (", ..." if int(which.sum()) > len(found) else "")
