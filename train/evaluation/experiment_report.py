"""What an experiment writes: tables, ``results.json``, Figure 3 and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_specs.io.files import write_text
from train.evaluation.experiment_figure import figure3, panels
from train.evaluation.experiment_results import KINDS, Outcome, TestSet
from train.evaluation.tables import markdown
from train.files import csv_text
from train.pages import decimals, environment


def results_md(tests: Sequence[TestSet], outcome: Outcome, about: Mapping[str, Any]) -> str:
    """The gap table, the verdicts and the command, for a README."""
    titles = "evaluated on|student|parameters|labelled-only PCC|distilled PCC|teacher PCC"
    titles += "|difference|share of the gap"
    cells = []
    for test in tests:
        by_model = {one.model: one for one in outcome.results_on(test)}
        for gap in outcome.gaps_on(test):
            names = [*(f"{gap.variant}-{kind}" for kind in KINDS), outcome.teacher.name]
            cells.append(
                [f"{test.heading}, {test.size}", gap.variant, f"{gap.parameters:,}"]
                + [by_model[name].pcc_text for name in names]
                + [gap.difference_text, gap.share_text]
            )
    verdicts = [f"- {verdict.text}." for verdict in outcome.verdicts]
    how = f"`{about['command']}`, {about['date']}. In brackets: {about['intervals']}."
    return "\n".join([*markdown(titles.split("|"), cells, 2), "", *verdicts, "", how, ""])


def page(tests: Sequence[TestSet], outcome: Outcome, about: Mapping[str, Any]) -> str:
    """``experiment.html``: one file without a script or an outside address."""
    sets = [
        {"test": test, "results": outcome.results_on(test), "gaps": outcome.gaps_on(test)}
        for test in tests
    ]
    template = environment().get_template("experiment.html.j2")
    return template.render(sets=sets, outcome=outcome, panels=panels(tests, outcome), about=about)


def write_all(
    tests: Sequence[TestSet], outcome: Outcome, about: Mapping[str, Any], out: Path
) -> None:
    """``results.json``, ``.csv`` and ``.md``, ``figure3.svg`` and ``experiment.html``."""
    content = {
        "about": about,
        "models": [asdict(model) for model in outcome.models],
        "sets": [asdict(result) for result in outcome.results],
        "gaps": [asdict(gap) for gap in outcome.gaps],
        "verdicts": [asdict(verdict) for verdict in outcome.verdicts],
    }
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / "results.csv", csv_text([asdict(result) for result in outcome.results]))
    write_text(out / "results.md", results_md(tests, outcome, about))
    write_text(out / "figure3.svg", figure3(tests, outcome))
    write_text(out / "experiment.html", page(tests, outcome, about))


def print_results(tests: Sequence[TestSet], outcome: Outcome) -> None:
    """The results as text."""
    for test in tests:
        print(f"{test.heading}, {test.size}")
        for one in outcome.results_on(test):
            rest = f"Spearman {decimals(one.spearman)}  RMSE {decimals(one.rmse)}"
            print(f"  {one.model:15} {one.parameters or 0:10,}  PCC {one.pcc_text:22}  {rest}")
        for gap in outcome.gaps_on(test):
            print(f"  {gap.variant:15} share of the gap {gap.share_text}")
    for verdict in outcome.verdicts:
        print(verdict.text)
