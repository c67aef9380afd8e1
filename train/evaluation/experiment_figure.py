"""Figure 3 of the paper: PCC over parameters, and the share of the gap that distillation closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from train import charts
from train.bootstrap import Interval
from train.evaluation.experiment_results import HALF, SMALL, TITLES, Outcome, SetOutcome

PANELS_A_ROW = 3

APART = 1.05
"""Factor between the places of the points of one size: their bars would hide each other."""


@charts.themed
def figure3(outcome: Outcome) -> str:
    """All sets as one SVG file: correlations, and shares of the gap beneath."""
    columns = min(len(outcome.sets), PANELS_A_ROW)
    rows = 2 * -(-len(outcome.sets) // columns)
    figure, axes = charts.new(rows=rows, columns=columns)
    for number, found in enumerate(outcome.sets):
        place = 2 * (number // columns) * columns + number % columns
        draw_correlations(axes[place], found, outcome)
        draw_shares(axes[place + columns], found, outcome)
        axes[place].set_title(found.test.heading)
        axes[place + columns].set_title(f"{found.test.clips.name}: gap closed")
    for one in axes:
        if not one.has_data():
            one.remove()
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=len(handles))
    return charts.svg(figure, "Figure 3")


@charts.themed
def panels(outcome: Outcome) -> list[tuple[str, Markup]]:
    """The same charts one by one for the page, with their headings."""
    charted = []
    for found in outcome.sets:
        for draw, more in ((draw_correlations, ""), (draw_shares, ": gap closed")):
            figure, (axes,) = charts.new()
            draw(axes, found, outcome)
            if draw is draw_correlations:
                axes.legend(fontsize=11)
            heading = found.test.heading + more
            charted.append((heading, charts.inline(figure, heading)))
    return charted


def draw_correlations(axes: Axes, found: SetOutcome, outcome: Outcome) -> None:
    """PCC over parameters, a line a kind; the teacher as a level, marked at its size if known."""
    sizes = [model.parameters / 1e6 for model in outcome.models if model.parameters]
    charts.millions(axes, sizes, 1.35)
    axes.set_ylabel("PCC")
    for number, kind in enumerate(outcome.kinds):
        mine = [one for one in found.results if one.model.kind == kind]
        points = [(one.model.parameters or 0, one.pcc) for one in mine]
        # Many points stand close together on the lines of pruned models: bars would hide them.
        _line(axes, points, number, TITLES.get(kind, kind), barred=kind in TITLES)
    for one in found.results:
        pcc, model = one.pcc.value, one.model
        if model.kind != "teacher" or pcc is None:
            continue
        size = f", {model.parameters / 1e6:.1f} M" if model.parameters else ""
        size += ": 1 by definition" if one.by_definition else ""
        axes.axhline(pcc, ls="--", color=charts.SOFT, lw=1)
        if model.parameters:
            axes.plot(model.parameters / 1e6, pcc, "D", ms=6, color=charts.INK)
        _note(axes, (0.02, pcc), f"teacher {model.name}{size}", axes.get_yaxis_transform())
    named = {m.variant: m.parameters / 1e6 for m in outcome.models if m.variant and m.parameters}
    for name, across in named.items():
        _note(axes, (across, 0.01), name, axes.get_xaxis_transform(), ha="center")
    axes.margins(y=0.15)


def draw_shares(axes: Axes, found: SetOutcome, outcome: Outcome) -> None:
    """The share of the gap that is closed over parameters, bars cut at -100 and 200 %."""
    charts.millions(axes, [m.parameters / 1e6 for m in outcome.models if m.parameters], 1.35)
    axes.set_ylabel("share of the gap closed (%)")
    points = [(gap.parameters, _percent(gap.share)) for gap in found.gaps]
    _line(axes, points, 0, "share of the gap", barred=True)
    axes.update_datalim([(1, 0), (1, 100)])
    axes.autoscale_view(scalex=False)
    axes.axhline(100 * HALF, ls="--", color=charts.SOFT, lw=1)
    _note(axes, (0.98, 100 * HALF), "half", axes.get_yaxis_transform(), ha="right")
    tenth = SMALL * (outcome.teacher.parameters or 0) / 1e6
    if axes.get_xlim()[0] < tenth:
        axes.axvline(tenth, ls="--", color=charts.SOFT, lw=1)
        _note(axes, (tenth, 0.95), "1/10 of the teacher", axes.get_xaxis_transform(), ha="center")


def _percent(share: Interval) -> Interval:
    def cut(end: float | None) -> float | None:
        return None if end is None else min(max(100 * end, -100.0), 200.0)

    return Interval(cut(share.value), cut(share.low), cut(share.high))


def _line(
    axes: Axes, points: Sequence[tuple[int, Interval]], number: int, label: str, barred: bool
) -> None:
    """A line through parameters and values that are defined, with bars of their intervals."""
    points = sorted(
        (point for point in points if point[1].value is not None),
        key=lambda point: (point[0], point[1].value),
    )
    x = [size / 1e6 * (APART**number if barred else 1) for size, _ in points]
    y: Any = [one.value for _, one in points]
    colour = charts.SERIES[number % len(charts.SERIES)]
    look: Any = {"ls": "-" if number % 2 == 0 else "--", "marker": "os"[number > 0], "ms": 6}
    axes.plot(x, y, color=colour, lw=1.8, label=label, **look)
    for across, (_, one) in zip(x, points, strict=True):
        if barred and one.low is not None and one.high is not None:
            axes.vlines(across, one.low, one.high, colour, lw=1.3)


def _note(axes: Axes, at: tuple[float, float], text: str, transform: Any, ha: str = "left") -> None:
    axes.text(*at, text, transform=transform, ha=ha, va="bottom", size=11, color=charts.SOFT)
