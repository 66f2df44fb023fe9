"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors + JSON, no pickle.

    checkpoints/step-00000200/
        model.safetensors optimizer.safetensors rng.safetensors    tensors, by name
        state.json       step, data position, loss scale, ...
        manifest.json    size and SHA-256 of each file, and the hash of itself

Of several ranks each writes what it holds, `model-00001-of-00002.safetensors` and so on, into the
one folder that all of them see. A tensor that lies whole in a file bears its name there; a piece of
one is called `name[first:last]`, and the file's metadata say which tensor, offset and whole shape
that means. So any number of ranks reads what any number wrote.

A checkpoint is written under a temporary name, fsynced, read back, compared with what left the
memory, and only then renamed: a name `step-N` always stands for a whole one, unless the disk
damaged it later. `newest` notices that and falls back to the one before, saying so. An older one is
removed only after a newer one was verified.

Writing and filling hold a few megabytes in the host's memory beside the state, whatever its size;
`Checkpoint.stream` and an export hold one tensor.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from torch import Tensor

from fastllm import files
from fastllm.checkpoint.hashing import (
    MODULUS,
    Parts,
    add_up,
    as_pieces,
    block_hash,
    blocks,
    digest,
    in_hex,
    part_hashes,
    seed_of,
    total_of,
)
from fastllm.checkpoint.reading import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    CorruptCheckpoint,
    load,
    read_layout,
    read_manifest,
    same_run,
    seal,
    verify,
)
from fastllm.config import RunError, UserError
from fastllm.dist.mesh import ALONE, World
from fastllm.pieces import Piece

__all__ = ["Checkpoint", "CheckpointConfig", "CorruptCheckpoint", "Parts", "digest", "load",
           "newest", "part_hashes", "retain", "same_run", "save", "steps", "verify"]
NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
T = TypeVar("T")


@dataclass(kw_only=True)
class CheckpointConfig:
    every: Annotated[int, Field(gt=0)] = 200
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the newest to keep, besides the best one. Two, so that one may be bad."""
    best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


def save(folder: Path, step: int, parts: Parts, state: dict[str, Any], world: World = ALONE
         ) -> Path:
    """Write `folder/step-NNNNNNNN` and return its path; on any failure nothing before it changes.

    Every rank calls it, with its own pieces; it returns when the checkpoint is on the disk whole.

    parts: file stem -> the pieces that this rank writes (or whole tensors by name), on any device;
    over the ranks together every element once.  state: JSON-able; the first rank's is written.
    Raises UserError, on every rank the same, where the disk is full or not writable, naming the
    folder and the bytes needed.
    """
    pieces = {part: _worth_writing(as_pieces(some)) for part, some in parts.items()}
    needed = world.sum(sum(piece.size * piece.tensor.element_size()
                           for some in pieces.values() for piece in some))
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_WRITING}{final.name}"

    def everyone(work: Callable[[], T]) -> T | None:
        """This rank's share of the work; if a rank fails, every rank raises its words."""
        failure: Exception | None = None
        result = None
        try:
            result = work()
        except (OSError, CorruptCheckpoint) as error:
            reason = getattr(error, "strerror", None) or str(error)
            failure = UserError(_full(folder, needed, reason))
        except UserError as error:
            failure = error
        except Exception as error:  # the other ranks wait for this one's word, whatever happened
            failure = RunError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        world.together(failure)
        return result

    def first_rank(work: Callable[[], None]) -> None:
        everyone(work if world.first else lambda: None)

    try:
        first_rank(lambda: _begin(folder, temporary, needed))
        listed, sums = everyone(lambda: _write_shards(temporary, pieces, world)) or ({}, {})
        reports = world.gather([listed, sums])
        hashes = in_hex(add_up([sums for _, sums in reports]))
        head = {"format": FORMAT, "step": step, "world_size": world.size,
                "state_hash": total_of(hashes), "part_hashes": hashes}
        listed = {name: entry for some, _ in reports for name, entry in some.items()}
        first_rank(lambda: _finish(temporary, final, listed, {**head, **state}))
    except (UserError, RunError):  # the one that all ranks raise together
        if world.first:
            files.remove_tree(temporary)
        world.barrier()
        raise
    return final


def newest(folder: Path, say: Callable[[str], None] = print, world: World = ALONE
           ) -> Checkpoint | None:
    """The newest good checkpoint of a folder, or None where there is none; for every rank the same.

    A bad one is named through the first rank's `say` and the one before it is tried. Raises
    UserError where checkpoints exist but every one is bad: starting over silently would lose the
    run.
    """
    names = world.gather([path.name for path in reversed(steps(folder))] if world.first else [])[0]
    for name in names:
        try:
            return load(folder / name, world)
        except CorruptCheckpoint as error:
            if world.first:
                say(f"bad checkpoint, trying the one before: {error}")
    if names:
        raise UserError(f"{folder}: all {len(names)} checkpoints are damaged; move the folder away "
                        "to start over")
    return None


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first. Temporary ones are not among them."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir()
             if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def retain(folder: Path, keep: int, best_step: int | None, world: World = ALONE) -> None:
    """Remove all but the newest `keep` and the best; called only after the newest was verified.

    The first rank does it; the others need not wait.
    """
    if not world.first:
        return
    doomed = []
    for path in steps(folder)[:-keep]:
        if path.name == f"step-{best_step or 0:08d}":
            continue
        # Renamed first: a removal that is cut short must not leave half a checkpoint by that name.
        with suppress(OSError):
            files.rename(path, path.with_name(_REMOVING + path.name))
            doomed.append(path.with_name(_REMOVING + path.name))
    if doomed:
        with suppress(OSError):
            files.sync(folder)
            for path in doomed:
                files.remove_tree(path)


def _begin(folder: Path, temporary: Path, needed: int) -> None:
    """Make the temporary folder, if there is room for the checkpoint."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(absent):
        files.make_folder(path)
        files.sync(path.parent)
    for pattern in (_WRITING, _REMOVING):  # what a killed process left
        for path in folder.glob(f"{pattern}step-*"):
            files.remove_tree(path)
    if shutil.disk_usage(folder).free < needed:
        raise OSError("the disk is full")
    files.make_folder(temporary)


def _worth_writing(pieces: Sequence[Piece]) -> list[Piece]:
    """Without pieces of no element of a tensor that has some; wide elements first, so that each
    tensor is aligned in the file."""
    kept = [piece for piece in pieces if piece.size or not piece.whole_size]
    return sorted(kept, key=lambda piece: -piece.tensor.element_size())


def _write_shards(folder: Path, parts: Mapping[str, Sequence[Piece]], world: World
                  ) -> tuple[dict[str, Any], dict[str, int]]:
    """This rank's file of every part; (the files' sizes and hashes, the sums of the state's)."""
    listed, sums = {}, {}
    for part, pieces in parts.items():
        shard = f"-{world.rank + 1:05d}-of-{world.size:05d}" if world.size > 1 else ""
        path = folder / f"{part}{shard}.safetensors"
        slots, cut = [], {}
        for piece in pieces:
            name, shape = piece.name, piece.shape
            if piece.size != piece.whole_size:
                name = f"{piece.name}[{piece.offset}:{piece.offset + piece.size}]"
                cut[name], shape = [piece.name, piece.offset, list(piece.shape)], (piece.size,)
            slots.append(files.Slot(name, piece.tensor.dtype, tuple(shape)))
        counter = _Counter(part, pieces)
        written = files.write_safetensors(path, slots, counter,
                                          {"pieces": json.dumps(cut)} if cut else None)
        files.sync(path)
        files.forget(path)
        if files.sha256(path) != written:
            raise CorruptCheckpoint(f"{path}: what was read back differs from memory")
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": written}
        sums[part] = counter.total % MODULUS
    return listed, sums


class _Counter:
    """The elements of pieces, in blocks, adding up the state's hash as they pass."""

    def __init__(self, part: str, pieces: Sequence[Piece]) -> None:
        self.part, self.pieces, self.total = part, pieces, 0

    def __iter__(self) -> Iterator[Tensor]:
        for piece in self.pieces:
            seed = seed_of(self.part, piece.name, piece.tensor.dtype, piece.shape)
            for first, block in blocks(piece):
                self.total += block_hash(seed, first, block)
                yield block


def _finish(temporary: Path, final: Path, listed: dict[str, Any], state: dict[str, Any]) -> None:
    """The first rank's share, after every rank's files are on the disk: seal and rename."""
    read_layout(temporary, listed)  # a state that is not whole must not become a checkpoint
    text = json.dumps(state, indent=1).encode()
    written = files.write_file(temporary / STATE, text)
    listed[STATE] = {"bytes": len(text), "sha256": written}
    files.write_file(temporary / MANIFEST, seal(listed))
    if files.sha256(temporary / STATE) != written or read_manifest(temporary)[1] != listed:
        raise CorruptCheckpoint(f"{temporary}: what was read back differs from memory")
    files.sync(temporary)
    aside = final.with_name(_REMOVING + final.name)
    replaces = final.exists()  # a damaged one, or this very step saved before an interruption
    if replaces:
        files.rename(final, aside)
    try:
        files.rename(temporary, final)
    except OSError:
        if replaces:
            files.rename(aside, final)
        raise
    files.sync(final.parent)
    if replaces:
        files.remove_tree(aside)


def _full(folder: Path, needed: int, reason: str) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    except OSError:
        free = "which is not there"
    return (f"cannot write a checkpoint to {folder}: {reason} (needs {needed / 1e6:.1f} MB, "
            f"{free}); earlier checkpoints are intact: make room, then --resume")
