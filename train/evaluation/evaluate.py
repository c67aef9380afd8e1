"""Scorers against people's ratings and against the teacher's labels. ``python -m train evaluate``.

Any scorers over any rated sets: v7, runs and teachers of this package, and those of others by name
(``train.evaluation.comparing.others``). Per set: Pearson (PCC), Spearman, Kendall, RMSE, and RMSE
after a monotone third-order map, at the level of clips, conditions and systems, with intervals, and
whether two scorers differ; over the rated sets the means, unweighted and weighted by clips, as the
paper judges (section V). Scores are kept: a second run scores only what is new.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip, read_rated
from data_specs.teacher import MEAN, teacher_table
from train.command import command_of
from train.data.shards import list_shards
from train.data.stream import ShardSamples
from train.data.tars import read_record
from train.evaluation.bootstrap import LEVEL, RESAMPLES
from train.evaluation.comparing.cache import ScoreCache
from train.evaluation.comparing.common import common_clips, entries_of
from train.evaluation.comparing.comparison import Comparison
from train.evaluation.comparing.judges import (
    Judge,
    OtherJudge,
    OurJudge,
    batches,
    hear_rated,
    hear_shards,
    wave_of,
)
from train.evaluation.comparing.others import NotAvailable, Options, load_other, others_named
from train.evaluation.comparing.page import write_page
from train.evaluation.comparing.quoted import MARK, table1
from train.evaluation.comparing.rows import (
    SHARDS_SHORT,
    ClipScore,
    Failure,
    Kind,
    SetResult,
    Unavailable,
)
from train.evaluation.comparing.significance import pairs_of
from train.evaluation.comparing.statistics import judge as judge_set
from train.evaluation.comparing.tables import figure, means, results_md, text_table
from train.files import csv_text
from train.scoring.score import Scorer, Short, load

__all__ = ["SHARDS_SHORT", "ClipScore", "SetResult", "labelled_by", "means", "score_rated"]

WAYS: dict[str, tuple[Short, ...]] = {
    "zero": ("zero",),
    "repeat": ("repeat",),
    "both": ("zero", "repeat"),
}


# --- one scorer, every clip or an error (train experiment) --------------------------


def score_rated(scorer: Scorer, clips: Sequence[RatedClip], short: Short) -> list[ClipScore]:
    """Scores of rated clips; ``ValueError`` naming the file that cannot be scored."""
    scored = []
    results = scorer.score_files([clip.path for clip in clips], short)
    bar = progress_bar(
        results, total=len(clips), unit="clip", desc=f"{scorer.name}, rated, {short}"
    )
    for clip, result in zip(clips, bar, strict=True):
        if result.mos is None:
            raise UserError(result.error)
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
    bar = progress_bar(total=len(chosen), unit="clip", desc=f"{scorer.name}, {folder.name}")
    with bar:
        for places in batches(samples, chosen.tolist()):
            waves = [wave_of(place) for place in places]
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


def labelled_by(folder: Path, scorer: Scorer | Judge) -> bool:
    """Whether the shards' labels are this very model's: then there is nothing to compare."""
    samples = ShardSamples(list_shards(folder))
    return read_record(*samples.locate(0)).teacher_sha256 == scorer.weights_sha256


# --- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """The sets to compare on: rated clips, with the hashes of their files, and shards."""

    clips: list[RatedClip]
    hashes: list[str]
    shards: list[Path]
    below: list[RatedClip]
    """The clips in the folders of their tables: of others, a page must not publish the audio."""


def read_sets(rated: Sequence[Path], shards: Sequence[Path]) -> Sets:
    """Read the tables of rated clips and hash the clips.

    ``ValueError`` if there is nothing to evaluate on, a clip is missing, or two sets share a name.
    """
    if not rated and not shards:
        raise UserError("nothing to evaluate on: give --rated labels.csv or --shards DIR")
    tables = [read_rated(path) for path in rated]
    _require_own_names(tables, shards)
    clips = [clip for table in tables for clip in table]
    below = [
        clip
        for path, table in zip(rated, tables, strict=True)
        for clip in table
        if clip.path.resolve().is_relative_to(path.parent.resolve())
    ]
    return Sets(clips, [sha256_of(clip.path) for clip in clips], list(shards), below)


def _require_own_names(tables: Sequence[list[RatedClip]], shards: Sequence[Path]) -> None:
    """Refuse two sets of one name: their clips would be judged together."""
    names = [name for table in tables for name in {clip.dataset for clip in table}]
    names += [folder.name for folder in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two sets are called {twice[0]!r}: name them in the CSV's column 'dataset', or rename "
            "the folder of shards"
        )
    seen = set()
    for clip in (clip for table in tables for clip in table):
        if (clip.dataset, clip.path) in seen:
            raise UserError(f"{clip.path}: rated twice in {clip.dataset!r}: give one row a clip")
        seen.add((clip.dataset, clip.path))


def load_judges(names: Sequence[str], options: Options) -> tuple[list[Judge], list[Unavailable]]:
    """The scorers by name, and those that are known but cannot be had here.

    ``ValueError`` for a name that is none, or if none of them can be had.
    """
    judges: list[Judge] = []
    missing: list[Unavailable] = []
    for name in dict.fromkeys(names):
        others = others_named(name)
        for family, outputs in others:
            try:
                judges.append(OtherJudge(load_other(family, outputs, options), options.device))
            except NotAvailable as error:
                missing.append(Unavailable(family, error.reason, error.command))
        if not others:
            try:
                judges.append(OurJudge(load(name, options.device)))
            except UserError as error:
                if name not in teacher_table().teachers and not name.startswith(MEAN):
                    raise
                reason, _, command = str(error).rpartition(": run ")
                missing.append(Unavailable(name, reason or command, command if reason else ""))
    for one in missing:
        print(f"{one.model} is not available: {one.reason}", file=sys.stderr)
    if not judges:
        said = "; ".join(f"{one.model}: {one.reason}; {one.command}" for one in missing)
        raise UserError(f"none of the scorers can be had here: {said}")
    _require_once([output.name for judge in judges for output in judge.outputs])
    return judges, missing


def _require_once(models: Sequence[str]) -> None:
    twice = sorted({name for name in models if models.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]!r} is asked for twice: name it once with --model")


# --- comparing ------------------------------------------------------------------------------------


def score_all(
    judges: Sequence[Judge], sets: Sets, ways: Sequence[Short], cache: ScoreCache
) -> tuple[list[ClipScore], list[Failure]]:
    """Scores of all judges on all sets; shards without the judge that labelled them."""
    rows: list[ClipScore] = []
    failures: list[Failure] = []
    for judge in judges:
        found = [
            hear_rated(judge, sets.clips, sets.hashes, way, cache)
            for way in (judge.ways(ways) if sets.clips else ())
        ]
        found += [
            hear_shards(judge, folder, cache)
            for folder in sets.shards
            if not labelled_by(folder, judge)
        ]
        for one_rows, one_failures in found:
            rows += one_rows
            failures += one_failures
    return rows, failures


def compare(comparison: Comparison, sets: Sets, seed: int) -> Comparison:
    """Judge every set on the clips that its models have in common; adds to ``comparison``."""
    sizes = {
        output.name: judge.parameters or output.parameters
        for judge in comparison.judges
        for output in judge.outputs
    }
    other_scales = {
        output.name
        for judge in comparison.judges
        for output in judge.outputs
        if not output.mos_scale
    }
    rated = {clip.dataset for clip in sets.clips}
    for name in dict.fromkeys(row.set for row in comparison.rows):
        rows = [row for row in comparison.rows if row.set == name]
        failed = [one.path_or_key for one in comparison.failures if one.set == name]
        keys = list(dict.fromkeys([*(row.path_or_key for row in rows), *failed]))
        entries = entries_of(rows, sizes, other_scales)
        kind: Kind = "rated" if name in rated else "shards"
        clips, notes = common_clips(rows, keys, kind, entries)
        comparison.notes.extend(notes)
        if clips:
            comparison.sets.append(clips)
            comparison.results.extend(judge_set(clips, seed))
            comparison.pairs.extend(pairs_of(clips, seed))
    return comparison


# --- what is written ------------------------------------------------------------------------------


def write_results(out: Path, comparison: Comparison, about: dict[str, Any]) -> None:
    """``results.json``, ``.csv`` and ``.md``, ``scores.csv``, ``pairs.csv``.

    Numbers that are not defined are null or empty, with the reason beside them.
    """
    quoted, clips = table1()
    content = {
        "about": about,
        "sets": [asdict(result) for result in comparison.per_clip],
        "levels": [asdict(result) for result in comparison.results if result.level != "clip"],
        "means": means(comparison.results),
        "pairs": [asdict(pair) for pair in comparison.pairs],
        "unavailable": [asdict(one) for one in comparison.unavailable],
        "failures": [asdict(failure) for failure in comparison.failures],
        "notes": comparison.notes,
        "table1": {"mark": MARK, "clips": clips, "rows": [asdict(row) for row in quoted]},
    }
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / "results.csv", csv_text([asdict(result) for result in comparison.results]))
    write_text(out / "pairs.csv", csv_text([asdict(pair) for pair in comparison.pairs]))
    compared = {(clips.name, key) for clips in comparison.sets for key in clips.keys}
    rows = [
        asdict(row) | {"compared": int((row.set, row.path_or_key) in compared)}
        for row in comparison.rows
    ]
    write_text(out / "scores.csv", csv_text(rows))
    text = results_md(
        comparison.results, comparison.pairs, comparison.unavailable, comparison.notes, about
    )
    write_text(out / "results.md", text)


def about_run(args: argparse.Namespace, judges: Sequence[Judge]) -> dict[str, Any]:
    """The command, the day, and what everything was made with."""
    return {
        "command": command_of("evaluate", args, add_arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": args.seed,
        "intervals": f"bootstrap intervals ({LEVEL:.0%}, {RESAMPLES} resamples of conditions, else "
        "of systems, else of clips; the same for all models)",
        "scorers": [
            {
                "name": judge.name,
                "outputs": [output.name for output in judge.outputs],
                "version": judge.version,
                "parameters": judge.parameters,
                "weights_sha256": judge.weights_sha256,
            }
            for judge in judges
        ],
    }


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train evaluate``."""
    add = parser.add_argument
    add(
        "--model",
        action="extend",
        nargs="+",
        required=True,
        help="v7, a run, a model file, a teacher; of others: distillmos, dnsmos, nisqa, squim, "
        "utmos; several or repeated",
    )
    add("--rated", action="extend", nargs="+", default=[], type=path_here, help="CSV; or several")
    add(
        "--shards",
        action="extend",
        nargs="+",
        default=[],
        type=path_here,
        help="folder; or several",
    )
    add(
        "--out",
        type=path_here,
        required=True,
        help="folder for the results; continued if it exists",
    )
    add("--short", choices=sorted(WAYS), default="zero", help="how ours fill short clips")
    add("--fresh", action="store_true", help="score everything again, whatever is known")
    add(
        "--clean-speech",
        type=path_here,
        help="a recording, any, that SQUIM's subjective model needs",
    )
    add(
        "--allow-outside",
        action="store_true",
        help="put the audio of clips that lie outside their CSV's folder into the page too",
    )
    add("--audio-mb", type=float, default=12.0, help="most audio in the page (default 12; 0: none)")
    add("--seed", type=int, default=0, help="of the resamples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train evaluate``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    sets = read_sets(args.rated, args.shards)
    judges, unavailable = load_judges(args.model, Options(args.device, args.clean_speech))
    with ScoreCache(args.out / "cache.jsonl", args.fresh) as cache:
        rows, failures = score_all(judges, sets, WAYS[args.short], cache)
    if not rows:
        why = failures[0].error if failures else "the shards' labels are these models' own"
        raise UserError(f"nothing to compare: {why}")
    found = compare(Comparison(judges, unavailable, rows, failures), sets, args.seed)
    about = about_run(args, judges)
    write_results(args.out, found, about)
    write_page(
        args.out / "evaluation.html",
        found,
        sets.clips if args.allow_outside else sets.below,
        about,
        args.audio_mb,
    )
    if outside := 0 if args.allow_outside else len(sets.clips) - len(sets.below):
        print(
            f"{outside} rated clips lie outside their CSV's folder, and their audio is not in the "
            "page: where the table is your own, --allow-outside puts it there"
        )
    print_results(found, args.out)
    return 0


def print_results(found: Comparison, out: Path) -> None:
    """The results as text."""
    print(text_table(found.results))
    for mean in means(found.results):
        print(
            f"{mean['model']} ({mean['short']}): mean PCC over {mean['sets']} rated sets "
            f"{figure(mean['pcc_unweighted'])}, weighted by clips {figure(mean['pcc_weighted'])}"
        )
    for note in found.notes:
        print(note)
    for one in found.unavailable:
        print(f"not available: {one.model}: {one.reason}; to get it: {one.command}")
    print(out / "evaluation.html")
