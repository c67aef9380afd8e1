"""One HTML page about a run: what was made, learnt and reached. ``python -m train report``.

The page is a single file without a script or an outside address: it opens from disk, keeps, and
can be mailed. What is not there is said, with the command that makes it.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.addresses import path_here
from data_specs.io.files import write_text
from data_specs.io.listen import data_uri, in_words, spectrogram_png
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE, SampleRecord
from train import charts
from train.command import command_of
from train.data.stream import ShardSamples
from train.pages import decimals, template
from train.report.draws import decisions, labels, parameters
from train.report.reading import (
    CURVES,
    MAKE_RUN,
    MAKE_SCORES,
    MAKE_SHARDS,
    Dataset,
    Evaluation,
    Missing,
    read_dataset,
    read_evaluation,
    read_log,
    read_model,
)

PLAYERS = 8


# --- sections -------------------------------------------------------------------------------------


def _column(
    log: Sequence[Mapping[str, Any]], name: str, scale: float
) -> tuple[list[float], list[float]]:
    """Steps and values of a column; lines without it are left out."""
    lines = [line for line in log if line.get(name) is not None and math.isfinite(line[name])]
    return [float(line["step"]) for line in lines], [scale * float(line[name]) for line in lines]


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for every quantity that the log has."""
    found = []
    for title, label, wanted in CURVES:
        scale = 100 if "%" in label else 1
        columns = {name: _column(log, column, scale) for name, column in wanted.items()}
        if series := {name: points for name, points in columns.items() if points[0]}:
            found.append({"title": title, "svg": charts.lines(title, "steps", label, series)})
    return found


def scatters(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A chart for every model and set, with its figures beneath."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in evaluation.scores:
        key = (row["set"], row["model"], row.get("padding", ""))
        groups[key].append((float(row["truth"]), float(row["score"])))
    results = {(r["set"], r["model"], r.get("padding", "")): r for r in evaluation.sets}
    found = []
    for key, points in groups.items():
        name, model, padding = key
        if _matters(padding) and any(key[:2] == other[:2] for other in groups if other != key):
            continue  # in the table; a chart of its own would look the same
        result = results.get(key, {})
        truth = "teacher's score" if _is_teachers(result) else "people's mean opinion score"
        title = f"{model} on {name}" + (f", short clips: {padding}" if _matters(padding) else "")
        x, y = zip(*points, strict=True)
        svg = charts.scatter(title, (f"{truth} (MOS)", f"score of {model} (MOS)"), (x, y))
        found.append({"title": title, "svg": svg, "result": result, "clips": len(points)})
    return found


def _matters(padding: str) -> bool:
    return padding not in ("", "none", "zero")


def _is_teachers(result: Mapping[str, Any]) -> bool:
    """Whether a set's truth is the teacher's labels (shards) rather than people's ratings."""
    return result.get("kind") == "shards"


def headlines(
    model: Mapping[str, Any], dataset: Dataset | None, sets: Sequence[Mapping[str, Any]], run: str
) -> list[tuple[str, str, str]]:
    """The few numbers on top: value, what it is and where it comes from."""
    found: list[tuple[str, str, str]] = []
    mine = sorted((row for row in sets if row["model"] == run), key=_is_teachers, reverse=True)
    for row in mine:
        if _is_teachers(row):
            note = f"to the teacher, {row['clips']} samples of {row['set']}"
            found += [(decimals(row["pcc"]), "PCC", note)]
            found += [(decimals(row["rmse"]), "RMSE (MOS)", note)]
        elif not _matters(str(row.get("padding", ""))):
            found += [(decimals(row["pcc"]), "PCC", _beside(row, sets))]
    metrics = model.get("metrics") or {}
    if not mine and metrics:
        note = "to the teacher, on what training held out"
        found += [(decimals(metrics.get("pcc")), "PCC", note)]
        found += [(decimals(metrics.get("rmse")), "RMSE (MOS)", note)]
    if "parameters" in model:
        found += [(f"{model['parameters']:,}", "parameters", f"student {model.get('student', '')}")]
    if dataset:
        hours = dataset.total * CROP_SAMPLES / SAMPLE_RATE / 3600
        note = f"{hours:.1f} h of recipe {dataset.recipe.name}, {dataset.dropped} dropped"
        found += [(f"{dataset.total:,}", "samples", note)]
    return found


def _beside(row: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    others = [
        f"{other['model']} {decimals(other['pcc'])}"
        for other in sets
        if other["set"] == row["set"]
        and other["model"] != row["model"]
        and other.get("padding") == row.get("padding")
    ]
    beside = f" ({', '.join(others)})" if others else ""
    return f"to people, {row['clips']} clips of {row['set']}{beside}"


# --- samples to listen to -------------------------------------------------------------------------


def players(dataset: Dataset, evaluation: Evaluation | None, run: str) -> list[dict[str, Any]]:
    """Samples spread evenly over the labels, from worst to best."""
    numbered = enumerate(dataset.records.values())
    ranked = sorted(numbered, key=lambda one: (one[1].mos, one[1].key))
    places = np.linspace(0, len(ranked) - 1, min(PLAYERS, len(ranked)), dtype=int).tolist()
    scores = {
        row["path_or_key"]: float(row["score"])
        for row in (evaluation.scores if evaluation else ())
        if row["set"] == dataset.folder.name and row["model"] == run
    }
    chosen = (ranked[place] for place in places)
    return [_player(dataset.samples, number, record, scores) for number, record in chosen]


def _player(
    samples: ShardSamples, number: int, record: SampleRecord, scores: Mapping[str, float]
) -> dict[str, Any]:
    pcm, _ = samples.read(number)
    return {
        "key": record.key,
        "teacher": record.mos,
        "student": scores.get(record.key),
        "words": in_words(record.plan),
        "audio": data_uri("audio/flac", samples.flac(number)),
        "picture": data_uri("image/png", spectrogram_png(pcm)),
        "seconds": len(pcm) / SAMPLE_RATE,
    }


# --- the page -------------------------------------------------------------------------------------


def mark_mine(results: Evaluation, weights_sha256: str, name: str) -> Evaluation:
    """Call the run's own model by the run's name, wherever its weights were evaluated."""
    mine = {row["model"] for row in results.sets if row.get("weights_sha256") == weights_sha256}

    def renamed(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [{**row, "model": name} if row["model"] in mine else row for row in rows]

    return replace(results, sets=renamed(results.sets), scores=renamed(results.scores))


def page(
    run: Path,
    shards: Path | None,
    evaluation: Path | None,
    command: str,
    held_out: Path | None = None,
) -> str:
    """The whole page as HTML. Raises ``ValueError`` for damaged input, naming the file.

    ``shards`` were trained on (labels, draws); ``held_out`` were not (players; default ``shards``).
    """
    missing: dict[str, str] = {}

    def part(name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Missing as error:
            missing[name] = str(error)
            return None

    log = part("log", lambda: read_log(run))
    about = part("model", lambda: read_model(run)) or {}
    dataset: Dataset | None = part("data", lambda: read_dataset(shards))
    results: Evaluation | None = part("scores", lambda: read_evaluation(evaluation))
    if results:
        results = mark_mine(results, str(about.get("weights_sha256")), run.name)
    shown = read_dataset(held_out) if held_out else dataset
    drawn = dataset if dataset and dataset.records else None
    return template("report.html.j2").render(
        run=run,
        command=command,
        model=about,
        missing=missing,
        headlines=headlines(about, dataset, results.sets if results else [], run.name),
        curves=curves(log or []),
        sets=results.sets if results else [],
        scatters=scatters(results) if results else [],
        dataset=dataset,
        labels=drawn and labels(drawn),
        decisions=drawn and decisions(drawn),
        parameters=drawn and parameters(drawn),
        players=players(shown, results, run.name) if shown and shown.records else [],
        evaluation=evaluation,
        make={"run": MAKE_RUN, "shards": MAKE_SHARDS, "scores": MAKE_SCORES},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train report``."""
    add = parser.add_argument
    add("--run", type=path_here, required=True, help="folder that fit wrote")
    add("--shards", type=path_here, help="the dataset that it was trained on")
    add("--held-out", type=path_here, help="held-out dataset to listen to (the players)")
    add("--evaluation", type=path_here, help="folder that evaluate wrote")
    add("--out", type=path_here, required=True, metavar="HTML")


def run(args: argparse.Namespace) -> int:
    """``python -m train report``; returns the exit code."""
    command = command_of("report", args, add_arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    html = page(args.run.resolve(), args.shards, args.evaluation, command, args.held_out)
    write_text(args.out, html)
    print(args.out.resolve())
    return 0
