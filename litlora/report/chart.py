"""Line charts as SVG."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 280, 84, 32, 12
SMOOTHING = 0.9
"""Weight of the past in the smoothed curve."""


@dataclass(frozen=True)
class Curve:
    """A named curve; `style` is its class in the page's CSS."""

    name: str
    style: str
    points: Points


def smoothed(points: Points) -> Points:
    """Return the exponential moving average, without the bias of its start."""
    result, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + 1 - SMOOTHING
        result.append((x, mean / weight))
    return result


def line_chart(curves: Sequence[Curve]) -> str:
    """Return curves over the same steps as an SVG element; an empty text if there is no point."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x_range, y_range = _range(xs), _range(ys)
    lines = [_polyline(curve, x_range, y_range) for curve in curves if curve.points]
    parts = "".join([*_grid(x_range, y_range), *lines])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{parts}</svg>'


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)


def _x(value: float, limits: tuple[float, float]) -> float:
    return LEFT + (value - limits[0]) / (limits[1] - limits[0]) * (WIDTH - LEFT - 12)


def _y(value: float, limits: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (value - limits[0]) / (limits[1] - limits[0]) * (HEIGHT - BOTTOM - TOP)


def _polyline(curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    places = [(_x(x, x_range), _y(y, y_range)) for x, y in curve.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places if len(places) <= 20)
    return f'<g class="{curve.style}"><polyline points="{line}"/>{dots}</g>'


def _grid(x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    """Return five horizontal lines with their values, and the first, middle and last step."""
    parts = []
    for n in range(5):
        value = y_range[0] + n / 4 * (y_range[1] - y_range[0])
        y = _y(value, y_range)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for n, anchor in enumerate(("start", "middle", "end")):
        value = x_range[0] + n / 2 * (x_range[1] - x_range[0])
        parts.append(f'<text x="{_x(value, x_range):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{value:.0f}</text>')
    return parts
