"""bench/kernels.py, as far as it runs without a GPU: what it would time, and the check of bits."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import kernel_check as kc
import pytest
import torch

spec = importlib.util.spec_from_file_location(
    "bench_kernels", Path(__file__).parents[2] / "bench" / "kernels.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
BY_NAME = {kernel.name: kernel for kernel in kc.KERNELS}
EVERYTHING = {"kernel": None, "options": None, "dtype": ["bfloat16"], "sweep": False}


def asked(**options):
    return bench.cases(argparse.Namespace(**{**EVERYTHING, **options}))


def test_every_shape_and_option_unless_told():
    number = sum(len(kernel.bench_shapes) * (1 + len(kernel.bench_options))
                 for kernel in bench.kernels())
    assert len(asked()) == number
    assert len(asked(dtype=["bfloat16", "float16"])) == 2 * number
    assert {case[3] for case in asked(kernel=["attention"], options=["", "causal"])} == {
        "", "causal"}


def test_a_sweep_is_of_as_many_tokens_and_elements_each():
    cases = asked(sweep=True)
    assert {kernel.name for kernel, *_ in cases} == set(bench.SWEEPS)
    for kernel, (batch, queries, keys, kv_heads, group, width), _, option in cases:
        assert not option or option in kernel.bench_options
        assert (batch * queries, kv_heads * group * width) == (16384, 2048) and queries == keys
    assert len(set(map(str, cases))) == len(cases)


def test_bits_that_change_are_counted_and_those_that_may_do_not_fail(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", kc.DEVICE)
    kernel, shape = BY_NAME["swiglu"], BY_NAME["swiglu"].test_shapes[-1]
    assert bench.repeat_check([(kernel, shape, "bfloat16", "")], 3)[1]
    calls = []

    def unsteady(gate, up, deterministic=True):
        calls.append(gate)
        return kernel.public(gate, up) + (len(calls) == 2)

    toy = dataclasses.replace(kernel, public=unsteady, inputs=lambda *args, **_: kernel.inputs(
        *args), bench_options={"atomics": {"deterministic": False}})
    (row,), steady = bench.repeat_check([(toy, shape, "bfloat16", "")], 3)
    assert (row["changed"], row["runs"], steady) == (1, 3, False)
    calls.clear()
    (row,), steady = bench.repeat_check([(toy, shape, "bfloat16", "atomics")], 3)
    assert (row["changed"], row["deterministic"], steady) == (1, False, True)


@pytest.mark.parametrize("name", ["attention", "adamw", "cross_entropy"])
def test_inputs_are_made_anew_for_each_run(monkeypatch, name):
    """Some calls write into what they are given."""
    monkeypatch.setattr(bench, "DEVICE", kc.DEVICE)
    kernel = BY_NAME[name]
    for option in ("", *kernel.bench_options):
        assert not bench.changes(kernel, kernel.test_shapes[0], torch.float32, option, 2)


def test_another_result_than_ours_is_an_error():
    kernel = BY_NAME["attention"]
    call = kc.make(kernel, kernel.test_shapes[1], torch.float32, causal=True)
    assert bench.difference(kernel, bench.prepare(kernel, call, "torch eager"), call) < 1e-5
    with pytest.raises(ValueError, match="differ from ours"):
        bench.difference(kernel, lambda: kernel.public(*call.args), call)
