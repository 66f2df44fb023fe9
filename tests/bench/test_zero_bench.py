"""The benchmark of data parallelism: its contestants train alike, and what it keeps and refuses."""

import pytest
import readme
import zero as bench
import zero_jobs
from torch import distributed

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs Gloo")
NAMES = ["ours 0", "ours 2", "DDP", "FSDP2, parameters kept"]


def test_a_quick_run_has_the_shape_of_a_full_one():
    options = bench.arguments(["--quick", "--no-scatter", "--contestant", *NAMES])
    assert options.out is None
    result = bench.report(options)["results"]["tiny float32"]
    assert not result["missing"]
    assert result["contestants"].keys() == set(NAMES)
    for name, one in result["contestants"].items():
        assert one["against"] == bench.CONTESTANTS[name].against
        assert len(one["ms_samples"]) == len(one["cpu_ms_samples"]) == 2 <= len(one["losses"])
        assert one["losses"][-1] < one["losses"][0]
        assert 1 <= one["state_bytes"] / one["state_formula"] < 1.1
        assert one["peak_rss"] > 1e8
        assert ("ms_ratio" in one) == (name != one["against"])
    assert result["contestants"]["DDP"]["ms_ratio"].keys() == {"median", "min", "max"}
    assert result["largest_loss_difference"] <= bench.TOLERANCE


@pytest.mark.parametrize("tolerance", [1e-4, 5e-2])
def test_wrong_losses_are_refused(tolerance):
    right = [4.0, 3.0, 2.0]
    losses = {"DDP": right, "ours 0": [4.0, 3.0, 2.0 + tolerance / 2], "alone": [4.0, 1.0, 0.0]}
    assert bench.check(losses, tolerance) == pytest.approx(tolerance / 2)
    for name, wrong in (("FSDP2", [4.0, 3.0, 2.0 + 2 * tolerance]),
                        ("DeepSpeed 3", [4.0, float("nan"), 2.0])):
        with pytest.raises(RuntimeError, match=f"{name} is wrong"):
            bench.check({**losses, name: wrong}, tolerance)
    with pytest.raises(RuntimeError, match="ours 1 is wrong"):
        bench.check({"ours 1": [1.0], "FSDP2": [2.0], "ours 2": [2.0]}, tolerance)


def test_losses_in_bf16_are_held_to_fp32():
    truth = [4.0, 3.0]
    losses = {"DDP": [4.0, 3.01], "FSDP2": [4.02, 3.0], "ours 0": [4.0, 3.03], "alone": [4.0, 9.0]}
    assert bench.check_rounded(losses, truth) == pytest.approx(0.03)
    for wrong in ([4.0, 3.05], [4.0, float("nan")]):
        with pytest.raises(RuntimeError, match="ours 2 is wrong"):
            bench.check_rounded({**losses, "ours 2": wrong}, truth)


def test_ranks_that_fail_take_no_part_and_say_why():
    shape = bench.SHAPES["tiny"]
    tasks = {"when built": bench.task("ours 0", {**shape, "hidden": -1}, "float32"),
             "DDP": bench.task("DDP", {**shape, "heads": 7}, "float32")}
    with zero_jobs.crew(tasks) as (jobs, missing):
        result = bench.race(jobs, 1, 1)
    assert missing.keys() == {"when built"} and result["missing"].keys() == {"DDP"}
    for reason in [*missing.values(), *result["missing"].values()]:
        assert "Error: " in reason and "\n" not in reason


def test_groups_fit_the_memory_and_each_has_ours():
    names = list(bench.CONTESTANTS)
    assert len(bench.groups("29m", names, 10**12)) == 1
    for size, budget in (("29m", 18 * 10**9), ("124m", 18 * 10**9), ("124m", 0)):
        found = bench.groups(size, names, budget)
        assert sorted(name for group in found for name in group) == sorted(names)
        for group in found:
            assert {bench.CONTESTANTS[name].against for name in group} <= set(group)
    assert len(bench.groups("124m", names, 0)) == 4


def test_the_quietest_rounds_count(monkeypatch):
    """Others take all of every second round."""
    clock = {"others": 0.0, "at": 0}

    def processor_seconds():
        clock["at"] += 1
        if clock["at"] % 4 == 0:
            clock["others"] += 100.0
        return clock["others"], 0.0

    monkeypatch.setattr(zero_jobs, "processor_seconds", processor_seconds)
    quiet, made = bench.Quiet([], 2), 0
    while quiet.wanted():
        with quiet.round() as samples:
            samples["round"] = made
        made += 1
    assert [one["round"] for one in quiet.kept()] == [0, 2]
    assert quiet.summary() == {"discarded_rounds": 1, "others_share": 0.0}


def test_only_a_full_run_writes_the_file(tmp_path):
    assert bench.arguments([]).out == bench.OUT
    for some in (["--quick"], ["--size", "29m"], ["--no-scatter"], ["--contestant", "DDP"]):
        assert bench.arguments(some).out is None
    assert bench.arguments(["--quick", "--out", str(tmp_path)]).out == tmp_path


def test_the_table_names_every_peer_and_who_is_missing():
    def one(name, ms):
        return {"against": bench.CONTESTANTS[name].against, "ms": ms, "cpu_ms": ms,
                "ms_ratio": bench.spread([1.5, 1.25]), "cpu_ms_ratio": bench.spread([1.1]),
                "state_bytes": 2e8, "state_formula": 1e8, "peak_rss": 1e9}

    scatter = {"ms": {"gloo": 40.0, "ours": 20.0}, "ratio": bench.spread([2.0]), "bytes": 58e6,
               "error": {"gloo": 0.5, "ours": 0.25}}
    result = {"world": 2, "batch": [4, 256], "deepspeed": {}, "machine": "one", "isa": "none",
              "results": {"29m bfloat16": {
        "parameters": 29e6, "contestants": {"ours 1": one("ours 1", 10.0),
                                            "DeepSpeed 1": one("DeepSpeed 1", 15.0)},
        "groups": [{"others_share": 0.0}], "missing": {"DDP": "Error: no wire"}}},
        "reduce_scatter": {"2 ranks bfloat16": scatter}}
    text = readme.zero(result)
    assert "| 29M bf16: DeepSpeed 1 | 15 ms | 10 ms | 1.38x (1.25 to 1.50) | 1.10x |" in text
    assert "200 MB | 200 MB | 100 MB |" in text
    assert "| 29M bf16: DDP | Error: no wire |" in text
    assert "| 2 ranks, bf16 | 40.0 ms | 20.0 ms | 2.00x | 5.0e-01 | 2.5e-01 |" in text


@pytest.mark.parametrize("size", bench.SHAPES)
def test_the_number_of_parameters(size):
    import torch
    from zero_rank import Decoder

    with torch.device("meta"):
        model = Decoder(**bench.SHAPES[size], dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == bench.parameters(bench.SHAPES[size])
    assert size == "tiny" or round(count / 1e6) == int(size[:-1])
