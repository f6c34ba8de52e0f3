"""Line charts and histograms as HTML: a drawing that stretches with the page, and labels that do not.

The drawing is an SVG of `WIDTH` x `HEIGHT` units over the whole plot; lines keep their width however it is stretched.
Ticks are placed beside it in percent, so that text is as large on a phone as on a wide screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 600
"""Of a drawn curve: a page of a long run stays small."""
MOST_DOTS = 40
"""A curve of at most as many points has them marked, with their values shown by the pointer."""
COLORS = 8
"""Styles c0 to c7 of the template, for curves that stand for runs."""


@dataclass(frozen=True)
class Curve:
    """A named curve; `style` is its class in the page's CSS."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Axis:
    """The range of an axis, and its round ticks."""

    low: float
    high: float
    ticks: Sequence[float]

    def part(self, value: float) -> float:
        """Return where a value lies between both ends."""
        return (value - self.low) / (self.high - self.low)


def smoothed(points: Points) -> Points:
    """Return the mean of each point with its neighbours on both sides, a sixteenth of the curve in all.

    The window is symmetric and becomes narrower towards the ends: a straight line stays where it is.
    """
    most, last = len(points) // 32, len(points) - 1
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    halves = [min(most, index, last - index) for index in range(len(points))]
    return [(x, (sums[n + half + 1] - sums[n - half]) / (2 * half + 1))
            for n, ((x, _), half) in enumerate(zip(points, halves, strict=True))]  # fmt: skip


def line_chart(curves: Sequence[Curve], x_name: str = "step") -> str:
    """Return curves over the same steps; an empty text if there is no point."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x, y = whole_axis(min(xs), max(xs)), round_axis(min(ys), max(ys))
    drawn = "".join(_curve(curve, x, y) for curve in curves if curve.points)
    names = ", ".join(curve.name for curve in curves if curve.points)
    return _plot(drawn, x, y, f"{names} over {x_name}")


def histogram(edges: Sequence[float], counts: Sequence[int], x_name: str) -> str:
    """Return bars between edges; an empty text if nothing is counted."""
    if not any(counts):
        return ""
    x, y = Axis(edges[0], edges[-1], ticks(edges[0], edges[-1])), round_axis(0, max(counts))
    bars = "".join(_bar(x, y, *bar) for bar in zip(edges, edges[1:], counts, strict=False))
    return _plot(bars, x, y, f"rows by {x_name}")


def round_axis(low: float, high: float) -> Axis:
    """Return an axis that ends with ticks on both sides."""
    marks = ticks(*_apart(low, high), outside=True)
    return Axis(marks[0], marks[-1], marks)


def whole_axis(low: float, high: float) -> Axis:
    """Return an axis of whole numbers with exactly this range."""
    low, high = (low, high) if high > low else (low - 1, high + 1)
    return Axis(low, high, [mark for mark in ticks(low, high) if mark == int(mark)])


def ticks(low: float, high: float, count: int = 5, *, outside: bool = False) -> list[float]:
    """Return about `count` round numbers between two values, or around them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = low / step, high / step
    indices = range(math.floor(first + 1e-9), math.ceil(last - 1e-9) + 1) if outside else \
        range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)  # fmt: skip
    return [float(f"{index * step:.12g}") for index in indices]


def tick_label(value: float) -> str:
    """Return a tick as it is written."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.6g}"


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)


def _plot(drawn: str, x: Axis, y: Axis, label: str) -> str:
    """Return a drawing with its grid, and its ticks around it."""
    grid = "".join(f'<path class="grid" d="M0 {_up(y.part(mark))}H{WIDTH}"/>' for mark in y.ticks)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
    rows = "".join(f'<span class="y" style="top:{100 * (1 - y.part(m)):.2f}%">{tick_label(m)}</span>' for m in y.ticks)
    columns = "".join(f'<span class="x" style="left:{100 * x.part(m):.2f}%">{tick_label(m)}</span>' for m in x.ticks)
    return f'<div class="plot">{svg}{grid}{drawn}</svg>{rows}{columns}</div>'


def _curve(curve: Curve, x: Axis, y: Axis) -> str:
    places = [(f"{WIDTH * x.part(a):.1f}", _up(y.part(b))) for a, b in thinned(curve.points)]
    line = " ".join(f"{a},{b}" for a, b in places)
    dots = ""
    if len(curve.points) <= MOST_DOTS:
        titles = (f"{escape(curve.name)}, {tick_label(a)}: {b:.4g}" for a, b in curve.points)
        dots = "".join(
            f'<path class="dot" d="M{a} {b}h0"><title>{title}</title></path>'
            for (a, b), title in zip(places, titles, strict=True)
        )
    return f'<g class="{escape(curve.style)}"><polyline points="{line}"/>{dots}</g>'


def thinned(points: Points) -> Points:
    """Return at most about MOST_POINTS of the points: the lowest and the highest of each stretch."""
    size = -(-len(points) // (MOST_POINTS // 2))
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        kept += sorted({min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])})
    return kept


def _bar(x: Axis, y: Axis, left: float, right: float, count: int) -> str:
    start, width, top = WIDTH * x.part(left), WIDTH * (x.part(right) - x.part(left)), _up(y.part(count))
    title = f"{tick_label(left)} to {tick_label(right)}: {count:,}"
    return (
        f'<rect class="bar" x="{start:.1f}" y="{top}" width="{max(width - 2, 1):.1f}" '
        f'height="{HEIGHT - float(top):.1f}"><title>{title}</title></rect>'
    )


def _up(part: float) -> str:
    return f"{HEIGHT * (1 - part):.1f}"
