"""Distilled students against their labelled-only counterparts. ``python -m train experiment``.

For every variant two students with the same network, steps and batch, and the same rated clips:
one on the rated clips alone (the paper's baseline), one on pseudo-labelled shards with the rated
clips mixed in (section IV-B). Both and the teacher are evaluated on held-out sets: Figure 3 of the
paper (PCC over parameters), and the share of the gap that distillation closes,
``(distilled - labelled) / (teacher - labelled)``, with bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.options import add_options
from data_specs.io.parse import json_object
from data_specs.rated import RatedClip, read_rated, require_heard
from train.bootstrap import LEVEL, RESAMPLES
from train.command import made_by
from train.data.hold_out import held_apart
from train.data.sources import Sources, chosen, open_sources, require_apart, require_once
from train.evaluation.experiment_figure import figure3, panels
from train.evaluation.experiment_results import KINDS, Kind, Model, Outcome, find, test_sets
from train.evaluation.records import ClipScore
from train.evaluation.scorers import PADDINGS, OwnScorer, score_sets
from train.evaluation.tables import markdown, write_tables
from train.files import csv_rows, csv_text, require_same, run_folder
from train.loop.loop import Host, host_of
from train.models.student import count, variant
from train.pages import template
from train.pruning.runs import PrunedModel, pruned_models
from train.scoring.base import Scorer
from train.scoring.score import load
from train.student import fit as fitting
from train.student.presets import PRESETS, FitConfig, make_config

RATED_HOLD_OUT = 0.2
"""Share of the rated clips' conditions that choose the labelled-only student's best step.

More than a tenth: of the 13 conditions of a small set a tenth is one, and one condition's clips are
all about equally good.
"""

RATED_COLUMNS = ("dataset", "path", "mos", "votes", "condition", "system")


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One student to train: what with, and where to."""

    variant: str
    kind: Kind
    config: FitConfig
    sources: Sources
    out: Path

    @property
    def name(self) -> str:
        """The run's name, also of its folder."""
        return f"{self.variant}-{self.kind}"

    @property
    def macs(self) -> int:
        """Multiply-adds of all steps, forward (backward takes about twice as many)."""
        return count(variant(self.variant))[1] * self.config.batch * self.config.steps


def write_rated(path: Path, clips: Sequence[RatedClip]) -> Path:
    """Rated clips as a CSV with absolute paths."""
    rows = [{name: getattr(clip, name) for name in RATED_COLUMNS} for clip in clips]
    write_text(path, csv_text(rows))
    return path


def split_rated(args: argparse.Namespace) -> tuple[Path, Path]:
    """The rated clips that both students train on, and those that choose the baseline's best.

    Written into ``--out``, so that both students train on the same ones. ``ValueError`` for a clip
    that is trained on and evaluated on.
    """
    clips = chosen(args.rated, args.rated_set)
    require_once(clips)
    if args.rated_validation:
        held = read_rated(args.rated_validation)
        require_apart(clips, held)
    else:
        clips, held = held_apart(clips, 0, args.rated_hold_out)
    tests = test_clips(args)
    _require_apart([*clips, *held], tests, args)
    require_heard([*clips, *held, *tests])
    paths = args.out / "rated.csv", args.out / "rated-validation.csv"
    return write_rated(paths[0], clips), write_rated(paths[1], held)


def test_clips(args: argparse.Namespace) -> list[RatedClip]:
    """Rated clips to evaluate on; none where no CSV is given."""
    return chosen(args.test_rated, args.test_rated_set) if args.test_rated else []


def _require_apart(
    trained: Sequence[RatedClip], tests: Sequence[RatedClip], args: argparse.Namespace
) -> None:
    if both := {clip.path for clip in trained} & {clip.path for clip in tests}:
        raise UserError(
            f"{min(both)}: in --rated and in --test-rated: name other datasets with --rated-set "
            "and --test-rated-set"
        )
    folders = {folder.resolve() for folder in (args.shards, args.validation) if folder}
    for folder in args.test_shards:
        if folder.resolve() in folders:
            raise UserError(f"--test-shards {folder}: the students are trained or validated on it")
    names = [folder.name for folder in args.test_shards] + sorted({c.dataset for c in tests})
    if not names:
        raise UserError("nothing to evaluate on: give --test-rated CSV, --test-shards DIR or both")
    if len(set(names)) < len(names):
        raise UserError(f"two test sets have one name ({', '.join(names)}): rename a folder")


VALIDATIONS = 10

CHANGES = (
    *("steps", "batch", "lr", "warmup", "validate_every", "crops", "rated_share", "precision"),
    "seed",
)
"""Options that change the preset, as ``train fit`` has them."""
HOST = ("device", "workers", "threads", "cache_gb")
"""Options of the machine, likewise."""


def make_plan(args: argparse.Namespace) -> list[Run]:
    """All runs, cheapest variant first. ``ValueError`` for what cannot be trained or evaluated."""
    if args.test_samples is not None and args.test_samples < 2:
        raise UserError(f"--test-samples {args.test_samples}: a correlation needs at least two")
    macs = {name: count(variant(name))[1] for name in dict.fromkeys(args.variants)}
    rated, rated_validation = split_rated(args)
    sources: dict[Kind, Sources] = {
        "labelled": open_sources(None, None, rated, rated_validation),
        "distilled": open_sources(args.shards, args.validation, rated),
    }
    runs = []
    for name in sorted(macs, key=macs.__getitem__):
        for kind in KINDS:
            changes = {option: getattr(args, option) for option in CHANGES}
            if kind == "labelled":  # all of its clips are rated
                changes |= {"rated_share": None, "validate_every": validate_every(args)}
            config = make_config(name, sources[kind], args.preset, **changes)
            out = args.out / "runs" / f"{name}-{kind}"
            runs.append(Run(name, kind, config, sources[kind], out))
    return runs


def validate_every(args: argparse.Namespace) -> int:
    """Of the labelled-only students: ten times a run or more, for few ratings are soon overfitted.

    Distilled ones do not overfit: they are validated as the preset or ``--validate-every`` says.
    """
    if args.validate_every:
        return int(args.validate_every)
    preset = PRESETS[args.preset]
    tenth = max(1, (args.steps or preset["steps"]) // VALIDATIONS)
    return min(tenth, int(preset["validate_every"]))


def announce(runs: Sequence[Run]) -> None:
    """Print what will be trained and what it takes."""
    for run in runs:
        parameters, macs = count(variant(run.variant))
        print(
            f"{run.name:15} {parameters:10,} parameters, {macs / 1e6:6,.0f} M multiply-adds a "
            f"clip; {run.config.steps} x {run.config.batch} clips: {run.macs / 1e12:,.1f} T forward"
            f"{' (done)' if is_done(run) else ''}"
        )
    total, config = sum(run.macs for run in runs), runs[0].config
    print(
        f"{len(runs)} runs, {total / 1e12:,.1f} T multiply-adds forward; {config.rated_clips} "
        f"rated clips, and {config.validation_samples} that choose the labelled-only students' "
        f"best step; {runs[-1].config.samples} samples of shards",
        flush=True,
    )


# --- training -------------------------------------------------------------------------------------


def is_done(run: Run) -> bool:
    """Whether the run's model is there; ``ValueError`` if it is of another configuration."""
    if not (run.out / "model.json").is_file():
        return False
    about = _read_json(run.out / "model.json")
    require_same(run.out, about.get("fit", {}), run.config.model_dump(mode="json"))
    return True


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(path.read_bytes(), path, "delete it and run again")


@contextmanager
def timed(path: Path, name: str) -> Iterator[None]:
    """Add the wall and CPU seconds of what is done inside to ``name`` in a JSON file.

    CPU seconds are those of this process and of its children that have ended.
    """
    began, cpu = time.monotonic(), sum(os.times()[:4])
    try:
        yield
    finally:
        seconds = _read_json(path) if path.is_file() else {}
        before = seconds.get(name, {"wall_s": 0.0, "cpu_s": 0.0})
        seconds[name] = {
            "wall_s": round(before["wall_s"] + time.monotonic() - began, 1),
            "cpu_s": round(before["cpu_s"] + sum(os.times()[:4]) - cpu, 1),
        }
        write_text(path, json.dumps(seconds, indent=2) + "\n")


def train_all(runs: Sequence[Run], host: Host, times: Path) -> None:
    """Train what is not done yet, in order."""
    left = [run for run in runs if not is_done(run)]
    while left:
        run, began = left.pop(0), time.monotonic()
        started = (run.out / "last.pt").is_file()
        with timed(times, run.name):
            fitting.fit(run.config, run.sources, run.out, host)
        seconds = time.monotonic() - began
        rest = sum(other.macs for other in left) * seconds / run.macs
        # A run that was continued did only a part of its steps now.
        guess = f"; about {rest / 60:.0f} min for the {len(left)} left, by multiply-adds"
        print(f"{run.name}: {seconds:.0f} s{guess if left and not started else ''}", flush=True)


# --- scoring --------------------------------------------------------------------------------------


def models_of(runs: Sequence[Run], pruned: Sequence[PrunedModel], teacher: Scorer) -> list[Model]:
    """The students, in the order of their runs, the pruned models, then the teacher."""
    found = []
    for run in runs:
        about = _read_json(run.out / "model.json")
        parameters, sha256 = int(about["parameters"]), str(about["weights_sha256"])
        found.append(Model(run.name, run.variant, run.kind, parameters, sha256))
    for one in pruned:
        found.append(Model(one.name, None, one.series, one.parameters, one.weights_sha256))
    own = Model(teacher.name, None, "teacher", teacher.parameters, teacher.weights_sha256)
    return [*found, own]


def score_all(
    folders: Mapping[str, Path],
    teacher: Scorer,
    clips: Sequence[RatedClip],
    args: argparse.Namespace,
) -> list[ClipScore]:
    """Scores of all models on all test sets. ``UserError`` naming a clip that has none."""
    scores: list[ClipScore] = []
    hashes = [sha256_of(clip.path) for clip in clips]
    for name in [*folders, teacher.name]:
        scorer = load(folders[name], args.device) if name in folders else teacher
        scorer.name = name
        own, paddings, most = OwnScorer(scorer), PADDINGS[args.score_padding], args.test_samples
        found, failures = score_sets(own, clips, hashes, args.test_shards, paddings, count=most)
        if failures:
            raise UserError(failures[0].error)
        scores += found
    return scores


def read_scores(path: Path) -> list[ClipScore]:
    """``scores.csv`` of an earlier run; ``ValueError`` where it is missing or lacks a column."""
    if not path.is_file():
        raise UserError(f"{path}: no scores yet: run without --report-only")
    rows: list[dict[str, Any]] = list(csv_rows(path))
    try:
        numbers = [{name: float(row[name]) for name in ("truth", "score")} for row in rows]
        return [ClipScore(**row | two) for row, two in zip(rows, numbers, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): run without --report-only") from error


def about_run(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """The command, the day, what the runs had in common, and how long everything took."""
    times = args.out / "seconds.json"
    seconds: dict[str, Any] = _read_json(times) if times.is_file() else {}
    common = ("preset", "steps", "batch", "lr", "seed", "precision", "validate_every", "crops")
    settings = {name: getattr(runs[0].config, name, None) for name in common}
    return made_by("experiment", args, add_arguments) | {
        "settings": settings | {"rated_share": runs[-1].config.rated_share},
        "clips": {
            "rated": runs[0].config.rated_clips,
            "rated_validation": runs[0].config.validation_samples,
            "shards": runs[-1].config.samples,
            "validation": runs[-1].config.validation_samples,
        },
        "intervals": f"bootstrap intervals ({LEVEL:.0%}, {RESAMPLES} resamples of conditions, or "
        "of clips where a set has none; the same for all models)",
        "seconds": seconds,
        "cpu_minutes": round(sum(part["cpu_s"] for part in seconds.values()) / 60, 1),
        "wall_minutes": round(sum(part["wall_s"] for part in seconds.values()) / 60, 1),
    }


# --- what is written ------------------------------------------------------------------------------


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


def write_all(outcome: Outcome, about: Mapping[str, Any], out: Path) -> str:
    """``results.json``, ``.csv`` and ``.md``, ``figure3.svg`` and ``experiment.html``.

    The page is one file without a script or an outside address. Returns ``results.md``.
    """
    results = [one.record(found.test) for found in outcome.sets for one in found.results]
    content = {
        "about": about,
        "models": [asdict(model) for model in outcome.models],
        "sets": results,
        "gaps": [gap.record(found.test) for found in outcome.sets for gap in found.gaps],
        "verdicts": [asdict(verdict) for found in outcome.sets for verdict in found.verdicts],
    }
    text = results_md(outcome, about)
    write_tables(out, "results", content, results, text)
    write_text(out / "figure3.svg", figure3(outcome))
    page = template("experiment.html.j2").render(
        outcome=outcome, panels=panels(outcome), about=about
    )
    write_text(out / "experiment.html", page)
    return text


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train experiment``."""
    add = parser.add_argument
    add("--shards", type=path_here, required=True, help="pseudo-labelled shards to train on")
    beside = "shards that choose the best step (default: validation beside --shards)"
    add("--validation", type=path_here, help=beside)
    add("--rated", type=path_here, required=True, help="CSV of rated clips to train on")
    add("--rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    add("--rated-validation", type=path_here, help="CSV that chooses the labelled-only best step")
    share = "without it: share of conditions taken from --rated (default %(default)s)"
    add("--rated-hold-out", type=float, default=RATED_HOLD_OUT, help=share)
    add("--test-rated", type=path_here, help="CSV of rated clips to evaluate on")
    add("--test-rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    by_labels = "shards to evaluate on, by their labels"
    add("--test-shards", nargs="+", type=path_here, default=[], help=by_labels)
    add("--test-samples", type=int, help="of every --test-shards, spread evenly (default: all)")
    drawn = "folders of train prune: evaluated and drawn too"
    add("--pruned", nargs="+", type=path_here, default=[], metavar="RUN", help=drawn)
    add("--variants", nargs="+", default=["v1", "v2", "v4", "v6"], help="sizes to train")
    add("--teacher", default="v7", help="what is closed up to: v7, a teacher, a run (default v7)")
    add("--out", type=path_here, required=True, help="folder; continued if it exists")
    add(
        "--score-padding", choices=("both", "repeat", "zero"), default="zero", help="of short clips"
    )
    add("--preset", choices=sorted(PRESETS), default="fast", help="of what follows")
    add_options(parser, FitConfig, FitConfig.model_fields.keys() - CHANGES)
    add_options(parser, Host, Host.model_fields.keys() - HOST)
    add("--report-only", action="store_true", help="train and score nothing: evaluate scores.csv")


def run(args: argparse.Namespace) -> int:
    """``python -m train experiment``; returns the exit code."""
    host = host_of(args, Host)
    with run_folder(args.out):
        return _experiment(args, host)


def _experiment(args: argparse.Namespace, host: Host) -> int:
    runs, clips = make_plan(args), test_clips(args)
    pruned = pruned_models(args.pruned)
    teacher = load(args.teacher, host.device)  # now, not after hours: it may not be there
    times = args.out / "seconds.json"
    if not args.report_only:
        announce(runs)
        train_all(runs, host, times)
        with timed(times, "scoring"):
            folders = {one.name: one.out for one in runs} | {one.name: one.folder for one in pruned}
            scores = score_all(folders, teacher, clips, args)
        write_text(args.out / "scores.csv", csv_text([asdict(one) for one in scores]))
    if left := [run.name for run in runs if not is_done(run)]:
        raise UserError(f"{', '.join(left)}: not trained yet: run without --report-only")
    models = models_of(runs, pruned, teacher)
    tests = test_sets(read_scores(args.out / "scores.csv"), models)
    outcome = find(tests, models, args.seed)
    text = write_all(outcome, about_run(args, runs), args.out)
    print(text, args.out / "experiment.html", sep="\n")
    return 0
