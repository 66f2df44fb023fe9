"""The traffic gate: refuses what is above the floor without a reason, and reasons without need."""

import dataclasses

import pytest
import torch
import traffic

from fastllm.kernels import swiglu
from fastllm.kernels._triton import INTERPRETED

FLOOR = {"forward": 1000, "backward": 2000}


def kernel(**changes):
    return dataclasses.replace(
        swiglu.KERNELS[0] if hasattr(swiglu, "KERNELS") else swiglu.KERNEL, name="toy",
        traffic_shapes=((2, 8), (4, 8)), **{"above_floor": {}, "bench_options": {}, **changes})


def rows(forward=1000, backward=2000, requested=0, aten=0, shape=(4, 8), options=""):
    return [{"kernel": "toy", "options": options, "shape": shape, "contender": "ours",
             "direction": direction, "launches": 1, "unique": moved, "requested": moved + requested,
             "aten_bytes": aten, "flops": 0, "floor_bytes": FLOOR[direction], "floor_flops": 1}
            for direction, moved in (("forward", forward), ("backward", backward))]


def test_at_the_floor_nothing_is_said():
    assert not list(traffic.offenders(kernel(), rows(1050, 2100)))
    assert not list(traffic.offenders(kernel(), rows(requested=100)))


@pytest.mark.parametrize(("changes", "says"), [
    ({"forward": 1051}, "toy: forward moves 1.051x"),
    ({"backward": 2101}, "toy: backward moves 1.05"),
    ({"requested": 101}, "1.101x requested"),
    ({"aten": 51}, "toy: forward moves 1.051x"),
    ({"forward": 900}, "floor_bytes counts what need not be moved"),
    ({"forward": 1500, "backward": 1700}, "toy: forward and backward moves 1.067x"),
])
def test_what_is_above_the_floor_is_named(changes, says):
    assert says in "\n".join(traffic.offenders(kernel(), rows(**changes)))


def test_work_done_in_the_forward_is_judged_by_both():
    assert not list(traffic.offenders(kernel(), rows(3000, 0)))


def test_a_reason_excuses_and_must_be_needed():
    excused = kernel(above_floor={"forward": "because"})
    assert not list(traffic.offenders(excused, rows(1200)))
    (line,) = traffic.offenders(excused, rows())
    assert "above_floor['forward'] is not needed" in line
    option = kernel(above_floor={"long backward": "because"})
    assert not list(traffic.offenders(option, rows() + rows(1000, 3000, options="long")))


def test_in_brief_what_is_gated_is_counted():
    option = kernel(bench_options={"long": {}})
    assert len(traffic.cases(option, ["ours", "liger"])) == 2 * 2 * 2
    assert {case.shape for case in traffic.cases(option, ["ours"], brief=True)} == {(4, 8)}
    products = kernel(bound="flops")
    assert {case.shape for case in traffic.cases(products, ["ours"], brief=True)} == {(2, 8)}


def test_small_shapes_and_products_are_not_gated():
    assert not list(traffic.offenders(kernel(), rows(5000, shape=(2, 8))))
    assert not list(traffic.offenders(kernel(bound="flops"), rows(5000)))
    assert list(traffic.offenders(dataclasses.replace(kernel(), traffic_shapes=()), []))


def test_only_what_is_worse_than_the_file_is_refused():
    small = rows(shape=(2, 8))  # known, but not counted in brief

    def said(old, new):
        known = {("toy", "", (2, 8)), ("toy", "", (4, 8))}
        return "\n".join(traffic.stale(old, new, known))

    assert not said(small + rows(), rows())
    assert not said(rows(1010), rows(1000))
    assert "unique 1010" in said(rows(1000), rows(1010))
    assert "not in traffic.json" in said([], rows())
    assert "no longer" in said(rows() + rows(options="gone"), rows())
    assert "no longer" in said(rows() + rows(shape=(3, 8)), rows())
    liger = [{**row, "contender": "liger", "unique": 9} for row in rows()]
    assert not said(rows() + liger, rows())
    assert "another floor" in said(rows() + [{**row, "floor_bytes": 7} for row in liger], rows())


@pytest.mark.skipif(not INTERPRETED, reason="the meter counts in the interpreter")
def test_a_kernel_of_the_registry_is_measured_to_the_same_byte_twice():
    case = traffic.Case("rms_norm", "", (64, 64), "ours")
    first, second = traffic.measure(case), traffic.measure(case)
    assert [row["direction"] for row in first] == ["forward", "backward"]
    assert first == second
    for row in first:
        assert row["floor_bytes"] <= row["unique"] + row["aten_bytes"] < 3 * row["floor_bytes"]


def test_a_kernel_that_fails_is_a_line():
    line = traffic.measure(traffic.Case("rms_norm", "", (3,), "ours"))
    assert isinstance(line, str) and "fails at" in line
    assert torch.get_num_threads() == 1
