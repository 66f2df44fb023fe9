"""Line charts as SVG and HTML text: numbers in, a string out, no library and no network.

The SVG holds only lines and stretches to any width (strokes keep theirs); ticks and labels are HTML
placed in percent, so that they stay readable on a phone; a data attribute holds the read-out.
"""

import json
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate, groupby, pairwise
from statistics import median

# Points of a line that can be told apart on a wide screen. Longer series are drawn by the extremes
# of as many parts, so that no spike is lost: a band if they are raw, a line if they are smooth.
MAX_POINTS = 1000
_BOX = 1000  # the SVG's own coordinates, both ways

Values = Sequence[float | None]


@dataclass
class Series:
    """One line of a chart. tone: a colour of the style sheet; kind: thin, line or dots."""

    name: str
    x: Sequence[float]
    y: Values
    tone: str = "blue"
    kind: str = "line"


@dataclass
class Chart:
    """A chart in one unit. Values are plotted as they are: scale them to the unit first.

    zero: the axis begins at 0. top: the axis ends there at the latest.
    log: a logarithmic axis (positive values only).
    marks: steps to mark at the foot, named by mark_name. reference: (name, value) of a dashed line.
    """

    title: str
    unit: str
    series: list[Series]
    zero: bool = False
    top: float | None = None
    log: bool = False
    wide: bool = False
    marks: Sequence[float] = field(default_factory=list)
    mark_name: str = ""
    reference: tuple[str, float] | None = None
    x_range: tuple[float, float] | None = None

    def html(self) -> str:
        """The chart as one <figure>; every text in it is escaped."""
        x_low, x_high = self.x_range or x_extent(self.series)
        y_low, y_high = self._y_extent()
        x_axis = Axis(x_low, x_high, about=8 if self.wide else 5, whole=True)
        y_axis = Axis(y_low, y_high, self.log)
        lines = "".join(_svg_series(one, x_axis, y_axis) for one in self.series)
        beyond = sum(y is not None and not y_low <= y <= y_high
                     for one in self.series[:1] for y in one.y)
        note = f'<span class="beyond">{beyond:,} beyond the axis</span>' if beyond else ""
        size = " wide" if self.wide else ""
        return (
            f'<figure class="chart{size}"><figcaption><b>{escape(self.title)}</b>'
            f'<span class="unit">{escape(self.unit)}</span>{self._legend()}</figcaption>'
            f'<div class="frame"><div class="ys">{_labels(y_axis, "bottom")}</div>'
            f'<div class="plot" data-points="{escape(self._points(x_axis))}">'
            f'<svg viewBox="0 0 {_BOX} {_BOX}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self._summary())}">'
            f"{_grid(y_axis)}{self._reference(y_axis)}{lines}{self._marks(x_axis)}</svg>"
            '<i class="cursor" hidden></i><div class="tip" hidden></div>'
            f"{note}</div>"
            f'<div class="xs">{_labels(x_axis, "left")}</div></div></figure>')

    def _y_extent(self) -> tuple[float, float]:
        """Of all that is drawn, except that thin (raw) lines count without their outliers."""
        values = [y for one in self.series if one.kind != "thin" for y in one.y if y is not None]
        for one in self.series:
            if one.kind == "thin":
                values += inliers([y for y in one.y if y is not None])
        if self.log:
            values = [value for value in values if value > 0] or [1.0]
            low, high = min(values), max(values)
            return (low / 1.2, high * 1.2) if low < high else (low / 2, high * 2)
        if self.reference:
            values.append(self.reference[1])
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        high = high if self.top is None else max(low, min(high, self.top))
        if self.zero and low >= 0:
            return 0.0, high * 1.08 or 1.0
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return low - margin, high + margin

    def _legend(self) -> str:
        names = [(f"{one.tone} {one.kind}", one.name) for one in self.series]
        if self.reference:
            names.append(("muted dashed", self.reference[0]))
        if self.marks:
            names.append(("red dots", self.mark_name))
        if len(names) < 2:
            return ""
        keys = "".join(f'<span><i class="key {look}"></i>{escape(name)}</span>'
                       for look, name in names)
        return f'<span class="legend">{keys}</span>'

    def _points(self, x_axis: "Axis") -> str:
        """What the pointer reads, as JSON: the range of x, and some 800 points of every series."""
        series = []
        for one in self.series:
            every = max(1, math.ceil(len(one.x) / 800))
            kept = range((len(one.x) - 1) % every, len(one.x), every)  # the last one is among them
            series.append({"name": one.name, "tone": one.tone, "dots": one.kind == "dots",
                           "x": [one.x[i] for i in kept],
                           "y": [None if (y := one.y[i]) is None else float(f"{y:.5g}")
                                 for i in kept]})
        return json.dumps({"range": [x_axis.low, x_axis.high], "unit": self.unit, "series": series},
                          separators=(",", ":"))

    def _summary(self) -> str:
        parts = []
        for one in self.series:
            finite = [y for y in one.y if y is not None]
            if finite:
                parts.append(f"{one.name} from {finite[0]:.4g} to {finite[-1]:.4g} {self.unit}")
        return f"{self.title}: " + ("; ".join(parts) or "no values")

    def _reference(self, y_axis: "Axis") -> str:
        if not self.reference:
            return ""
        y = _BOX - y_axis.place(self.reference[1])
        return f'<path class="muted dashed" d="M0 {y:.1f}H{_BOX}"/>'

    def _marks(self, x_axis: "Axis") -> str:
        places = sorted({round(x_axis.place(step)) for step in self.marks})
        path = "".join(f"M{x} {_BOX}v-45" for x in places)
        return f'<path class="red mark" d="{path}"/>' if path else ""


@dataclass
class Axis:
    """A range of values, where they lie in the box, and the round ones to label."""

    low: float
    high: float
    log: bool = False
    about: int = 5
    whole: bool = False  # the values are whole numbers (steps): no tick between two of them

    def place(self, value: float) -> float:
        """Position in the SVG's coordinates, 0 at `low`."""
        if self.log:
            if value <= 0:
                return 0.0
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return max(-_BOX, min(2 * _BOX, fraction * _BOX))  # far outliers leave the box all the same

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of the round numbers inside the range."""
        if self.log:
            return [(value, f"{value:g}") for value in log_ticks(self.low, self.high)]
        values = nice_ticks(self.low, self.high, self.about, 1.0 if self.whole else 0.0)
        step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
        largest = max(abs(self.low), abs(self.high))
        return [(value, tick_label(value, step, largest)) for value in values]


def nice_ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten (not below `least`) within [low, high], about
    `about` of them."""
    if not high > low:
        return [low]
    raw = max((high - low) / about, least)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with 2 and 5 between them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [f * 10.0**p for p in powers[::every] for f in factors if low <= f * 10.0**p <= high]
    return found or [float(f"{low:.2g}")]


def tick_label(value: float, step: float, largest: float) -> str:
    """As many decimals as the step between ticks needs; from 10,000 on in k, then M, then G."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * limit:
            return f"{value / limit:.{_decimals(step / limit)}f}{suffix}" if value else "0"
    return f"{value:,.{_decimals(step)}f}"


def x_extent(series: Sequence[Series]) -> tuple[float, float]:
    """The common range of x: from 0 where it begins near 0, never empty."""
    steps = [x for one in series for x in (*one.x[:1], *one.x[-1:])]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    low = 0 if low <= 0.05 * high else low
    return (low, high) if low < high else (low - 1, high + 1)


def smooth(y: Values, half: int) -> list[float | None]:
    """Centred mean over `half` values to each side, gaps left out; a gap stays one.

    Near the beginning the window grows with the distance, so that a steep start is not flattened;
    at the end it is cut off on one side, so that the last value is not a single noisy one.
    """
    sums = [0.0, *accumulate(value or 0.0 for value in y)]
    counts = [0, *accumulate(int(value is not None) for value in y)]
    return [None if y[i] is None else (sums[last] - sums[first]) / (counts[last] - counts[first])
            for i, (first, last) in enumerate(_windows(len(y), half))]


def rolling_median(y: Values, half: int) -> list[float | None]:
    """As `smooth`, but the median: one wild value leaves no trace of the window's width."""
    ordered: list[float] = []
    start, stop = 0, 0
    result: list[float | None] = []
    for i, (first, last) in enumerate(_windows(len(y), half)):
        for value in y[stop:last]:
            if value is not None:
                insort(ordered, value)
        for value in y[start:first]:
            if value is not None:
                del ordered[bisect_left(ordered, value)]
        start, stop = first, last
        result.append(None if y[i] is None else ordered[len(ordered) // 2])
    return result


def _windows(count: int, half: int) -> Iterator[tuple[int, int]]:
    for i in range(count):
        reach = min(half, i // 4)
        yield i - reach, min(i + reach + 1, count)


def extremes(y: Values, buckets: int) -> list[tuple[int, float, float] | None]:
    """(position, lowest, highest) of each of `buckets` equal parts; None where all are gaps."""
    edges = [len(y) * i // buckets for i in range(buckets + 1)]
    result: list[tuple[int, float, float] | None] = []
    for first, last in pairwise(edges):
        finite = [value for value in y[first:last] if value is not None]
        result.append(((first + last) // 2, min(finite), max(finite)) if finite else None)
    return result


def inliers(values: Sequence[float]) -> list[float]:
    """The values without a few wild ones: all where there are under 50, else within 10 half-ranges.

    A half-range is from the median to the 1st and to the 99th percentile.
    """
    if len(values) < 50:
        return list(values)
    ordered = sorted(values)
    middle, cut = median(ordered), len(ordered) // 100
    below, above = middle - ordered[cut], ordered[-1 - cut] - middle
    low, high = middle - 10 * below, middle + 10 * above
    return ordered[bisect_left(ordered, low):bisect_left(ordered, math.nextafter(high, math.inf))]


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0


def _svg_series(one: Series, x_axis: Axis, y_axis: Axis) -> str:
    def points(xs: Sequence[float], ys: Values) -> list[str | None]:
        return [None if y is None else f"{x_axis.place(x):.1f} {_BOX - y_axis.place(y):.1f}"
                for x, y in zip(xs, ys, strict=True)]

    if one.kind == "dots":
        places = [place for place in points(one.x, one.y) if place is not None]
        dots = "".join(f"M{place}h0" for place in places)
        return f'<path class="{one.tone} line" d="{_polyline(places)}"/>' \
               f'<path class="{one.tone} dots" d="{dots}"/>'
    if len(one.x) <= MAX_POINTS:
        return f'<path class="{one.tone} {one.kind}" d="{_polyline(points(one.x, one.y))}"/>'
    parts = extremes(one.y, MAX_POINTS)
    if one.kind == "line":
        xs = [one.x[part[0]] if part else 0 for part in parts]
        ys = [(part[1] + part[2]) / 2 if part else None for part in parts]
        return f'<path class="{one.tone} line" d="{_polyline(points(xs, ys))}"/>'
    bands = []
    for _, stretch in groupby(parts, key=lambda part: part is not None):
        run = [part for part in stretch if part is not None]
        if run:
            xs = [one.x[part[0]] for part in run]
            there, back = points(xs, [part[2] for part in run]), points(xs, [p[1] for p in run])
            bands.append("M" + "L".join(str(place) for place in [*there, *back[::-1]]) + "Z")
    return f'<path class="{one.tone} band" d="{"".join(bands)}"/>'


def _polyline(places: Sequence[str | None]) -> str:
    """SVG path through the places, broken at None; a place between two breaks becomes a dot."""
    path, drawing = [], False
    for place in places:
        if place is not None:
            path.append(f"L{place}" if drawing else f"M{place}h0")
        drawing = place is not None
    return "".join(path)


def _grid(y_axis: Axis) -> str:
    lines = "".join(f"M0 {_BOX - y_axis.place(value):.1f}H{_BOX}" for value, _ in y_axis.ticks())
    return f'<path class="grid" d="{lines}"/>'


def _labels(axis: Axis, side: str) -> str:
    return "".join(f'<span style="{side}:{axis.place(value) / _BOX:.2%}">{escape(label)}</span>'
                   for value, label in axis.ticks())
