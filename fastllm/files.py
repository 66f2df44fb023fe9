"""Files that survive a crash: the few calls that every atomic write is made of, and safetensors.

A file or folder that must appear whole is written under a temporary name, synced, and renamed.
Whatever is written that way goes through the functions here, so that a test can record the calls,
fail them, or play them back as far as a power cut would have let them come.

The format of safetensors: 8 bytes of little-endian header length, a JSON header padded to 8, then
the data. It is written and read here in chunks; the library's own functions hold all of a file.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.config import UserError

CHUNK = 1 << 22
"""Bytes that are in the host's memory at once while tensors go to a file or come from one."""
_LONGEST_HEADER = 100_000_000  # that of the safetensors library
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
          torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
          torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def make_folder(path: Path) -> None:
    """A new folder; its parent exists."""
    path.mkdir()


def create(path: Path) -> FileIO:
    """A file to write anew, without a buffer: a full disk shows at the write that it stops."""
    return FileIO(path, "wb")


def write(file: FileIO, data: Any) -> None:
    """Append all of `data` (bytes or a buffer)."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while len(view):
        view = view[file.write(view):]


def sync(path: Path) -> None:
    """fsync a file or a folder, so that the rename that follows never names unwritten data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Atomic; lasting once the folder is synced."""
    os.rename(old, new)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as that is possible; one that is not there is no fault."""
    shutil.rmtree(path, ignore_errors=True)


def forget(path: Path) -> None:
    """Drop a synced file from the page cache, so that reading it back asks the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write_file(path: Path, data: bytes) -> str:
    """Write and sync a small file; returns its SHA-256."""
    with create(path) as file:
        write(file, data)
    sync(path)
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Slot:
    """A tensor in a safetensors file. start: of its data, in bytes from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, slots: Sequence[Slot], data: Iterable[Tensor],
                      metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, one tensor of `data` in memory at a time; returns its SHA-256.

    data: tensors whose elements, end to end, are those of the slots in order, in their dtypes; cut
    as the caller likes and from any device. It may make each when it is asked for it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for slot in slots:
        begin, end = end, end + slot.nbytes
        header[slot.name] = {"dtype": _CODES[slot.dtype], "shape": list(slot.shape),
                             "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total, written = hashlib.sha256(), 0
    with create(path) as file:
        for block in _blocks(struct.pack("<Q", len(text)) + text, data):
            total.update(block)
            write(file, block)
            written += len(block)
    if written != 8 + len(text) + end:
        raise ValueError(f"{path}: {written} bytes of data, the header says {8 + len(text) + end}")
    return total.hexdigest()


def read_slots(path: Path) -> tuple[list[Slot], dict[str, str]]:
    """(the tensors of a safetensors file in the order of their data, its metadata).

    Reads the header alone. Raises ValueError for a file that is not safetensors to the last byte.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header's length is impossible")
        header = json.loads(file.read(length))
    try:
        metadata = header.pop("__metadata__", {})
        ends = {name: entry["data_offsets"] for name, entry in header.items()}
        slots = [Slot(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]),
                      8 + length + ends[name][0]) for name, entry in header.items()]
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its header makes no sense: {error!r}") from None
    slots.sort(key=lambda slot: (slot.start, slot.nbytes))
    place = 8 + length
    for slot in slots:
        if slot.start != place or ends[slot.name][1] != place - 8 - length + slot.nbytes:
            raise ValueError(f"its header gives tensor {slot.name} a place that it cannot have")
        place += slot.nbytes
    if place != size:
        raise ValueError(f"it has {size} bytes, its header says {place}")
    return slots, metadata


def read_into(path: Path, start: int, tensor: Tensor) -> None:
    """Fill a 1-d contiguous tensor of any device with the file's bytes from `start`.

    Straight into the memory of a CPU tensor, else in chunks. Raises EOFError past the file's end.
    """
    flat = tensor.detach().view(torch.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for block in flat.split(CHUNK):
            host = block if block.device.type == "cpu" else torch.empty_like(block, device="cpu")
            fill(file, host)
            if host is not block:
                block.copy_(host)


def fill(file: FileIO, host: Tensor) -> None:
    """Fill a CPU tensor of uint8 from where the file stands. Raises EOFError at the file's end."""
    view = memoryview(host.numpy().data)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise EOFError(f"{file.name} ends before its header says")
        view = view[count:]


def _blocks(first: bytes, data: Iterable[Tensor]) -> Iterator[Any]:
    """`first`, then the bytes of the tensors, as buffers of at most CHUNK bytes."""
    yield first
    for tensor in data:
        for block in tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            yield block.cpu().numpy().data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, naming it, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
