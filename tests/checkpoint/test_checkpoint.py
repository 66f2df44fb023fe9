"""fastllm.checkpoint: whole or absent, verified, and never lost."""

import json
import os
import random
import shutil

import pytest
import torch

from fastllm import checkpoint
from fastllm.checkpoint import CorruptCheckpoint
from fastllm.checkpoint.reading import seal
from fastllm.config import UserError


def parts(seed: int):
    draw = torch.Generator().manual_seed(seed)
    return {"model": {"w": torch.randn(7, 5, generator=draw).bfloat16(),
                      "b": torch.randn((), generator=draw), "none": torch.empty(0, 3)},
            "optimizer": {"exp_avg.w": torch.randn(7, 5, generator=draw)}}


def tensors(saved):
    return {part: saved.tensors(part) for part in saved.layout}


def same(a, b):
    pairs = [(a[part][name], b[part][name]) for part in a for name in a[part]]
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def test_round_trip_is_bitwise(tmp_path):
    path = checkpoint.save(tmp_path, 12, parts(1), {"data": {"position": 96}})
    assert path.name == "step-00000012"
    loaded = checkpoint.load(path)
    assert same(parts(1), tensors(loaded))
    assert loaded.step == 12
    assert loaded.state["data"] == {"position": 96}


def test_newest_and_retention(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, parts(step), {})
        checkpoint.retain(tmp_path, 2, best_step=2)
    assert [path.name[-1] for path in checkpoint.steps(tmp_path)] == ["2", "4", "5"]
    assert same(tensors(checkpoint.newest(tmp_path)), parts(5))
    assert {path.name for path in tmp_path.iterdir()} == {f"step-0000000{s}" for s in (2, 4, 5)}


def test_nothing_there(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def test_a_temporary_folder_is_not_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, parts(1), {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".writing-step-00000002")
    assert checkpoint.newest(tmp_path).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json",
                                  "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "delete", "hole", "append"])
def test_damage_is_found_named_and_stepped_over(tmp_path, name, fault):
    checkpoint.save(tmp_path, 1, parts(1), {})
    file = checkpoint.save(tmp_path, 2, parts(2), {}) / name
    damage(file, fault, random.Random(0))
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert name in said[0]
    assert "step-00000002" in said[0]


def damage(file, fault, draw):
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    if fault == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif fault == "truncate":
        del data[at:]
    elif fault == "hole":
        data[at:at + 16] = bytes(b ^ 0xFF for b in data[at:at + 16])
    elif fault == "append":
        data += b"\0"
    if fault == "delete":
        file.unlink()
    else:
        file.write_bytes(data)


def test_swapped_files_of_two_steps_are_found(tmp_path):
    one = checkpoint.save(tmp_path, 1, parts(1), {})
    two = checkpoint.save(tmp_path, 2, parts(2), {})
    shutil.copy(one / "model.safetensors", two / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors was altered"):
        checkpoint.load(two)


def test_a_manifest_made_anew_does_not_help(tmp_path):
    """Files that agree with their manifest but not with the recorded hash of the state."""
    one = checkpoint.save(tmp_path, 1, parts(1), {})
    two = checkpoint.save(tmp_path, 2, parts(2), {})
    shutil.copy(one / "model.safetensors", two / "model.safetensors")
    files = json.loads((two / "manifest.json").read_text())["files"]
    files["model.safetensors"] = json.loads((one / "manifest.json").read_text())["files"][
        "model.safetensors"]
    (two / "manifest.json").write_bytes(seal(files))
    with pytest.raises(CorruptCheckpoint, match="hash of the state"):
        checkpoint.load(two)


def test_all_bad_is_an_error_and_not_a_new_start(tmp_path):
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, parts(step), {}) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoint.newest(tmp_path, lambda line: None)


@pytest.mark.parametrize("call", range(6))
def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch, call):
    """ENOSPC at every fsync of a save in turn: one clear line, the last checkpoint still loads."""
    checkpoint.save(tmp_path, 1, parts(1), {})
    real, count = os.fsync, iter(range(100))

    def fsync(descriptor):
        if next(count) == call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"No space left on device.*earlier checkpoints are intact"):
        checkpoint.save(tmp_path, 2, parts(2), {})
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).step == (2 if call == 5 else 1)
    assert not list(tmp_path.glob(".writing*"))


def test_no_room_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="the disk is full"):
        checkpoint.save(tmp_path, 1, parts(1), {})
    assert not list(tmp_path.iterdir())


def test_digest_sees_name_dtype_shape_and_bits():
    base = {"p": {"a": torch.zeros(4)}}
    for other in ({"p": {"b": torch.zeros(4)}}, {"p": {"a": torch.zeros(2, 2)}},
                  {"p": {"a": torch.zeros(4, dtype=torch.int32)}}, {"q": {"a": torch.zeros(4)}},
                  {"p": {"a": torch.tensor([0.0, 0, 0, -0.0])}}):
        assert checkpoint.digest(base) != checkpoint.digest(other)
