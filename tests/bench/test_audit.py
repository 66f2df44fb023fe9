"""The audit compiles without a GPU, and its gate refuses every fault that is planted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import audit
import audit_calls
import kernel_check as kc
import pytest
import torch

ROOT = Path(__file__).parents[2]
CLEAN = {"warps": 8, "registers": 40, "stack": 0, "spills": 0, "shared": 0, "occupancy": 0.75,
         "tensor_core": 4, "native": 4, "serialized": 0, "float64": 0, "loads": {"128": 2},
         "stores": {"128": 1}, "async_copies": 1, "tma": 0, "dots": 1, "row_loads": True,
         "row_stores": True}


def compiling(cache, script, *arguments):
    """What a script prints where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")]),
                    "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, str(script), *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Facts of the kernels of planted.py, by name and architecture."""
    return json.loads(compiling(tmp_path_factory.mktemp("triton"),
                                Path(__file__).with_name("planted.py"), "80", "90"))


@pytest.mark.parametrize("arch", ["80", "90"])
def test_what_is_planted_is_found(planted, arch):
    says = {name: list(audit.offences(facts[arch], False)) for name, facts in planted.items()}
    assert says["clean"] == says["product"] == []
    assert planted["clean"][arch]["loads"] == {"128": 1}
    assert planted["product"][arch]["dots"] == 1 and planted["product"][arch]["tensor_core"]
    assert bool(planted["product"][arch]["native"]) == (arch == "90")
    assert any(line.startswith("float64") for line in says["float64"])
    assert {line.split()[0] for line in says["spills"]} == {"spills", "stack"}
    assert any(line.startswith("serialized") for line in says["serialized"]) == (arch == "90")
    assert [line.split()[0] for line in says["narrow"]] == ["loads", "stores"]
    assert not list(audit.offences(planted["narrow"][arch], True)), "excused"


@pytest.mark.parametrize(("change", "says"), [
    ({"spills": 2}, "spills 2"), ({"stack": 8}, "stack 8"), ({"float64": 1}, "float64 1"),
    ({"serialized": 3}, "serialized 3"),
    ({"tensor_core": 0}, "no tensor-core"), ({"loads": {"64": 3}}, "64 bits at a time"),
    ({"stores": {"16": 3}}, "stores 16-bit rows 16 bits")])
def test_each_rule_of_the_gate(change, says):
    assert not list(audit.offences(CLEAN, False))
    assert says in "\n".join(audit.offences(CLEAN | change, False))


@pytest.mark.parametrize(("change", "says"), [
    ({"registers": 57}, "registers 57, was 40"), ({"occupancy": 0.5}, "occupancy"),
    ({"tensor_core": 0}, "tensor_core gone"), ({"native": 0}, "native gone"),
    ({"async_copies": 0}, "async_copies gone"), ({"shared": 8192}, "shared"),
    ({"loads": {"64": 9}}, "loads 64 bits wide, was 128")])
def test_worse_than_the_golden_file_is_refused_and_better_is_not(change, says):
    assert says in "\n".join(audit.worse(CLEAN | change, CLEAN))
    better = {"registers": 56, "occupancy": 1.0, "loads": {"128": 9}, "tma": 2}
    assert not list(audit.worse(CLEAN | better, CLEAN))


def test_the_golden_file_and_the_registry_must_agree():
    kernel = dataclasses.replace(kc.KERNELS[0], name="toy", audit_shapes=((1, 1),),
                                 narrow_access={})
    key = "toy 1x1 _kernel sm_90"
    assert not list(audit.judge(kernel, {key: CLEAN}, {key: CLEAN}, [90], True))
    assert "not in the golden file" in "\n".join(audit.judge(kernel, {key: CLEAN}, {}, [90], True))
    gone = {key: CLEAN, "toy 2x2 _kernel sm_90": CLEAN, "toy 1x1 _kernel sm_80": CLEAN}
    (line,) = audit.judge(kernel, {key: CLEAN}, gone, [90], True)
    assert "toy 2x2" in line
    (line,) = audit.judge(kernel, {key: "does not compile: because"}, {}, [90], False)
    assert line == f"{key}: does not compile: because"


def test_a_reason_for_narrow_accesses_must_be_needed():
    narrow, key = CLEAN | {"loads": {"64": 1}}, "toy 1x1 _kernel sm_90"
    kernel = dataclasses.replace(kc.KERNELS[0], name="toy", narrow_access={"_kernel": "because"})
    assert not list(audit.judge(kernel, {key: narrow}, {}, [90], False))
    (line,) = audit.judge(kernel, {key: CLEAN}, {}, [90], False)
    assert "narrow_access['_kernel'] is not needed" in line


@pytest.mark.parametrize(("access", "bits"), [
    ("LDG.E.128", 128), ("LDG.E.LTC128B.64.CONSTANT", 64), ("LDG.E.U16", 16), ("LDG.E", 32),
    ("LDGSTS.E.BYPASS.LTC128B.128", 128), ("STG.E.U8", 8), ("LDG.E.ENL2.256", 256)])
def test_widths_are_read_from_machine_code(access, bits):
    assert audit.width(access) == bits


def test_occupancy_is_what_the_scarcest_resource_leaves():
    assert audit.occupancy(90, 32, 0, 8) == 1.0
    assert audit.occupancy(90, 33, 0, 8) == 0.75  # registers come in eights
    assert audit.occupancy(90, 255, 0, 8) == 0.125
    assert audit.occupancy(90, 32, 100 << 10, 4) == 2 * 4 / 64
    assert audit.occupancy(80, 32, 100 << 10, 4) == 1 * 4 / 64
    assert audit.occupancy(90, 16, 0, 1) == 0.5  # 32 blocks at most


def test_what_a_gpu_would_refuse_of_any_call_is_told(tmp_path):
    *wrong, summary, memory = compiling(tmp_path, Path(__file__).with_name(
        "planted_calls.py")).splitlines()
    for fault, says in (("broken", "does not compile: CompilationError: ^ / NameError"),
                        ("grid", "its grid is (1, 65536)"),
                        ("shared", "262144 bytes of shared memory, above 232448"),
                        ("raises", "cannot be recorded: ValueError: because")):
        assert any(line.startswith(f"WRONG toy {fault} bfloat16 4x5") and says in line
                   for line in wrong), fault
    assert len(wrong) == 4 and "3 launches, 4 wrong" in summary
    assert int(memory.split()[1]) < 4 << 20, "large tensors were written to"


def test_every_call_that_tests_and_benchmarks_make_is_one_of_those_compiled():
    for kernel in kc.KERNELS:
        made = [(name, shape, dtype) for name, shape, dtype, _ in audit_calls.calls(kernel, False)]
        assert len(set(made)) == len(made)
        middle = kernel.test_shapes[len(kernel.test_shapes) // 2]
        for dtype in kernel.dtypes:
            assert {("", shape, dtype) for shape in kernel.test_shapes} <= set(made)
            assert {(name, middle, dtype) for name in kernel.variants} <= set(made)
        for shape in kernel.bench_shapes:
            assert {(f"bench {name}".strip(), shape) for name in ("", *kernel.bench_options)} <= {
                case[:2] for case in made}


def test_large_tensors_are_not_computed_and_small_ones_are():
    with audit_calls.Untouched():
        large, small = torch.arange(1 << 24) + 1, torch.arange(5) + 1
        total = large.sum()
        part = large[:3]
    assert large.shape == (1 << 24,) and large.dtype == torch.int64
    assert small.tolist() == [1, 2, 3, 4, 5]
    assert total.item() == 0 and part.data_ptr() == large.data_ptr()
