"""bench/sanitizer_report.py: where a report is of, and what is none."""

import pytest
from sanitizer_report import Reader


@pytest.mark.parametrize(("lines", "function", "file", "line"), [
    (["Invalid __global__ read of size 16 bytes", "at matmul_kernel+0xec0 in matmul.py:43"],
     "matmul_kernel", "matmul.py", 43),
    (["Invalid __global__ read of size 16 bytes", "at 0xda0 in /a/fused_moe.py:175:fused_kernel"],
     "fused_kernel", "fused_moe.py", 175),
    (["Uninitialized __global__ memory read of size 1 bytes", "at 0x150 in void f<int>(int *)"],
     "void f<int>(int *)", "", 0),
    (["Barrier error detected. Divergent thread(s) in warp", "at g(int *)+0x30"],
     "g(int *)", "", 0),
    (["Program hit cudaErrorInvalidValue (error 1) on CUDA API call to cudaMemcpy."], "", "", 0)])
def test_where_a_report_is_of(lines, function, file, line):
    reader = Reader()
    reader.feed(f"========= {lines[0]}\n")
    for text in lines[1:]:
        reader.feed(f"=========     {text}\n")
    reader.feed("=========\n")
    (found,) = reader.findings
    assert (found.function, found.file, found.line) == (function, file, line)


def test_what_is_said_around_the_reports_is_no_finding():
    reader = Reader()
    for line in ("COMPUTE-SANITIZER", "", "Target application returned an error",
                 "Error: Target application terminated before first instrumented API call",
                 "Tracking kernels launched by child processes requires the --target-processes all "
                 "option.", "Error: couldn't find exit code.", "ERROR SUMMARY: 3 errors",
                 "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"):
        reader.feed(f"========= {line}\n")
    assert not reader.findings and reader.summary == 5
    assert reader.trouble == ["Error: Target application terminated before first instrumented API "
                              "call", "Error: couldn't find exit code."]
