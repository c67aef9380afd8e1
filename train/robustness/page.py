"""``robustness.html``: the grid as one file without a script or an outside address."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train import charts
from train.bootstrap import Interval
from train.evaluation.tables import p_text
from train.pages import template
from train.robustness.interface import BITS, METHODS
from train.robustness.results import Row, ordered, worst

COLOURS = dict(zip(BITS, (charts.INK, *charts.SERIES, charts.SOFT), strict=True))


def page(rows: Sequence[Row], speeds: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The page as HTML: the worst cell, curves, sizes and speeds, every cell by what it adds."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    return template("robustness.html.j2").render(
        rows=[(name, ordered(rows, name)) for name in metrics],
        legend=[(b, charts.THEME[c]) for b, c in COLOURS.items() if b in {r.bits for r in rows}],
        panels=_panels([row for row in rows if row.metric == metrics[0]]),
        metric=metrics[0],
        worst=worst(rows),
        speeds=speeds,
        about=about,
        interval=lambda row, name, sign="": Interval(
            *(getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
        ).text(sign),
        p_text=p_text,
    )


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """By model: a titled chart of every condition and way to choose zeros, all on one scale."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model and row.value is not None]
        values = [row.value for row in mine if row.value is not None]
        drawn = []
        for place in dict.fromkeys(row.condition for row in mine):
            for by in METHODS:
                part = [r for r in mine if r.condition == place and r.by in ("", by)]
                if any(row.by for row in part) or by == METHODS[0]:
                    name = f"{place}, zeros by {by}"
                    svg = _curves(f"{model}: {name}", part, (min(values), max(values)))
                    drawn.append((name, svg))
        found.append((model, drawn))
    return found


@charts.themed
def _curves(title: str, rows: Sequence[Row], ends: tuple[float, float]) -> Markup:
    """The metric over the share of zeros, a line for every number of bits."""
    figure, (axes,) = charts.new()
    for bits, colour in COLOURS.items():
        points = [(r.sparsity, r.value) for r in rows if r.bits == bits and r.value is not None]
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", color=colour, ms=4, lw=1.6)
    room = 0.05 * (ends[1] - ends[0]) or 0.05 * max(math.fabs(ends[0]), 1)
    axes.set(xlabel="zeros (% of the weights)", ylabel=rows[0].metric)
    axes.set_ylim(ends[0] - room, ends[1] + room)
    return charts.inline(figure, title)
