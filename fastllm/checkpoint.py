"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors + JSON, no pickle.

    checkpoints/step-00000200/
        model.safetensors optimizer.safetensors rng.safetensors    tensors, by name
        state.json       step, data position, loss scale, ...
        manifest.json    size and SHA-256 of each file, and the hash of itself

A checkpoint is written under a temporary name, fsynced, read back, compared with the tensors in
memory, and only then renamed: a name `step-N` always stands for a whole one, unless the disk
damaged it later. `newest` notices that and falls back to the one before, saying so. An older one is
removed only after a newer one was verified.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllm.config import UserError
from fastllm.files import sync

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
Parts = Mapping[str, Mapping[str, Tensor]]  # "model" -> name -> tensor; a safetensors file each


@dataclass(kw_only=True)
class CheckpointConfig:
    every: Annotated[int, Field(gt=0)] = 200
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the newest to keep, besides the best one. Two, so that one may be bad."""
    best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


class CorruptCheckpoint(Exception):
    """A checkpoint that must not be loaded; the message names the file and its fault."""


@dataclass
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def digest(parts: Parts) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in order of name."""
    total = hashlib.sha256()
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].items()):
            total.update(f"{part}/{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def save(folder: Path, step: int, parts: Parts, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` and return its path; on any failure nothing before it changes.

    parts: file stem -> tensor name -> tensor (any device, contiguous).  state: JSON-able.
    Raises UserError where the disk is full or not writable, naming the folder and the bytes needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(_full(folder, needed, "the disk is full"))
    try:
        temporary.mkdir()
        state = {"format": FORMAT, "step": step, "state_hash": digest(parts), **state}
        _write(temporary, parts, state)
        if digest(_read(temporary, sorted(parts))) != state["state_hash"]:
            raise CorruptCheckpoint(f"{temporary}: what was read back differs from memory")
        if final.exists():  # a damaged one, or this very step saved before an interruption
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, SafetensorError, CorruptCheckpoint) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(_full(folder, needed, reason)) from None
    return final


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CorruptCheckpoint naming the file and the fault."""
    files = verify(path)
    parts = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = _read(path, parts)
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{path}: {error}") from None
    if digest(tensors) != state["state_hash"]:
        raise CorruptCheckpoint(f"{path}: the tensors differ from the recorded hash of the state")
    return Checkpoint(path, int(state["step"]), tensors, state)


def verify(path: Path) -> dict[str, dict[str, Any]]:
    """Check every file against the manifest, and the manifest against itself; return its files.

    Raises CorruptCheckpoint naming the first file that is missing, of another size or altered.
    """
    files = _manifest(path)
    present = {file.name for file in path.iterdir()} - {"manifest.json"}
    for name in sorted(present ^ files.keys()):
        fault = "is missing" if name in files else "does not belong there"
        raise CorruptCheckpoint(f"{path / name} {fault}")
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise CorruptCheckpoint(f"{path / name} has {size} bytes, not {expected['bytes']}")
        if _sha256(path / name) != expected["sha256"]:
            raise CorruptCheckpoint(f"{path / name} was altered: its SHA-256 does not match")
    return files


def newest(folder: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest good checkpoint of a folder, or None where there is none.

    A bad one is named through `say` and the one before it is tried. Raises UserError where
    checkpoints exist but every one is bad: starting over silently would lose the run.
    """
    bad = 0
    for path in reversed(steps(folder)):
        try:
            return load(path)
        except CorruptCheckpoint as error:
            bad += 1
            say(f"bad checkpoint, trying the one before: {error}")
    if bad:
        raise UserError(f"{folder}: all {bad} checkpoints are damaged; move the folder away to "
                        "start over")
    return None


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first. Temporary ones are not among them."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir()
             if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def retain(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` and the best; called only after the newest was verified."""
    for path in steps(folder)[:-keep]:
        if path.name == f"step-{best_step or 0:08d}":
            continue
        # Renamed first: a removal that is cut short must not leave half a checkpoint by that name.
        doomed = path.with_name(f".removing-{path.name}")
        with suppress(OSError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write(folder: Path, parts: Parts, state: dict[str, Any]) -> None:
    for part, tensors in parts.items():
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                  folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / "manifest.json").write_bytes(_seal(files))
    sync(folder / "manifest.json")
    sync(folder)


def _read(folder: Path, parts: list[str]) -> dict[str, dict[str, Tensor]]:
    return {part: load_file(folder / f"{part}.safetensors") for part in parts}


def _seal(files: dict[str, Any]) -> bytes:
    """The manifest's bytes: canonical JSON that carries the hash of its own content."""
    content = json.dumps({"format": FORMAT, "files": files}, sort_keys=True)
    seal = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": files, "seal": seal}, sort_keys=True).encode()


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        raw = file.read_bytes()
        files = json.loads(raw)["files"]
        whole = _seal(files) == raw  # byte for byte: a flip in white space is caught as well
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{file} cannot be read: {error}") from None
    if not whole:
        raise CorruptCheckpoint(f"{file} was altered: it does not match its own seal")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _full(folder: Path, needed: int, reason: str) -> str:
    free = shutil.disk_usage(folder).free
    return (f"cannot write a checkpoint to {folder}: {reason} (needs {needed / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB free); earlier checkpoints are intact: make room, then --resume")
