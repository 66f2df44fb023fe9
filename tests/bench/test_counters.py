"""bench/counters.py beside an ncu that is made up: what it reads of it, and what it says."""

import json
import os
import sys

import counters as bench
import kernel_check as kc
import ncu_csv
import pytest

BY_NAME = {kernel.name: kernel for kernel in kc.KERNELS}
FAKE = """#!{python}
import json, os, subprocess, sys, time
if "--version" in sys.argv:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 36398880)")
    sys.exit()
play = json.load(open(os.environ["PLAY"]))
with open(os.environ["PLAY"] + ".log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
word = lambda name: sys.argv[sys.argv.index(name) + 1]
told = json.load(open(word("--calls")))
out = open(word("--log-file"), "w")
print("==PROF== Connected to process 1", file=out)
if play.get("says"):
    if not play.get("until") or play["until"] in word("--metrics"):
        print(play["says"], file=out)
        sys.exit(1)
cases = told["cases"][:play.get("most")]
if play.get("really"):
    subprocess.run(sys.argv[sys.argv.index("--calls") - 2:], check=True)
else:
    for number, case in cases:
        print("\\n@says " + json.dumps({{"begin": number, "part": "forward"}}), flush=True)
        if number == play.get("dies"):
            sys.exit(139)
        print("\\n@says " + json.dumps({{"of": number, **play["told"]}}), flush=True)
    print('\\n@says {{"end": true}}', flush=True)
print('"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"', file=out)
ids = iter(range(10**6))
def write(name, grid, read, written, time):
    place = next(ids)
    for metric, unit, value in (("dram__bytes_read.sum", "Mbyte", read),
            ("dram__bytes_write.sum", "Kbyte", written), ("gpu__time_duration.sum", "us", time)):
        print('"%s","%s","(%s, 1, 1)","%s","%s","%s"' % (place, name, grid, metric, unit, value),
              file=out)
for number, case in cases:
    for part in range(2):
        if [number, part] not in play.get("hides", []):
            write("counters_marker", 2 * number + part + 1, 0, 0, 1)
            write("_forward_kernel", 7, "1.50", "500,000", "10.5")
            write("void at::fill(int)", 7, "0.50", "0", "1")
"""


@pytest.fixture
def played(tmp_path, monkeypatch, capsys):
    """played(play, *arguments): (exit code, printed, the JSON or None, the fake's commands)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ncu").write_text(FAKE.format(python=sys.executable))
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.record, "machine", lambda: {"gpu": "NVIDIA H200"})
    shape = BY_NAME["swiglu"].bench_shapes[-1]

    def run(play, *given):
        (tmp_path / "play.json").write_text(json.dumps(
            {"told": {"shape": shape, "directions": ["forward", "backward"]}} | play))
        monkeypatch.setenv("PLAY", str(tmp_path / "play.json"))
        out = tmp_path / "out.json"
        code = bench.main(["--kernel", "swiglu", "--out", str(out), *given])
        said, log = capsys.readouterr(), tmp_path / "play.json.log"
        return (code, said.out + said.err, json.loads(out.read_text()) if out.exists() else None,
                [json.loads(line) for line in log.read_text().splitlines()])

    return run


def test_what_is_measured_stands_beside_what_is_metered(played):
    code, text, found, starts = played({})
    assert code == 0 and found["ncu"].startswith("Version 2025.3")
    assert not found["failed"] and not found["not_reached"]
    kernel, rows = BY_NAME["swiglu"], found["results"]
    assert [(row["options"], row["direction"]) for row in rows] == [
        (option, part) for option in ("", *kernel.bench_options)
        for part in ("forward", "backward")]
    known = bench.metered(json.loads(bench.TRAFFIC.read_text())["rows"])
    for row in rows:
        assert row["bytes"] == 1.5e6 + 5e8 + 0.5e6 and row["launches"] == 2
        assert row["nanoseconds"] == 11500
        floor = kernel.floor_bytes(kernel.bench_shapes[-1], bench.torch.bfloat16, row["direction"],
                                   **kernel.bench_options.get(row["options"], {}))
        meter = known["swiglu", row["options"], "ours"][row["direction"]]
        ratio = (meter["unique"] + meter["aten_bytes"]) / meter["floor_bytes"]
        assert row["over_floor"] == row["bytes"] / floor
        assert row["measured_over_metered"] == pytest.approx(row["over_floor"] / ratio)
        assert [one["name"] for one in row["by_name"]] == ["_forward_kernel", "void at::fill(int)"]
    (words,) = starts
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--cache-control") + 1] == "all"
    assert words[words.index("--profile-from-start") + 1] == "off"
    assert "swiglu packed" in text and "ratio" in text


def test_the_furthest_apart_come_first():
    row = {"kernel": "a", "options": "", "contender": "ours", "shape": {"rows": 2}, "launches": 1,
           "direction": "forward", "nanoseconds": 1.0, "bytes": 3.0, "over_floor": 1.0,
           "metered_over_floor": 1.0}
    rows = [row | {"kernel": name, "measured_over_metered": ratio} for name, ratio in (
        ("near", 1.1), ("none", None), ("above", 1.9), ("below", 0.5))]
    assert [line.split()[0] for line in list(bench.show(rows))[1:]] == [
        "below", "above", "near", "none"]


def test_work_of_the_backward_done_in_the_forward_is_judged_together():
    kernel, case = BY_NAME["linear_cross_entropy"], bench.Case("linear_cross_entropy", "", "ours")
    known = bench.metered(json.loads(bench.TRAFFIC.read_text())["rows"])[
        "linear_cross_entropy", "", "ours"]
    assert bench.counted([known["backward"]]) < bench.ELSEWHERE
    told = {"shape": kernel.bench_shapes[0], "directions": ["forward", "backward"]}
    launches = [bench.Launch("f", 1, {ncu_csv.READ: 4.0, ncu_csv.WRITTEN: 1.0, ncu_csv.TIME: 2.0})]
    (row,) = bench.rows_of(case, told, 3, {6: launches, 7: launches * 2}, kernel, known)
    assert row["direction"] == "forward and backward"
    assert (row["launches"], row["bytes"]) == (3, 15.0)


def test_a_case_that_fails_is_named_and_the_others_go_on(played):
    code, _, found, _ = played({"dies": 1})
    assert code == 1 and found["failed"] == {
        "swiglu packed": "forward: ended with exit code 139",
        "swiglu": "it ran, but ncu wrote nothing of it"}, "ncu writes at the end"
    code, text, found, _ = played({"told": {"failed": "OutOfMemoryError: 80 GB"}})
    assert code == 1 and "failed: swiglu: OutOfMemoryError" in text and not found["results"]
    code, text, found, _ = played({"told": {"left_out": "no such op"}})
    assert found["left_out"].keys() == {"swiglu", "swiglu packed"}
    code, text, found, _ = played({"hides": [[0, 1]]})
    assert code == 1 and found["failed"] == {"swiglu": "it ran, but ncu wrote nothing of it"}


def test_what_is_not_reached_is_listed(played):
    code, text, found, starts = played({"most": 1})
    assert code == 0 and len(starts) == 2 and not found["not_reached"], "a second process goes on"
    code, text, _, _ = played({}, "--limit", "1")
    assert code == 1 and "not reached in time: 2: swiglu; swiglu packed" in text


def test_counters_that_may_not_be_read(played):
    code, text, found, _ = played({"says": "==ERROR== ERR_NVGPUCTRPERM - The user does not have "
                                           "permission to access NVIDIA GPU Performance Counters"})
    assert code == 2 and found is None and "not permitted" in text and text.count("\n") == 1


def test_a_metric_that_a_gpu_has_not_is_done_without(played):
    code, _, found, starts = played({"says": "==ERROR== Failed to find metric " + ncu_csv.WARPS,
                                     "until": ncu_csv.WARPS})
    assert code == 0 and len(found["results"]) == 4
    assert [words[words.index("--metrics") + 1] for words in starts] == [
        ",".join(bench.METRICS), ",".join(bench.NEEDED)]


def test_the_calls_themselves_beside_the_fake(played, monkeypatch):
    """The process of calls is a real one here, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, text, found, _ = played({"really": True}, "--options", "")
    assert code == 0, text
    assert [tuple(row["shape"].values()) for row in found["results"]] == 2 * [(5, 100)]


def test_without_ncu_or_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find", lambda *names: None)
    assert bench.main([]) == 2
    assert "needs Nsight Compute" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find", lambda *names: "/usr/bin/true")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    said = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in said and said.count("\n") == 1


def test_a_dry_run_makes_the_calls(monkeypatch, capsys):
    """Here in this process: another would spend its time on importing torch."""
    def follow(heard, script, told, limit, folder, before, env):
        assert before == [] and env == bench.INTERPRETED
        monkeypatch.setattr(bench, "say", lambda **what: heard.said(what))
        return bench.calls(told | {"limit": limit})

    monkeypatch.setattr(bench.Profile, "follow", follow)
    assert bench.main(["--dry-run", "--kernel", "dropout", "grad_norm", "--options", ""]) == 0
    assert "3 rows of 2 cases" in capsys.readouterr().out


def test_plain_calls_come_first_and_others_last():
    cases = bench.plan(kc.KERNELS, None, ["ours", "liger"])
    assert len(set(cases)) == len(cases) == 2 * sum(1 + len(k.bench_options) for k in kc.KERNELS)
    assert all(not case.options and case.contender == "ours" for case in cases[:len(kc.KERNELS)])
    half = len(cases) // 2
    assert {case.contender for case in cases[half:]} == {"liger"}
