"""What compression adds, by condition, with intervals, and how that differs between conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from train.bootstrap import Doubles, Interval, bootstrap_p, draws, interval
from train.evaluation.significance import holm
from train.evaluation.tables import markdown
from train.pages import decimals
from train.robustness.interface import BITS, DENSE, INT8, Cell, Clip, Judged, Metric, Values

ALL = "all"
"""The condition of all clips together."""


@dataclass(frozen=True)
class Judgement:
    """A model's values of every clip in one cell."""

    model: str
    cell: Cell
    values: Values


@dataclass(frozen=True)
class Row:
    """One cell in one condition: a record of ``robustness.csv``; 95 % intervals.

    ``added``: how much worse the metric is than the dense model's, on the same clips in the same
    resamples. ``interaction``: how much more that is than in the matched condition. Each p is
    two-sided; Holm's is over the conditions of its cell.
    """

    model: str
    bits: str
    sparsity: float
    by: str
    metric: str
    condition: str
    clips: int
    value: float | None
    low: float | None
    high: float | None
    added: float | None = None
    added_low: float | None = None
    added_high: float | None = None
    added_p: float | None = None
    interaction: float | None = None
    interaction_low: float | None = None
    interaction_high: float | None = None
    interaction_p: float | None = None
    interaction_p_holm: float | None = None
    reason: str | None = None

    @property
    def cell(self) -> Cell:
        """What was done to the weights."""
        return Cell(self.bits, self.sparsity, self.by)


def rows_of(
    task: type[Judged], clips: Sequence[Clip], judged: Sequence[Judgement], matched: str, seed: int
) -> list[Row]:
    """Every cell of every model in every condition and all together, by every metric.

    Groups of clips are drawn once for all, so that cells and conditions are paired.
    """
    drawn_RN = draws([clip.group for clip in clips], seed)
    counts_RN = np.vstack([np.ones(len(clips)), drawn_RN])  # the first is the set as it is
    names = list(dict.fromkeys(clip.condition for clip in clips))
    places = {name: [n for n, c in enumerate(clips) if c.condition == name] for name in names}
    if len(names) > 1:
        places[ALL] = list(range(len(clips)))
    found = []
    for model in dict.fromkeys(one.model for one in judged):
        mine = [one for one in judged if one.model == model]
        truth_N = _truth(task, clips, next(one for one in mine if one.cell == DENSE))
        for name, metric in task.metrics.items():
            tables = [
                {
                    place: _values(metric, counts_RN[:, rows], truth_N[rows], one.values, rows)
                    for place, rows in places.items()
                }
                for one in mine
            ]
            dense = tables[[one.cell for one in mine].index(DENSE)]
            for one, table in zip(mine, tables, strict=True):
                cell = {"model": model, **asdict(one.cell), "metric": name}
                counts = {place: len(rows) for place, rows in places.items()}
                found += _rows(cell, metric, counts, table, dense, matched)
    return found


def _truth(task: type[Judged], clips: Sequence[Clip], dense: Judgement) -> Doubles:
    """What clips are held against (N,): their ratings, or what the dense model says."""
    ratings = [clip.mos for clip in clips if clip.mos is not None]
    known = ratings if len(ratings) == len(clips) else dense.values[task.columns[0]]
    return np.array(known, np.float64)


def _values(
    metric: Metric, counts_RN: Doubles, truth_N: Doubles, values: Values, rows: Sequence[int]
) -> Doubles:
    mine = {name: side[rows] for name, side in values.items()}
    with np.errstate(invalid="ignore"):  # of a resample without any of these clips it is NaN
        return metric.of(counts_RN, truth_N, mine)


def _rows(
    cell: dict[str, Any],
    metric: Metric,
    clips: dict[str, int],
    table: dict[str, Doubles],
    dense: dict[str, Doubles],
    matched: str,
) -> list[Row]:
    added = {place: metric.sign * (table[place] - dense[place]) for place in table}
    rows = []
    for place, values_R in table.items():
        value = _interval(values_R)
        row = cell | {"condition": place, "clips": clips[place], "reason": value.reason}
        row |= {"value": value.value, "low": value.low, "high": value.high}
        if table is not dense:
            row |= _tested(added[place], "added")
        if table is not dense and place not in (matched, ALL):
            row |= _tested(added[place] - added[matched], "interaction")
        rows.append(Row(**row))
    adjusted = holm([row.interaction_p for row in rows])
    return [replace(r, interaction_p_holm=p) for r, p in zip(rows, adjusted, strict=True)]


def _tested(values_R: Doubles, name: str) -> dict[str, Any]:
    return _interval(values_R).named(name) | {f"{name}_p": bootstrap_p(values_R[1:])}


def _interval(values_R: Doubles) -> Interval:
    """The first value, with the interval of the others; none where it is not defined."""
    first = float(values_R[0])
    return interval(first if np.isfinite(first) else None, values_R[1:])


def ordered(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows of a metric, those first to which compression adds most; the dense ones last."""
    mine = [row for row in rows if row.metric == metric]
    return sorted(mine, key=lambda row: -np.inf if row.added is None else row.added, reverse=True)


def worst(rows: Sequence[Row]) -> str:
    """The cell and condition to which compression adds most, in words."""
    first = ordered(rows, rows[0].metric)[0]
    if first.added is None:
        return "nothing was compressed"
    more = Interval(first.added, first.added_low, first.added_high).text()
    return f"{first.model} in {first.cell.label}, {first.condition}: {first.metric} worse by {more}"


def results_md(
    rows: Sequence[Row], speeds: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The grid as Markdown: a row for every model, condition and share of zeros, a column for bits.

    Of the first metric; size and speed of real int8, and the command.
    """
    mine = [row for row in rows if row.metric == rows[0].metric]
    columns = [one for one in (*BITS, INT8) if any(row.bits == one for row in mine)]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in mine:
        zeros = f"{row.sparsity:g} % by {row.by}" if row.sparsity else "none"
        key = row.model, row.condition, zeros
        lines.setdefault(key, {})[row.bits] = decimals(row.value)
    titles = ("model", "condition", "zeros", *columns)
    cells = [[*key, *(values.get(one, "") for one in columns)] for key, values in lines.items()]
    text = [f"{rows[0].metric} by bits a weight.", "", *markdown(titles, cells, 3), ""]
    if speeds:
        names = ("model", "fp32_mb", "int8_mb", "fp32_ms", "int8_ms")
        heads = ("model", "fp32, MB", "int8, MB", "fp32, ms a window", "int8, ms a window")
        table = [[str(one[names[0]]), *(f"{one[n]:.1f}" for n in names[1:])] for one in speeds]
        text += [*markdown(heads, table), ""]
    return "\n".join([*text, f"`{about['command']}`, {about['date']}.", ""])
