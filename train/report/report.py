"""One HTML page about a run: what was made, learnt and reached. ``python -m train report``.

The page is a single file without a script or an outside address: it opens from disk, keeps, and
can be mailed. What is not there is said, with the command that makes it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from data_specs.distributions import Choice, Constant, LogUniform, Normal, Uniform
from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.listen import data_uri, in_words, spectrogram_png, split_unit
from data_specs.io.parse import json_object
from data_specs.recipe import Recipe
from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE, SampleRecord
from data_specs.strict import describe
from train.command import command_of
from train.data.shards import MOST_INFO_BYTES, list_shards
from train.data.stream import ShardSamples
from train.files import csv_rows
from train.report import charts

Spread = Uniform | LogUniform | Normal
DISTRIBUTIONS = (Constant, Uniform, LogUniform, Normal, Choice)

Model = TypeVar("Model", bound=BaseModel)

PLAYERS = 8

MOST_RECORDS = 20_000
"""Of a large dataset so many samples are read, from shards spread evenly: some 150 MB."""

VERSIONED = ("torch", "numpy", "scipy", "soundfile", "soxr", "distillmos", "webdataset", "ray")


class Missing(Exception):
    """Something that the page would show is not there; the message says what makes it."""


class About(BaseModel):
    """What the page shows of ``dataset.json``."""

    recipe: Recipe
    recipe_hash: str
    corpora: dict[str, Any] = {}


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Speech(_Checked):
    path: str
    corpus: str = ""
    start_sample: int = 0
    speaker: str = ""
    language: str = ""


class _Room(_Checked):
    path: str


class _Noise(_Checked):
    path: str
    snr_db: float


class _Step(_Checked):
    stage: str
    kind: str
    params: dict[str, float]


class Plan(_Checked):
    """What the page counts and shows of a sample's plan; records of strangers may have others."""

    speech: _Speech
    speed: float
    level_dbfs: float
    room: _Room | None
    noise: _Noise | None
    speech_steps: int
    steps: list[_Step]


class _Model(BaseModel):
    """What is read of ``model.json``; all of it may be missing."""

    parameters: int = 0
    metrics: dict[str, float | None] | None = None


class _Result(_Checked):
    """What is read of a result of ``evaluate``."""

    model: str
    set: str
    clips: int
    pcc: float | None
    spearman: float | None
    rmse: float | None
    kind: str = ""
    short: str | None = None


class _Results(BaseModel):
    sets: list[_Result]


class _Score(BaseModel):
    """A row of ``scores.csv``."""

    model: str
    set: str
    path_or_key: str
    truth: float
    score: float


@dataclass(frozen=True)
class Dataset:
    """A folder of shards: its description, and its samples' records by key, in ``samples``' order.

    Of a large one the records of every so many shards; ``total`` and ``dropped`` are of all.
    """

    folder: Path
    about: About
    recipe: Recipe
    samples: ShardSamples
    records: dict[str, SampleRecord]
    total: int
    dropped: int

    @property
    def which(self) -> str:
        """Which samples the page is about."""
        read = len(self.records)
        return "every sample" if read == self.total else f"{read:,} of {self.total:,} samples"


class Section(TypedDict, total=False):
    """A part of the page: what to show, or ``missing`` in words."""

    missing: str
    content: Any


# --- reading --------------------------------------------------------------------------------------


def _json(path: Path, make: str) -> dict[str, Any]:
    if not path.is_file():
        raise Missing(f"{path} is not there. It is made by: {make}")
    if (size := path.stat().st_size) > MOST_INFO_BYTES:
        raise UserError(f"{path}: {size} bytes are too many; make it again: {make}")
    return json_object(path.read_bytes(), path, f"make it again: {make}")


MAKE_RUN = "python -m train fit --student v2 --shards SHARDS --out RUN"
MAKE_SHARDS = "python -m pipeline shards RECIPE --out SHARDS --samples 2000, then --shards SHARDS"
MAKE_SCORES = (
    "python -m train evaluate --model RUN --model v7 --rated labels.csv --shards TEST_SHARDS "
    "--out EVALUATION, then --evaluation EVALUATION"
)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``; a last line cut by a crash is left out."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise Missing(f"{path} is not there. It is made by: {MAKE_RUN}")
    lines = path.read_text("utf-8", "replace").split("\n")
    rows = [_log_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line[-1:] == "}"]
    if not rows:
        raise Missing(f"{path} has no lines yet. It is made by: {MAKE_RUN}")
    return rows


def _log_line(line: str, where: str) -> dict[str, Any]:
    """A line with its step, and numbers in all that is drawn."""
    row = json_object(line, where, "remove the line")
    drawn = [name for _, _, series in CURVES for names in series.values() for name in names]
    also = [name.replace("val_", "validation_") for name in drawn]
    numbers = {name: row[name] for name in (*drawn, *also) if row.get(name) is not None}
    numbers["step"] = row.get("step")
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise UserError(f"{where}: {name!r} is no number: {value!r}; remove the line")
    return dict(row)


def read_model(run: Path) -> dict[str, Any]:
    """What ``model.json`` says of the run's model."""
    about = _json(run / "model.json", MAKE_RUN)
    _parsed(_Model, about, run / "model.json")
    return about


def read_dataset(folder: Path | None) -> Dataset:
    """Description and records, read as the trainer does. Raises ``Missing`` or ``ValueError``."""
    if folder is None:
        raise Missing(f"No dataset was given. Make one: {MAKE_SHARDS}")
    about = _parsed(About, _json(folder / DATASET_FILE, MAKE_SHARDS), folder / DATASET_FILE)
    listed = list_shards(folder)
    total = sum(shard.samples for shard in listed)
    samples = ShardSamples(listed[:: math.ceil(total / MOST_RECORDS)])
    records: dict[str, SampleRecord] = {}
    for number in range(len(samples)):
        record = samples.record(number)
        if record.key in records:
            raise UserError(f"{folder}: sample {record.key} is there twice; make its shard again")
        _parsed(Plan, record.plan, f"{folder}: sample {record.key}: plan")
        records[record.key] = record
    dropped = sum(_dropped(shard.tar.with_suffix(".json")) for shard in listed)
    return Dataset(folder, about, about.recipe, samples, records, total, dropped)


def _dropped(path: Path) -> int:
    dropped = _json(path, MAKE_SHARDS).get("dropped", [])
    if not isinstance(dropped, list):
        raise UserError(f"{path}: 'dropped' must be a list; make the shard again")
    return len(dropped)


def _parsed(model: type[Model], content: Any, where: Path | str) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(describe(error, content, str(where))) from error


@dataclass(frozen=True)
class Evaluation:
    """What ``python -m train evaluate`` wrote."""

    folder: Path
    sets: list[dict[str, Any]]
    scores: list[dict[str, str]]


def read_evaluation(folder: Path | None) -> Evaluation:
    """Results and scores. Raises ``Missing`` or ``ValueError``."""
    if folder is None:
        raise Missing(f"No evaluation was given. Make one: {MAKE_SCORES}")
    results = _json(folder / "results.json", MAKE_SCORES)
    _parsed(_Results, results, folder / "results.json")
    path = folder / "scores.csv"
    if not path.is_file():
        raise Missing(f"{path} is not there. It is made by: {MAKE_SCORES}")
    scores = csv_rows(path)
    for line, row in enumerate(scores, 2):
        _parsed(_Score, row, f"{path}:{line}")
    return Evaluation(folder, results["sets"], scores)


# --- sections -------------------------------------------------------------------------------------


def _column(rows: Sequence[Mapping[str, Any]], *names: str) -> tuple[list[float], list[float]]:
    """Steps and values of the first of ``names`` that a row has; rows without it are left out."""
    steps, values = [], []
    for row in rows:
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if value is not None and math.isfinite(value):
            steps.append(float(row["step"]))
            values.append(float(value))
    return steps, values


CURVES = (
    ("Loss", "mean squared error (MOS²)", {"training": ("loss",), "held out": ("val_loss",)}),
    ("Correlation with the teacher, held out", "Pearson's correlation", {"": ("val_pcc",)}),
    ("Error to the teacher, held out", "RMSE (MOS)", {"": ("val_rmse",)}),
    ("Speed", "samples per second", {"": ("samples_per_s",)}),
    ("Time spent waiting for data", "share of time (%)", {"": ("data_wait_share",)}),
    ("Learning rate", "learning rate", {"": ("lr",)}),
)


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for every quantity that the log has."""
    found = []
    for title, label, wanted in CURVES:
        series = []
        for name, columns in wanted.items():
            also = [column.replace("val_", "validation_") for column in columns]
            x, y = _column(log, *columns, *also)
            if x:
                y = [100 * value for value in y] if "%" in label else y
                series.append(charts.Series(name, x, y))
        if series:
            found.append({"title": title, "svg": charts.lines(title, "updates", label, series)})
    return found


def scatters(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A chart for every model and set, with its figures beneath."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in evaluation.scores:
        key = (row["set"], row["model"], row.get("short", ""))
        groups[key].append((float(row["truth"]), float(row["score"])))
    kinds = {(r["set"], r["model"], r.get("short", "")): r for r in evaluation.sets}
    found = []
    for key, points in groups.items():
        if _matters(key[2]) and any(key[:2] == other[:2] for other in groups if other != key):
            continue  # in the table; a chart of its own would look the same
        result = kinds.get(key, {})
        truth = "teacher's score" if _is_teachers(result) else "people's mean opinion score"
        title = f"{key[1]} on {key[0]}" + (f", short clips: {key[2]}" if _matters(key[2]) else "")
        svg = charts.scatter(title, f"{truth} (MOS)", f"score of {key[1]} (MOS)", points)
        found.append({"title": title, "svg": svg, "result": result, "clips": len(points)})
    return found


def _matters(short: str) -> bool:
    return short not in ("", "none", "zero")


def _is_teachers(result: Mapping[str, Any]) -> bool:
    """Whether a set's truth is the teacher's labels (shards) rather than people's ratings."""
    return result.get("kind") == "shards"


def headlines(
    model: Mapping[str, Any], dataset: Dataset | None, sets: Sequence[Mapping[str, Any]], run: str
) -> list[dict[str, str]]:
    """The few numbers on top: value, unit, what it is and where it comes from."""
    found: list[dict[str, str]] = []
    mine = sorted((row for row in sets if row["model"] == run), key=_is_teachers, reverse=True)
    for row in mine:
        if _is_teachers(row):
            note = f"to the teacher, {row['clips']} samples of {row['set']}"
            found.append({"value": figure(row["pcc"]), "name": "PCC", "note": note})
            found.append({"value": figure(row["rmse"]), "name": "RMSE (MOS)", "note": note})
        elif not _matters(str(row.get("short", ""))):
            found.append({"value": figure(row["pcc"]), "name": "PCC", "note": _beside(row, sets)})
    metrics = model.get("metrics") or {}
    if not mine and metrics:
        for name, title in (("pcc", "PCC"), ("rmse", "RMSE (MOS)")):
            value = figure(metrics.get(name))
            note = "to the teacher, on what training held out"
            found.append({"value": value, "name": title, "note": note})
    if "parameters" in model:
        note = f"student {model.get('student', '')}"
        found.append({"value": f"{model['parameters']:,}", "name": "parameters", "note": note})
    if dataset:
        hours = dataset.total * CROP_SAMPLES / SAMPLE_RATE / 3600
        note = f"{hours:.1f} h of recipe {dataset.recipe.name}, {dataset.dropped} dropped"
        found.append({"value": f"{dataset.total:,}", "name": "samples", "note": note})
    return found


def _beside(row: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    others = [
        f"{other['model']} {figure(other['pcc'])}"
        for other in sets
        if other["set"] == row["set"]
        and other["model"] != row["model"]
        and other.get("short") == row.get("short")
    ]
    beside = f" ({', '.join(others)})" if others else ""
    return f"to people, {row['clips']} clips of {row['set']}{beside}"


def figure(value: float | None) -> str:
    """Three decimals, or a dash where the value is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


# --- what was drawn against the recipe ------------------------------------------------------------


def decisions(dataset: Dataset) -> list[dict[str, Any]]:
    """Every yes-or-no and every choice: the recipe's probability beside the share drawn."""
    recipe, plans = dataset.recipe, [record.plan for record in dataset.records.values()]
    rows: list[dict[str, Any]] = []
    voices = recipe.sources.voices.corpus if recipe.sources.voices else None
    if recipe.voices:
        spoken = sum(plan["speech"]["corpus"] == voices for plan in plans)
        rows.append(_row("synthetic voice", recipe.voices.share, spoken, len(plans)))
        if not recipe.voices.degrade:  # the steps below are for recorded speech alone
            plans = [plan for plan in plans if plan["speech"]["corpus"] != voices]
    for stage in recipe.speech_stages:
        rows += _stage_rows(stage, plans)
    if recipe.room:
        found = sum(bool(plan["room"]) for plan in plans)
        rows.append(_row("room", recipe.room.probability, found, len(plans)))
    if recipe.noise:
        found = sum(bool(plan["noise"]) for plan in plans)
        rows.append(_row("noise", recipe.noise.probability, found, len(plans)))
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
    distance = (share - asked) / error if error else 0.0
    return {
        "name": name.replace("_", " "),
        "asked": 100 * asked,
        "drawn": 100 * share,
        "of": of,
        "errors": distance,
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
    what, unit = split_unit(field)
    unit = "dBFS" if field == "level_dbfs" else unit
    what = "level" if field == "level_dbfs" else what
    label = f"{what} ({unit})" if unit else what
    if isinstance(distribution, Choice):
        return _choice_chart(title, label, distribution, values)
    log = isinstance(distribution, LogUniform)
    edges = _edges(distribution, values)
    return charts.histogram(title, label, values, edges, _expected(distribution), log)


def _choice_chart(title: str, label: str, choice: Choice, values: Sequence[float]) -> Markup:
    order = sorted(choice.values)
    weights = dict(zip(choice.values, choice.weights or [1.0] * len(order), strict=True))
    total = sum(weights.values())
    return charts.columns(
        title,
        label,
        [f"{value:g}" for value in order],
        [sum(v == value for v in values) / len(values) for value in order],
        [weights[value] / total for value in order],
    )


def _edges(distribution: Spread, values: Sequence[float], bins: int = 20) -> list[float]:
    if isinstance(distribution, LogUniform):
        return list(np.geomspace(distribution.low, distribution.high, bins + 1))
    if isinstance(distribution, Uniform):
        return list(np.linspace(distribution.low, distribution.high, bins + 1))
    return list(np.linspace(min(values), max(values), bins + 1))


def _expected(distribution: Spread) -> Callable[[float, float], float]:
    """Probability that a value falls between two edges."""

    def below(value: float) -> float:
        if isinstance(distribution, Normal):
            deviation = (value - distribution.mean) / max(distribution.sigma, 1e-12)
            return 0.5 * (1 + math.erf(deviation / math.sqrt(2)))
        low, high = distribution.low, distribution.high
        if isinstance(distribution, LogUniform):
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low) if high > low else 1.0

    return lambda low, high: below(high) - below(low)


def labels(dataset: Dataset) -> Markup:
    """Distribution of the teacher's scores."""
    values = [record.mos for record in dataset.records.values()]
    edges = list(np.linspace(1, 5, 33))
    return charts.histogram("Labels", "teacher's score (MOS)", values, edges)


# --- samples to listen to -------------------------------------------------------------------------


def players(dataset: Dataset, evaluation: Evaluation | None, run: str) -> list[dict[str, Any]]:
    """Samples spread evenly over the labels, from worst to best."""
    ranked = sorted(dataset.records.values(), key=lambda record: (record.mos, record.key))
    places = np.linspace(0, len(ranked) - 1, min(PLAYERS, len(ranked))).astype(int)
    numbers = {key: number for number, key in enumerate(dataset.records)}
    scores = _student_scores(evaluation, dataset.folder.name, run)
    return [
        _player(record, dataset.samples, numbers[record.key], scores.get(record.key))
        for record in (ranked[place] for place in places)
    ]


def _student_scores(evaluation: Evaluation | None, name: str, run: str) -> dict[str, float]:
    rows = evaluation.scores if evaluation else []
    return {
        row["path_or_key"]: float(row["score"])
        for row in rows
        if row["set"] == name and row["model"] == run
    }


def _player(
    record: SampleRecord, samples: ShardSamples, number: int, student: float | None
) -> dict[str, Any]:
    pcm, _ = samples.read(number)
    return {
        "key": record.key,
        "teacher": f"{record.mos:.2f}",
        "student": None if student is None else f"{student:.2f}",
        "words": in_words(record.plan),
        "audio": data_uri("audio/flac", samples.flac(number)),
        "picture": data_uri("image/png", spectrogram_png(pcm)),
        "seconds": len(pcm) / SAMPLE_RATE,
    }


# --- the page -------------------------------------------------------------------------------------


def _section(make: Callable[[], Any]) -> Section:
    """Content, or in words what is missing. Damaged input is an error, not a gap."""
    try:
        content = make()
    except Missing as missing:
        return {"missing": str(missing)}
    return {"content": content}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def mark_mine(results: Evaluation, weights_sha256: str, name: str) -> Evaluation:
    """Call the run's own model by the run's name, wherever its weights were evaluated."""
    mine = {row["model"] for row in results.sets if row.get("weights_sha256") == weights_sha256}

    def renamed(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [{**row, "model": name} if row["model"] in mine else row for row in rows]

    return replace(results, sets=renamed(results.sets), scores=renamed(results.scores))


def environment() -> jinja2.Environment:
    """What pages are rendered with: this folder's templates, with the filter ``figure``."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["figure"] = figure
    return made


def page(
    run: Path,
    shards: Path | None,
    evaluation: Path | None,
    command: str,
    judged: Path | None = None,
) -> str:
    """The whole page as HTML. Raises ``ValueError`` for damaged input, naming the file.

    ``shards`` were trained on (labels, draws); ``judged`` were not (players; default ``shards``).
    """
    log = _section(lambda: read_log(run))
    model = _section(lambda: read_model(run))
    data = _section(lambda: read_dataset(shards))
    scored = _section(lambda: read_evaluation(evaluation))
    dataset: Dataset | None = data.get("content")
    about: dict[str, Any] = model.get("content") or {}
    results: Evaluation | None = scored.get("content")
    if results:
        results = mark_mine(results, str(about.get("weights_sha256")), run.name)
    heard = read_dataset(judged) if judged else dataset
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            command=command,
            model=about,
            missing={"log": log, "model": model, "data": data, "scores": scored},
            headlines=headlines(about, dataset, results.sets if results else [], run.name),
            curves=curves(log["content"]) if "content" in log else [],
            sets=results.sets if results else [],
            scatters=scatters(results) if results else [],
            dataset=dataset,
            labels=labels(dataset) if dataset and dataset.records else None,
            decisions=decisions(dataset) if dataset and dataset.records else [],
            parameters=parameters(dataset) if dataset and dataset.records else [],
            players=players(heard, results, run.name) if heard and heard.records else [],
            evaluation=evaluation,
            versions=versions(),
            make={"run": MAKE_RUN, "shards": MAKE_SHARDS, "scores": MAKE_SCORES},
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train report``."""
    parser.add_argument("--run", type=path_here, required=True, help="folder that fit wrote")
    parser.add_argument("--shards", type=path_here, help="the dataset that it was trained on")
    parser.add_argument(
        "--judged", type=path_here, help="held-out dataset to listen to (the players)"
    )
    parser.add_argument("--evaluation", type=path_here, help="folder that evaluate wrote")
    parser.add_argument("--out", type=path_here, required=True, metavar="HTML")


def run(args: argparse.Namespace) -> int:
    """``python -m train report``; returns the exit code."""
    command = command_of("report", args, add_arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        args.out, page(args.run.resolve(), args.shards, args.evaluation, command, args.judged)
    )
    print(args.out.resolve())
    return 0
