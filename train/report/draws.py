"""What was drawn against what the recipe asks for: shares, and distributions of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from markupsafe import Markup

from data_specs.distributions import Choice, Constant, LogUniform, Normal, Uniform, support
from data_specs.io.listen import split_unit
from train import charts
from train.report.reading import Dataset

Spread = Uniform | LogUniform | Normal
DISTRIBUTIONS = (Constant, Uniform, LogUniform, Normal, Choice)
BINS = 20


def decisions(dataset: Dataset) -> list[dict[str, Any]]:
    """Every yes-or-no and every choice: the recipe's probability beside the share drawn."""
    recipe, plans = dataset.recipe, [record.plan for record in dataset.records.values()]
    rows: list[dict[str, Any]] = []
    voices = recipe.sources.voices.corpus if recipe.sources.voices else None
    if recipe.voices:
        recorded = [plan for plan in plans if plan["speech"]["corpus"] != voices]
        spoken = len(plans) - len(recorded)
        rows.append(_row("synthetic voice", recipe.voices.share, spoken, len(plans)))
        if not recipe.voices.degrade:  # the steps below are for recorded speech alone
            plans = recorded
    for stage in recipe.speech_stages:
        rows += _stage_rows(stage, plans)
    for name, asked in (("room", recipe.room), ("noise", recipe.noise)):
        if asked:
            found = sum(bool(plan[name]) for plan in plans)
            rows.append(_row(name, asked.probability, found, len(plans)))
    for stage in recipe.stages:
        rows += _stage_rows(stage, plans)
    return rows


def _stage_rows(stage: Any, plans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds = [step["kind"] for p in plans for step in p["steps"] if step["stage"] == stage.stage]
    rows = [_row(stage.stage, stage.probability, len(kinds), len(plans))]
    if len(stage.choices) > 1:
        total = sum(option.weight for option in stage.choices)
        for option in stage.choices:
            name = f"{stage.stage}: {option.use.kind.replace('_', ' ')}"
            found = kinds.count(option.use.kind)
            rows.append(_row(name, option.weight / total, found, len(kinds), inner=True))
    return rows


def _row(name: str, asked: float, found: int, of: int, inner: bool = False) -> dict[str, Any]:
    share = found / of if of else 0.0
    error = math.sqrt(asked * (1 - asked) / of) if of else 0.0
    return {
        "name": name.replace("_", " "),
        "asked": 100 * asked,
        "drawn": 100 * share,
        "of": of,
        "errors": (share - asked) / error if error else 0.0,
        "inner": inner,
    }


def parameters(dataset: Dataset) -> list[dict[str, Any]]:
    """A chart for every value that is drawn, over the distribution that the recipe asks for."""
    recipe, plans = dataset.recipe, [record.plan for record in dataset.records.values()]
    drawn: list[tuple[str, str, Constant | Spread | Choice, list[float]]] = [
        ("Level", "level_dbfs", recipe.level_dbfs, [p["level_dbfs"] for p in plans]),
        ("Speed", "speed", recipe.speed, [p["speed"] for p in plans]),
    ]
    if recipe.noise:
        snr_db = [plan["noise"]["snr_db"] for plan in plans if plan["noise"]]
        drawn.append(("Signal-to-noise ratio", "snr_db", recipe.noise.snr_db, snr_db))
    for stage in recipe.all_stages():
        for option in stage.choices:
            for field, distribution in option.use:
                if isinstance(distribution, DISTRIBUTIONS):
                    values = _settings(plans, stage.stage, option.use.kind, field)
                    kind = option.use.kind.replace("_", " ")
                    title = f"{stage.stage.replace('_', ' ')}, {kind}: {split_unit(field)[0]}"
                    drawn.append((title, field, distribution, values))
    return [
        {"title": title, "n": len(values), "svg": _chart(title, field, distribution, values)}
        for title, field, distribution, values in drawn
        if values and not isinstance(distribution, Constant)
    ]


def _settings(plans: Sequence[Mapping[str, Any]], stage: str, kind: str, field: str) -> list[float]:
    """Values of a field; one that is drawn for many points (``gain_250_hz_db``) is pooled."""
    stem, _, unit = field.rpartition("_")
    return [
        value
        for plan in plans
        for step in plan["steps"]
        if step["stage"] == stage and step["kind"] == kind
        for name, value in step["params"].items()
        if name == field or (stem and name.startswith(f"{stem}_") and name.endswith(f"_{unit}"))
    ]


def _chart(
    title: str, field: str, distribution: Spread | Choice, values: Sequence[float]
) -> Markup:
    what, unit = ("level", "dBFS") if field == "level_dbfs" else split_unit(field)
    label = f"{what} ({unit})" if unit else what
    if isinstance(distribution, Choice):
        return _choice_chart(title, label, distribution, values)
    values = np.clip(values, -charts.HUGE, charts.HUGE).tolist()
    low, high = support(distribution)
    if isinstance(distribution, Normal):
        low, high = min(values), max(values)
    log = isinstance(distribution, LogUniform)
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    # Where low and high are one value there is no probability between them: NaN.
    expected = np.nan_to_num(np.diff(_law(distribution).cdf(edges)))
    return charts.histogram(title, label, values, edges.tolist(), expected.tolist(), log)


def _law(distribution: Spread) -> Any:
    """A distribution as SciPy has it."""
    if isinstance(distribution, Normal):
        return scipy.stats.norm(distribution.mean, max(distribution.sigma, 1e-12))
    if isinstance(distribution, LogUniform):
        return scipy.stats.loguniform(distribution.low, distribution.high)
    return scipy.stats.uniform(distribution.low, distribution.high - distribution.low)


def _choice_chart(title: str, label: str, choice: Choice, values: Sequence[float]) -> Markup:
    order = sorted(choice.values)
    weights = dict(zip(choice.values, choice.weights or [1.0] * len(order), strict=True))
    total = sum(weights.values())
    shares = [sum(v == value for v in values) / len(values) for value in order]
    names = [f"{value:g}" for value in order]
    return charts.columns(title, label, names, shares, [weights[v] / total for v in order])


def labels(dataset: Dataset) -> Markup:
    """Distribution of the teacher's scores."""
    values = [record.mos for record in dataset.records.values()]
    return charts.histogram(
        "Labels", "teacher's score (MOS)", values, np.linspace(1, 5, 33).tolist()
    )
