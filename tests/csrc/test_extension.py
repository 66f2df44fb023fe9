"""The extension as built: nothing else would tell a wrong number in cpu.py from one not built."""

import pytest

pytest.importorskip("fastllm._C", reason="built without a C++ compiler")


def test_its_ops_are_those_that_cpu_needs():
    from fastllm import cpu
    assert cpu.available(), cpu.why_not()
