"""The charts of the comparison's page. Dots carry their clip's number: ``data-c``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from train import charts
from train.bootstrap import Doubles
from train.evaluation.mapping import fit_map
from train.evaluation.records import CommonClips, Entry

MOST_CONDITIONS = 24
MOST_LETTERS = 8
"""Longer names of conditions are cut in a chart."""

DOTS_A_STRIP = 60


@dataclass(frozen=True)
class Point:
    """A model over its size: PCC with interval; ``published`` ones were not measured here."""

    name: str
    parameters: int
    pcc: float
    low: float | None = None
    high: float | None = None
    published: bool = False


def scatter(clips: CommonClips, entry: Entry, first: int, truth: str) -> Markup:
    """Scores over ratings, with the monotone third-order map; clips are numbered from ``first``."""
    score_N = clips.scores[entry.label]
    scores = np.linspace(score_N.min(), score_N.max(), 40)
    mapped = fit_map(clips.truth, score_N)
    return charts.scatter(
        f"{entry.label} on {clips.name}",
        (f"{truth} (MOS)", "score (MOS)" if entry.mos_scale else "score"),
        (clips.truth, score_N),
        curve=(mapped(scores), scores) if mapped else None,
        mos_scale=entry.mos_scale,
        first=first,
    )


@charts.themed
def residuals(clips: CommonClips, entry: Entry, first: int) -> tuple[Markup, int] | None:
    """Score less rating by condition (else system), from the worst rated to the best.

    With boxes from the lower to the upper quartile and the median. Scores that are not on the MOS
    scale are mapped first. Returns the chart and how many conditions are not shown: those with the
    smallest mean error. None for a set without conditions and systems.
    """
    errors_N = _errors(clips, entry)
    if clips.unit == "clip" or errors_N is None:
        return None
    groups = np.asarray(clips.groups)
    places = {name: np.flatnonzero(groups == name) for name in sorted(set(clips.groups))}
    worst = sorted(places, key=lambda name: -abs(float(errors_N[places[name]].mean())))
    shown = sorted(
        worst[:MOST_CONDITIONS], key=lambda name: float(clips.truth[places[name]].mean())
    )
    figure, (axes,) = charts.new()
    axes.axhline(0, ls="--", color=charts.SOFT, lw=1)
    axes.boxplot(
        [errors_N[places[name]] for name in shown],
        positions=range(len(shown)),
        widths=0.62,
        showfliers=False,
        showcaps=False,
        whis=0,
        patch_artist=True,
        boxprops={"facecolor": charts.BAR, "linewidth": 0},
        medianprops={"color": charts.INK, "linewidth": 1.5},
    )
    marks, across = [], []
    for number, name in enumerate(shown):
        kept = [places[name][n] for n in charts.thinned(len(places[name]), DOTS_A_STRIP)]
        marks += [first + int(n) for n in kept]
        # Side by side in a fixed order: chance would move them from page to page.
        across += [number + ((n * 0.618) % 1 - 0.5) * 0.5 for n in range(len(kept))]
    charts.dots(axes, across, errors_N[np.array(marks) - first], 4.6, 0.75)
    names = [name if len(name) <= MOST_LETTERS else f"{name[:7]}…" for name in shown]
    slant: Any = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(shown)), names, **(slant if len("".join(names)) > 40 else {}))
    axes.set_ylabel("score - rating (MOS)" if entry.mos_scale else "mapped score - rating (MOS)")
    title = f"residuals of {entry.label} on {clips.name} by {clips.unit}"
    return charts.inline(figure, title, marks), len(places) - len(shown)


def _errors(clips: CommonClips, entry: Entry) -> Doubles | None:
    score_N = clips.scores[entry.label]
    if not entry.mos_scale:
        mapped = fit_map(clips.truth, score_N)
        if mapped is None:
            return None
        score_N = mapped(score_N)
    errors_N: Doubles = score_N - clips.truth
    return errors_N


# --- Figure 3 -------------------------------------------------------------------------------------


@charts.themed
def over_size(title: str, points: Sequence[Point]) -> Markup | None:
    """PCC over parameters (Figure 3 of the paper), every model with its name; None without any."""
    if not points:
        return None
    figure, (axes,) = charts.new()
    sizes = [point.parameters / 1e6 for point in points]
    charts.millions(axes, sizes, 2.2)
    for point, size in zip(points, sizes, strict=True):
        if point.low is not None and point.high is not None:
            axes.vlines(size, point.low, point.high, charts.SERIES[0], lw=1.3)
    published = np.array([point.published for point in points])
    pcc = np.array([point.pcc for point in points])
    for group, face in ((published, "none"), (~published, charts.SERIES[0])):
        edge = charts.SOFT if face == "none" else face
        axes.plot(np.array(sizes)[group], pcc[group], "o", ms=6.5, mfc=face, mec=edge)
    charts.dots(axes, sizes, pcc, 11, 0)  # what the pointer finds: a wide disc that is not seen
    axes.set_ylabel("PCC")
    axes.margins(y=0.15)
    figure.draw_without_rendering()
    _name_points(axes, points, sizes)
    titles = [
        f"{point.name}: PCC {point.pcc:.3f}, {size:.3g} M parameters"
        for point, size in zip(points, sizes, strict=True)
    ]
    return charts.inline(figure, title, titles)


def _name_points(axes: Axes, points: Sequence[Point], sizes: Sequence[float]) -> None:
    """Every model's name beside its point where it covers nothing; others have only a title."""
    at = axes.transData.transform(
        [(size, point.pcc) for size, point in zip(sizes, points, strict=True)]
    )
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for (x, _), point in zip(at, points, strict=True):
        ends = axes.transData.transform([(1, point.low or point.pcc), (1, point.high or point.pcc)])
        taken.append(Bbox.from_extents(x - 1, ends[0][1], x + 1, ends[1][1]))
    for (x, y), point in zip(at, points, strict=True):
        wide = 6.6 * len(point.name)
        for side, up in ((1, 0), (-1, 0), (1, 12), (1, -12), (-1, 12)):
            near, far = x + 8 * side, x + (8 + wide) * side
            box = Bbox.from_extents(min(near, far), y + up - 6, max(near, far), y + up + 6)
            inside = all(axes.bbox.fully_contains(*corner) for corner in (box.min, box.max))
            # As near to another point as to its own it would be taken for the other's.
            near_other = any(abs(a - x) < 20 and abs(b - y - up) < abs(up) for a, b in at)
            if inside and not near_other and not box.count_overlaps(taken):
                taken.append(box)
                look: Any = {"ha": "left" if side > 0 else "right", "va": "center", "size": 11}
                look |= {"style": "italic", "color": charts.SOFT} if point.published else {}
                axes.annotate(point.name, (near, y + up), xycoords="figure pixels", **look)
                break
