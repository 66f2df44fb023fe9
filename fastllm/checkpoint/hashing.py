"""The hash of a state: the same number however the tensors are cut and over how many ranks.

A sum modulo 2**64 over all elements of mix(mix(seed + GAMMA * index) ^ bits): `seed` is a hash of
the part's and the tensor's name, dtype and shape, `index` the element's place in the flattened
tensor, `bits` the element's own, and `mix` the finalizer of splitmix64. Every rank sums over its
pieces and the sums add up.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastllm import files
from fastllm.dist.mesh import ALONE, World
from fastllm.pieces import Piece

Part = Mapping[str, Tensor] | Sequence[Piece]
"""Some of a state: whole tensors by name, or a rank's pieces."""
Parts = Mapping[str, Part]
"""A state: "model", "optimizer" and so on."""
MODULUS = 1 << 64
_GAMMA, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9,
                                                  0x94D049BB133111EB))
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SPAN = 1 << 15  # elements in one go of the numpy form: its temporaries stay in the cache


def as_pieces(part: Part) -> list[Piece]:
    """The pieces of a part."""
    if isinstance(part, Mapping):
        return [Piece.whole(name, tensor) for name, tensor in part.items()]
    return list(part)


def blocks(piece: Piece) -> Iterator[tuple[int, Tensor]]:
    """(index of the first element, 1-d CPU tensor of a few MB) over a piece, in order."""
    flat, first = piece.tensor.detach().reshape(-1), piece.offset
    for block in flat.split(files.CHUNK // flat.element_size()):
        yield first, block.cpu()
        first += block.numel()


def seed_of(part: str, name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """What the elements of one tensor are hashed with: 64 bits."""
    text = f"{part}/{name} {dtype} {tuple(shape)};".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def block_hash(seed: int, first: int, block: Tensor) -> int:
    """The sum over a contiguous CPU tensor whose first element has index `first`."""
    flat = block.view(-1)
    if not flat.numel():
        return 0
    if hasattr(torch.ops.fastllm_cpu, "state_hash"):
        signed = seed - MODULUS if seed >= MODULUS >> 1 else seed
        bits = flat.view(_SIGNED[flat.element_size()])
        return int(torch.ops.fastllm_cpu.state_hash(bits, signed, first)) % MODULUS
    return numpy_hash(seed, first, flat)


def numpy_hash(seed: int, first: int, flat: Tensor) -> int:
    """`block_hash` without the C++ extension; its definition."""
    bits = flat.view(torch.uint8).numpy().view(_UNSIGNED[flat.element_size()])
    total = 0
    for at in range(0, len(bits), _SPAN):
        some = bits[at:at + _SPAN]
        index = np.arange(len(some), dtype=np.uint64) + np.uint64(first + at)
        index *= _GAMMA
        index += np.uint64(seed)
        mixed = _mix(_mix(index) ^ some)
        total += int(mixed.sum(dtype=np.uint64))
    return total % MODULUS


def part_hashes(parts: Parts, world: World = ALONE) -> dict[str, str]:
    """The hash of each part of the state that the ranks hold together, in hex."""
    mine = {name: sum(block_hash(seed_of(name, piece.name, piece.tensor.dtype, piece.shape), first,
                                 block)
                      for piece in as_pieces(part) for first, block in blocks(piece)) % MODULUS
            for name, part in parts.items()}
    return in_hex(add_up(world.gather(mine)))


def digest(parts: Parts, world: World = ALONE) -> str:
    """The hash of the state that the ranks hold together, in hex."""
    return total_of(part_hashes(parts, world))


def add_up(sums: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The ranks' sums by part, added."""
    names = sorted({name for some in sums for name in some})
    return {name: sum(some.get(name, 0) for some in sums) % MODULUS for name in names}


def in_hex(sums: Mapping[str, int]) -> dict[str, str]:
    """Sums as 16 digits each."""
    return {name: f"{value:016x}" for name, value in sums.items()}


def total_of(hashes: Mapping[str, str]) -> str:
    """The hash of a state from those of its parts."""
    return f"{sum(int(value, 16) for value in hashes.values()) % MODULUS:016x}"


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, in place."""
    z ^= z >> np.uint64(30)
    z *= _FIRST
    z ^= z >> np.uint64(27)
    z *= _SECOND
    z ^= z >> np.uint64(31)
    return z
