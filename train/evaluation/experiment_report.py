"""What an experiment writes: tables, ``results.json``, Figure 3 and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_specs.io.files import write_text
from train.evaluation.experiment_figure import figure3, panels
from train.evaluation.experiment_results import KINDS, Outcome
from train.evaluation.tables import markdown, write_tables
from train.pages import decimals, environment


def results_md(outcome: Outcome, about: Mapping[str, Any]) -> str:
    """The gap table, the verdicts and the command, for a README."""
    titles = "evaluated on|student|parameters|labelled-only PCC|distilled PCC|teacher PCC"
    titles += "|difference|share of the gap"
    cells = []
    for found in outcome.sets:
        pcc = {one.model.name: one.pcc_text for one in found.results}
        for gap in found.gaps:
            names = [*(f"{gap.variant}-{kind}" for kind in KINDS), outcome.teacher.name]
            cells.append(
                [f"{found.test.heading}, {found.test.size}", gap.variant, f"{gap.parameters:,}"]
                + [pcc[name] for name in names]
                + [gap.difference.text("+"), gap.share_text]
            )
    verdicts = [f"- {verdict.text}." for found in outcome.sets for verdict in found.verdicts]
    how = f"`{about['command']}`, {about['date']}. In brackets: {about['intervals']}."
    return "\n".join([*markdown(titles.split("|"), cells, 2), "", *verdicts, "", how, ""])


def write_all(outcome: Outcome, about: Mapping[str, Any], out: Path) -> None:
    """``results.json``, ``.csv`` and ``.md``, ``figure3.svg`` and ``experiment.html``.

    The page is one file without a script or an outside address.
    """
    results = [one.record(found.test) for found in outcome.sets for one in found.results]
    content = {
        "about": about,
        "models": [asdict(model) for model in outcome.models],
        "sets": results,
        "gaps": [gap.record(found.test) for found in outcome.sets for gap in found.gaps],
        "verdicts": [asdict(verdict) for found in outcome.sets for verdict in found.verdicts],
    }
    write_tables(out, "results", content, results, results_md(outcome, about))
    write_text(out / "figure3.svg", figure3(outcome))
    template = environment().get_template("experiment.html.j2")
    page = template.render(outcome=outcome, panels=panels(outcome), about=about)
    write_text(out / "experiment.html", page)


def print_results(outcome: Outcome) -> None:
    """The results as text."""
    for found in outcome.sets:
        print(f"{found.test.heading}, {found.test.size}")
        for one in found.results:
            size = f"{one.model.name:15} {one.model.parameters or 0:10,}"
            rest = f"Spearman {decimals(one.spearman.value)}  RMSE {decimals(one.rmse.value)}"
            print(f"  {size}  PCC {one.pcc_text:22}  {rest}")
        for gap in found.gaps:
            print(f"  {gap.variant:15} share of the gap {gap.share_text}")
    for found in outcome.sets:
        for verdict in found.verdicts:
            print(verdict.text)
