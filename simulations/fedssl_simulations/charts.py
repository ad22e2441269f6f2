"""The geometry of charts: from numbers to the points, paths and ticks that a template draws as SVG. No words of style in here.

Coordinates are SVG units, y downward. Colours are numbers that the page's style sheet gives a meaning in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and what stands beside it."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point with the words that appear when it is pointed at."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """Numbers to draw: ``xs`` ascending; ``dashed`` sets a second kind of line apart; ``marked`` draws every point.

    ``low``, ``high``: the ends of a band around ``ys``, as many; empty: none.
    """

    name: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False
    marked: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Line:
    """One series, drawn: the path of its means, the band between its extremes (empty where nothing was pooled), its dots."""

    name: str
    colour: int
    dashed: bool
    path: str
    band: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class LineChart:
    """Lines over a common x axis inside the frame (left, top) to (right, bottom)."""

    title: str
    about: str
    x_label: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Bar:
    """One value of a bar chart: how long, and what is written behind it. A missing value has no length and says so."""

    length: float
    label: str
    is_best: bool


@dataclass(frozen=True)
class BarRow:
    """A label and one bar a panel."""

    label: str
    kind: str
    colour: int
    y: float
    bars: Sequence[Bar]


@dataclass(frozen=True)
class BarChart:
    """Rows of horizontal bars in panels that share the row labels and one scale from 0."""

    title: str
    about: str
    width: float
    height: float
    thickness: float
    panels: Sequence[Tick]
    rows: Sequence[BarRow]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    digits: str = "g",
    from_zero: bool = False,
    x_label: str = "round",
    x_names: Sequence[str] = (),
    most_points: int = 120,
) -> LineChart:
    """A chart of ``series``; at least one of them has a point.

    Points beyond ``most_points`` are pooled: the line shows the mean of neighbours, the band their smallest and largest.
    Values that are not finite are left out. ``digits``: a format of Python's for the words on dots. ``x_names``: where x is 0, 1, 2,
    ... of things that have names, these.
    """
    width, height, left, right, top, bottom = 560.0, 280.0, 56.0, 544.0, 16.0, 240.0
    finite = [[(x, y) for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(x) and math.isfinite(y)] for one in series]
    pooled = [
        list(zip(one.xs, one.low, one.ys, one.high, strict=True)) if one.low else _pool(points, most_points) for one, points in zip(series, finite, strict=True)
    ]
    xs = [x for points in pooled for x, _, _, _ in points]
    ys = [y for points in pooled for _, low, _, high in points for y in (low, high)]
    x_low, x_high = min(xs), max(xs)
    x_low = 0.0 if 0 < x_low <= x_high / 10 else x_low
    if x_names:
        x_low, x_high = -0.3, len(x_names) - 0.7
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return round(left + (right - left) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5), 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - top) * (y - y_low) / (y_high - y_low), 1)

    lines = []
    for one, points in zip(series, pooled, strict=True):
        if not points:
            continue
        is_pooled = any(low < high for _, low, _, high in points)
        edge = [(x, high) for x, _, _, high in points] + [(x, low) for x, low, _, _ in reversed(points)]
        dots = [Dot(across(x), up(y), f"{one.name}, {x_label} {x_names[int(x)] if x_names else f'{x:g}'}: {y:{digits}}") for x, _, y, _ in points]
        lines.append(
            Line(
                name=one.name,
                colour=one.colour,
                dashed=one.dashed,
                path="M" + "L".join(f"{across(x)} {up(y)}" for x, _, y, _ in points),
                band="M" + "L".join(f"{across(x)} {up(y)}" for x, y in edge) + "Z" if is_pooled else "",
                dots=dots if one.marked or len(points) == 1 else dots[-1:],
            )
        )
    return LineChart(
        title=title,
        about="; ".join(f"{one.name} from {points[0][1]:{digits}} to {points[-1][1]:{digits}}" for one, points in zip(series, finite, strict=True) if points),
        x_label=x_label,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=[Tick(across(at), name) for at, name in enumerate(x_names)]
        or [Tick(across(x), f"{x:,g}") for x in ticks(x_low, x_high, 6) if x_low <= x <= x_high],
        y_ticks=[Tick(up(y), f"{y:.{_decimals(y_ticks)}f}") for y in y_ticks],
        lines=lines,
    )


def bar_chart(title: str, panels: Sequence[str], rows: Sequence[tuple[str, str, int, Sequence[float | None]]], *, digits: str = ".4f") -> BarChart:
    """A row for each (label, kind, colour, one value a panel). All bars share one scale, so panels can be compared."""
    width, gap, value_room, row_height = 980.0, 28.0, 64.0, 30.0
    # About 7.4 units a letter, and room for 40 of them at most: the template shortens what is longer.
    labels = 24.0 + 7.4 * max(20, min(40, max((len(label) for label, *_ in rows), default=0)))
    room = (width - labels - gap * (len(panels) - 1)) / len(panels)
    present = [value for *_, values in rows for value in values if value is not None]
    largest = max(present, default=0.0) or 1.0
    leaders = [max((value for value in column if value is not None), default=None) for column in zip(*(values for *_, values in rows), strict=True)]
    drawn = []
    for number, (label, kind, colour, values) in enumerate(rows):
        bars = [
            Bar(
                length=round((room - value_room) * value / largest, 1) if value is not None else 0.0,
                label=f"{value:{digits}}" if value is not None else "not measured",
                is_best=value is not None and value == leaders[at] and len(rows) > 1,
            )
            for at, value in enumerate(values)
        ]
        drawn.append(BarRow(label, kind, colour, 34.0 + row_height * number, bars))
    return BarChart(
        title=title,
        about="; ".join(
            f"{label}: " + ", ".join(f"{bar.label} {panel}" for bar, panel in zip(row.bars, panels, strict=True)) for row in drawn for label in [row.label]
        ),
        width=width,
        height=34.0 + row_height * len(rows),
        thickness=18.0,
        panels=[Tick(labels + at * (room + gap), panel) for at, panel in enumerate(panels)],
        rows=drawn,
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, ``about`` so many, from at or below ``low`` to at or above ``high``; at least two."""
    if not high > low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / max(about - 1, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * at:.15g}") for at in range(first, last + 1)]


def _decimals(marks: Sequence[float]) -> int:
    """How many decimals tell all the marks exactly."""
    return max(len(f"{mark:.10f}".rstrip("0").partition(".")[2]) for mark in marks)


def _pool(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float, float, float]]:
    """(x, smallest, mean, largest) of runs of neighbours, at most ``most`` of them."""
    size = max(1, math.ceil(len(points) / most))
    pooled = []
    for at in range(0, len(points), size):
        run = points[at : at + size]
        values = [y for _, y in run]
        pooled.append((run[-1][0], min(values), sum(values) / len(values), max(values)))
    return pooled
