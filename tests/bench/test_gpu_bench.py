"""bench/kernels.py, as far as it runs without a GPU: what it would time, and the check of bits."""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import kernel_check as kc
import pytest
import torch

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "kernels.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
BY_NAME = {kernel.name: kernel for kernel in kc.KERNELS}
EVERYTHING = {"kernel": None, "options": None, "dtype": ["bfloat16"], "attention": False,
              "dry_run": False}


def asked(**options):
    return bench.cases(argparse.Namespace(**{**EVERYTHING, **options}))


def test_every_shape_and_option_unless_told():
    number = sum(len(kernel.bench_shapes) * (1 + len(kernel.bench_options))
                 for kernel in bench.kernels())
    assert len(asked()) == number
    assert len(asked(dtype=["bfloat16", "float16"])) == 2 * number
    assert {case[3] for case in asked(kernel=["attention"], options=["", "causal"])} == {
        "", "causal"}


def test_plain_calls_and_the_largest_shapes_come_first():
    """What is not reached in the time is then what matters least."""
    cases = asked()
    plain = [case for case in cases if not case[3]]
    assert cases[:len(plain)] == plain
    firsts = {}
    for kernel, shape, *_ in plain:
        firsts.setdefault(kernel.name, (kernel, shape))
    assert all(shape == kernel.bench_shapes[-1] for kernel, shape in firsts.values())


def test_lengths_of_attention_are_of_as_many_tokens_and_elements_each():
    cases = asked(attention=True)
    assert {kernel.name for kernel, *_ in cases} == set(bench.SWEEPS)
    for kernel, (batch, queries, keys, kv_heads, group, width), _, option in cases:
        assert not option or option in kernel.bench_options
        assert (batch * queries, kv_heads * group * width) == (16384, 2048) and queries == keys
    assert len(set(map(str, cases))) == len(cases)
    assert cases[0][1:] == ((2, 8192, 8192, 16, 1, 128), "bfloat16", "causal")


def test_a_dry_run_is_small_and_has_every_op_and_option():
    cases = asked(dry_run=True)
    assert {(case[0].name, case[3]) for case in cases} == {
        (case[0].name, case[3]) for case in asked()}
    assert all(shape in kernel.test_shapes for kernel, shape, *_ in cases)


def test_bits_that_change_are_counted_and_those_that_may_do_not_fail(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", kc.DEVICE)
    kernel, shape = BY_NAME["swiglu"], BY_NAME["swiglu"].test_shapes[-1]
    assert not bench.failed(bench.repeat_check((kernel, shape, "bfloat16", ""), 3))
    calls = []

    def unsteady(gate, up, deterministic=True):
        calls.append(gate)
        return kernel.public(gate, up) + (len(calls) == 2)

    toy = dataclasses.replace(kernel, public=unsteady, inputs=lambda *args, **_: kernel.inputs(
        *args), bench_options={"atomics": {"deterministic": False}})
    row = bench.repeat_check((toy, shape, "bfloat16", ""), 3)
    assert (row["changed"], row["runs"], bench.failed(row)) == (1, 3, True)
    calls.clear()
    row = bench.repeat_check((toy, shape, "bfloat16", "atomics"), 3)
    assert (row["changed"], row["deterministic"], bench.failed(row)) == (1, False, False)


@pytest.mark.parametrize("name", ["attention", "adamw", "cross_entropy"])
def test_inputs_are_made_anew_for_each_run(monkeypatch, name):
    """Some calls write into what they are given."""
    monkeypatch.setattr(bench, "DEVICE", kc.DEVICE)
    kernel = BY_NAME[name]
    for option in ("", *kernel.bench_options):
        assert not bench.changes((kernel, kernel.test_shapes[0], "float32", option), 2)


@pytest.mark.parametrize("name", ["attention", "adamw", "cross_entropy", "dequantize"])
def test_another_result_than_ours_is_an_error(monkeypatch, name):
    monkeypatch.setattr(bench, "DEVICE", kc.DEVICE)
    kernel = BY_NAME[name]
    case = kernel, bench.shape_of(kernel), "float32", ""
    assert bench.difference(case, "torch eager") < 1e-5

    def wrong(*args, **kwargs):
        found = kernel.reference(*args, **kwargs)
        for tensor in args[0] if kernel.mutates else ():
            tensor.mul_(1.5)
        return found if kernel.mutates else found * 1.5

    case = dataclasses.replace(kernel, reference=wrong), *case[1:]
    with pytest.raises(ValueError, match="differ from ours"):
        bench.difference(case, "torch eager")


def test_a_row_fails_where_ours_does_or_torch_gives_something_else():
    for row, wrong in (({"contender": "ours", "error": "x"}, True), ({"contender": "ours"}, False),
                       ({"contender": "liger", "error": "it has no such thing"}, False),
                       ({"contender": "torch eager", "error": "its results differ from"}, True)):
        assert bench.failed(row) == wrong


def test_going_on_is_refused_for_another_commit(monkeypatch, tmp_path):
    out = tmp_path / "kernels.json"
    assert bench.kept(out) == []
    monkeypatch.setattr(bench.record, "commit", lambda: {"hash": "a"})
    bench.record.write(out, {"machine": {"commit": {"hash": "a"}}}, [{"kernel": "x"}])
    assert bench.kept(out) == [{"kernel": "x"}]
    monkeypatch.setattr(bench.record, "commit", lambda: {"hash": "b"})
    with pytest.raises(ValueError, match="another commit"):
        bench.kept(out)


def test_without_a_gpu_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    assert bench.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_dry_run_goes_all_the_way(tmp_path):
    """On the pretended GPU: measuring, comparing, writing, and going on with what is not there."""
    out = tmp_path / "kernels.json"
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--dry-run", "--out", str(out),
               "--kernel", "swiglu", "--options", "", "--contender", "ours", "torch eager",
               "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(out.read_text())
    assert written["machine"]["gpu"] == "pretended GPU" and written["dry_run"]
    assert written["machine"]["commit"].keys() == {"hash", "modified"}
    assert written["ceilings"].keys() == {"copy", "bfloat16", "float16", "float32"}
    assert [(row["contender"], row["direction"]) for row in written["results"]] == [
        (name, way) for name in ("ours", "torch eager") for way in ("forward", "backward", "both")]
    for row in written["results"]:
        assert len(row["samples_milliseconds"]) >= 5 and row["host_milliseconds"] > 0
        assert row["contender"] == "ours" or 0 <= row["difference"] < 0.05
    assert written["not_reached"] == []
    again = subprocess.run([*command, "--resume", "--kernel", "swiglu", "geglu", "--limit", "-1"],
                           capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    later = json.loads(out.read_text())
    assert later["results"] == written["results"]
    assert len(later["not_reached"]) == 1 and later["not_reached"][0].startswith("geglu ")
