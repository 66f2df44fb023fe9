"""Reading checkpoints: verified as a whole first, then tensor by tensor and piece by piece.

However many ranks wrote a checkpoint, it is a set of tensors, each made of runs of elements that
lie somewhere in its files. Any number of ranks reads the elements that it wants.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm import files
from fastllm.checkpoint.hashing import (
    MODULUS,
    Part,
    add_up,
    as_pieces,
    block_hash,
    in_hex,
    seed_of,
    total_of,
)
from fastllm.config import UserError
from fastllm.dist.mesh import ALONE, World

FORMAT = 2  # 1 had whole tensors of one rank only, and another hash of the state
MANIFEST, STATE = "manifest.json", "state.json"
_SHARD = re.compile(r"(.+?)(?:-\d{5,}-of-\d{5,})?\.safetensors")
_KINDS = {"optimizer": "optimizer state"}  # what messages call a tensor of a part


class CorruptCheckpoint(Exception):
    """A checkpoint that must not be loaded; the message names the file and its fault."""


@dataclass(frozen=True)
class Run:
    """Elements offset .. offset + size of a tensor, at byte `start` of a file."""

    offset: int
    size: int
    file: Path
    start: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint; its runs in order, without hole or overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    runs: list[Run] = field(default_factory=list)

    def read(self, offset: int, flat: Tensor) -> None:
        """Fill a 1-d tensor with the elements from `offset` on."""
        end = offset + flat.numel()
        for run in self.runs:
            first, last = max(offset, run.offset), min(end, run.offset + run.size)
            if first < last:
                try:
                    files.read_into(run.file,
                                    run.start + (first - run.offset) * self.dtype.itemsize,
                                    flat[first - offset:last - offset])
                except (OSError, EOFError) as error:
                    raise CorruptCheckpoint(f"{run.file} cannot be read: {error}") from None


Layout = dict[str, dict[str, Stored]]  # "model" -> name -> where it is


@dataclass
class Checkpoint:
    """A verified checkpoint on the disk. Its tensors are read when they are asked for.

    state: what was saved beside the tensors; also world_size (the ranks that wrote it), state_hash
    and part_hashes.  world: the ranks that loaded it together.
    """

    path: Path
    step: int
    state: dict[str, Any]
    layout: Layout
    world: World = ALONE

    def stream(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) one at a time, in order of name."""
        for name in sorted(self.layout.get(part, {})):
            yield name, self.tensor(part, name)

    def tensor(self, part: str, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        stored = self.layout[part][name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read(0, whole.view(-1))
        return whole

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part, whole."""
        return dict(self.stream(part))

    def fill(self, part: str, pieces: Part) -> None:
        """Copy from the disk into this rank's pieces, in place; every rank calls it with its own.

        A piece may lie across several saved ones: only its own elements are read. Raises UserError
        naming the first tensor that is missing, unknown to every rank, or of another shape or
        dtype; nothing is changed then. CorruptCheckpoint where a file cannot be read any more.
        """
        pieces, stored = as_pieces(pieces), self.layout.get(part, {})
        kind, fault, error = _KINDS.get(part, f"{part} tensor"), None, None
        unknown = stored.keys() - {piece.name for piece in pieces}
        for piece in pieces:
            saved, dtype = stored.get(piece.name), piece.tensor.dtype
            if saved is None:
                fault = _absent(kind, piece.name, "the saved state")
            elif saved.shape != tuple(piece.shape) or saved.dtype != dtype:
                fault = (f"{kind} {piece.name} is {saved.dtype} {saved.shape} in the saved run and "
                         f"{dtype} {tuple(piece.shape)} here")
            if fault:
                break
        said = self.world.gather([fault, sorted(unknown)])
        for fault in (fault for fault, _ in said if fault):
            raise UserError(fault)
        for name in stored:
            if all(name in unknown for _, unknown in said):
                raise UserError(_absent(kind, name, "this run"))
        try:
            for piece in pieces:
                stored[piece.name].read(piece.offset, piece.tensor.detach().view(-1))
        except CorruptCheckpoint as failure:
            error = str(failure)
        agree(self.world, error)


def _absent(kind: str, name: str, where: str) -> str:
    return (f"{kind} {name} is not in {where}: the model, the dtype or a setting of optim differs "
            "from the saved run's")


def agree(world: World, fault: str | None, value: Any = None) -> list[Any]:
    """Every rank's value; if a rank has a fault, every rank raises CorruptCheckpoint with it."""
    said = world.gather([fault, value])
    for fault, _ in said:
        if fault:
            raise CorruptCheckpoint(fault)
    return [value for _, value in said]


def load(path: Path, world: World = ALONE) -> Checkpoint:
    """Verify one checkpoint, every rank reading its share of the files, and open it.

    Raises CorruptCheckpoint naming the file and the fault, on every rank the same.
    """
    fault: str | None = None
    number, listed, sums = FORMAT, dict[str, Any](), dict[str, int]()
    try:
        number, listed = read_manifest(path)
        sums = _verify(path, listed, world)
    except CorruptCheckpoint as error:
        fault = str(error)
    hashes = in_hex(add_up(agree(world, fault, sums)))
    saved = None
    try:
        state = json.loads((path / STATE).read_bytes())
        saved = Checkpoint(path, int(state["step"]), state, read_layout(path, listed), world)
        if number == 1:
            _from_first_format(saved, hashes)
        elif (state["part_hashes"], state["state_hash"]) != (hashes, total_of(hashes)):
            raise CorruptCheckpoint(_differs(path))
    except CorruptCheckpoint as error:
        fault = str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{path / STATE} cannot be read: {error!r}"
    agree(world, fault)
    assert saved is not None
    return saved


def verify(path: Path) -> dict[str, dict[str, Any]]:
    """Check every file against the manifest, and the manifest against itself; return its files.

    Raises CorruptCheckpoint naming the first file that is missing, of another size or altered.
    """
    _, listed = read_manifest(path)
    _verify(path, listed, ALONE)
    return listed


def seal(listed: dict[str, Any], number: int = FORMAT) -> bytes:
    """The manifest's bytes: canonical JSON that carries the hash of its own content."""
    content = json.dumps({"format": number, "files": listed}, sort_keys=True)
    own = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps({"format": number, "files": listed, "seal": own}, sort_keys=True).encode()


def read_manifest(path: Path) -> tuple[int, dict[str, Any]]:
    """(format, file name -> bytes and sha256). Raises CorruptCheckpoint where it was altered."""
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
        number, listed = content["format"], content["files"]
        whole = seal(listed, number) == raw  # byte for byte: a flip in white space is caught too
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{file} cannot be read: {error}") from None
    if not whole:
        raise CorruptCheckpoint(f"{file} was altered: it does not match its own seal")
    if number not in (1, FORMAT):
        raise CorruptCheckpoint(f"{file} says format {number}; this version reads up to {FORMAT}")
    return number, listed


def read_layout(path: Path, names: Sequence[str] | dict[str, Any]) -> Layout:
    """Where every tensor lies, from the files' headers.

    Raises CorruptCheckpoint naming a file that makes no sense, or a tensor whose pieces disagree,
    overlap or leave a hole.
    """
    layout: Layout = {}
    for name in sorted(names):
        if match := _SHARD.fullmatch(name):
            part = layout.setdefault(match[1], {})
            try:
                placed = _placed(path / name)
            except (OSError, ValueError) as error:
                raise CorruptCheckpoint(f"{path / name} is not safetensors of ours: {error}"
                                        ) from None
            for tensor, shape, offset, slot in placed:
                stored = part.setdefault(tensor, Stored(slot.dtype, shape))
                if (stored.dtype, stored.shape) != (slot.dtype, shape):
                    raise CorruptCheckpoint(f"{path / name}: {tensor} is {slot.dtype} {shape} and "
                                            f"elsewhere {stored.dtype} {stored.shape}")
                stored.runs.append(Run(offset, prod(slot.shape), path / name, slot.start))
    for part_name, part in layout.items():
        for tensor, stored in part.items():
            stored.runs.sort(key=lambda run: (run.offset, run.size))
            end = 0
            for run in [*stored.runs, Run(prod(stored.shape), 0, path, 0)]:
                if run.offset != end:
                    what = "overlap" if run.offset < end else "leave a hole"
                    raise CorruptCheckpoint(f"{path}: the pieces of {part_name} tensor {tensor} "
                                            f"{what} at element {min(run.offset, end)}")
                end += run.size
    return layout


def _placed(path: Path) -> list[tuple[str, tuple[int, ...], int, files.Slot]]:
    """(tensor, its whole shape, offset, where) of every piece in a file, in order of place."""
    slots, metadata = files.read_slots(path)
    try:
        cut = json.loads(metadata.get("pieces", "{}"))
        found = []
        for slot in slots:
            name, offset, shape = cut.get(slot.name, (slot.name, 0, slot.shape))
            found.append((str(name), tuple(int(n) for n in shape), int(offset), slot))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"its metadata makes no sense: {error}") from None
    return found


def _verify(path: Path, listed: dict[str, Any], world: World) -> dict[str, int]:
    """Check this rank's share of the files; returns its sums of the state's hash by part."""
    try:
        present = {file.name: file.stat().st_size for file in path.iterdir()}
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    present.pop(MANIFEST, None)
    for name in sorted(present.keys() ^ listed.keys()):
        fault = "is missing" if name in listed else "does not belong there"
        raise CorruptCheckpoint(f"{path / name} {fault}")
    for name, expected in listed.items():
        if present[name] != expected["bytes"]:
            raise CorruptCheckpoint(f"{path / name} has {present[name]} bytes, not "
                                    f"{expected['bytes']}")
    # The largest first, in turn: shares of about one size. The small file is for every rank.
    order = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))
    sums: dict[str, int] = {}
    for name in {*order[world.rank::world.size], STATE} & listed.keys():
        try:
            found, part, value = _scan(path / name)
        except (OSError, EOFError) as error:
            raise CorruptCheckpoint(f"{path / name} cannot be read: {error}") from None
        if found != listed[name]["sha256"]:
            raise CorruptCheckpoint(f"{path / name} was altered: its SHA-256 does not match")
        if part is not None:
            sums[part] = sums.get(part, 0) + value
    return sums


def _scan(path: Path) -> tuple[str, str | None, int]:
    """(SHA-256, part, the part's share of the state's hash) of a file, in one reading."""
    match = _SHARD.fullmatch(path.name)
    try:
        placed = _placed(path) if match else []
    except ValueError:  # damage, which the SHA-256 shows; if not, `read_layout` says what it is
        placed = []
    if match is None or not placed:
        return files.sha256(path), match and match[1], 0
    whole, total, buffer = hashlib.sha256(), 0, torch.empty(files.CHUNK, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        header = torch.empty(placed[0][3].start, dtype=torch.uint8)
        files.fill(file, header)
        whole.update(header.numpy().data)
        for name, shape, offset, slot in placed:
            seed = seed_of(match[1], name, slot.dtype, shape)
            for at in range(0, slot.nbytes, files.CHUNK):
                block = buffer[:min(files.CHUNK, slot.nbytes - at)]
                files.fill(file, block)
                whole.update(block.numpy().data)
                total += block_hash(seed, offset + at // slot.dtype.itemsize,
                                    block.view(slot.dtype))
    return whole.hexdigest(), match[1], total % MODULUS


def _from_first_format(saved: Checkpoint, hashes: dict[str, str]) -> None:
    """Check the first format's hash of the state, and put today's in its place."""
    total = hashlib.sha256()
    for part in sorted(saved.layout):
        for name, tensor in saved.stream(part):
            total.update(f"{part}/{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    if total.hexdigest() != saved.state["state_hash"]:
        raise CorruptCheckpoint(_differs(saved.path))
    saved.state |= {"world_size": 1, "part_hashes": hashes, "state_hash": total_of(hashes)}


def _differs(path: Path) -> str:
    return f"{path}: the tensors differ from the recorded hash of the state"


def same_run(ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    """Refuse to resume with another model or other data, naming the first key that differs."""
    for section in ours:
        mine, saved = ours[section], theirs.get(section)
        if mine == saved:
            continue
        if isinstance(mine, dict) and isinstance(saved, dict):
            key = next(k for k in mine if mine[k] != saved.get(k))
            detail = f"{section}.{key} is {mine[key]} here and {saved.get(key)} in the checkpoint"
        else:
            detail = f"{section} is {mine} here and {saved} in the checkpoint"
        raise UserError(f"cannot resume {path} with another {section}: {detail}; give the run's "
                        "own settings, or another --out")
