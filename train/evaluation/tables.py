"""The results as text, Markdown and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.files import write_text
from train.evaluation.published import MARK, published_for, table1
from train.evaluation.records import METRICS, Comparison, SetResult
from train.files import csv_text
from train.pages import decimals, ranged

TITLES = {
    "pcc": "PCC",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "rmse": "RMSE",
    "rmse_mapped": "RMSE mapped",
}


def write_tables(
    out: Path, name: str, content: Any, rows: Sequence[Mapping[str, Any]], text: str
) -> None:
    """``name`` with .json (``content``), .csv (``rows``) and .md (``text``).

    Numbers that are not defined are null or empty.
    """
    write_text(out / f"{name}.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / f"{name}.csv", csv_text(rows))
    write_text(out / f"{name}.md", text)


def means(results: Sequence[SetResult]) -> list[dict[str, Any]]:
    """Per (model, padding): means over the rated sets at clip level, unweighted and by clips.

    A set where a metric is not defined is left out of both means of that metric;
    ``undefined_sets`` counts those without a PCC.
    """
    groups: dict[tuple[str, str], list[SetResult]] = {}
    for result in results:
        if result.kind == "rated" and result.level == "clip":
            groups.setdefault((result.model, result.padding), []).append(result)
    return [_mean(model, padding, group) for (model, padding), group in groups.items()]


def _mean(model: str, padding: str, group: Sequence[SetResult]) -> dict[str, Any]:
    defined = [result for result in group if result.pcc is not None]
    row: dict[str, Any] = {
        "model": model,
        "padding": padding,
        "sets": len(defined),
        "undefined_sets": len(group) - len(defined),
        "clips": sum(result.clips for result in defined),
    }
    for name in METRICS:
        pairs = [(r.clips, v) for r in group if (v := getattr(r, name)) is not None]
        values, weights = [value for _, value in pairs], [clips for clips, _ in pairs]
        row[f"{name}_unweighted"] = float(np.mean(values)) if values else None
        row[f"{name}_weighted"] = float(np.average(values, weights=weights)) if values else None
    return row


def text_table(results: Sequence[SetResult]) -> str:
    """The clip level's results as text."""
    rows = [["model", "set", "padding", "clips", *TITLES.values(), ""]]
    for r in results:
        if r.level == "clip":
            metrics = [decimals(getattr(r, name)) for name in METRICS]
            rows.append([r.model, r.set, r.padding, str(r.clips), *metrics, r.reason or ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<<" + ">" * (1 + len(METRICS)) + "<"
    lines = [
        "  ".join(
            f"{cell:{side}{wide}}" for cell, side, wide in zip(row, sides, widths, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first ``left`` columns are text."""
    marks = ["---"] * left + ["---:"] * (len(titles) - left)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*titles], marks, *cells)]


def results_md(found: Comparison, about: Mapping[str, Any]) -> str:
    """``results.md``: every set and level, means, differences, Table I, what is missing."""
    lines = [f"# Scorers compared, {about['date']}", "", f"`{about['command']}`", ""]
    lines += [f"In brackets: {about['intervals']}.", ""]
    sets = dict.fromkeys(result.set for result in found.results)
    sections = [(name, _of_set(name, found.results)) for name in sets]
    sections += [("Means over the rated sets", _means_md(found.results))]
    sections += [("Differences in PCC, per clip", _pairs_md(found))]
    if found.unavailable:
        rows = [(one.model, one.reason, f"`{one.command}`") for one in found.unavailable]
        head = ("scorer", "why", "to get it")
        sections += [("Not available here", markdown(head, rows, 3))]
    if found.notes:
        sections += [("Left out", [f"- {note}" for note in found.notes])]
    sections += [(f"The paper's Table I ({MARK})", _table1_md())]
    for title, body in sections:
        lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)


def _of_set(name: str, results: Sequence[SetResult]) -> list[str]:
    found = [result for result in results if result.set == name]
    rows = [
        (
            *(r.model, r.padding, r.level, f"{r.points}"),
            *(_ranged(r, metric) for metric in METRICS),
            r.reason or "",
        )
        for r in found
    ]
    rows += [
        (row.model, MARK, "clip", "", f"{pcc:.2f}", *[""] * (len(METRICS) - 1), MARK)
        for row, pcc in (published_for(name) if found[0].kind == "rated" else ())
    ]
    return markdown(("model", "padding", "level", "points", *TITLES.values(), "note"), rows, 3)


def _ranged(result: SetResult, name: str) -> str:
    return ranged(*(getattr(result, f"{name}{end}") for end in ("", "_low", "_high")))


def _means_md(results: Sequence[SetResult]) -> list[str]:
    rows = []
    for row in means(results):
        both = [
            f"{decimals(row[f'{name}_unweighted'])} / {decimals(row[f'{name}_weighted'])}"
            for name in METRICS
        ]
        rows.append([row["model"], row["padding"], f"{row['sets']}", f"{row['clips']}", *both])
    head = ("model", "padding", "sets", "clips", *TITLES.values())
    return ["Unweighted / weighted by clips.", "", *markdown(head, rows, 2)]


def _pairs_md(found: Comparison) -> list[str]:
    rows = [
        (
            *(pair.set, pair.one, pair.other, decimals(pair.difference)),
            f"[{decimals(pair.difference_low)}, {decimals(pair.difference_high)}]",
            *map(p_text, (pair.p, pair.p_holm, pair.williams_p)),
        )
        for pair in found.pairs
    ]
    head = ("set", "one", "other", "PCC one - other", "95 %", "p", "p (Holm)", "p (Williams)")
    return markdown(head, rows, 3)


def p_text(p: float | None) -> str:
    """A p-value in words of two digits."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _table1_md() -> list[str]:
    rows, clips = table1()
    body = [
        (
            *(row.model, f"{row.parameters_m:g}"),
            *("" if row.pcc[name] is None else f"{row.pcc[name]:.2f}" for name in clips),
            *(f"{row.weighted:.2f}", f"{row.unweighted:.2f}"),
        )
        for row in rows
    ]
    return markdown(("model", "M parameters", *clips, "weighted mean", "unweighted mean"), body)
