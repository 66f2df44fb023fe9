"""bench/sanitize.py beside a compute-sanitizer that is made up: what it reads, says and fails on.

The reports are worded as those of compute-sanitizer 2025.3.
"""

import json
import os
import sys

import halves
import kernel_check as kc
import pytest
import sanitize as bench

BY_NAME = {kernel.name: kernel for kernel in kc.KERNELS}
STORE = """\
========= Invalid __global__ write of size 4 bytes
=========     at {}+0x2b0 in {}:57
=========     by thread (4,0,0) in block (0,0,0)
=========     Access to 0x7f2c5d000190 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2c5d000000 of size 400 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x2f0d22] in libcuda.so.1
=========
"""
RACE = """\
========= Error: Race reported between Write access at {}+{} in {}:9
=========     and {} access at {}+{} in standard.py:293 [6136 hazards]
=========
"""
OF_TORCH = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<\
float>, std::array<char *, (unsigned long)1>>(int, T2, T3)+0x150
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f7fcdc01300
=========
"""
PLANTED = {"memcheck": STORE.format("planted_store", "planted_faults.py"),
           "racecheck": RACE.format("planted_race(int *)", "0xa0", "planted_race.cu", "Read",
                                    "planted_race(int *)", "0xd0")}
FAKE = """#!{python}
import json, os, subprocess, sys, time
if "--version" in sys.argv:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0 (build 36400806) (public-release)")
    sys.exit()
tool = sys.argv[sys.argv.index("--tool") + 1]
told = json.load(open(sys.argv[sys.argv.index("--calls") + 1]))
play = json.load(open(os.environ["PLAY"]))
with open(os.environ["PLAY"] + ".log", "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]) + "\\n")
print("========= COMPUTE-SANITIZER", flush=True)
found = 0
def report(text):
    global found
    found += text.count("Invalid") + text.count("Race") + text.count("Uninit")
    print(text, end="", flush=True)
if told["control"]:
    report(play["control"].get(tool, ""))
    print("\\n@says " + json.dumps({{"control": play.get("problem", "")}}), flush=True)
if play.get("really"):
    subprocess.run(sys.argv[sys.argv.index("--calls") - 2:], check=True)
else:
    for number, case in told["cases"][:play.get("most")]:
        print("\\n@says " + json.dumps({{"begin": number, "part": "forward"}}), flush=True)
        report(play["reports"].get(str(number), ""))
        if number == play.get("dies"):
            os._exit(139)
        print("\\n@says " + json.dumps({{"of": number}}), flush=True)
    print('\\n@says {{"end": true}}', flush=True)
print("========= %s SUMMARY: %d errors" % ("RACECHECK" if tool == "racecheck" else "ERROR",
                                          play.get("summary", found)), flush=True)
sys.exit(9 if found or play.get("summary") else 0)
"""


@pytest.fixture
def played(tmp_path, monkeypatch, capsys):
    """played(play, *arguments): (exit code, what was printed, the JSON, the fake's command lines).

    A play says what the fake reports of the control and of each case, by its number.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(FAKE.format(python=sys.executable))
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.record, "machine", lambda: {"gpu": "NVIDIA H200"})

    def run(play, *given):
        (tmp_path / "play.json").write_text(json.dumps(
            {"control": PLANTED, "reports": {}} | play))
        monkeypatch.setenv("PLAY", str(tmp_path / "play.json"))
        out = tmp_path / "out.json"
        code = bench.main(["--kernel", "swiglu", "--compile", "0", "--out", str(out), *given])
        log = tmp_path / "play.json.log"
        return (code, capsys.readouterr().out, json.loads(out.read_text()),
                [json.loads(line) for line in log.read_text().splitlines()])

    return run


def test_a_clean_run(played):
    code, text, record, starts = played({"reports": {"0": OF_TORCH}})
    assert code == 0 and list(record["tools"]) == ["memcheck", "racecheck"]
    for tool, row in record["tools"].items():
        number = len(bench.plan([BY_NAME["swiglu"]]))
        assert (row["control"], row["done"], row["cases"]) == ("seen", number, number)
        assert not row["errors"] and not row["not_reached"] and not row["not_understood"]
        assert row["errors_of_other_code"] == 1
        assert f"{tool}: {row['calls']} calls" in text
    assert "of other code: void at::native::vectorized_elementwise_kernel" in text
    assert record["sanitizer"].startswith("Version 2025.3")
    assert [words[1] for words, _ in starts] == ["memcheck", "racecheck"]
    for words, uncached in starts:
        assert uncached == "1" and words[words.index("--error-exitcode") + 1] == "9"
        names = words[words.index("--kernel-name") + 1]
        assert names.startswith("regex=^(") and "planted_store" in names and "_update" in names


def test_a_finding_in_a_kernel_of_ours_is_counted_once_a_kind(played):
    ours = STORE.format("_forward_kernel", "_glu.py")
    again = RACE.format("_forward_kernel", "0x1a0", "_glu.py", "Write", "_forward_kernel", "0x1a0")
    code, text, record, _ = played({"reports": {"0": ours * 3, "1": OF_TORCH, "2": ours + again}})
    assert code == 1
    row = record["tools"]["memcheck"]
    assert (row["errors"], row["errors_of_other_code"]) == (5, 1)
    store, race = row["findings"]
    assert (store["function"], store["file"], store["reports"]) == ("_forward_kernel", "_glu.py", 4)
    assert store["lines"] == [57]
    assert store["kind"] == "Invalid __global__ write of size N bytes"
    assert store["report"][0] == "Invalid __global__ write of size 4 bytes"
    assert not any("Host Frame" in line for line in store["report"])
    cases = bench.plan([BY_NAME["swiglu"]])
    assert store["under_way"] == sorted(f"{cases[n]} forward" for n in (0, 2))
    assert race["kind"].endswith("by one instruction") and race["reports"] == 1
    assert "_forward_kernel in _glu.py: Invalid __global__ write" in text


@pytest.mark.parametrize("control", [{}, {"memcheck": STORE.format("_forward_kernel", "_glu.py"),
                                          "racecheck": OF_TORCH}])
def test_a_control_that_is_not_seen(played, control):
    code, text, record, _ = played({"control": control})
    assert code == 1
    assert {row["control"] for row in record["tools"].values()} == {"not seen"}
    assert text.count("SEES NOTHING HERE") == 2


def test_a_control_that_cannot_be_compiled_is_left_out(played):
    """Not one in Triton, though: that it fails is no reason not to be seen."""
    code, text, record, _ = played({"control": {}, "problem": "OSError: no CUDA_HOME"})
    controls = {tool: row["control"] for tool, row in record["tools"].items()}
    assert controls == {"memcheck": "not seen", "racecheck": "left out: OSError: no CUDA_HOME"}
    assert code == 1 and "control left out: OSError" in text


def test_what_is_not_reached_is_listed(played):
    code, text, record, _ = played({"most": 3}, "--tool", "memcheck")
    row = record["tools"]["memcheck"]
    assert code == 0 and row["done"] == 3 and not row["failed"]
    assert len(row["not_reached"]) == row["cases"] - 3
    assert f"not reached in time: {row['cases'] - 3}: " in text

    _, _, record, _ = played({}, "--tool", "memcheck", "--limit", "1")
    late = record["tools"]["memcheck"]
    assert len(late["not_reached"]) == row["cases"] and late["control"] == "not reached"


def test_a_process_that_dies_costs_one_case(played):
    code, _, record, starts = played({"dies": 2}, "--tool", "memcheck")
    row = record["tools"]["memcheck"]
    assert code == 1 and row["done"] == row["cases"] - 1 and not row["not_reached"]
    assert list(row["failed"].values()) == ["forward: ended with exit code 139"]
    assert len(starts) == 2, "the calls, and those after the death"
    assert row["control"] == "seen"


def test_errors_that_are_not_understood_fail(played):
    code, text, record, _ = played({"summary": 7, "control": {}}, "--tool", "memcheck")
    assert code == 1 and "no report was understood" in text
    assert "7 errors" in record["tools"]["memcheck"]["not_understood"][0]


def test_the_calls_themselves_beside_the_fake(played, monkeypatch):
    """The process of calls is a real one here, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    first = bench.plan([BY_NAME["swiglu"]])[:2]
    monkeypatch.setattr(bench, "plan", lambda *given: first)
    code, text, record, _ = played({"really": True}, "--tool", "memcheck")
    row = record["tools"]["memcheck"]
    assert code == 0, text
    assert row["done"] == row["cases"] == 2 and row["calls"] == 4


def test_without_the_tool_or_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "find", lambda *names: None)
    assert bench.main([]) == 2
    assert "needs compute-sanitizer" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find", lambda *names: "/usr/bin/true")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    said = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in said and said.count("\n") == 1


def test_every_option_of_every_kernel_is_planned_and_plain_calls_come_first():
    cases = bench.plan(kc.KERNELS)
    assert len(set(cases)) == len(cases)
    for kernel in kc.KERNELS:
        mine = {case.options for case in cases if case.kernel == kernel.name}
        assert mine >= {"", *kernel.variants, *kernel.bench_options}
        shape = bench.shape_of(kernel)
        assert shape in kernel.test_shapes and bench.torch.Size(shape).numel() > halves.ELEMENTS
        assert bench.shape_of(kernel, large=True) in kernel.test_shapes
    plain = sum(not case.options for case in cases)
    assert plain == 2 * len(kc.KERNELS) and not any(case.options for case in cases[:plain])


def test_our_functions_are_known_by_name():
    found = bench.functions()
    assert {"_forward_kernel", "_backward_kernel"} <= set(found)
    assert "planted_store" not in found and "cdiv" not in found


def test_a_dry_run_is_of_the_interpreter(monkeypatch, capsys):
    starts = []

    def follow(heard, script, told, limit, folder, before, env):
        starts.append((told["control"], before, env))
        for number, _ in told["cases"]:
            heard.said({"begin": number, "part": "forward"})
            heard.said({"of": number} | ({"failed": "why"} if number == 3 else {}))
        heard.said({"end": True})
        return 0

    monkeypatch.setattr(bench.Reader, "follow", follow)
    assert bench.main(["--dry-run", "--kernel", "swiglu", "--compile", "2"]) == 1
    assert starts == 2 * [("", [], bench.INTERPRETED)]
    number = len(bench.plan([BY_NAME["swiglu"]]))
    said = capsys.readouterr().out
    assert f"{number} calls of {number - 1} cases of {number}, 1 failed" in said
    assert f"failed: {bench.plan([BY_NAME['swiglu']])[3]}: why" in said
