"""What the reference model gives every answer: computed once, kept with its fingerprint.

A preference loss compares the model with a reference that never changes, so that a step need not
run it: one pass over the data before the first step, then a number an answer.
"""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastllm.data.loader import PackedRows
from fastllm.data.once import made_once
from fastllm.monitor import dtype_name
from fastllm.objectives.sequences import sequence_logprobs
from fastllm.run.base import find_base, weights_hash
from fastllm.run.setup import data_progress

if TYPE_CHECKING:
    from fastllm.run.session import Run

FORMAT = "fastllm-reference-1"
VALUES, SUM = "values.npy", "sha256"


def reference_of(run: "Run", path: str | None) -> tuple[np.ndarray, str]:
    """(sum of log-probabilities of the trained tokens of every document of the store, NaN for one
    that is not used; the fingerprint of all that decided them).

    path: the reference model; None: the run's own, as it is before the first step.
    """
    model: Any = run.model
    if path is not None:
        model = find_base(path).build(next(run.model.parameters()).dtype).to(run.device).eval()
    weights = run.base_hash if path is None else weights_hash(model)
    packed = [rows for rows in (run.loader.packed, run.held.packed) if len(rows.dataset)]
    settings = run.settings
    what = [FORMAT, weights, run.prepared.fingerprint, settings.train.seq_len,
            run.prepared.truncation, dtype_name(run.dtype)]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    folder = Path(settings.data.cache_dir).expanduser() / f"reference-{key}"
    if all(run.world.gather(_fault(folder) is not None)):
        run.say(f"reference log-probabilities: computed once, into {folder}")
        values = made = _compute(run, model, packed, own=path is None)

        def build(place: Path) -> None:
            np.save(place / VALUES, made, allow_pickle=False)
            digest = hashlib.sha256((place / VALUES).read_bytes()).hexdigest()
            (place / SUM).write_text(digest, "utf-8")

        run.world.first_alone("reference", lambda: made_once(folder, _fault, build))
    else:
        run.say(f"reference log-probabilities: from {folder}")
        values = np.load(folder / VALUES, allow_pickle=False)
    return values, key


def _fault(folder: Path) -> str | None:
    """What is wrong with a folder of values: None, "absent" or a phrase."""
    if not folder.exists():
        return "absent"
    try:
        digest = hashlib.sha256((folder / VALUES).read_bytes()).hexdigest()
        return None if (folder / SUM).read_text("utf-8") == digest else "its hash differs"
    except OSError as error:
        return str(error)


@torch.no_grad()
def _compute(run: "Run", model: Any, packed: list[PackedRows], *, own: bool) -> np.ndarray:
    """One pass over every row, shared out over the ranks."""
    size, count = run.settings.train.batch_size, len(run.prepared.store.documents)
    values = np.zeros(count)
    seen = np.zeros(count)
    # An adapter that begins away from the base, such as virtual tokens, is not the reference.
    plain = run.adapter.disabled() if own and run.adapter else nullcontext()
    model.eval()
    with plain, data_progress() as progress:
        for rows in packed:
            total = rows.packing.num_rows
            # Every rank makes as many forwards as the others: in stage 3 they need each other.
            for begin in range(0, total, size * run.world.size):
                mine = begin + run.world.rank * size + np.arange(size)
                mine[mine >= total] = -1
                batch = rows.batch(mine).to(run.device)
                sums, _ = sequence_logprobs(model, batch)
                assert batch.pairs is not None
                documents = rows.documents(mine)
                values[documents] = sums[batch.pairs].double().cpu().numpy().reshape(-1)
                seen[documents] = 1
                progress("the reference model", begin, total)
    if own:
        if run.zero:
            run.zero.reshard()
        model.train()
    values, seen = run.world.gather_numbers([*values, *seen]).sum(0).numpy().reshape(2, -1)
    return np.where(seen > 0, values, np.nan).astype(np.float32)
