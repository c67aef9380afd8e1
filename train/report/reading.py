"""What the report reads: a run's log and model, a dataset, an evaluation; each checked first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from data_specs.io.errors import UserError
from data_specs.io.parse import json_object
from data_specs.recipe import Recipe
from data_specs.sample import DATASET_FILE, SampleRecord
from data_specs.strict import checked
from train.data.shards import MOST_INFO_BYTES, list_shards
from train.data.stream import ShardSamples
from train.files import csv_rows

MOST_RECORDS = 20_000
"""Of a large dataset so many samples are read, from shards spread evenly: some 150 MB."""


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
    padding: str | None = None


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
    samples: ShardSamples
    records: dict[str, SampleRecord]
    total: int
    dropped: int

    @property
    def recipe(self) -> Recipe:
        """What the samples were drawn by."""
        return self.about.recipe

    @property
    def which(self) -> str:
        """Which samples the page is about."""
        read = len(self.records)
        return "every sample" if read == self.total else f"{read:,} of {self.total:,} samples"


CURVES = (
    ("Loss", "mean squared error (MOS²)", {"training": "loss", "held out": "validation_loss"}),
    ("Correlation with the teacher, held out", "Pearson's correlation", {"": "validation_pcc"}),
    ("Error to the teacher, held out", "RMSE (MOS)", {"": "validation_rmse"}),
    ("Speed", "samples per second", {"": "samples_per_s"}),
    ("Time spent waiting for data", "share of time (%)", {"": "data_wait_share"}),
    ("Learning rate", "learning rate", {"": "lr"}),
)
"""Charts of the log: title, label, and by series the column."""

_COLUMNS: Any = {name: (float | None, None) for *_, series in CURVES for name in series.values()}
_LogLine = create_model(
    "_LogLine", __config__=ConfigDict(strict=True), step=(float, ...), **_COLUMNS
)

MAKE_RUN = "python -m train fit --student v2 --shards SHARDS --out RUN"
MAKE_SHARDS = "python -m pipeline shards RECIPE --out SHARDS --samples 2000, then --shards SHARDS"
MAKE_SCORES = (
    "python -m train evaluate --model RUN --model v7 --rated labels.csv --shards TEST_SHARDS "
    "--out EVALUATION, then --evaluation EVALUATION"
)

# --- reading --------------------------------------------------------------------------------------


def _require(path: Path, make: str) -> Path:
    if not path.is_file():
        raise Missing(f"{path} is not there. It is made by: {make}")
    return path


def _json(path: Path, make: str) -> dict[str, Any]:
    if (size := _require(path, make).stat().st_size) > MOST_INFO_BYTES:
        raise UserError(f"{path}: {size} bytes are too many; make it again: {make}")
    return json_object(path.read_bytes(), path, f"make it again: {make}")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``; a last line cut by a crash is left out."""
    path = _require(run / "log.jsonl", MAKE_RUN)
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if line.endswith("}"):
            row = json_object(line, f"{path}:{number}", "remove the line")
            checked(_LogLine, row, f"{path}:{number}: remove the line")
            rows.append(row)
    if not rows:
        raise Missing(f"{path} has no lines yet. It is made by: {MAKE_RUN}")
    return rows


def read_model(run: Path) -> dict[str, Any]:
    """What ``model.json`` says of the run's model."""
    about = _json(run / "model.json", MAKE_RUN)
    checked(_Model, about, run / "model.json")
    return about


def read_dataset(folder: Path | None) -> Dataset:
    """Description and records, read as the trainer does. Raises ``Missing`` or ``ValueError``."""
    if folder is None:
        raise Missing(f"No dataset was given. Make one: {MAKE_SHARDS}")
    about = checked(About, _json(folder / DATASET_FILE, MAKE_SHARDS), folder / DATASET_FILE)
    listed = list_shards(folder)
    total = sum(shard.samples for shard in listed)
    samples = ShardSamples(listed[:: math.ceil(total / MOST_RECORDS)])
    records: dict[str, SampleRecord] = {}
    for record in map(samples.record, range(len(samples))):
        if record.key in records:
            raise UserError(f"{folder}: sample {record.key} is there twice; make its shard again")
        checked(Plan, record.plan, f"{folder}: sample {record.key}: plan")
        records[record.key] = record
    dropped = sum(_dropped(shard.tar.with_suffix(".json")) for shard in listed)
    return Dataset(folder, about, samples, records, total, dropped)


def _dropped(path: Path) -> int:
    dropped = _json(path, MAKE_SHARDS).get("dropped", [])
    if not isinstance(dropped, list):
        raise UserError(f"{path}: 'dropped' must be a list; make the shard again")
    return len(dropped)


@dataclass(frozen=True)
class Evaluation:
    """What ``python -m train evaluate`` wrote: its results and its scores."""

    sets: list[dict[str, Any]]
    scores: list[dict[str, str]]


def read_evaluation(folder: Path | None) -> Evaluation:
    """Results and scores. Raises ``Missing`` or ``ValueError``."""
    if folder is None:
        raise Missing(f"No evaluation was given. Make one: {MAKE_SCORES}")
    results = _json(folder / "results.json", MAKE_SCORES)
    checked(_Results, results, folder / "results.json")
    path = _require(folder / "scores.csv", MAKE_SCORES)
    scores = csv_rows(path)
    for line, row in enumerate(scores, 2):
        checked(_Score, row, f"{path}:{line}")
    return Evaluation(results["sets"], scores)
