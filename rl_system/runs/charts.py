"""Small inline SVG charts. Names are escaped; nothing refers to another file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rl_system.runs.timeline import TimelineEvent

COLOURS = ("#2f6fb0", "#d0762b", "#3d8f5f", "#9a4f96", "#b0413e", "#5c6b73")
Point = tuple[float, float]
_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 22


@dataclass(frozen=True)
class Line:
    """One curve: x, y; a y that is not finite breaks it. ``faint`` lines are background (unsmoothed values)."""

    points: Sequence[Point]
    colour: str
    faint: bool = False


def moving_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of the finite values among the last ``window`` points; NaN where there is none."""
    values = np.array([y for _, y in points])
    smoothed = []
    for i, (x, _) in enumerate(points):
        recent = values[max(0, i - window + 1) : i + 1]
        recent = recent[np.isfinite(recent)]
        smoothed.append((x, float(recent.mean()) if recent.size else math.nan))
    return smoothed


def line_chart(lines: Sequence[Line], label: str) -> Markup:
    """Curves over the training step with ticks; ``label`` is read out by screen readers."""
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return Markup('<p class="none">no value yet</p>')
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_scale = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_ticks = _ticks(min(ys), max(ys), 4)
    y_scale = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_svg_open(_WIDTH, _HEIGHT, label)]
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y, "grid") + _text(_LEFT - 6, y + 3.5, _number(tick), "end"))
    for tick in [t for t in _ticks(min(xs), max(xs), 5) if min(xs) <= t <= max(xs) and t == int(t)]:
        parts.append(_text(x_scale(tick), _HEIGHT - 6, _number(tick), "middle"))
    for line in sorted(lines, key=lambda line: not line.faint):
        for run in _unbroken(line.points):
            parts.append(_polyline([(x_scale(x), y_scale(y)) for x, y in run], line))
    return Markup("").join([*parts, Markup("</svg>")])


@dataclass(frozen=True)
class Bar:
    """One share with its interval, all in [0, 1], and the text beside it."""

    name: str
    share: float
    low: float
    high: float
    text: str


def bar_chart(bars: Sequence[Bar], label: str, even: float) -> Markup:
    """A row per bar with a whisker over its interval; ``even`` is what chance gives, a broken line."""
    width, left, right, row, bottom = 760, 24 + 8 * max(len(bar.name) for bar in bars), 70, 38, 24
    height = len(bars) * row + bottom
    ticks = _ticks(0, max(bar.high for bar in bars), 5)
    scale = _scale(0, min(ticks[-1], 1), left, width - right)
    parts = [_svg_open(width, height, label)]
    for tick in (t for t in ticks if t <= 1):
        parts.append(_rule(scale(tick), 0, scale(tick), height - bottom, "grid"))
        parts.append(_text(scale(tick), height - 6, f"{tick:.0%}", "middle"))
    for i, bar in enumerate(bars):
        middle = (i + 0.5) * row
        parts.append(_text(left - 10, middle + 4, bar.name, "end", "process"))
        parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5" fill="{}"/>').format(
                left, middle - 11, scale(bar.share) - left, 22, COLOURS[i % len(COLOURS)]
            )
        )
        low, high = scale(bar.low), scale(bar.high)
        parts.append(_rule(low, middle, high, middle, "whisker"))
        parts += [_rule(x, middle - 5, x, middle + 5, "whisker") for x in (low, high)]
        parts.append(_text(width - right + 12, middle + 4, bar.text, "start", "process"))
    parts.append(_rule(scale(even), 0, scale(even), height - bottom, "even"))
    return Markup("").join([*parts, Markup("</svg>")])


def gantt(rows: Mapping[str, Sequence[TimelineEvent]], start_s: float, end_s: float, origin_s: float) -> Markup:
    """One row per process with a bar per event between ``start_s`` and ``end_s``.

    Events of a process that overlap share its row in lanes. Ticks are seconds after ``origin_s``.
    """
    width, left, row_height, gap = 1100, 150, 26, 8
    bottom = 24
    height = len(rows) * (row_height + gap) + bottom
    scale = _scale(start_s, end_s, left, width - 10)
    parts = [_svg_open(width, height, "time line of all processes")]
    for tick in _ticks(start_s - origin_s, end_s - origin_s, 8):
        if start_s <= tick + origin_s <= end_s:
            x = scale(tick + origin_s)
            parts.append(_rule(x, 0, x, height - bottom, "grid"))
            parts.append(_text(x, height - 6, f"{_number(tick)} s", "middle"))
    for row, (process, events) in enumerate(rows.items()):
        top = row * (row_height + gap) + gap / 2
        parts.append(_text(left - 10, top + row_height / 2 + 4, process, "end", "process"))
        lanes = _lanes(events)
        lane_height = row_height / (1 + max((lane for _, lane in lanes), default=0))
        for event, lane in lanes:
            x, right = scale(max(event.start_s, start_s)), scale(min(event.end_s, end_s))
            parts.append(
                Markup(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5" fill="{}">'
                    "<title>{}: {}, {:.2f} s</title></rect>"
                ).format(
                    *(x, top + lane * lane_height, max(right - x - 0.5, 0.8), max(lane_height - 1, 1)),
                    *(COLOURS[row % len(COLOURS)], process, event.name, event.end_s - event.start_s),
                )
            )
    return Markup("").join([*parts, Markup("</svg>")])


def _lanes(events: Sequence[TimelineEvent]) -> list[tuple[TimelineEvent, int]]:
    """Each event in the first lane that is free at its start."""
    free_at: list[float] = []
    placed = []
    for event in sorted(events, key=lambda e: e.start_s):
        lane = next((i for i, end in enumerate(free_at) if end <= event.start_s), len(free_at))
        free_at[lane : lane + 1] = [event.end_s]
        placed.append((event, lane))
    return placed


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that enclose ``low`` and ``high``."""
    if high - low < 1e-12:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end] linearly; everything to the middle if ``low`` equals ``high``."""
    return lambda value: start + ((value - low) / (high - low) if high > low else 0.5) * (end - start)


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    run: list[Point] = []
    for x, y in points:
        if math.isfinite(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _polyline(points: Sequence[Point], line: Line) -> Markup:
    if len(points) == 1:
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2" fill="{}"/>').format(*points[0], line.colour)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = Markup('stroke-width="1" opacity="0.35"') if line.faint else Markup('stroke-width="1.8"')
    return Markup('<polyline points="{}" fill="none" stroke="{}" {}/>').format(path, line.colour, style)


def _svg_open(width: float, height: float, label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)


def _rule(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, css)


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, css, text)


def _number(value: float) -> str:
    """Short without losing what tells ticks apart: 1,200, 0.05, 2e-06."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{round(value, 6):g}"
