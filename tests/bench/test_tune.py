"""The tuner picks by a set clock, in the interpreter, and what it keeps is used from then on."""

import json
import sys

import pytest
import torch
import tune as bench_tune

from fastllm.kernels import _attention_tables as tables
from fastllm.kernels._attention_tables import Tiles
from fastllm.kernels._triton import INTERPRETED
from fastllm.ops import _memory, _timing, _tune

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the clock is set, in the interpreter")
SHAPE = (1, 32, 1, 1)
GRID = (Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_memory, "_machines", None)
    _tune._use_kept.cache_clear()
    yield tmp_path / "fastllm" / "attention.json"
    tables.override({})
    _tune._use_kept.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds by (own, other) of the tiles in use; the table's take 2."""
    def read(call, device):
        call()
        tiles = call.args[0]
        return milliseconds.get((tiles.own, tiles.other), 2.0)

    milliseconds = {}
    monkeypatch.setattr(_timing, "_time", read)
    monkeypatch.setattr(_timing, "WARM_UP", 0)
    monkeypatch.setattr(_timing, "ROUNDS", 1)
    return milliseconds


def tuned(kernel="forward", strain=0, **options):
    return _tune.tune(kernel, 16, strain, "cpu", shape=SHAPE, **{"grid": GRID, **options})


@pytest.mark.parametrize(("kernel", "strain"), [
    ("forward", 0), ("forward", 1), ("queries", 2), ("keys", 0), ("keys", 2)])
def test_the_fastest_tiles_win(clock, kernel, strain):
    clock |= {(16, 16): 1.5, (32, 16): 1.0}
    before = tables.override({})
    found = tuned(kernel, strain)
    assert found.best == GRID[1] and found.key == (kernel, 90, 64, strain)
    assert found.milliseconds == {"table": 2.0, "16x16 4 warps 1 stages": 1.5,
                                  "32x16 4 warps 1 stages": 1.0, "16x32 4 warps 1 stages": 2.0}
    assert not found.out and tables.override({}) == before == {}


def test_the_tables_tiles_stay_where_none_is_clearly_faster(clock):
    clock[16, 16] = 1.98
    found = tuned()
    assert found.best == found.table == tables.tiles_of(
        "forward", torch.empty(1, 32, 1, 16, dtype=torch.bfloat16), 0, 32)


def test_tiles_that_fail_or_compute_wrong_are_out(clock, monkeypatch):
    clock |= {(16, 16): 0.1, (32, 16): 0.2}
    stock = _tune.attention

    def faulty(q, k, v, **options):
        own, other = (lambda t: (t.own, t.other))(tables.tiles_of("forward", q, 0, 32))
        if other == 32 and own == 16:
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        return stock(q, k, v, **options) * (1.1 if (own, other) == (16, 16) else 1)

    monkeypatch.setattr(_tune, "attention", faulty)
    found = tuned()
    assert found.best == GRID[1]
    assert found.out["16x32 4 warps 1 stages"] == "RuntimeError: out of resource: shared memory"
    assert found.out["16x16 4 warps 1 stages"].startswith("wrong by ")
    text = bench_tune.table(found)
    assert text.splitlines()[0].startswith("forward width 16 strain 0: 32x16 4 warps 1 stages")
    assert "out: RuntimeError" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_wrong(value):
    x = torch.ones(3, dtype=torch.bfloat16)
    assert not _tune._wrong((x,), (x,))
    assert _tune._wrong((x * value,), (x,))
    assert _tune._wrong((torch.ones(3),), (torch.zeros(3),))
    assert not _tune._wrong((torch.zeros(3),), (torch.zeros(3),))


def test_what_is_kept_serves_the_next_process(clock, cache, monkeypatch):
    clock[32, 16] = 1.0
    _memory.remember(_memory.machine("cpu"), "choices", {"a kind": {"chosen": "triton"}})
    _tune.keep([tuned(), tuned("keys", 1)], "cpu")
    assert json.loads(cache.read_text()) == {_memory.machine("cpu"): {"tiles": {
        "forward 90 64 0": [32, 16, 4, 1, 0], "keys 90 64 1": [32, 16, 4, 1, 0]}}}
    monkeypatch.setattr(_memory, "_machines", None)
    by_hand = {("keys", 90, 64, 1): GRID[0]}
    tables.override(by_hand)
    _tune.use_kept("cpu")
    assert tables.override({}) == {("forward", 90, 64, 0): GRID[1], **by_hand}
    _tune.use_kept("cpu")  # once
    assert tables.override({}) == {}


def test_the_tables_tiles_for_higher_strain_are_not_shadowed():
    _memory.remember(_memory.machine("cpu"), "tiles", {
        "keys 90 128 0": [16, 16, 4, 1], "keys 90 256 1": [16, 16, 4, 1]})
    _tune.use_kept("cpu")
    assert tables.override({}) == {
        ("keys", 90, 128, 0): GRID[0], ("keys", 90, 256, 1): GRID[0],
        ("keys", 90, 128, 2): tables.TABLE["keys", 90, 128, 2]}


@pytest.mark.parametrize(("words", "numbers"), [
    ("forward 91 64 0", [16, 16, 4, 1]), ("forward", [16]), ("keys 90 64 0", 3)])
def test_what_was_kept_and_cannot_be_is_said(words, numbers):
    _memory.remember(_memory.machine("cpu"), "tiles", {
        words: numbers, "forward 90 64 0": [16, 16, 4, 1]})
    with pytest.warns(UserWarning, match=f"the tiles kept as '{words}' are not used"):
        _tune.use_kept("cpu")
    assert tables.override({}) == {("forward", 90, 64, 0): GRID[0]}


def test_the_script_writes_what_it_found(clock, tmp_path, monkeypatch):
    out = tmp_path / "gpu" / "attention_tiles.json"
    monkeypatch.setattr(bench_tune.record, "machine", lambda: {"gpu": "none"})
    bench_tune.write([tuned()], out, [("keys", 64, 1)])
    written = json.loads(out.read_text())
    assert written["machine"] == {"gpu": "none"} and written["not_reached"] == [["keys", 64, 1]]
    assert written["results"][0]["kernel"] == "forward"
    assert Tiles(*written["results"][0]["best"]) == Tiles(*written["results"][0]["table"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert bench_tune.main() == 2
    assert capsys.readouterr().err.startswith("bench/tune.py times tiles on an NVIDIA GPU")


def test_the_grid_has_tiles_that_the_kernels_take():
    assert len(set(_tune.GRID)) == len(_tune.GRID) == 44
    assert {tiles.own for tiles in tables.TABLE.values() if tiles.own >= 64} <= {
        tiles.own for tiles in _tune.GRID}
