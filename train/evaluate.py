"""Models against people's ratings and against the teacher's labels. ``python -m train evaluate``.

Per set: Pearson (PCC), Spearman and RMSE; over the rated sets the mean, unweighted and weighted
by clips, as the paper judges (section V).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_specs.rated import RatedClip, read_rated
from train.files import csv_text, write_text
from train.metrics import Agreement, agreement
from train.score import WINDOWS_A_BATCH, Scorer, Short, load
from train.shards import list_shards
from train.stream import PCM_SCALE, ShardSamples
from train.tars import read_pcm, read_record

SHARDS_SHORT = "none"
"""What stands in the column ``short`` for shards: their clips are never short."""


@dataclass(frozen=True)
class ClipScore:
    """One scored clip: a row of ``scores.csv``."""

    model: str
    set: str
    path_or_key: str
    truth: float
    score: float
    short: str
    weights_sha256: str = ""


@dataclass(frozen=True)
class SetResult:
    """One model on one set: a row of ``results.csv``. ``kind`` is "rated" or "shards"."""

    model: str
    set: str
    clips: int
    pcc: float | None
    spearman: float | None
    rmse: float | None
    short: str
    kind: str
    reason: str | None = None
    weights_sha256: str = ""


def score_rated(scorer: Scorer, clips: Sequence[RatedClip], short: Short) -> list[ClipScore]:
    """Scores of rated clips; ``ValueError`` naming the file that cannot be scored."""
    scored = []
    results = scorer.score_files([clip.path for clip in clips], short)
    bar = tqdm(results, total=len(clips), unit="clip", desc=f"{scorer.name}, rated, {short}")
    for clip, result in zip(clips, bar, strict=True):
        if result.mos is None:
            raise ValueError(result.error)
        scored.append(
            ClipScore(
                scorer.name,
                clip.dataset,
                str(clip.path),
                clip.mos,
                result.mos,
                short,
                scorer.weights_sha256,
            )
        )
    return scored


def score_shards(scorer: Scorer, folder: Path, count: int | None = None) -> list[ClipScore]:
    """Scores of a folder's samples, all or so many spread evenly, beside the stored labels."""
    samples = ShardSamples(list_shards(folder))
    chosen = np.linspace(0, len(samples) - 1, min(count or len(samples), len(samples)), dtype=int)
    scored: list[ClipScore] = []
    bar = tqdm(total=len(chosen), unit="clip", desc=f"{scorer.name}, {folder.name}")
    with bar:
        for start in range(0, len(chosen), WINDOWS_A_BATCH):
            numbers = chosen[start : start + WINDOWS_A_BATCH].tolist()
            places = [samples.locate(number) for number in numbers]
            waves = [read_pcm(*place).astype(np.float32) / PCM_SCALE for place in places]
            for (tar, span), mos in zip(places, scorer.score_windows(waves), strict=True):
                label = read_record(tar, span).mos
                scored.append(
                    ClipScore(
                        scorer.name,
                        folder.name,
                        span.key,
                        label,
                        mos,
                        SHARDS_SHORT,
                        scorer.weights_sha256,
                    )
                )
            bar.update(len(waves))
    return scored


def _require_own_names(tables: Sequence[list[RatedClip]], shards: Sequence[Path]) -> None:
    """Refuse two sets of one name: their clips would be judged together."""
    names = [name for table in tables for name in {clip.dataset for clip in table}]
    names += [folder.name for folder in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two sets are called {twice[0]!r}: name them in the CSV's column 'dataset', or rename "
            "the folder of shards"
        )


def labelled_by(folder: Path, scorer: Scorer) -> bool:
    """Whether the shards' labels are this very model's: then there is nothing to compare."""
    samples = ShardSamples(list_shards(folder))
    return read_record(*samples.locate(0)).teacher_sha256 == scorer.weights_sha256


def summarise(rows: Sequence[ClipScore], kind: str) -> list[SetResult]:
    """One result a (model, set, way with short clips), in order of appearance."""
    groups: dict[tuple[str, str, str], list[ClipScore]] = {}
    for row in rows:
        groups.setdefault((row.model, row.set, row.short), []).append(row)
    results = []
    for (model, name, short), group in groups.items():
        found: Agreement = agreement([r.truth for r in group], [r.score for r in group])
        results.append(
            SetResult(
                model=model,
                set=name,
                short=short,
                kind=kind,
                weights_sha256=group[0].weights_sha256,
                **asdict(found),
            )
        )
    return results


def means(results: Sequence[SetResult]) -> list[dict[str, Any]]:
    """Per (model, short): means over the rated sets, unweighted and weighted by clips.

    Sets without a defined PCC are left out of both and counted in ``undefined_sets``.
    """
    groups: dict[tuple[str, str], list[SetResult]] = {}
    for result in results:
        if result.kind == "rated":
            groups.setdefault((result.model, result.short), []).append(result)
    return [_mean(model, short, group) for (model, short), group in groups.items()]


def _mean(model: str, short: str, group: Sequence[SetResult]) -> dict[str, Any]:
    defined = [result for result in group if result.pcc is not None]
    weights = [result.clips for result in defined]
    row: dict[str, Any] = {
        "model": model,
        "short": short,
        "sets": len(defined),
        "undefined_sets": len(group) - len(defined),
        "clips": sum(weights),
    }
    for name in ("pcc", "spearman", "rmse"):
        values = [getattr(result, name) for result in defined]
        row[f"{name}_unweighted"] = float(np.mean(values)) if values else None
        row[f"{name}_weighted"] = float(np.average(values, weights=weights)) if values else None
    return row


def table(results: Sequence[SetResult]) -> str:
    """The results as text."""
    width = max([len(result.model) for result in results] + [5])
    name_width = max([len(result.set) for result in results] + [3])
    titles = f"{'short':6} {'clips':>6} {'PCC':>7} {'Spearm.':>7} {'RMSE':>6}"
    lines = [f"{'model':{width}} {'set':{name_width}} {titles}"]
    for r in results:
        lines.append(
            f"{r.model:{width}} {r.set:{name_width}} {r.short:6} {r.clips:6} "
            f"{_figure(r.pcc):>7} {_figure(r.spearman):>7} {_figure(r.rmse):>6}"
            f"{'  ' + r.reason if r.reason else ''}"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_results(out: Path, results: Sequence[SetResult], rows: Sequence[ClipScore]) -> None:
    """``results.json``, ``results.csv`` and ``scores.csv``; numbers undefined are null or empty."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"sets": [asdict(result) for result in results], "means": means(results)}
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / "results.csv", csv_text([asdict(result) for result in results]))
    write_text(out / "scores.csv", csv_text([asdict(row) for row in rows]))


def evaluate(
    scorers: Sequence[Scorer],
    rated: Sequence[Path],
    shards: Sequence[Path],
    out: Path,
    ways: Sequence[Short] = ("zero",),
) -> list[SetResult]:
    """Score all sets with all models and write the results to ``out``.

    ``ValueError`` if there is nothing to evaluate on, or a clip or shard is damaged.
    """
    if not rated and not shards:
        raise ValueError("nothing to evaluate on: give --rated labels.csv or --shards DIR")
    tables = [read_rated(path) for path in rated]
    _require_own_names(tables, shards)
    clips = [clip for table in tables for clip in table]
    rows: list[ClipScore] = []
    results: list[SetResult] = []
    for scorer in scorers:
        of_people = [row for way in ways if clips for row in score_rated(scorer, clips, way)]
        of_teacher = [
            row
            for folder in shards
            if not labelled_by(folder, scorer)
            for row in score_shards(scorer, folder)
        ]
        results += summarise(of_people, "rated") + summarise(of_teacher, "shards")
        rows += of_people + of_teacher
    write_results(out, results, rows)
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train evaluate``."""
    parser.add_argument(
        "--model", action="append", required=True, help="v7, a run or a teacher; repeatable"
    )
    parser.add_argument("--rated", action="append", default=[], type=Path, help="CSV; repeatable")
    parser.add_argument("--shards", action="append", default=[], type=Path, help="repeatable")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--short", choices=("zero", "repeat", "both"), default="zero")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train evaluate``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    ways: dict[str, tuple[Short, ...]] = {
        "zero": ("zero",),
        "repeat": ("repeat",),
        "both": ("zero", "repeat"),
    }
    scorers = [load(model, args.device) for model in args.model]
    results = evaluate(scorers, args.rated, args.shards, args.out, ways[args.short])
    print(table(results))
    for mean in means(results):
        print(
            f"{mean['model']} ({mean['short']}): mean PCC over {mean['sets']} rated sets "
            f"{_figure(mean['pcc_unweighted'])}, weighted by clips {_figure(mean['pcc_weighted'])}"
        )
    return 0
