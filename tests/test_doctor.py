"""`info`: complete, JSON-able, and readable with and without a terminal."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

from fastllm import doctor, ops
from fastllm.doctor import info, render_info
from fastllm.monitor import dtype_name, pick_dtype


@pytest.fixture(scope="module")
def report():
    return info(torch.device("cpu"))


def plain(report):
    return render_info(report, Console(file=io.StringIO()))


def test_info_is_json_and_agrees_with_what_decides(report):
    assert json.loads(json.dumps(report)) == report
    dispatch = ops.dispatch(torch.device("cpu"))
    assert {op: (how["backend"], how["reason"]) for op, how in report["ops"].items()} \
        == dict(dispatch)
    dtype, reason = pick_dtype(torch.device("cpu"))
    assert report["auto_dtype"] == {"dtype": dtype_name(dtype), "reason": reason}
    assert set(report["matmul"]["peak"]) == {"fp32", dtype_name(dtype)}
    assert all(peak["flops"] > 0 for peak in report["matmul"]["peak"].values())
    assert 0 < report["disk"]["free_bytes"] <= report["disk"]["total_bytes"]


def test_every_op_its_backend_and_the_reason_are_shown(report):
    text = " ".join(plain(report).split())  # long reasons wrap
    for op, how in report["ops"].items():
        assert " ".join(f"{op} {how['backend']} {how['reason']}".split()) in text
    for word in (torch.__version__, report["cpu"]["model"], "C++ extension",
                 f"dtype: auto {report['auto_dtype']['dtype']}", "GFLOP/s", "free of"):
        assert word in text


def test_plain_where_there_is_no_terminal_and_coloured_on_one(report):
    assert "\x1b" not in plain(report)
    assert "\x1b[" in render_info(report, Console(file=io.StringIO(), force_terminal=True,
                                                  color_system="truecolor", width=100))


def test_a_missing_extension_says_why(monkeypatch, report):
    monkeypatch.setattr(doctor.cpu, "available", lambda: False)
    monkeypatch.setattr(doctor.cpu, "why_not", lambda: "no C++20 compiler [found]")
    without = info(torch.device("cpu"))
    assert without["cpp_extension"] == {"built": False, "why_not": "no C++20 compiler [found]"}
    assert "no C++20 compiler [found]" in plain(without)  # brackets are no markup


def test_gpus_their_driver_and_readings_are_shown(report):
    machine = copy.deepcopy(report)
    machine.update(
        gpus=[{"name": "NVIDIA H200", "memory_bytes": 141 * 2**30, "compute_capability": "9.0"}],
        nvidia_driver="570.86", cuda="12.8", cudnn=90800,
        gpu_readings={"gpu_memory_bytes": 2**30, "power_watts": 76.4, "sm_clock_mhz": 1980},
        notes=["NVML: something is off"])
    machine["matmul"]["peak"] = {"bf16": {"flops": 989.5e12, "source": "NVIDIA data sheet"}}
    text = plain(machine)
    for word in ("NVIDIA H200, 141 GiB, compute capability 9.0", "570.86", "12.8",
                 "1 GiB in use, 76 W, 1980 MHz", "990 TFLOP/s: NVIDIA data sheet",
                 "note: NVML: something is off"):
        assert word in text


@pytest.mark.parametrize(("device", "words"), [
    ("cpu", ("fp32", "oneDNN")), ("cuda", ("cuBLAS", "TF32 off")), ("mps", ("mps",))])
def test_the_matmul_library_is_named(device, words):
    named = doctor._matmul_backend(torch.device(device))
    assert all(word in named for word in words)
