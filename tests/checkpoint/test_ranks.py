"""Checkpoints written by any number of ranks and read by any other, and the hash of their state."""

import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from states import cut, read, same, state
from threads_as_ranks import everywhere, must

import fastllm.ops  # noqa: F401  loads the C++ ops
from fastllm import checkpoint, files
from fastllm.checkpoint import CorruptCheckpoint, hashing
from fastllm.checkpoint.reading import seal
from fastllm.config import UserError
from fastllm.pieces import Piece


def save(folder, step, whole, size, seed=None, **more):
    """A checkpoint that `size` ranks write."""
    return must(everywhere(size, lambda world: checkpoint.save(
        folder, step, cut(whole, world.rank, size, seed), {"data": 5}, world, **more)))[0]


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers):
    whole = state(1)
    path = save(tmp_path, 3, whole, writers, seed=writers)
    saved = checkpoint.load(path)
    assert (saved.step, saved.state["data"], saved.state["world_size"]) == (3, 5, writers)
    assert same(read(saved), whole)
    assert saved.state["state_hash"] == checkpoint.digest(whole)
    for readers in (1, 2, 3, 4):
        def load(world, readers=readers):
            found = checkpoint.load(path, world)
            empty = {part: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
                     for part, tensors in whole.items()}
            pieces = cut(empty, world.rank, readers, seed=7)
            for part, some in pieces.items():
                found.fill(part, some)
            return pieces, checkpoint.part_hashes(pieces, world)

        for rank, (pieces, hashes) in enumerate(must(everywhere(readers, load))):
            expected = cut(whole, rank, readers, seed=7)
            for part in whole:
                for mine, right in zip(pieces[part], expected[part], strict=True):
                    assert torch.equal(mine.tensor.view(torch.uint8),
                                       right.tensor.view(torch.uint8)), (part, mine.name)
            assert hashes == saved.state["part_hashes"]


def test_the_files_are_safetensors_that_say_what_they_hold(tmp_path):
    path = save(tmp_path, 1, state(1), 2)
    assert {file.name for file in path.iterdir()} == {
        *(f"{part}-0000{rank}-of-00002.safetensors" for part in ("model", "optimizer")
          for rank in (1, 2)), "state.json", "manifest.json"}
    with safe_open(path / "model-00002-of-00002.safetensors", "pt") as file:
        cuts = json.loads(file.metadata()["pieces"])
        assert cuts["w[17:35]"] == ["w", 17, [7, 5]]
        assert torch.equal(file.get_tensor("w[17:35]").view(torch.int16),
                           state(1)["model"]["w"].view(-1)[17:].view(torch.int16))
    one = checkpoint.save(tmp_path, 2, state(1), {})
    assert {file.name for file in one.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    with safe_open(one / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == state(1)["optimizer"].keys()


@pytest.mark.parametrize(("change", "words"), [
    (lambda parts: parts["model"].pop("w"), "model tensor w is not in this run"),
    (lambda parts: parts["model"].update(x=torch.zeros(1)),
     "model tensor x is not in the saved state: the model, the dtype or a setting of optim"),
    (lambda parts: parts["optimizer"].update({"exp_avg.w": torch.zeros(5, 7)}),
     r"optimizer state exp_avg.w is torch.float32 \(7, 5\) in the saved run and torch.float32 "
     r"\(5, 7\) here"),
    (lambda parts: parts["model"].update(w=torch.zeros(7, 5)),
     "model tensor w is torch.bfloat16 .* and torch.float32"),
])
@pytest.mark.parametrize("size", [1, 2])
def test_what_does_not_fit_is_named_on_every_rank(tmp_path, change, words, size):
    path = save(tmp_path, 1, state(1), 2)
    other = {part: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
             for part, tensors in state(1).items()}
    change(other)

    def load(world):
        saved, pieces = checkpoint.load(path, world), cut(other, world.rank, size)
        try:
            for part in other:
                saved.fill(part, pieces[part])
        finally:
            assert all(not piece.tensor.any() for piece in pieces["model"] if "model" in words)

    for error in everywhere(size, load):
        with pytest.raises(UserError, match=words):
            raise error


@pytest.mark.parametrize(("offset", "words"), [
    (15, "optimizer tensor exp_avg.w overlap at element 15"),
    (20, "optimizer tensor exp_avg.w leave a hole at element 17")])
def test_pieces_that_overlap_or_leave_a_hole_are_neither_saved_nor_read(
        tmp_path, monkeypatch, offset, words):
    def parts(rank):
        found = cut(state(1), rank, 2)
        if rank:
            found["optimizer"][0] = Piece("exp_avg.w", torch.zeros(35 - offset), offset, (7, 5))
        return found

    def write(world):
        return checkpoint.save(tmp_path, 1, parts(world.rank), {}, world)

    for error in everywhere(2, write):
        with pytest.raises(UserError, match=words):
            raise error
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "read_layout", lambda *a: None)
    path = must(everywhere(2, write))[0]
    for error in everywhere(2, lambda world: checkpoint.load(path, world)):
        with pytest.raises(CorruptCheckpoint, match=words):
            raise error


def test_a_rank_may_have_nothing_to_write(tmp_path):
    """As where every rank holds the whole and the first one writes it; each still fills its own."""
    whole = state(1)

    def work(world):
        mine = whole if world.first else {part: {} for part in whole}
        saved = checkpoint.load(checkpoint.save(tmp_path, 1, mine, {}, world), world)
        own = {part: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
               for part, tensors in whole.items()}
        for part in own:
            saved.fill(part, own[part])
        return own, saved.state["state_hash"]

    for own, total in must(everywhere(3, work)):
        assert same(own, whole)
        assert total == checkpoint.digest(whole)


def test_every_rank_falls_back_to_the_same_checkpoint(tmp_path):
    """The damage lies in a file that one rank verifies and the other does not."""
    save(tmp_path, 1, state(1), 2)
    second = save(tmp_path, 2, state(2), 2)
    for name in ("model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"):
        kept = (second / name).read_bytes()
        (second / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        said = [[], [], []]

        def load(world, said=said):
            return checkpoint.newest(tmp_path, said[world.rank].append, world)

        assert [saved.step for saved in must(everywhere(3, load))] == [1, 1, 1]
        assert [len(lines) for lines in said] == [1, 0, 0] and name in said[0][0]
        (second / name).write_bytes(kept)
        assert [saved.step for saved in must(everywhere(3, load))] == [2, 2, 2]


def test_the_hash_of_the_state_is_what_its_definition_says():
    """In Python's own integers, element by element, for every size of element."""
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.float64):
        raw = torch.arange(37 * dtype.itemsize).mul(89).to(torch.uint8)
        bits = [int.from_bytes(bytes(row.tolist()), "little")
                for row in raw.view(-1, dtype.itemsize)]
        seed, first = 2**64 - 5, 2**40
        expected = sum(mix(mix((seed + 0x9E3779B97F4A7C15 * (first + i)) % 2**64) ^ each)
                       for i, each in enumerate(bits)) % 2**64
        assert hashing.numpy_hash(seed, first, raw.view(dtype)) == expected
        assert hashing.block_hash(seed, first, raw.view(dtype)) == expected


def test_the_hash_does_not_depend_on_cuts_and_spans(monkeypatch):
    tensor = torch.randn(200_001).bfloat16()
    whole = checkpoint.digest({"model": {"w": tensor}})
    monkeypatch.setattr(files, "CHUNK", 1 << 12)
    assert checkpoint.digest({"model": {"w": tensor}}) == whole
    cuts = [0, 5, 5, 99_999, 200_001]
    assert checkpoint.digest({"model": [
        Piece("w", tensor[a:b], a, (200_001,)) for a, b in itertools.pairwise(cuts)]
    }) == whole
    swapped = tensor.clone()
    swapped[[3, 77_777]] = tensor[[77_777, 3]]
    assert checkpoint.digest({"model": {"w": swapped}}) != whole


def test_a_checkpoint_of_the_first_format_still_loads(tmp_path):
    """As version 0.1.0 wrote it: the library's writer, and SHA-256 of everything as the hash."""

    whole, total = state(1), hashlib.sha256()
    path = tmp_path / "step-00000007"
    path.mkdir()
    for part, tensors in sorted(whole.items()):
        save_file(tensors, path / f"{part}.safetensors")
        for name, tensor in sorted(tensors.items()):
            total.update(f"{part}/{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def finish(state_hash):
        (path / "manifest.json").unlink(missing_ok=True)
        (path / "state.json").write_text(json.dumps(
            {"format": 1, "step": 7, "state_hash": state_hash}))
        listed = {file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
                  for file in path.iterdir()}
        (path / "manifest.json").write_bytes(seal(listed, 1))

    finish(total.hexdigest())
    saved = checkpoint.newest(tmp_path)
    assert same(read(saved), whole)
    assert saved.state["part_hashes"] == checkpoint.part_hashes(whole)
    assert saved.state["world_size"] == 1
    finish("0" * 64)
    with pytest.raises(CorruptCheckpoint, match="hash of the state"):
        checkpoint.load(path)


MEMORY = """
import sys, torch
from pathlib import Path
from fastllm import checkpoint
def status(key):
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(lines[key].split()[0]) / 1024
def peak():
    return status("VmHWM")
warm = {"model": {"w": torch.ones(1 << 22)}}
folder = Path(sys.argv[1])
checkpoint.load(checkpoint.save(folder / "warm", 1, warm, {})).fill("model", warm["model"])
parts = {"optimizer": {f"w{i}": torch.ones(1 << 21) * i for i in range(8)}}
# The imports' own peak would hide ours: memory is filled up to it.
ballast = torch.ones(int(max(peak() - status("VmRSS"), 0) * 2**18) + 1)
before = status("VmRSS")
assert peak() - before < 1, (peak(), before)
path = checkpoint.save(folder / "run", 1, parts, {})
saved = checkpoint.load(path)
saved.fill("optimizer", parts["optimizer"])
print(peak() - before)
for name, tensor in saved.stream("optimizer"):
    assert tensor.numel() == 1 << 21
    del tensor
print(peak() - before)
"""


def test_saving_and_loading_hold_a_few_megabytes(tmp_path):
    """64 MB in tensors of 8: nothing of their size beside them; one at a time when streamed."""
    # Large blocks go back to the system when they are freed: else those of the warm-up would serve.
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True,
                          text=True, check=False,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "500000"})
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    saving, streaming = (float(line) for line in done.stdout.split())
    assert saving < 8
    assert streaming < 16
