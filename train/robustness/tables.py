"""The grid as Markdown: a row for every model, condition and share of zeros, a column for bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluation.tables import markdown
from train.pages import decimals
from train.robustness.interface import BITS, INT8
from train.robustness.results import Row


def results_md(
    rows: Sequence[Row], speeds: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The first metric's values, size and speed of real int8, and the command."""
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
