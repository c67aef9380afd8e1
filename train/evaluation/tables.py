"""The results as text, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.evaluation.published import MARK, published_for, table1
from train.evaluation.records import METRICS, Comparison, Pair, SetResult
from train.pages import decimals, ranged

TITLES = {
    "pcc": "PCC",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "rmse": "RMSE",
    "rmse_mapped": "RMSE mapped",
}


def means(results: Sequence[SetResult]) -> list[dict[str, Any]]:
    """Per (model, short): means over the rated sets at clip level, unweighted and by clips.

    A set where a metric is not defined is left out of both means of that metric;
    ``undefined_sets`` counts those without a PCC.
    """
    groups: dict[tuple[str, str], list[SetResult]] = {}
    for result in results:
        if result.kind == "rated" and result.level == "clip":
            groups.setdefault((result.model, result.short), []).append(result)
    return [_mean(model, short, group) for (model, short), group in groups.items()]


def _mean(model: str, short: str, group: Sequence[SetResult]) -> dict[str, Any]:
    defined = [result for result in group if result.pcc is not None]
    row: dict[str, Any] = {
        "model": model,
        "short": short,
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
    rows = [
        [r.model, r.set, r.short, str(r.clips)]
        + [decimals(getattr(r, name)) for name in METRICS]
        + [r.reason or ""]
        for r in results
        if r.level == "clip"
    ]
    rows.insert(0, ["model", "set", "short", "clips", *TITLES.values(), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{wide}}" if place in (0, 1, 2, 9) else f"{cell:>{wide}}"
            for place, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first ``left`` columns are text."""
    marks = ["---"] * left + ["---:"] * (len(titles) - left)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*titles], marks, *cells)]


def results_md(found: Comparison, about: Mapping[str, Any]) -> str:
    """``results.md``: every set and level, means, differences, Table I, what is missing."""
    lines = [f"# Scorers compared, {about['date']}", "", f"`{about['command']}`", ""]
    lines += [f"In brackets: {about['intervals']}.", ""]
    for name in dict.fromkeys(result.set for result in found.results):
        lines += [f"## {name}", "", *_of_set(name, found.results), ""]
    lines += ["## Means over the rated sets", "", *_means_md(found.results), ""]
    lines += ["## Differences in PCC, per clip", "", *_pairs_md(found.pairs), ""]
    if found.unavailable:
        rows = [(one.model, one.reason, f"`{one.command}`") for one in found.unavailable]
        lines += ["## Not available here", "", *markdown(("scorer", "why", "to get it"), rows, 3)]
        lines.append("")
    if found.notes:
        lines += ["## Left out", "", *(f"- {note}" for note in found.notes), ""]
    lines += [f"## The paper's Table I ({MARK})", "", *_table1_md(), ""]
    return "\n".join(lines)


def _of_set(name: str, results: Sequence[SetResult]) -> list[str]:
    found = [result for result in results if result.set == name]
    rows = [
        (
            r.model,
            r.short,
            r.level,
            f"{r.points}",
            *(_ranged(r, metric) for metric in METRICS),
            r.reason or "",
        )
        for r in found
    ]
    rows += [
        (row.model, MARK, "clip", "", f"{pcc:.2f}", *[""] * (len(METRICS) - 1), MARK)
        for row, pcc in (published_for(name) if found[0].kind == "rated" else ())
    ]
    titles = ("model", "short", "level", "points", *TITLES.values(), "note")
    return markdown(titles, rows, 3)


def _ranged(result: SetResult, name: str) -> str:
    return ranged(*(getattr(result, f"{name}{end}") for end in ("", "_low", "_high")))


def _means_md(results: Sequence[SetResult]) -> list[str]:
    rows = [
        (
            row["model"],
            row["short"],
            f"{row['sets']}",
            f"{row['clips']}",
            *(
                f"{decimals(row[f'{name}_unweighted'])} / {decimals(row[f'{name}_weighted'])}"
                for name in METRICS
            ),
        )
        for row in means(results)
    ]
    head = ("model", "short", "sets", "clips", *TITLES.values())
    return ["Unweighted / weighted by clips.", "", *markdown(head, rows, 2)]


def _pairs_md(pairs: Sequence[Pair]) -> list[str]:
    rows = [
        (
            pair.set,
            pair.one,
            pair.other,
            decimals(pair.difference),
            f"[{decimals(pair.difference_low)}, {decimals(pair.difference_high)}]",
            p_text(pair.p),
            p_text(pair.p_holm),
            p_text(pair.williams_p),
        )
        for pair in pairs
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
            row.model,
            f"{row.parameters_m:g}",
            *("" if row.pcc[name] is None else f"{row.pcc[name]:.2f}" for name in clips),
            f"{row.weighted:.2f}",
            f"{row.unweighted:.2f}",
        )
        for row in rows
    ]
    head = ("model", "M parameters", *clips, "weighted mean", "unweighted mean")
    return markdown(head, body)
