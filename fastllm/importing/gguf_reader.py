"""The header of a GGUF file, read without trust, and its tensors, a few rows at a time.

Every length and every place is compared with the file's own size before anything is read or taken,
so a damaged or a hostile header costs no more time and memory than the file has bytes.
The gguf package's reader does not do that; its tables of types and `dequantize` are used here.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastllm.config import UserError

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Type of a metadata value -> its letter in struct and numpy.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}
_ROWS_BYTES = 1 << 26  # fp32 bytes of the rows that `File.rows` gives at once
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. shape: as torch says it; start: of its data, in bytes of the file."""

    name: str
    kind: Any
    """gguf's GGMLQuantizationType."""
    shape: tuple[int, ...]
    start: int
    nbytes: int


def package() -> Any:
    """The gguf package. UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("a GGUF file needs the gguf package: "
                        "pip install 'fastllm-train[export]'") from error
    return gguf


class File:
    """A GGUF file: `metadata` by key, `tensors` by name. It is mapped, not read.

    Arrays of numbers come as numpy arrays, arrays of strings as lists. Raises UserError where the
    file cannot be read, is not GGUF, is damaged, or holds a quantisation that cannot be undone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = package()
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
                            ) from None
        self._place = 0
        if self._take(4, "the magic") != MAGIC:
            raise UserError(f"{path}: not a GGUF file")
        self._check_version(self._number("I"))
        tensors, keys = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        # The shortest entry: a name's length, a type, one byte; for a tensor also place and shape.
        for _ in range(self._count(keys, 13, "metadata entries")):
            key = self._string("a key")
            if key in self.metadata:
                self.damaged(f"the key {key} comes twice")
            self.metadata[key] = self._value(self._number("I"), key)
        self.tensors = self._read_tensors(tensors)
        self._check_kinds()

    def damaged(self, why: str) -> NoReturn:
        """Raise UserError for a file that no writer wrote."""
        raise UserError(f"{self.path}: damaged GGUF file: {why}; get it again")

    def rows(self, name: str, whole: bool = False) -> Iterator[Tensor]:
        """The values of a tensor in fp32, some rows at a time, or all of them at once."""
        stored = self.tensors[name]
        gguf = self._gguf
        row_bytes = stored.nbytes // prod(stored.shape[:-1])
        data = np.frombuffer(self._data, np.uint8, stored.nbytes, stored.start)
        data = data.reshape(-1, row_bytes)
        step = len(data) if whole else max(1, _ROWS_BYTES // (4 * stored.shape[-1]))
        for first in range(0, len(data), step):
            part = data[first:first + step]
            values = torch.from_numpy(np.array(gguf.quants.dequantize(part, stored.kind)))
            yield values.view(*stored.shape) if step >= len(data) else values

    # -------------------------------------------------------------------------------- parsing

    def _take(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self._place:
            self.damaged(f"it ends within {what}, at byte {len(self._data)}")
        self._place += count
        return self._data[self._place - count:self._place]

    def _number(self, letter: str) -> Any:
        form = struct.Struct(f"<{letter}")
        return form.unpack(self._take(form.size, "its header"))[0]

    def _count(self, count: int, each: int, what: str) -> int:
        """`count`, of things of at least `each` bytes, if the rest of the file can hold them."""
        if count * each > len(self._data) - self._place:
            self.damaged(f"it announces {count} {what}, more than its {len(self._data)} bytes hold")
        return count

    def _string(self, what: str) -> str:
        length = self._count(self._number("Q"), 1, f"bytes of {what}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.damaged(f"{what} is not UTF-8")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(f"the value of {key}")
        if kind != _ARRAY:
            self.damaged(f"{key} has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return [self._string(f"an element of {key}")
                    for _ in range(self._count(count, 8, f"elements of {key}"))]
        if kind not in _SCALARS:
            self.damaged(f"{key} is an array of the type {kind}")
        form = np.dtype(_SCALARS[kind]).newbyteorder("<")
        count = self._count(count, form.itemsize, f"elements of {key}")
        return np.frombuffer(self._take(count * form.itemsize, key), form)

    def _check_version(self, version: int) -> None:
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise UserError(f"{self.path}: " + (
                "a big-endian GGUF file is not supported" if big
                else f"GGUF version {version} is not supported, only 2 and 3 are")
                + ": convert it anew with llama.cpp")

    def _read_tensors(self, count: int) -> dict[str, Stored]:
        entries = []
        for _ in range(self._count(count, 24, "tensors")):
            name = self._string("a tensor's name")
            dimensions = self._number("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self.damaged(f"tensor {name} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            entries.append((name, shape, self._number("I"), self._number("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.damaged(f"general.alignment is {alignment!r}")
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                self.damaged(f"tensor {name} comes twice")
            tensors[name] = self._place_tensor(name, shape, kind, start + offset)
        end = start
        for stored in sorted(tensors.values(), key=lambda stored: stored.start):
            if stored.start < end:
                self.damaged(f"tensor {stored.name} lies over another one")
            end = stored.start + stored.nbytes
        return tensors

    def _place_tensor(self, name: str, shape: tuple[int, ...], code: int, start: int) -> Stored:
        try:
            kind = self._gguf.GGMLQuantizationType(code)
        except ValueError:
            raise UserError(f"{self.path}: tensor {name} has the type {code}, which the gguf "
                            "package does not know: bring it up to date") from None
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        if prod(shape) <= 0 or shape[-1] % block:
            self.damaged(f"tensor {name} is {shape}, which {kind.name} in blocks of {block} "
                         "cannot be")
        nbytes = prod(shape) // block * size
        if start + nbytes > len(self._data):
            self.damaged(f"tensor {name} ends at byte {start + nbytes}, the file at "
                         f"{len(self._data)}")
        return Stored(name, kind, shape, start, nbytes)

    def _check_kinds(self) -> None:
        """Refuse, before anything is written, a type that `dequantize` cannot undo."""
        seen = {stored.kind: stored.name for stored in reversed(self.tensors.values())}
        for kind, name in seen.items():
            size = self._gguf.GGML_QUANT_SIZES[kind][1]
            try:
                self._gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError:
                raise UserError(f"{self.path}: tensor {name} is of type {kind.name}, which the "
                                "gguf package cannot turn into floats: get the model in another "
                                "quantisation") from None
