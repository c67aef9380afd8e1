"""Figure 3 of the paper: PCC over parameters, and the share of the gap that distillation closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from train import charts
from train.evaluation.experiment_results import HALF, SMALL, TITLES, Outcome, TestSet

PANELS_A_ROW = 3

APART = 1.05
"""Factor between the places of the points of one size: their bars would hide each other."""


@charts.themed
def figure3(tests: Sequence[TestSet], outcome: Outcome) -> str:
    """All sets as one SVG file: correlations, and shares of the gap beneath."""
    columns = min(len(tests), PANELS_A_ROW)
    rows = 2 * -(-len(tests) // columns)
    figure, axes = charts.new(rows=rows, columns=columns)
    for number, test in enumerate(tests):
        place = 2 * (number // columns) * columns + number % columns
        draw_correlations(axes[place], test, outcome)
        draw_shares(axes[place + columns], test, outcome)
        axes[place].set_title(test.heading)
        axes[place + columns].set_title(f"{test.name}: gap closed")
    for one in axes:
        if not one.has_data():
            one.remove()
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=len(handles))
    return charts.svg(figure, "Figure 3")


@charts.themed
def panels(tests: Sequence[TestSet], outcome: Outcome) -> list[tuple[str, Markup]]:
    """The same charts one by one for the page, with their headings."""
    found = []
    for test in tests:
        for draw, more in ((draw_correlations, ""), (draw_shares, ": gap closed")):
            figure, (axes,) = charts.new()
            draw(axes, test, outcome)
            if draw is draw_correlations:
                axes.legend(fontsize=11)
            found.append((test.heading + more, charts.inline(figure, test.heading + more)))
    return found


def draw_correlations(axes: Axes, test: TestSet, outcome: Outcome) -> None:
    """PCC over parameters, a line a kind; the teacher as a level, marked at its size if known."""
    results = [one for one in outcome.results_on(test) if one.pcc is not None]
    sizes = [model.parameters / 1e6 for model in outcome.models if model.parameters]
    charts.millions(axes, sizes, 1.35)
    axes.set_ylabel("PCC")
    for number, kind in enumerate(outcome.kinds):
        mine = [one for one in results if one.kind == kind]
        # Many points stand close together on the lines of pruned models: bars would hide them.
        points = [
            (one.parameters or 0, one.pcc, *((one.pcc_low, one.pcc_high) if kind in TITLES else ()))
            for one in mine
        ]
        _line(axes, points, number, TITLES.get(kind, kind))
    for one in (one for one in results if one.kind == "teacher"):
        size = f", {one.parameters / 1e6:.1f} M" if one.parameters else ""
        size += ": 1 by definition" if one.by_definition else ""
        axes.axhline(one.pcc or 0.0, ls="--", color=charts.SOFT, lw=1)
        if one.parameters:
            axes.plot(one.parameters / 1e6, one.pcc or 0.0, "D", ms=6, color=charts.INK)
        _note(
            axes, (0.02, one.pcc or 0.0), f"teacher {one.model}{size}", axes.get_yaxis_transform()
        )
    named = {m.variant: m.parameters / 1e6 for m in outcome.models if m.variant and m.parameters}
    for name, across in named.items():
        _note(axes, (across, 0.01), name, axes.get_xaxis_transform(), ha="center")
    axes.margins(y=0.15)


def draw_shares(axes: Axes, test: TestSet, outcome: Outcome) -> None:
    """The share of the gap that is closed over parameters, bars cut at -100 and 200 %."""
    charts.millions(axes, [m.parameters / 1e6 for m in outcome.models if m.parameters], 1.35)
    axes.set_ylabel("share of the gap closed (%)")
    points = [
        (gap.parameters, _percent(gap.share), _percent(gap.share_low), _percent(gap.share_high))
        for gap in outcome.gaps_on(test)
        if gap.share is not None
    ]
    _line(axes, points, 0, "share of the gap")
    axes.update_datalim([(points[0][0] / 1e6 if points else 1, end) for end in (0, 100)])
    axes.autoscale_view(scalex=False)
    axes.axhline(100 * HALF, ls="--", color=charts.SOFT, lw=1)
    _note(axes, (0.98, 100 * HALF), "half", axes.get_yaxis_transform(), ha="right")
    tenth = SMALL * (outcome.teacher.parameters or 0) / 1e6
    if axes.get_xlim()[0] < tenth:
        axes.axvline(tenth, ls="--", color=charts.SOFT, lw=1)
        _note(axes, (tenth, 0.95), "1/10 of the teacher", axes.get_xaxis_transform(), ha="center")


def _percent(end: float | None) -> float | None:
    return None if end is None else min(max(100 * end, -100.0), 200.0)


def _line(axes: Axes, points: Sequence[Any], number: int, label: str) -> None:
    """A line through (parameters, value) or (parameters, value, low, high), with bars."""
    points = sorted(points, key=lambda point: point[:2])
    barred = any(len(point) > 2 for point in points)
    x = [point[0] / 1e6 * (APART**number if barred else 1) for point in points]
    y, colour = [point[1] for point in points], charts.SERIES[number % len(charts.SERIES)]
    look: Any = {"ls": "-" if number % 2 == 0 else "--", "marker": "os"[number > 0], "ms": 6}
    axes.plot(x, y, color=colour, lw=1.8, label=label, **look)
    for across, point in zip(x, points, strict=True):
        if barred and None not in point:
            axes.vlines(across, point[2], point[3], colour, lw=1.3)


def _note(axes: Axes, at: tuple[float, float], text: str, transform: Any, ha: str = "left") -> None:
    axes.text(*at, text, transform=transform, ha=ha, va="bottom", size=11, color=charts.SOFT)
