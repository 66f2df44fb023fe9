"""Checkpoints on a disk that loses power, fills up, fails or damages what it holds."""

import errno
import os
import random
import shutil
import threading

import pytest
from states import cut, read, same, state
from threads_as_ranks import everywhere, must

import fastllm.ops  # noqa: F401  loads the C++ ops
from fastllm import checkpoint, files
from fastllm.config import RunError, UserError

CALLS = ("make_folder", "create", "write", "sync", "rename")


def save(folder, step, size, wide=False):
    """A checkpoint by `size` ranks, and what is too old removed, as the trainer does."""
    def work(world):
        RANK.value = world.rank
        path = checkpoint.save(folder, step, cut(state(step, wide), world.rank, size), {}, world)
        return path, lambda: checkpoint.retain(folder, 2, None, world)

    RANK.value = 0
    done = must(everywhere(size, work) if size > 1 else [work(checkpoint.ALONE)])
    return done[0]


RANK = threading.local()


# A disk after a power cut.


class Node:
    """A file or folder: what the system sees (live) and what is surely on the disk."""

    def __init__(self, folder):
        self.folder = folder
        self.live, self.lasting = ({}, {}) if folder else (b"", b"")
        self.pending = []  # changes of a folder since it was last synced

    def change(self, *change):
        self.pending.append(change)
        apply(self.live, change)

    def sync(self):
        self.lasting, self.pending = type(self.live)(self.live), []

    def after_the_cut(self, mode, draw):
        """What may be found afterwards, as nested dicts of bytes."""
        if not self.folder:
            if mode == "lost":
                return self.lasting
            if mode == "kept":
                return self.live
            rest = self.live[len(self.lasting):]
            torn = rest[:draw.randrange(len(rest) + 1)]
            return self.lasting + draw.choice([b"", rest, torn, torn + bytes(len(rest) - len(torn)),
                                               bytes(len(rest))])
        names = dict(self.lasting)
        for change in self.pending:
            if mode == "kept" or (mode == "torn" and draw.random() < 0.5):
                apply(names, change)
        return {name: node.after_the_cut(mode, draw) for name, node in names.items()}


def apply(names, change):
    """A folder's change: ("add", name, node), ("remove", name) or ("rename", name, new, node)."""
    if change[0] == "add":
        names[change[1]] = change[2]
    else:
        names.pop(change[1], None)
    if change[0] == "rename":
        names[change[2]] = change[3]


class Recorder:
    """Every call of a save, in order, that changes the disk."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.log, self.lock = folder, [], threading.Lock()
        for name in (*CALLS, "remove_tree"):
            real = getattr(files, name)
            monkeypatch.setattr(files, name,
                                lambda *a, real=real, name=name: self.call(real, name, *a))

    def call(self, real, name, first, *more):
        with self.lock:
            path = first.name if name == "write" else first
            at = os.path.relpath(path, self.folder)
            if name == "write":
                data = bytes(more[0])
                for part in (data[:len(data) // 2], data[len(data) // 2:]):
                    if part:
                        self.log.append(("write", at, part))
            elif name == "rename":
                self.log.append(("rename", at, os.path.relpath(more[0], self.folder)))
            elif name == "remove_tree":
                if first.exists():
                    self.log += [("remove", f"{at}/{file.name}") for file in first.iterdir()]
                    self.log.append(("remove", at))
            else:
                self.log.append((name, at))
            return real(first, *more)


def play(log):
    """The root of the disk after a log."""
    root = Node(True)

    def find(at):
        node = root
        for name in () if at == "." else at.split("/"):
            node = node.live[name]
        return node

    for name, at, *more in log:
        above, _, leaf = at.rpartition("/")
        parent = find(above or ".")
        if name in ("make_folder", "create"):
            parent.change("add", leaf, Node(name == "make_folder"))
        elif name == "write":
            find(at).live += more[0]
        elif name == "sync":
            find(at).sync()
        elif name == "rename":
            parent.change("rename", leaf, more[0], parent.live[leaf])
        elif name == "remove":
            parent.change("remove", leaf)
    return root


def write_out(tree, folder):
    """Nested dicts of bytes as files."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_out(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def power_cuts(tmp_path, monkeypatch, size, saves, every, modes, without=None):
    """Cut the power after each call of some saves; returns (states tried, kinds of outcome).

    without: the disk ignores every sync of a path that this says yes to.
    """
    folder = tmp_path / "real"
    folder.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        for step in range(1, saves + 1):
            _, retain = save(folder, step, size)
            recorder.log.append(("returned", ".", step))
            retain()
    log = [entry for entry in recorder.log
           if not (entry[0] == "sync" and without and without(entry[1]))]
    draw, tried, outcomes = random.Random(size), 0, set()
    for length in range(0, len(log) + 1, every):
        acknowledged = max([more[0] for name, _, *more in log[:length] if name == "returned"],
                           default=0)
        root = play(log[:length])
        for mode in modes:
            crashed = tmp_path / "crashed"
            write_out(root.after_the_cut(mode, draw), crashed)
            said = []
            saved = checkpoint.newest(crashed, said.append)
            found = saved.step if saved else 0
            assert found >= acknowledged, (length, mode, log[length - 1], said)
            assert saved is None or same(read(saved), state(found)), (length, mode)
            # What a cut leaves does not stand in the way of the saves that follow.
            if tried % 16 == 0:
                again = checkpoint.save(crashed, found + 1, state(found + 1), {})
                assert same(read(checkpoint.load(again)), state(found + 1))
                assert not list(crashed.glob(".*"))
            shutil.rmtree(crashed)
            tried += 1
            outcomes.add((acknowledged, found))
    return tried, outcomes


@pytest.mark.parametrize("size", [1, 2])
def test_a_power_cut_leaves_the_last_save(tmp_path, monkeypatch, size):
    tried, outcomes = power_cuts(tmp_path, monkeypatch, size, 3, 11, ["torn"])
    assert tried > 10 and {(2, 2), (1, 1)} <= outcomes


@pytest.mark.parametrize("forgotten", [
    lambda at: at.endswith("model.safetensors"), lambda at: at.endswith("state.json"),
    lambda at: at.endswith("manifest.json"), lambda at: "/" not in at and at.startswith(".writing"),
    lambda at: at == "."])
def test_a_sync_that_is_left_out_is_noticed(tmp_path, monkeypatch, forgotten):
    """The played-back power cuts are worth something: without any one of the syncs they fail."""
    with pytest.raises((AssertionError, UserError)):
        power_cuts(tmp_path, monkeypatch, 1, 2, 1, ["lost"], forgotten)


@pytest.mark.battery
@pytest.mark.parametrize("size", [1, 2])
def test_a_power_cut_after_any_call_leaves_the_last_save(tmp_path, monkeypatch, size):
    """All kept, all unsynced lost, and two draws of some kept, some lost, some torn."""
    tried, outcomes = power_cuts(tmp_path, monkeypatch, size, 3, 1,
                                 ["kept", "lost", "torn", "torn"])
    print(tried, sorted(outcomes))
    assert tried > 300
    # Nothing acknowledged yet, each of the three, and one that was complete though not yet so.
    assert outcomes == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)}


# A disk that damages what it holds.


def damaged(folder, kind, draw):
    """Damage the checkpoint step 2; returns the names of the files that it touched."""
    two = folder / "step-00000002"
    names = sorted(path.name for path in two.iterdir())
    name = draw.choice(names)
    data = bytearray((two / name).read_bytes())
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "hole":
        data[at:at + 4096] = bytes(byte ^ 0xFF for byte in data[at:at + 4096])
    elif kind == "delete":
        (two / name).unlink()
        return [name]
    elif kind == "rename":
        (two / name).rename(two / f"{name}.old")
        return [name, f"{name}.old"]
    elif kind == "other step":
        name = draw.choice([name for name in names if "-of-" in name])
        data = (folder / "step-00000001" / name).read_bytes()
    elif kind == "swap":
        name, other = draw.sample(names, 2)
        data = (two / other).read_bytes()
        (two / other).write_bytes((two / name).read_bytes())
        (two / name).write_bytes(data)
        return [name, other]
    (two / name).write_bytes(data)
    return [name]


def detected(tmp_path, trials):
    """How many of the damages were seen, named and stepped over."""
    folder, kept = tmp_path / "run", tmp_path / "kept"
    for step in (1, 2):
        save(folder, step, 2, wide=3001)
    shutil.copytree(folder / "step-00000002", kept)
    draw, found = random.Random(7), 0
    for trial, kind in enumerate(kind for kind, count in trials.items() for _ in range(count)):
        touched = damaged(folder, kind, draw)
        said = []
        if trial % 10:
            saved = [checkpoint.newest(folder, said.append)]
        else:
            saved = everywhere(2, lambda world, said=said: checkpoint.newest(
                folder, said.append, world))
        fine = all(each.step == 1 for each in must(saved)) and len(said) == 1 and any(
            f"step-00000002/{name}" in said[0] for name in touched)
        assert fine, (kind, touched, said)
        found += fine
        shutil.rmtree(folder / "step-00000002")
        shutil.copytree(kept, folder / "step-00000002")
    assert checkpoint.newest(folder).step == 2
    return found


def test_forty_damages(tmp_path):
    assert detected(tmp_path, {"flip": 20, "truncate": 6, "hole": 6, "delete": 2, "rename": 2,
                               "other step": 2, "swap": 2}) == 40


@pytest.mark.battery
def test_a_thousand_damages(tmp_path):
    assert detected(tmp_path, {"flip": 500, "truncate": 200, "hole": 200, "delete": 25,
                               "rename": 25, "other step": 25, "swap": 25}) == 1000


# A disk that fails while a checkpoint is written.


class Fault:
    """Fail one call of one rank."""

    def __init__(self, monkeypatch, rank, call, number):
        self.rank, self.call, self.number = rank, call, number
        self.counts, self.kinds = {0: 0, 1: 0}, {0: [], 1: []}
        for name in CALLS:
            real = getattr(files, name)
            monkeypatch.setattr(files, name,
                                lambda *a, real=real, name=name: self.pass_on(real, name, *a))

    def pass_on(self, real, name, *arguments):
        rank = getattr(RANK, "value", 0)
        count = self.counts[rank]
        self.counts[rank] += 1
        self.kinds[rank].append(name)
        if (rank, count) == (self.rank, self.call):
            if name == "write":  # a full disk takes some of it first
                real(arguments[0], bytes(arguments[1])[:3])
            raise OSError(self.number, os.strerror(self.number))
        return real(*arguments)


def faults():
    """30 of (ranks, failing rank, place of the call among its own, error)."""
    found = []
    for i in range(30):
        size = 1 if i % 3 == 0 else 2
        found.append((size, i % 2 if size == 2 else 0, (i * 7 % 30) / 29,
                      (errno.ENOSPC, errno.EIO, errno.EROFS)[i // 3 % 3]))
    return found


@pytest.mark.parametrize(("size", "rank", "place", "number"), faults())
def test_a_failing_disk_is_one_line_on_every_rank(tmp_path, monkeypatch, size, rank, place, number):
    save(tmp_path, 1, size)
    with monkeypatch.context() as patch:
        counted = Fault(patch, None, None, None)
        save(tmp_path, 2, size)
    shutil.rmtree(tmp_path / "step-00000002")
    last = counted.counts[rank] - 1
    call = round(place * last)
    with monkeypatch.context() as patch:
        Fault(patch, rank, call, number)

        def work(world):
            RANK.value = world.rank
            return checkpoint.save(tmp_path, 2, cut(state(2), world.rank, size), {}, world)

        for error in everywhere(size, work):
            assert isinstance(error, UserError) and "\n" not in str(error)
            assert os.strerror(number) in str(error)
            assert "earlier checkpoints are intact" in str(error)
            assert size == 1 or str(error).startswith(f"rank {rank}: ")
    assert not list(tmp_path.glob(".*"))
    saved = checkpoint.newest(tmp_path)
    # After the rename only the folder's fsync is left: the checkpoint is there, if not for sure.
    assert saved.step == (2 if rank == 0 and call == last else 1)
    assert same(read(saved), state(saved.step))
    RANK.value = 0
    save(tmp_path, 3, size)
    assert same(read(checkpoint.newest(tmp_path)), state(3))


def test_the_failing_calls_are_of_every_kind(tmp_path, monkeypatch):
    """What the test above fails: on both ranks, calls of every kind that they make."""
    kinds = {1: set(), 2: set()}
    for size, rank, place, _ in faults():
        with monkeypatch.context() as patch:
            counted = Fault(patch, None, None, None)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            (tmp_path / "run").mkdir()
            save(tmp_path / "run", 1, size)
        calls = counted.kinds[rank]
        kinds[size].add((rank, calls[round(place * (len(calls) - 1))]))
    assert kinds[1] | kinds[2] >= {(0, name) for name in CALLS} | {
        (1, name) for name in ("create", "write", "sync")}


def test_a_step_saved_again_gives_way_to_nothing_but_a_whole_one(tmp_path, monkeypatch):
    """The one that stands there steps aside, and comes back if the new one cannot be named."""
    save(tmp_path, 1, 1)
    real = files.rename

    def rename(old, new):
        if old.name.startswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", rename)
        with pytest.raises(UserError, match="Input/output error"):
            checkpoint.save(tmp_path, 1, state(5), {})
    assert same(read(checkpoint.newest(tmp_path)), state(1))
    checkpoint.save(tmp_path, 1, state(5), {})
    assert same(read(checkpoint.newest(tmp_path)), state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_error_of_the_program_on_one_rank_ends_every_rank(tmp_path, monkeypatch):
    real = files.write_safetensors

    def fail(path, *arguments):
        if "00002-of" in path.name:
            raise ZeroDivisionError("a defect")
        return real(path, *arguments)

    monkeypatch.setattr(files, "write_safetensors", fail)
    with pytest.raises(RunError, match="rank 1: ZeroDivisionError: a defect"):
        save(tmp_path, 1, 2)
    assert not list(tmp_path.iterdir())
