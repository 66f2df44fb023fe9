"""The stream of training batches, and the fixed pass over held-out documents.

Which rows make a batch is a pure function of (packing, seed, position): position counts rows from
the beginning of training, epoch after epoch without a break. Threads make batches ahead of time and
ranks take slices, and neither changes the order.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fastllm.config import UserError
from fastllm.data.collate import Batch, collate
from fastllm.data.fitting import Truncation, fit
from fastllm.data.packing import epoch_order, pack, ranges
from fastllm.data.prepare import Prepared

PREFETCH = 4
"""Batches kept ready by the threads."""


class PackedRows:
    """A split's documents, fitted and packed into rows, any of which it makes a batch of.

    notes: what the user should know of documents that are cut or left out.
    reference: by document of the store, what `Batch.reference` says of it; None until it is set.
    """

    def __init__(self, prepared: Prepared, split: str, seq_len: int, truncation: Truncation
                 ) -> None:
        self.dataset = prepared.split(split)
        self.pad_id = prepared.tokenizer.pad_id
        fitted = fit(self.dataset, seq_len, truncation)
        self.notes = fitted.notes
        packing = pack(fitted.starts, fitted.lengths, seq_len, together=prepared.pack,
                       group=self.dataset.group)
        if packing.document is not None:
            packing = replace(packing, document=fitted.documents[packing.document])
        self.packing = packing
        self.reference: np.ndarray | None = None
        desirable = self.dataset.store.desirable
        self._desirable = None if desirable is None else np.repeat(desirable, self.dataset.group)

    def batch(self, rows: np.ndarray) -> Batch:
        """rows (B,), -1: an empty one."""
        return collate(self.dataset.tokens, self.packing, rows, self.pad_id,
                       trained=self.dataset.trained, desirable=self._desirable,
                       reference=self.reference)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Of data in pairs: the numbers in the store of a batch's documents, in its order."""
        assert self.packing.document is not None, "only documents in pairs are numbered"
        used = rows[rows >= 0]
        first = self.packing.row_start[used]
        return self.packing.document[ranges(first, self.packing.row_start[used + 1] - first)]


class Loader:
    """An endless stream of batches; iterating goes on from `position`.

    batch_size is the rows of this rank's batch: every batch takes world_size * batch_size rows of
    the global order, rank r the r-th part of them. num_workers threads make batches ahead of time
    (0: none). total_rows: the stream ends there, and rows beyond it in the last batch are empty;
    None: endless, an epoch's last batch is filled up with the first rows of the next one.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        num_workers: int = 1,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool | None = None,
        total_rows: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self.packed = PackedRows(prepared, split, seq_len, prepared.truncation)
        self.packing = self.packed.packing
        if self.packing.num_rows == 0:
            raise UserError(f"there is no document in the {split} split; see data.holdout")
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.total_rows = total_rows
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.position = 0
        self.wait_seconds = 0.0
        self._identity = {"fingerprint": prepared.fingerprint, "seq_len": seq_len, "seed": seed,
                          "pack": prepared.pack, "split": split}
        if prepared.truncation != "split":
            self._identity["truncation"] = prepared.truncation
        # Two: a batch at the end of an epoch draws from both, whichever thread makes it.
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self._workers = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._ready: deque[tuple[int, Future[Batch]]] = deque()

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.rows_per_epoch, self.seed, epoch)

    @property
    def rows_per_epoch(self) -> int:
        return self.packing.num_rows

    @property
    def rows_per_batch(self) -> int:
        """Rows that one batch takes over all ranks."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.position / self.rows_per_epoch

    def steps_per_epoch(self, grad_accum: int = 1) -> int:
        """Optimizer steps that see every row once; the last may take rows of the next epoch."""
        return math.ceil(self.rows_per_epoch / (self.rows_per_batch * grad_accum))

    def rows_at(self, position: int) -> np.ndarray:
        """This rank's rows of the batch at a position: (batch_size,) int64, -1 past total_rows."""
        index = position + self.rank * self.batch_size + np.arange(self.batch_size)
        epoch, within = np.divmod(index, self.rows_per_epoch)
        rows = np.empty(self.batch_size, dtype=np.int64)
        for number in np.unique(epoch).tolist():
            here = epoch == number
            rows[here] = self._order(number)[within[here]]
        if self.total_rows is not None:
            rows[index >= self.total_rows] = -1
        return rows

    def batch_at(self, position: int) -> Batch:
        """This rank's batch at a position (rows over all ranks since the beginning), from nothing
        but the position: the iterator gives the same."""
        batch = self.packed.batch(self.rows_at(position))
        return batch.pin_memory() if self.pin_memory else batch

    def _ended(self, position: int) -> bool:
        return self.total_rows is not None and position >= self.total_rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ended(self.position):
            raise StopIteration
        began = time.perf_counter()
        batch = self._prefetched() if self._workers else self.batch_at(self.position)
        self.wait_seconds += time.perf_counter() - began
        self.position += self.rows_per_batch
        return batch

    def _prefetched(self) -> Batch:
        assert self._workers is not None
        if self._ready and self._ready[0][0] != self.position:  # position was set from outside
            self._drop()
        upcoming = self._ready[-1][0] + self.rows_per_batch if self._ready else self.position
        while len(self._ready) < PREFETCH and not self._ended(upcoming):
            self._ready.append((upcoming, self._workers.submit(self.batch_at, upcoming)))
            upcoming += self.rows_per_batch
        return self._ready.popleft()[1].result()

    def _drop(self) -> None:
        for _, future in self._ready:
            future.cancel()
        self._ready.clear()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: rows consumed over all ranks, and what they are rows of."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, at any number of ranks, workers and batch size.

        Raises UserError where the state is of other data, seq_len, seed or packing.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise UserError(f"the checkpoint's data position is for {name} {state.get(name)}, "
                                f"here it is {ours}: resume with the run's own data and settings")
        self.position = int(state["position"])
        self._drop()

    def close(self) -> None:
        """Ends the threads."""
        self._drop()
        if self._workers:
            self._workers.shutdown(wait=True, cancel_futures=True)


class EvalSet:
    """One pass over a split: packed, in a fixed order, every label once. Iterate it again at will.

    A document longer than seq_len is scored piece by piece, each without what came before it, so
    a longer row gives a lower loss on long documents.

    num_bytes: UTF-8 bytes of the documents' text over all ranks; bits per byte of a model is the
    sum of its losses / ln 2 / num_bytes. len() is the number of batches, the same on every rank:
    rank r takes the r-th batch_size rows of each world_size * batch_size, and the last batch is
    filled up with empty rows.
    """

    def __init__(
        self, prepared: Prepared, seq_len: int, batch_size: int, *, split: str = "heldout",
        rank: int = 0, world_size: int = 1,
    ) -> None:
        self.tokenizer = prepared.tokenizer
        # Of one sequence every part is scored, also where training would leave its end out.
        self.packed = PackedRows(prepared, split, seq_len,
                                 "split" if prepared.store.group == 1 else prepared.truncation)
        self.dataset, self.packing = self.packed.dataset, self.packed.packing
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_documents, self.num_bytes = len(self.dataset), self.dataset.num_bytes
        self.num_tokens = self.packing.num_labels

    def __len__(self) -> int:
        return math.ceil(self.packing.num_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            begin = (number * self.world_size + self.rank) * self.batch_size
            rows = begin + np.arange(self.batch_size)
            rows[rows >= self.packing.num_rows] = -1
            yield self.packed.batch(rows)

    def texts(self, limit: int | None = None) -> Iterator[bytes]:
        """The documents' text in UTF-8, the first `limit` of them."""
        for index in range(min(limit if limit is not None else len(self.dataset),
                               len(self.dataset))):
            yield self.tokenizer.decode(self.dataset.document(index).tolist()).encode("utf-8")
