"""Small charts as inline SVG that take their colours from the page, so that they suit its theme.

Hand-made rather than matplotlib's: text stays text, both themes work, and a chart is a few kB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 250  # about the width of a column, so that 13 px text stays 13 px
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 12, 44
SQUARE = 350
MAX_POINTS = 4_000
"""More points than this in a scatter chart are thinned evenly: the page stays small."""


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """One axis: label with unit, limits, and whether it is logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies between the limits, 0 to 1."""
        if self.log:
            value, low, high = math.log(value), math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside the limits."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def axis(label: str, values: Sequence[float], log: bool = False) -> Axis:
    """An axis around ``values``, a little wider; never empty."""
    low, high = min(values), max(values)
    if log:
        return Axis(label, low / 1.1, high * 1.1, log=True)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(label, low - margin, high + margin)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**p for p in powers for m in marks if low <= m * 10.0**p <= high]
        if len(found) >= 3:
            return found
    return _ticks(low, high)


def number_text(value: float) -> str:
    """A number short enough for an axis."""
    text = f"{value:.6g}"
    if len(text) > 5 and (abs(value) < 0.1 or abs(value) >= 1e5):  # it must fit beside the axis
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return text


def x_at(at: Axis, value: float) -> float:
    """Pixels from the left of a value."""
    return LEFT + at.place(value) * (WIDTH - LEFT - RIGHT)


def y_at(at: Axis, value: float, height: int = HEIGHT) -> float:
    """Pixels from the top of a value."""
    return height - BOTTOM - at.place(value) * (height - TOP - BOTTOM)


def frame(
    x: Axis, y: Axis, title: str, body: Sequence[str], x_ticks: bool = True, height: int = HEIGHT
) -> Markup:
    """A chart around its ``body``: grid, axes, ticks and labels."""
    parts = []
    for tick in y.ticks():
        at = f"{y_at(y, tick, height):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="y tick" x="{LEFT - 6}" y="{at}">{number_text(tick)}</text>')
    base = height - BOTTOM
    for tick in x.ticks() if x_ticks else ():
        at = f"{x_at(x, tick):.1f}"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text class="x tick" x="{at}" y="{base + 17}">{number_text(tick)}</text>')
    parts += body
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + base) / 2
    parts.append(f'<text class="x" x="{middle_x}" y="{height - 8}">{escape(x.label)}</text>')
    parts.append(
        f'<text class="x" transform="translate(10 {middle_y}) rotate(-90)">{escape(y.label)}</text>'
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> Markup:
    """Lines over a common x; one legend entry each where there are several."""
    x = axis(x_label, [value for one in series for value in one.x])
    y = axis(y_label, [value for one in series for value in one.y])
    body = []
    for number, one in enumerate(series):
        points = " ".join(
            f"{x_at(x, a):.1f},{y_at(y, b):.1f}" for a, b in zip(one.x, one.y, strict=True)
        )
        body.append(f'<polyline class="line s{number}" points="{points}"/>')
        if len(one.x) < 40:
            body += [
                f'<circle class="dot s{number}" r="2.5" cx="{x_at(x, a):.1f}" '
                f'cy="{y_at(y, b):.1f}"/>'
                for a, b in zip(one.x, one.y, strict=True)
            ]
    if len(series) > 1:
        body += _legend([one.name for one in series])
    return frame(x, y, title, body)


def _legend(names: Sequence[str]) -> list[str]:
    body = []
    for number, name in enumerate(names):
        y = TOP + 10 + 16 * number
        body.append(
            f'<line class="line s{number}" x1="{WIDTH - RIGHT - 22}" x2="{WIDTH - RIGHT - 4}" '
            f'y1="{y}" y2="{y}"/>'
            f'<text class="y" x="{WIDTH - RIGHT - 28}" y="{y}">{escape(name)}</text>'
        )
    return body


def scatter(
    title: str, x_label: str, y_label: str, points: Sequence[tuple[float, float]]
) -> Markup:
    """Scores on both axes, 1 to 5, with the line where both are equal."""
    step = max(1, len(points) // MAX_POINTS)
    shown = points[::step]
    x, y = Axis(x_label, 0.9, 5.1), Axis(y_label, 0.9, 5.1)
    opacity = min(0.75, max(0.3, 60 / max(len(shown), 1)))
    dots = "".join(
        f'<circle r="2.4" cx="{x_at(x, a):.1f}" cy="{y_at(y, min(max(b, 0.9), 5.1), SQUARE):.1f}"/>'
        for a, b in shown
    )
    ends = [f"{x_at(x, mos):.1f} {y_at(y, mos, SQUARE):.1f}" for mos in (1, 5)]
    ideal = f'<path class="ideal" d="M{ends[0]}L{ends[1]}"/>'
    return frame(
        x, y, title, [ideal, f'<g class="dots" opacity="{opacity:.2f}">{dots}</g>'], height=SQUARE
    )


def histogram(
    title: str,
    x_label: str,
    values: Sequence[float],
    edges: Sequence[float],
    expected: Callable[[float, float], float] | None = None,
    log: bool = False,
) -> Markup:
    """Share of ``values`` in each bin; ``expected(low, high)`` outlines the share asked for."""
    bins = list(pairwise(edges))
    shares = [_share(values, low, high, high == edges[-1]) for low, high in bins]
    asked = [expected(low, high) for low, high in bins] if expected else []
    x = Axis(x_label, edges[0], edges[-1], log)
    y = Axis("share of samples (%)", 0, 108 * max([*shares, *asked, 1e-6]))
    body = []
    for (low, high), share in zip(bins, shares, strict=True):
        left, right, top = x_at(x, low), x_at(x, high), y_at(y, 100 * share)
        body.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'y="{top:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
    if asked:
        path = "".join(
            f"{'M' if i == 0 else 'L'}{x_at(x, low):.1f} {y_at(y, 100 * p):.1f}H{x_at(x, high):.1f}"
            for i, ((low, high), p) in enumerate(zip(bins, asked, strict=True))
        )
        body.append(f'<path class="asked" d="{path}"/>')
    return frame(x, y, title, body)


def _share(values: Sequence[float], low: float, high: float, closed: bool) -> float:
    inside = sum(low <= value < high or (closed and value == high) for value in values)
    return inside / len(values) if len(values) else 0.0


def columns(
    title: str,
    x_label: str,
    names: Sequence[str],
    shares: Sequence[float],
    expected: Sequence[float],
) -> Markup:
    """A column for each named value, with the share that is asked for marked across it."""
    y = Axis("share of samples (%)", 0, 108 * max([*shares, *expected]))
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    body = []
    for number, (name, share, asked) in enumerate(zip(names, shares, expected, strict=True)):
        left, top = LEFT + slot * (number + 0.2), y_at(y, 100 * share)
        body.append(
            f'<rect class="bar" x="{left:.1f}" width="{0.6 * slot:.1f}" y="{top:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
        at = f"{y_at(y, 100 * asked):.1f}"
        body.append(f'<path class="asked" d="M{left - 4:.1f} {at}h{0.6 * slot + 8:.1f}"/>')
        middle = f"{left + 0.3 * slot:.1f}"
        body.append(
            f'<text class="x tick" x="{middle}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>'
        )
    return frame(Axis(x_label, 0, 1), y, title, body, x_ticks=False)


# --- estimates with intervals, and a sheet of charts that stands alone ----------------------------

DODGE = 5.0
"""Pixels between the points of two series at one x: error bars would hide each other."""


@dataclass(frozen=True)
class Estimates:
    """A line with error bars: its name, points, and interval ends (None: no bar)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


@dataclass(frozen=True)
class Level:
    """A dashed line across the chart at ``y`` with its label; a mark on it at ``x`` if given."""

    label: str
    y: float
    x: float | None = None


@dataclass(frozen=True)
class Upright:
    """A dashed line from bottom to top at ``x`` with its label."""

    label: str
    x: float


def estimates(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Estimates],
    level: Level | None = None,
    upright: Upright | None = None,
    names: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Lines with error bars; the first is solid with round marks, the second dashed, square ones.

    The points of one x stand ``DODGE`` pixels apart. Bars end at the chart's edge. ``names`` are
    written above the x axis, each at its x.
    """
    body = _level(x, y, level) if level else []
    if upright:
        at = f"{x_at(x, upright.x):.1f}"
        body.append(f'<path class="ideal" d="M{at} {TOP + 16}V{HEIGHT - BOTTOM}"/>')
        body.append(f'<text class="x tick" x="{at}" y="{TOP + 10}">{escape(upright.label)}</text>')
    for number in reversed(range(len(series))):  # the first on top
        shift = DODGE * (number - (len(series) - 1) / 2)
        body += _with_bars(x, y, series[number], number, shift)
    for name, value in names:
        at = f"{x_at(x, value):.1f}"
        body.append(
            f'<text class="x tick" x="{at}" y="{HEIGHT - BOTTOM - 5}">{escape(name)}</text>'
        )
    return frame(x, y, title, body)


def _level(x: Axis, y: Axis, level: Level) -> list[str]:
    at = y_at(y, level.y)
    # The label lies above the line, at the end that the mark leaves free.
    left, anchor = (WIDTH - RIGHT - 3, "end") if level.x is None else (LEFT + 5, "start")
    body = [
        f'<path class="ideal" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>',
        f'<text class="tick" text-anchor="{anchor}" x="{left}" y="{at - 6:.1f}">'
        f"{escape(level.label)}</text>",
    ]
    if level.x is not None:
        middle = x_at(x, level.x)
        body.append(f'<path class="mark" d="M{middle:.1f} {at - 5:.1f}l5 5l-5 5l-5 -5z"/>')
    return body


def _with_bars(x: Axis, y: Axis, one: Estimates, number: int, shift: float) -> list[str]:
    places = [
        (x_at(x, a) + shift, y_at(y, b), low, high)
        for a, b, low, high in zip(one.x, one.y, one.low, one.high, strict=True)
    ]
    points = " ".join(f"{across:.1f},{up:.1f}" for across, up, _, _ in places)
    body = [f'<polyline class="line s{number}" points="{points}"/>']
    for across, up, low, high in places:
        if low is not None and high is not None:
            ends = [y_at(y, min(max(end, y.low), y.high)) for end in (low, high)]
            caps = "".join(f"M{across - 3:.1f} {end:.1f}h6" for end in ends)
            bar = f"M{across:.1f} {ends[0]:.1f}V{ends[1]:.1f}{caps}"
            body.append(f'<path class="bars s{number}" d="{bar}"/>')
        if number == 0:
            body.append(f'<circle class="dot s0" r="3.5" cx="{across:.1f}" cy="{up:.1f}"/>')
        else:
            body.append(
                f'<rect class="dot s{number}" x="{across - 3:.1f}" y="{up - 3:.1f}" '
                f'width="6" height="6"/>'
            )
    return body


# Colours are written out, not as variables: what shows pictures in a README may not know those.
SHEET_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1c2126; }
text.tick { fill: #5c6670; font-size: 12px; } text.head { font-weight: 600; }
text.x { text-anchor: middle; } text.y { text-anchor: end; dominant-baseline: central; }
.paper { fill: #fff; } line.grid { stroke: #d9dee3; } .axis { stroke: #5c6670; fill: none; }
.ideal { stroke: #5c6670; stroke-dasharray: 4 4; fill: none; } .mark { fill: #1c2126; }
.line { fill: none; stroke-width: 1.8; } .line.s1 { stroke-dasharray: 6 3; }
.line.s3, .line.s5 { stroke-dasharray: 2 3; }
.bars { fill: none; stroke-width: 1.3; }
.s0 { stroke: #1f5fa8; } .s1 { stroke: #c2571a; }
.dot.s0 { fill: #1f5fa8; } .dot.s1 { fill: #c2571a; }
.s2, .s3 { stroke: #18794e; } .dot.s2, .dot.s3 { fill: #18794e; }
.s4, .s5 { stroke: #8a3ffc; } .dot.s4, .dot.s5 { fill: #8a3ffc; }
@media (prefers-color-scheme: dark) {
text { fill: #e4e8ec; } text.tick { fill: #9aa5b0; } .paper { fill: #14171a; }
line.grid { stroke: #353c44; } .axis, .ideal { stroke: #9aa5b0; } .mark { fill: #e4e8ec; }
.s0 { stroke: #78aee8; } .s1 { stroke: #f0965a; }
.dot.s0 { fill: #78aee8; } .dot.s1 { fill: #f0965a; }
.s2, .s3 { stroke: #5bc392; } .dot.s2, .dot.s3 { fill: #5bc392; }
.s4, .s5 { stroke: #c4a0ff; } .dot.s4, .dot.s5 { fill: #c4a0ff; }
}
"""
HEADING, LEGEND, GAP = 26, 34, 18


def sheet(
    title: str, rows: Sequence[Sequence[tuple[str, Markup]]], legend: Sequence[str]
) -> Markup:
    """Rows of (heading, chart) as one SVG file with colours of its own, for light and dark.

    ``legend`` names the series, in their order.
    """
    width = max(len(row) for row in rows) * (WIDTH + GAP) + GAP
    height = LEGEND + len(rows) * (HEADING + HEIGHT + GAP)
    body = _sheet_legend(legend)
    for number, row in enumerate(rows):
        top = LEGEND + number * (HEADING + HEIGHT + GAP)
        for place, (heading, chart) in enumerate(row):
            left = GAP + place * (WIDTH + GAP)
            body.append(f'<text class="head" x="{left}" y="{top + 16}">{escape(heading)}</text>')
            at = f'x="{left}" y="{top + HEADING}" width="{WIDTH}" height="{HEIGHT}"'
            body.append(str(chart).replace("<svg ", f"<svg {at} ", 1))  # Markup would escape it
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}"><style>{SHEET_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{"".join(body)}</svg>\n'
    )


def _sheet_legend(names: Sequence[str]) -> list[str]:
    body, left = [], float(GAP)
    for number, name in enumerate(names):
        body.append(f'<path class="line s{number}" d="M{left} 20h30"/>')
        mark = (
            f'<circle class="dot s0" r="3.5" cx="{left + 15}" cy="20"/>'
            if number == 0
            else f'<rect class="dot s{number}" x="{left + 12}" y="17" width="6" height="6"/>'
        )
        body.append(f'{mark}<text x="{left + 38}" y="24">{escape(name)}</text>')
        left += 38 + 8.0 * len(name) + 24
    return body
