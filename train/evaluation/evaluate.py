"""Scorers against people's ratings and against the teacher's labels. ``python -m train evaluate``.

Per set: Pearson (PCC), Spearman, Kendall, RMSE, and RMSE after a monotone third-order map, at the
level of clips, conditions and systems, with intervals, and whether two scorers differ; over the
rated sets the means, unweighted and weighted by clips, as the paper compares (section V). Scores
are kept: a second run scores only what is new.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.options import add_options
from data_specs.rated import RatedClip, read_rated
from train.bootstrap import LEVEL, RESAMPLES
from train.command import made_by
from train.evaluation.common_clips import common_clips, entries_of
from train.evaluation.external_scorers import Options
from train.evaluation.page import page
from train.evaluation.published import MARK, table1
from train.evaluation.records import Comparison, Kind
from train.evaluation.score_cache import ScoreCache
from train.evaluation.scorers import PADDINGS, ComparedScorer, load_scorers, score_sets
from train.evaluation.significance import pairs_of
from train.evaluation.statistics import set_results
from train.evaluation.tables import means, results_md, text_table, write_tables
from train.files import csv_text, run_folder
from train.loop.loop import Host, host_of
from train.pages import decimals

# --- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """The rated clips to compare on, with the hashes of their files."""

    clips: list[RatedClip]
    hashes: list[str]
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
    return Sets(clips, [sha256_of(clip.path) for clip in clips], below)


def _require_own_names(tables: Sequence[list[RatedClip]], shards: Sequence[Path]) -> None:
    """Refuse two sets of one name: their clips would be taken together."""
    names = [name for table in tables for name in {clip.dataset for clip in table}]
    names += [folder.name for folder in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two sets are called {twice[0]!r}: name them in the CSV's column 'dataset', or rename "
            "the folder of shards"
        )


# --- comparing ------------------------------------------------------------------------------------


def compare(found: Comparison, scorers: Sequence[ComparedScorer], sets: Sets, seed: int) -> None:
    """Evaluate every set on the clips that its models have in common; adds to ``found``."""
    outputs = [(output, scorer) for scorer in scorers for output in scorer.outputs]
    sizes = {output.name: scorer.parameters or output.parameters for output, scorer in outputs}
    other_scales = {output.name for output, _ in outputs if not output.mos_scale}
    rated = {clip.dataset for clip in sets.clips}
    for name in dict.fromkeys(one.set for one in found.scores):
        scores = [one for one in found.scores if one.set == name]
        failed = [one.path_or_key for one in found.failures if one.set == name]
        keys = list(dict.fromkeys([*(one.path_or_key for one in scores), *failed]))
        entries = entries_of(scores, sizes, other_scales)
        kind: Kind = "rated" if name in rated else "shards"
        clips, notes = common_clips(scores, keys, kind, entries)
        found.notes.extend(notes)
        if clips:
            found.sets.append(clips)
            found.results.extend(set_results(clips, seed))
            found.pairs.extend(pairs_of(clips, seed))


# --- what is written ------------------------------------------------------------------------------


def write_results(out: Path, found: Comparison, about: dict[str, Any]) -> None:
    """``results.json``, ``.csv`` and ``.md``, ``scores.csv``, ``pairs.csv``.

    What is not defined has the reason beside it.
    """
    published, clips = table1()
    content: dict[str, Any] = {
        "about": about,
        "sets": [asdict(result) for result in found.per_clip],
        "levels": [asdict(result) for result in found.results if result.level != "clip"],
        "means": means(found.results),
        "pairs": [asdict(pair) for pair in found.pairs],
        "unavailable": [asdict(one) for one in found.unavailable],
        "failures": [asdict(failure) for failure in found.failures],
        "notes": found.notes,
        "table1": {"mark": MARK, "clips": clips, "rows": [asdict(one) for one in published]},
    }
    compared = {(clips.name, key) for clips in found.sets for key in clips.keys}
    scores = [
        asdict(one) | {"compared": int((one.set, one.path_or_key) in compared)}
        for one in found.scores
    ]
    rows = [asdict(result) for result in found.results]
    write_tables(out, "results", content, rows, results_md(found, about))
    write_text(out / "pairs.csv", csv_text(content["pairs"]))
    write_text(out / "scores.csv", csv_text(scores))


def about_run(args: argparse.Namespace, scorers: Sequence[ComparedScorer]) -> dict[str, Any]:
    """The command, the day, and what everything was made with."""
    return made_by("evaluate", args, add_arguments) | {
        "seed": args.seed,
        "intervals": f"bootstrap intervals ({LEVEL:.0%}, {RESAMPLES} resamples of conditions, else "
        "of systems, else of clips; the same for all models)",
        "scorers": [
            {
                "name": scorer.name,
                "outputs": [output.name for output in scorer.outputs],
                "version": scorer.version,
                "parameters": scorer.parameters,
                "weights_sha256": scorer.weights_sha256,
            }
            for scorer in scorers
        ],
    }


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train evaluate``."""
    add = parser.add_argument
    several: Any = {"action": "extend", "nargs": "+"}
    models = "v7, a run, a model file, a teacher; external scorers: distillmos, dnsmos, nisqa, "
    add("--model", required=True, help=models + "squim, utmos; several or repeated", **several)
    add("--rated", default=[], type=path_here, help="CSV; or several", **several)
    add("--shards", default=[], type=path_here, help="folder; or several", **several)
    results = "folder for the results; continued if it exists"
    add("--out", type=path_here, required=True, help=results)
    add("--padding", choices=sorted(PADDINGS), default="own", help="of short clips, by our models")
    add("--fresh", action="store_true", help="score everything again, whatever is known")
    clean = "a recording, any, that SQUIM's subjective model needs"
    add("--clean-speech", type=path_here, help=clean)
    outside = "put the audio of clips that lie outside their CSV's folder into the page too"
    add("--allow-outside", action="store_true", help=outside)
    add("--audio-mb", type=float, default=12.0, help="most audio in the page (default 12; 0: none)")
    add("--seed", type=int, default=0, help="of the resamples")
    add_options(parser, Host, Host.model_fields.keys() - {"device", "threads"})


def run(args: argparse.Namespace) -> int:
    """``python -m train evaluate``; returns the exit code, 1 where a clip could not be scored."""
    host = host_of(args, Host)
    sets = read_sets(args.rated, args.shards)
    with run_folder(args.out):
        return _evaluate(args, host, sets)


def _evaluate(args: argparse.Namespace, host: Host, sets: Sets) -> int:
    scorers, unavailable = load_scorers(args.model, Options(host.device, args.clean_speech))
    found, paddings = Comparison(unavailable), PADDINGS[args.padding]
    with ScoreCache(args.out / "cache.jsonl", args.fresh) as cache:
        for scorer in scorers:
            scored = score_sets(scorer, sets.clips, sets.hashes, args.shards, paddings, cache)
            found.scores.extend(scored[0])
            found.failures.extend(scored[1])
    if not found.scores:
        none = "the shards' labels are these models' own"
        why = found.failures[0].error if found.failures else none
        raise UserError(f"nothing to compare: {why}")
    compare(found, scorers, sets, args.seed)
    about = about_run(args, scorers)
    write_results(args.out, found, about)
    published = sets.clips if args.allow_outside else sets.below
    write_text(args.out / "evaluation.html", page(found, published, about, args.audio_mb))
    if outside := len(sets.clips) - len(published):
        print(
            f"{outside} rated clips lie outside their CSV's folder, and their audio is not in the "
            "page: where the table is your own, --allow-outside puts it there"
        )
    print_results(found, args.out)
    return 1 if found.failures else 0


def print_results(found: Comparison, out: Path) -> None:
    """The results as text."""
    print(text_table(found.results))
    for mean in means(found.results):
        print(
            f"{mean['model']} ({mean['padding']}): mean PCC over {mean['sets']} rated sets "
            f"{decimals(mean['pcc_unweighted'])}, by clips {decimals(mean['pcc_weighted'])}"
        )
    for note in found.notes:
        print(note)
    for one in found.unavailable:
        print(f"not available: {one.model}: {one.reason}; to get it: {one.command}")
    print(out / "evaluation.html")
