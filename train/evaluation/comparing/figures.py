"""The charts of the comparison's page, as inline SVG. Dots carry their clip: ``data-c``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from train.evaluation.comparing.mapping import FREEDOM, fit_map
from train.evaluation.comparing.rows import CommonClips, Doubles, Entry
from train.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SQUARE,
    TOP,
    WIDTH,
    Axis,
    axis,
    frame,
    x_at,
    y_at,
)

MOST_DOTS = 1500
"""More clips than this in a chart are thinned evenly: the page stays small."""

MOST_CONDITIONS = 24
MOS = (0.9, 5.1)
LETTER, SMALL_LETTER = 6.4, 5.8
"""Pixels a letter of a chart's small texts takes, about."""


@dataclass(frozen=True)
class Point:
    """A model over its size: PCC with interval; ``quoted`` ones were not measured here."""

    name: str
    parameters: int
    pcc: float
    low: float | None = None
    high: float | None = None
    quoted: bool = False


def shown_places(clips: int) -> list[int]:
    """Which of a chart's clips are drawn."""
    return list(range(0, clips, max(1, math.ceil(clips / MOST_DOTS))))


def scatter(clips: CommonClips, entry: Entry, first: int, truth: str) -> Markup:
    """Scores over ratings, with the monotone third-order map; clips are numbered from ``first``."""
    score_N = clips.scores[entry.label]
    x = Axis(f"{truth} (MOS)", *MOS)
    y = Axis("score (MOS)", *MOS) if entry.mos_scale else axis("score", score_N.tolist())
    body = []
    if entry.mos_scale:
        ends = [f"{x_at(x, mos):.1f} {y_at(y, mos, SQUARE):.1f}" for mos in (1, 5)]
        body.append(f'<path class="ideal" d="M{ends[0]}L{ends[1]}"/>')
    body.append(_map_line(clips.truth, score_N, x, y))
    dots = [
        _dot(first + n, x_at(x, clips.truth[n]), y_at(y, _inside(y, score_N[n]), SQUARE))
        for n in shown_places(len(clips.keys))
    ]
    body.append(f'<g class="dots" opacity="{_opacity(len(dots))}">{"".join(dots)}</g>')
    return frame(x, y, f"{entry.label} on {clips.name}", body, height=SQUARE)


def _dot(clip: int, x: float, y: float) -> str:
    return f'<circle data-c="{clip}" r="2.6" cx="{x:.1f}" cy="{y:.1f}"/>'


def _inside(at: Axis, value: float) -> float:
    return min(max(value, at.low), at.high)


def _opacity(dots: int) -> str:
    return f"{min(0.8, max(0.3, 60 / max(dots, 1))):.2f}"


def _map_line(truth_N: Doubles, score_N: Doubles, x: Axis, y: Axis) -> str:
    if len(truth_N) <= FREEDOM or len(np.unique(score_N)) < FREEDOM:
        return ""
    scores = np.linspace(score_N.min(), score_N.max(), 40)
    mapped = fit_map(truth_N, score_N)(scores)
    points = " ".join(
        f"{x_at(x, _inside(x, a)):.1f},{y_at(y, _inside(y, b), SQUARE):.1f}"
        for a, b in zip(mapped, scores, strict=True)
    )
    return f'<polyline class="line s1" points="{points}"/>'


# --- residuals by condition -----------------------------------------------------------------------


def residuals(clips: CommonClips, entry: Entry, first: int) -> tuple[Markup, int] | None:
    """Score less rating by condition (else system), from the worst rated to the best.

    With boxes from the lower to the upper quartile and the median. Scores that are not on the MOS
    scale are mapped first. Returns the chart and how many conditions are not shown: those with the
    smallest mean error. None for a set without conditions and systems.
    """
    if clips.unit == "clip":
        return None
    errors_N = _errors(clips, entry)
    if errors_N is None:
        return None
    groups = np.asarray(clips.groups)
    names = sorted(set(clips.groups), key=lambda name: float(clips.truth[groups == name].mean()))
    worst = sorted(names, key=lambda name: -abs(float(errors_N[groups == name].mean())))
    shown = [name for name in names if name in set(worst[:MOST_CONDITIONS])]
    label = "score - rating (MOS)" if entry.mos_scale else "mapped score - rating (MOS)"
    y = axis(label, [0.0, *errors_N[np.isin(groups, shown)].tolist()])
    slot = (WIDTH - LEFT - RIGHT) / len(shown)
    body = [f'<path class="ideal" d="M{LEFT} {y_at(y, 0):.1f}H{WIDTH - RIGHT}"/>']
    aslant = SMALL_LETTER * max(map(len, shown)) > slot - 2
    for number, name in enumerate(shown):
        middle = LEFT + slot * (number + 0.5)
        body += _strip(np.flatnonzero(groups == name), errors_N, middle, slot, y, first)
        body.append(_condition_name(name, middle, aslant))
    title = f"residuals of {entry.label} on {clips.name} by {clips.unit}"
    x = Axis("" if aslant else f"{clips.unit}, worst to best rated", 0, 1)
    return frame(x, y, title, body, x_ticks=False), len(names) - len(shown)


def _errors(clips: CommonClips, entry: Entry) -> Doubles | None:
    score_N = clips.scores[entry.label]
    if not entry.mos_scale:
        if len(clips.keys) <= FREEDOM or len(np.unique(score_N)) < FREEDOM:
            return None
        score_N = fit_map(clips.truth, score_N)(score_N)
    errors_N: Doubles = score_N - clips.truth
    return errors_N


def _strip(
    places: np.ndarray, errors_N: Doubles, middle: float, slot: float, y: Axis, first: int
) -> list[str]:
    low, median, high = np.percentile(errors_N[places], [25, 50, 75])
    wide = min(0.62 * slot, 26.0)
    top, bottom = y_at(y, high), y_at(y, low)
    body = [
        f'<rect class="box" x="{middle - wide / 2:.1f}" width="{wide:.1f}" y="{top:.1f}" '
        f'height="{max(bottom - top, 0.5):.1f}"/>',
        f'<path class="median" d="M{middle - wide / 2:.1f} {y_at(y, median):.1f}h{wide:.1f}"/>',
    ]
    kept = places[:: max(1, math.ceil(len(places) / 60))]
    dots = []
    for number, n in enumerate(kept):
        # Side by side in a fixed order: chance would move them from page to page.
        aside = ((number * 0.618) % 1 - 0.5) * 0.8 * wide
        dots.append(_dot(first + int(n), middle + aside, y_at(y, errors_N[n])))
    return [*body, f'<g class="dots" opacity="0.75">{"".join(dots)}</g>']


def _condition_name(name: str, middle: float, aslant: bool) -> str:
    at = HEIGHT - BOTTOM + 15
    if not aslant:
        return f'<text class="x tick small" x="{middle:.1f}" y="{at}">{escape(name)}</text>'
    short = name if len(name) <= 8 else f"{name[:7]}…"
    turned = f"translate({middle + 3:.1f} {at - 6}) rotate(-50)"
    return f'<text class="y tick small" transform="{turned}">{escape(short)}</text>'


# --- Figure 3 -------------------------------------------------------------------------------------


def over_size(title: str, points: Sequence[Point]) -> Markup | None:
    """PCC over parameters (Figure 3 of the paper), every model with its name; None without any."""
    if not points:
        return None
    sizes = [point.parameters / 1e6 for point in points]
    x = Axis("parameters (millions)", min(sizes) / 2.2, max(sizes) * 2.2, log=True)
    ends = [end for p in points for end in (p.pcc, p.low, p.high) if end is not None]
    y = axis("PCC", ends)
    room = 0.1 * (y.high - y.low)
    y = Axis(y.label, y.low - room, y.high + room)
    taken = [box for p in points for box in _covered(p, x, y)]
    body = []
    for point in points:
        across, up = x_at(x, point.parameters / 1e6), y_at(y, point.pcc)
        body.append(_mark(point, across, up, y))
        others = [
            (x_at(x, other.parameters / 1e6), y_at(y, other.pcc))
            for other in points
            if other is not point
        ]
        place = _free_place(point.name, (across, up), others, taken)
        if place:
            taken.append(place[2])
            body.append(
                f'<text class="tick{" soft" if point.quoted else ""}" x="{place[0]:.1f}" '
                f'y="{place[1]:.1f}">{escape(point.name)}</text>'
            )
    return frame(x, y, title, body)


Box = tuple[float, float, float, float]


def _box(left: float, middle: float, width: float) -> Box:
    return left, middle - 6, left + width, middle + 6


def _covered(point: Point, x: Axis, y: Axis) -> list[Box]:
    """What a point and its bar cover."""
    across = x_at(x, point.parameters / 1e6)
    boxes = [_box(across - 4, y_at(y, point.pcc), 8)]
    if point.low is not None and point.high is not None:
        boxes.append((across - 1, y_at(y, point.high), across + 1, y_at(y, point.low)))
    return boxes


def _free_place(
    name: str,
    point: tuple[float, float],
    others: Sequence[tuple[float, float]],
    taken: Sequence[Box],
) -> tuple[float, float, Box] | None:
    """Left end and base line of a name beside its point, and what it covers.

    None where it would cover something, or stand as near to another point as to its own: such a
    point is named by its title alone.
    """
    across, up = point
    wide = LETTER * len(name)
    sides = [across + 7, across - 7 - wide, across - wide / 2]
    for fall in (0, -13, 13):
        for left in sides if fall else sides[:2]:
            box = _box(left, up + fall, wide)
            inside = left >= LEFT + 2 and box[2] <= WIDTH and box[1] >= TOP - 4
            own = _away(box, point)
            alone = all(_away(box, other) > own for other in others)
            free = box[3] <= HEIGHT - BOTTOM and not any(_overlap(box, other) for other in taken)
            if inside and alone and free:
                return left, up + fall + 4, box
    return None


def _away(box: Box, point: tuple[float, float]) -> float:
    """Pixels from a point to the nearest part of a box."""
    across = max(box[0] - point[0], 0, point[0] - box[2])
    return math.hypot(across, max(box[1] - point[1], 0, point[1] - box[3]))


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _mark(point: Point, across: float, up: float, y: Axis) -> str:
    ends = [end for end in (point.low, point.high) if end is not None]
    bar = ""
    if len(ends) == 2:
        low, high = (y_at(y, end) for end in ends)
        bar = f'<path class="bars s0" d="M{across:.1f} {low:.1f}V{high:.1f}"/>'
    size = f"{point.parameters / 1e6:.3g} M parameters"
    said = escape(f"{point.name}: PCC {point.pcc:.3f}, {size}")
    kind = "quoted" if point.quoted else "dot s0"
    return (
        f"<g><title>{said}</title>{bar}"
        f'<circle class="{kind}" r="3.5" cx="{across:.1f}" cy="{up:.1f}"/></g>'
    )
