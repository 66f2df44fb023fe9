"""Charts: ticks, smoothing and thinning against plain definitions, and where a point is drawn."""

import html
import json
import math
import re
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.report.charts import (
    MAX_POINTS,
    Axis,
    Chart,
    Series,
    extremes,
    inliers,
    log_ticks,
    nice_ticks,
    rolling_median,
    smooth,
    tick_label,
    x_extent,
)

values = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60)


def window(count, half, i):
    """The positions that the smoothed value at `i` is made of."""
    reach = min(half, i // 4)
    return range(i - reach, min(i + reach + 1, count))


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-4, 1e6), about=st.integers(3, 8))
def test_ticks_are_round_equally_spaced_and_inside(low, span, about):
    ticks = nice_ticks(low, low + span, about)
    step = span if len(ticks) < 2 else ticks[1] - ticks[0]
    assert about / 2.5 - 1 <= len(ticks) <= about + 1
    assert all(low - 1e-6 * step <= tick <= low + span + 1e-6 * step for tick in ticks)
    if len(ticks) > 1:
        power = 10 ** math.floor(math.log10(step * 1.0001))
        assert min(abs(step / power - factor) for factor in (1, 2, 5)) < 1e-3


def test_ticks_of_steps_fall_on_whole_steps():
    assert nice_ticks(0, 2, 8, 1.0) == [0, 1, 2]
    assert [label for _, label in Axis(0, 3, about=8, whole=True).ticks()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0.9, 120, [1, 10, 100]), (1.5, 45, [2, 5, 10, 20]),
    (0.01, 1000, [0.01, 0.1, 1, 10, 100, 1000]), (3, 4, [3.0])])
def test_log_ticks(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("value", "step", "largest", "label"), [
    (2.5, 0.5, 3, "2.5"), (0, 0.5, 3, "0.0"), (1500, 500, 1500, "1,500"),
    (40000, 20000, 1e5, "40k"), (0, 20000, 1e5, "0"), (12500, 500, 2e4, "12.5k"),
    (2e7, 1e7, 5e7, "20M"), (0.0002, 0.0001, 0.0003, "0.0002")])
def test_tick_labels_have_the_decimals_of_their_step(value, step, largest, label):
    assert tick_label(value, step, largest) == label


@given(y=values, half=st.integers(0, 10))
def test_smooth_is_the_mean_of_its_window(y, half):
    for i, value in enumerate(smooth(y, half)):
        there = [y[j] for j in window(len(y), half, i) if y[j] is not None]
        if y[i] is None:
            assert value is None
        else:
            assert value == pytest.approx(mean(there), rel=1e-6, abs=1e-6)


@given(y=values, half=st.integers(0, 10))
def test_rolling_median_is_the_median_of_its_window(y, half):
    for i, value in enumerate(rolling_median(y, half)):
        there = sorted(y[j] for j in window(len(y), half, i) if y[j] is not None)
        assert value == (None if y[i] is None else there[len(there) // 2])


@given(y=values, buckets=st.integers(1, 10))
def test_extremes_lose_neither_the_highest_nor_the_lowest(y, buckets):
    parts = [part for part in extremes(y, buckets) if part]
    finite = [value for value in y if value is not None]
    if finite:
        assert min(low for _, low, _ in parts) == min(finite)
        assert max(high for _, _, high in parts) == max(finite)
    else:
        assert not parts


def test_inliers_leave_out_a_wild_value_and_nothing_of_an_ordinary_series():
    ordinary = [math.sin(i) for i in range(500)]
    assert sorted(inliers(ordinary)) == sorted(ordinary)
    assert sorted(inliers([*ordinary, 1e6, -1e6])) == sorted(ordinary)
    assert inliers([1.0, 1e9]) == [1.0, 1e9]  # too few to call one of them wild
    assert inliers([2.0] * 60) == [2.0] * 60


def test_the_range_of_x_is_never_empty_and_begins_at_0_for_a_whole_run():
    assert x_extent([Series("a", [1, 2, 1000], [])]) == (0, 1000)
    assert x_extent([Series("a", [900, 1000], [])]) == (900, 1000)
    low, high = x_extent([Series("a", [1], [])])
    assert low < 1 < high
    assert x_extent([]) == (0, 1)


def paths(chart):
    return dict(re.findall(r'<path class="([^"]+)" d="([^"]*)"', chart.html()))


def test_a_point_is_drawn_where_its_value_says():
    chart = Chart("t", "u", [Series("a", [0, 50, 100], [0.0, 100.0, None])], zero=True)
    # The axis ends 8 % above the highest value, so 100 lies at 1000 - 1000 / 1.08 from the top.
    assert paths(chart)["blue line"] == "M0.0 1000.0h0L500.0 74.1"


def test_gaps_break_the_line_and_a_lone_point_is_a_dot():
    y = [1.0, None, 2.0, None, 3.0, 4.0]
    drawn = paths(Chart("t", "u", [Series("a", list(range(6)), y)]))["blue line"]
    assert drawn.count("M") == 3
    assert drawn.count("L") == 1


def test_a_logarithmic_axis_spaces_powers_equally():
    y = [0.1, 1.0, 10.0, 100.0]
    drawn = paths(Chart("t", "u", [Series("a", [0, 1, 2, 3], y)], log=True))["blue line"]
    heights = [float(place.split()[1].removesuffix("h0")) for place in re.split("[ML]", drawn)[1:]]
    gaps = [above - below for above, below in pairwise(heights)]
    assert max(gaps) - min(gaps) < 0.3


def test_a_long_raw_series_is_a_band_that_reaches_its_spike():
    count = 50 * MAX_POINTS
    y = [1.0] * count
    y[31_415] = 2.0
    chart = Chart("t", "u", [Series("a", list(range(count)), y, kind="thin")], zero=True)
    band = paths(chart)["blue band"]
    assert band.count("L") < 2.1 * MAX_POINTS
    # Clipped by the axis that ends above the ordinary values, but drawn, and counted.
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", band)) < 0
    assert "1 beyond the axis" in chart.html()


def test_the_read_out_holds_the_last_step_and_few_points():
    count = 12_345
    chart = Chart("t", "u", [Series("a", list(range(1, count + 1)), [0.5] * count)])
    found = re.search(r'data-points="([^"]*)"', chart.html())
    data = json.loads(html.unescape(found[1]))
    (series,) = data["series"]
    assert len(series["x"]) <= 800
    assert series["x"][-1] == count
    assert data["unit"] == "u"


def test_nothing_finite_is_an_empty_chart_not_an_error():
    text = Chart("t", "u", [Series("a", [1, 2], [None, None])], marks=[1, 2],
                 mark_name="skipped").html()
    assert "no values" in text
    assert "nan" not in text.lower().replace("nan=", "")
