"""Pictures as SVG text: points and lines over bytes or lengths, and heat maps. Colours are the page's CSS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from locret.report.study import Heat

NUM_COLOURS = 10
_W, _H = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    text: str  # shown when pointed at


@dataclass(frozen=True)
class Series:
    """Points of one method, joined in the order of x."""

    name: str
    colour: int
    points: Sequence[Point]


def plot(
    series: Sequence[Series], *, x_label: str, y_label: str, label: str, x_text: Callable[[float], str],
    level: float | None = None, level_text: str = "",
) -> str:  # fmt: skip
    """Scores 0..100 over a logarithmic x. `level`: a dashed line, the full cache's score."""
    xs = [point.x for one in series for point in one.points]
    low, high = math.log2(min(xs)), math.log2(max(xs))
    pad = max(0.25, 0.06 * (high - low))
    low, high = low - pad, high + pad

    def at_x(x: float) -> float:
        return _LEFT + (math.log2(x) - low) / (high - low) * (_W - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _TOP + (1 - y / 100) * (_H - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(label)}">']
    for mark in range(0, 101, 20):
        y = at_y(mark)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{mark}</text>')
    for x in _ticks(low, high, sorted(set(xs))):
        parts.append(f'<text class="tick" text-anchor="middle" x="{at_x(x):.1f}" y="{_H - 22}">{x_text(x)}</text>')
    middle = (_LEFT + _W - _RIGHT) / 2
    parts.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{_H - 5}">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" transform="translate(11 {(_TOP + _H - _BOTTOM) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{escape(y_label)}</text>')  # fmt: skip
    if level is not None:
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{at_y(level):.1f}" '
                     f'y2="{at_y(level):.1f}"/>')  # fmt: skip
        parts.append(f'<text class="tick" text-anchor="middle" x="{middle}" y="{max(at_y(level) - 4, 10):.1f}">'
                     f"{escape(level_text)}</text>")  # fmt: skip
    for one in series:
        points = sorted(one.points, key=lambda p: p.x)
        parts.append(f'<g class="c{one.colour % NUM_COLOURS}">')
        if len(points) > 1:
            path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in points)
            parts.append(f'<polyline class="{_dash(one.colour)}" points="{path}"/>')
        for p in points:
            x, y = at_x(p.x), at_y(p.y)
            parts.append(f'<g><title>{escape(p.text)}</title><line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
                         f'y1="{at_y(p.low):.1f}" y2="{at_y(p.high):.1f}"/>'
                         f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>')  # fmt: skip
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def heat(values: Heat, *, label: str, row_name: str, column_name: str) -> str:
    """Shares 0..1 as shades with their percentages; an unmeasured field is empty."""
    num_rows, num_columns = len(values.rows), len(values.columns)
    numbers = num_columns <= 8
    width, height = (40 if numbers else max(6, 320 // num_columns)), (20 if num_rows <= 16 else max(6, 320 // num_rows))
    left, top = 46, 18
    total_w, total_h = left + width * num_columns + 4, top + height * num_rows + 24
    parts = [f'<svg class="heat" style="max-width:{max(total_w, 150) * 1.3:.0f}px" viewBox="0 0 {max(total_w, 150)} '
             f'{total_h}" role="img" aria-label="{escape(label)}">']  # fmt: skip
    every = max(1, math.ceil(num_columns * 26 / (width * num_columns)))
    for j, name in enumerate(values.columns):
        if j % every == 0:
            parts.append(f'<text class="tick" text-anchor="middle" x="{left + width * (j + 0.5)}" y="{top - 6}">'
                         f"{escape(name)}</text>")  # fmt: skip
    every = max(1, math.ceil(13 / height))
    for i, name in enumerate(values.rows):
        y = top + height * i
        if i % every == 0:
            parts.append(f'<text class="tick" text-anchor="end" x="{left - 6}" y="{y + height / 2 + 4}">'
                         f"{escape(name)}</text>")  # fmt: skip
        for j, value in enumerate(values.values[i]):
            x = left + width * j
            if value is None:
                parts.append(f'<rect class="none" x="{x}" y="{y}" width="{width - 1}" height="{height - 1}"/>')
                continue
            text = f"{row_name} {name}, {column_name} {values.columns[j]}: {100 * value:.0f} %"
            parts.append(f'<g><title>{escape(text)}</title><rect class="shade" fill-opacity="{0.04 + 0.96 * value:.3f}"'
                         f' x="{x}" y="{y}" width="{width - 1}" height="{height - 1}"/>')  # fmt: skip
            if numbers and height >= 16:
                style = "number strong" if value > 0.6 else "number"
                parts.append(f'<text class="{style}" text-anchor="middle" x="{x + (width - 1) / 2}" '
                             f'y="{y + height / 2 + 4}">{100 * value:.0f}</text>')  # fmt: skip
            parts.append("</g>")
    parts.append(f'<text class="axis" x="{left}" y="{total_h - 6}">{escape(row_name)} by {escape(column_name)}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float, xs: Sequence[float]) -> list[float]:
    """The values themselves if they are few and apart, else powers of two."""
    apart = all(math.log2(b / a) > 0.13 * (high - low) for a, b in itertools.pairwise(xs))
    if apart and len(xs) <= 7:
        return list(xs)
    step = max(1, math.ceil((high - low) / 6))
    return [2.0**k for k in range(math.ceil(low), math.floor(high) + 1, step)]


def _dash(colour: int) -> str:
    """More methods than colours: the second round is dashed."""
    return "dashed" if colour >= NUM_COLOURS else "solid"
