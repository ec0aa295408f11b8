"""Charts as inline SVG: no script, no colour of their own (the style sheet colours a series by its class), a text equivalent each.

Sizes are in CSS pixels at a width of 340, so that two charts stand side by side on a desk and one fills a phone, text at reading size in both.
Every function returns markup that is safe to stand in a page: text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340, 264
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 12, 44


@dataclass(frozen=True)
class Point:
    """A measured point, with its 95 % intervals where there are any (low, high)."""

    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """What one model, or yardstick, shows: `name` is its class in the style sheet, which gives colour, dash and mark.

    `aside` moves the marks by so many pixels to the right, where several would cover each other at one x; those marks are hollow.
    """

    name: str
    title: str
    line: Sequence[tuple[float, float]] = ()
    points: Sequence[Point] = ()
    aside: float | None = None


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`."""

    title: str
    ticks: Sequence[float]
    show: Callable[[float], str]

    @property
    def low(self) -> float:
        """The first tick."""
        return self.ticks[0]

    @property
    def high(self) -> float:
        """The last tick."""
        return self.ticks[-1]


def percent(value: float) -> str:
    """0.25 -> '25 %'."""
    return f"{100 * value:g} %"


def shares(highest: float, title: str) -> Axis:
    """An axis of shares from 0 to the first of 10, 20, 40, 60 % or 100 % that holds `highest`."""
    top, step = next(((top, step) for top, step in ((0.1, 0.02), (0.2, 0.05), (0.4, 0.1), (0.6, 0.2)) if highest <= top), (1.0, 0.2))
    return Axis(title, [round(step * number, 4) for number in range(round(top / step) + 1)], percent)


def chart(title: str, description: str, x: Axis, y: Axis, series: Iterable[Series], diagonal: bool = False,
          upright: float | None = None) -> Markup:
    """Lines and points over two linear axes; lines and intervals end where an axis ends.

    Args:
        title: the chart's name, for a screen reader.
        description: what it shows, in words and figures, for a screen reader.
        x: the axis below.
        y: the axis on the left.
        series: what to draw, later ones on top.
        diagonal: draw the line y = x.
        upright: draw the line x = this.
    """
    across = _scale(x, LEFT, WIDTH - RIGHT)
    up = _scale(y, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, across, up)]
    if diagonal:
        parts.append(Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(across(x.low), up(y.low), across(x.high), up(y.high)))
    if upright is not None:
        parts.append(Markup('<line class="ideal" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(across(upright), up(y.low), up(y.high)))
    parts += [_series(one, x.high, across, up) for one in series]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}. {}">{}</svg>').format(
        WIDTH, HEIGHT, title, description, Markup("").join(parts))


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    def scale(value: float) -> float:
        share = (min(max(value, axis.low), axis.high) - axis.low) / (axis.high - axis.low)
        return round(start + share * (end - start), 1)
    return scale


def _grid(x: Axis, y: Axis, across: Callable[[float], float], up: Callable[[float], float]) -> Markup:
    floor = HEIGHT - BOTTOM
    lines = [Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/><text class="tick end" x="{}" y="{}">{}</text>').format(
        LEFT, up(tick), WIDTH - RIGHT, up(tick), LEFT - 6, up(tick) + 4, y.show(tick)) for tick in y.ticks]
    lines += [Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/><text class="tick middle" x="{}" y="{}">{}</text>').format(
        across(tick), floor, across(tick), floor + 4, across(tick), floor + 17, x.show(tick)) for tick in x.ticks]
    lines.append(Markup('<text class="axis middle" x="{}" y="{}">{}</text>').format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.title))
    lines.append(Markup('<text class="axis middle" transform="translate(14 {}) rotate(-90)">{}</text>').format((TOP + floor) / 2, y.title))
    return Markup("").join(lines)


def _until(line: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The part of a line, given from left to right, that lies at x <= end."""
    inside = [point for point in line if point[0] <= end]
    if inside and len(inside) < len(line):
        (x0, y0), (x1, y1) = inside[-1], line[len(inside)]
        inside.append((end, y0 + (y1 - y0) * (end - x0) / (x1 - x0)))
    return inside


def _series(one: Series, end: float, across: Callable[[float], float], up: Callable[[float], float]) -> Markup:
    parts = []
    if one.line:
        steps = " ".join(f"{across(x)},{up(y)}" for x, y in _until(one.line, end))
        parts.append(Markup('<polyline class="line" points="{}"/>').format(steps))
    for point in one.points:
        at_x, at_y = round(across(point.x) + (one.aside or 0), 1), up(point.y)
        if point.y_interval:
            parts.append(Markup('<line class="interval" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(at_x, *map(up, point.y_interval)))
        if point.x_interval:
            low, high = map(across, point.x_interval)
            parts.append(Markup('<line class="interval" x1="{1}" y1="{0}" x2="{2}" y2="{0}"/>').format(at_y, low, high))
        parts.append(mark(one.name, at_x, at_y))
    return Markup('<g class="series {}{}"><title>{}</title>{}</g>').format(
        one.name, "" if one.aside is None else " hollow", one.title, Markup("").join(parts))


_MARKS = {"base": "M-4.5-4.5h9v9h-9z", "bag_of_words": "M0-6l5.5 10h-11z", "embedding": "M0-6l6 6-6 6-6-6z",
          "chosen": "M-2.5-8h5v5.5h5.5v5h-5.5v5.5h-5v-5.5h-5.5v-5h5.5z", "compared": "M-5-5l10 10M-5 5l10-10"}
"""Shapes, since colour alone does not reach everybody; a circle for the rest."""


def mark(name: str, x: float, y: float) -> Markup:
    """The shape of a series at a place."""
    if shape := _MARKS.get(name):
        return Markup('<path class="mark" transform="translate({} {})" d="{}"/>').format(x, y, shape)
    return Markup('<circle class="mark" cx="{}" cy="{}" r="5"/>').format(x, y)


def legend_mark(name: str) -> Markup:
    """The shape and line of a series, to stand before its name."""
    return Markup('<svg class="key series {}" viewBox="0 0 26 14" aria-hidden="true"><line class="line" x1="0" y1="7" x2="26" y2="7"/>{}</svg>'
                  ).format(name, mark(name, 13, 7))


def interval_bar(name: str, share: float, low: float, high: float) -> Markup:
    """A rate on a scale from 0 to 1, with its interval; decoration beside the figures, so hidden from a screen reader."""
    return Markup('<svg class="bar series {}" viewBox="0 0 120 14" aria-hidden="true"><line class="grid" x1="0" y1="7" x2="120" '
                  'y2="7"/><line class="interval" x1="{:.1f}" y1="7" x2="{:.1f}" y2="7"/>{}</svg>').format(
                      name, 120 * low, 120 * high, mark(name, round(120 * share, 1), 7))


def count_bar(share: float) -> Markup:
    """A count as a part of the largest; hidden from a screen reader, the figure stands beside it."""
    return Markup('<svg class="bar count" viewBox="0 0 120 14" aria-hidden="true">'
                  '<rect x="0" y="2" width="{:.1f}" height="10"/></svg>').format(120 * share)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that enclose low and high, at most `most` + 1 of them."""
    span = max(high - low, 1e-9)
    magnitude = 10.0 ** (len(str(int(span))) - 1) if span >= 1 else 0.1
    step = next(magnitude * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5, 10) if span / (magnitude * factor) <= most - 1)
    first = int(low // step)
    ticks = [round(step * first, 6)]
    while ticks[-1] < high:
        ticks.append(round(step * (first + len(ticks)), 6))
    return ticks
