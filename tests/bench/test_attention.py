"""The CPU benchmark of attention: its contestants compute what they say, and what it keeps."""

import json
from dataclasses import replace

import attention as bench
import pytest
import torch

from fastllm import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")
SMALL = {"dense": bench.dense(2, 20, bench.HEADS), "gqa": bench.dense(2, 20, 2),
         "packed": bench.packed(2, 20, 3), "window": bench.window(40, 8)}


def checked(case, dtype):
    given = bench.drawn(case, dtype)
    return bench.errors(case, given, {name: bench.prepare(side, given)
                                      for name, side in case.sides.items()})


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_every_contestant_is_right(name, dtype):
    found = checked(SMALL[name], dtype)
    assert found.keys() == SMALL[name].sides.keys() and min(found.values()) > 0


@pytest.mark.parametrize("name", [bench.OURS, "SDPA, mask", "SDPA, causal"])
def test_another_function_is_refused(name):
    case = SMALL["window"]
    other = {side.window: side for side in case.sides.values()}
    window = next(window for window in other if window != case.sides[name].window)
    sides = {**case.sides, name: replace(case.sides[name], window=window)}
    with pytest.raises(RuntimeError, match=f"{name} is wrong"):
        checked(replace(case, sides=sides), torch.bfloat16)


def test_documents_are_the_same_each_time_and_fill_the_rows():
    case = bench.CASES["packed"]()
    assert case.lengths == bench.CASES["packed"]().lengths
    assert len(case.lengths) == 56 and min(case.lengths) > 0
    assert [sum(case.lengths[i:i + 7]) for i in range(0, 56, 7)] == [340] * 8


def test_the_quietest_rounds_count(monkeypatch):
    """Others take all of every second round, then all of every one."""
    clock = {"others": 0.0, "at": 0}

    def processor_seconds():
        clock["at"] += 1
        if clock["at"] % step == 0:
            clock["others"] += 100.0
        return clock["others"], 0.0

    monkeypatch.setattr(bench, "processor_seconds", processor_seconds)
    monkeypatch.setattr(bench, "SAMPLE", 1e-4)
    product = torch.ones(64, 64)
    runs = {bench.OURS: lambda: product @ product,
            "twice": lambda: [product @ product for _ in range(20)]}
    step = 4
    result = bench.compare(runs, 3)
    assert (result["discarded_rounds"], result["others_share"]) == (2, 0.0)
    assert {len(times) for times in result["samples_ms"].values()} == {3}
    assert result["ratio"].keys() == {"twice"} and result["ratio"]["twice"] > 1
    step = 2
    result = bench.compare(runs, 3)
    assert result["discarded_rounds"] == 6 and result["others_share"] > bench.QUIET


def test_the_result_file_has_every_case():
    results = json.loads(bench.OUT.read_text(encoding="utf-8"))["results"]
    for name, make in bench.CASES.items():
        for dtype in bench.DTYPES:
            sides = {who for who, side in make().sides.items()
                     if dtype != torch.float32 or not side.narrow}
            result = results[f"{name} {str(dtype)[6:]}"]
            assert result["milliseconds"].keys() == result["error"].keys() == sides
            assert max(result["error"].values()) <= bench.TOLERANCE[dtype]
    for key, peers in bench.TARGET.items():
        assert peers.keys() <= results[key]["ratio"].keys()


def test_a_miss_is_said():
    result = {"milliseconds": {bench.OURS: 1.0, "SDPA": 1.5, "SDPA, float32": 1.0},
              "ratio": {"SDPA": 1.5, "SDPA, float32": 1.0}}
    assert "1.50x (target 2.0: missed)" in bench.line("dense bfloat16", result)
    assert "target" not in bench.line("dense float32", result)
