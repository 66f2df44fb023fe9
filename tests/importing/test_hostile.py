"""Damaged and hostile GGUF files: one line each, at once, and in no more memory than they have."""

import random
import struct
import time
import tracemalloc

import pytest

from fastllm.config import UserError
from fastllm.importing import import_model
from fastllm.importing.gguf_reader import File

HUGE = 2**63 - 1


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(version=3, tensors=0, keys=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(shape=(32,), kind=0, offset=0, name=b"w", dimensions=None):
    return (text(name) + struct.pack("<I", len(shape) if dimensions is None else dimensions)
            + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset))


def key(kind, value, name=b"k"):
    return text(name) + struct.pack("<I", kind) + value


CASES = {
    "no bytes": (b"", "cannot read"),
    "another magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "cut in the counts": (header()[:15], "ends within its header"),
    "version 1": (header(1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless keys": (header(keys=HUGE), f"announces {HUGE} metadata entries"),
    "endless tensors": (header(tensors=HUGE), f"announces {HUGE} tensors"),
    "endless name": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(40), "bytes of a key"),
    "endless string": (header(keys=1) + key(8, struct.pack("<Q", HUGE)) + bytes(9),
                       "bytes of the value of k"),
    "endless numbers": (header(keys=1) + key(9, struct.pack("<IQ", 5, 2**62)), "elements of k"),
    "endless strings": (header(keys=1) + key(9, struct.pack("<IQ", 8, 2**62)), "elements of k"),
    "nested arrays": (header(keys=1) + key(9, struct.pack("<IQ", 9, 1)) + bytes(16),
                      "an array of the type 9"),
    "unknown type": (header(keys=1) + key(77, bytes(8)), "k has the unknown type 77"),
    "a key twice": (header(keys=2) + 2 * key(0, b"\1"), "key k comes twice"),
    "not UTF-8": (header(keys=1) + key(8, text(b"\xff\xfe")), "not UTF-8"),
    "alignment 0": (header(keys=1) + key(4, bytes(4), b"general.alignment"), "alignment is 0"),
    "alignment 3": (header(keys=1) + key(4, struct.pack("<I", 3), b"general.alignment"),
                    "alignment is 3"),
    "many dimensions": (header(tensors=1) + tensor(dimensions=2**31) + bytes(999),
                        f"tensor w has {2**31} dimensions"),
    "a tensor of nothing": (header(tensors=1) + tensor((0, 4)) + bytes(999), "tensor w is "),
    "blocks that do not fit": (header(tensors=1) + tensor((33,), kind=2) + bytes(999),
                               "Q4_0 in blocks of 32"),
    "an unknown quantisation": (header(tensors=1) + tensor(kind=9999) + bytes(999),
                                "has the type 9999"),
    "past the end": (header(tensors=1) + tensor(offset=2**40) + bytes(999), "the file at"),
    "a product past 64 bits": (header(tensors=1) + tensor((2**40, 2**40)) + bytes(999),
                               "the file at"),
    "twice": (header(tensors=2) + 2 * tensor() + bytes(999), "tensor w comes twice"),
    "one over another": (header(tensors=2) + tensor() + tensor(name=b"v", offset=64)
                         + bytes(999), "tensor v lies over another"),
}


@pytest.mark.parametrize(("data", "words"), CASES.values(), ids=CASES)
def test_refused_at_once_in_one_line(data, words, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            File(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 32 << 20 and time.monotonic() - begun < 20
    with pytest.raises(UserError):
        import_model(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_cut_anywhere_is_refused(forge, tmp_path):
    data = forge.write(forge.scrambled()).read_bytes()
    path = tmp_path / "cut.gguf"
    draw = random.Random(0)
    for end in [len(data) - 32, *(draw.randrange(1, len(data)) for _ in range(40)),
                *(draw.randrange(1, 12000) for _ in range(40))]:
        path.write_bytes(data[:end])
        with pytest.raises(UserError):
            import_model(path, tmp_path / "out", say=lambda line: None)
        assert not (tmp_path / "out").exists()


def test_flipped_bytes_give_a_model_or_one_line(forge, tmp_path):
    """Nothing but UserError comes out of a header in which single bytes are wrong."""
    data = bytearray(forge.write(forge.scrambled()).read_bytes())
    names = data.index(b"blk.1.ffn_down.weight")
    path = tmp_path / "flipped.gguf"
    draw, refused = random.Random(1), []
    for place in [*(draw.randrange(4, 900) for _ in range(150)),
                  *(names + draw.randrange(-600, 600) for _ in range(100))]:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            import_model(path, tmp_path / "out", say=lambda line: None)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)
