"""Distilled students against their labelled-only twins. ``python -m train experiment``.

For every variant two students with the same network, updates and batch, and the same rated clips:
one on the rated clips alone (the paper's baseline), one on pseudo-labelled shards with the rated
clips mixed in (section IV-B). Both and the teacher are judged on held-out sets: Figure 3 of the
paper (PCC over parameters), and the share of the gap that distillation closes,
``(distilled - labelled) / (teacher - labelled)``, with bootstrap intervals.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from markupsafe import Markup

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.parse import json_object
from data_specs.rated import RatedClip, read_rated, require_heard
from train.command import command_of
from train.data.hold_out import groups_of, held_apart
from train.data.sources import Sources, chosen, open_sources, require_apart, require_once
from train.evaluation.bootstrap import LEVEL, RESAMPLES, Doubles, Gap, Judged, Model, TestSet, judge
from train.evaluation.evaluate import (
    SHARDS_SHORT,
    ClipScore,
    labelled_by,
    score_rated,
    score_shards,
)
from train.files import csv_rows, csv_text, require_same, run_folder
from train.loop.loop import Host
from train.models.student import count, variant
from train.pruning.runs import PrunedModel, pruned_models
from train.report import charts
from train.report.report import environment, figure, versions
from train.scoring.score import Scorer, Short, load
from train.student import fit as fitting
from train.student.presets import PRESETS, FitConfig, make_config

Kind = Literal["labelled", "distilled"]
KINDS: tuple[Kind, ...] = ("labelled", "distilled")
TITLES = {"labelled": "labelled-only", "distilled": "distilled", "teacher": "teacher"}

RATED_HOLD_OUT = 0.2
"""Share of the rated clips' conditions that choose the labelled-only student's best update.

More than a tenth: of the 13 conditions of a small set a tenth is one, and one condition's clips are
all about equally good.
"""

SMALL = 0.1
"""Share of the teacher's parameters up to which half of the gap is asked for."""

HALF = 0.5
PANELS_A_ROW = 3
NAMES_ROOM = 0.1
"""Share of the axis that is added at both ends: for the variants' names, and the teacher's."""

RATED_COLUMNS = ("dataset", "path", "mos", "votes", "condition", "system")
WAYS: dict[str, tuple[Short, ...]] = {
    "zero": ("zero",),
    "repeat": ("repeat",),
    "both": ("zero", "repeat"),
}


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
        """Multiply-adds of all updates, forward (backward takes about twice as many)."""
        return count(variant(self.variant))[1] * self.config.batch * self.config.steps


def write_rated(path: Path, clips: Sequence[RatedClip]) -> Path:
    """Rated clips as a CSV with absolute paths."""
    rows = [{name: getattr(clip, name) for name in RATED_COLUMNS} for clip in clips]
    write_text(path, csv_text(rows))
    return path


def split_rated(args: argparse.Namespace) -> tuple[Path, Path]:
    """The rated clips that both students train on, and those that choose the baseline's best.

    Written into ``--out``, so that both students hear the same ones. ``ValueError`` for a clip
    that is trained on and judged.
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
    """Rated clips to judge on; none where no CSV is given."""
    return chosen(args.test_rated, args.test_rated_set) if args.test_rated else []


def _require_apart(
    heard: Sequence[RatedClip], judged: Sequence[RatedClip], args: argparse.Namespace
) -> None:
    both = {clip.path for clip in heard} & {clip.path for clip in judged}
    if both:
        raise UserError(
            f"{min(both)}: in --rated and in --test-rated: name other datasets with --rated-set "
            "and --test-rated-set"
        )
    trained = {folder.resolve() for folder in (args.shards, args.validation) if folder}
    for folder in args.test_shards or ():
        if folder.resolve() in trained:
            raise UserError(f"--test-shards {folder}: the students are trained or validated on it")
    names = [folder.name for folder in args.test_shards or ()] + sorted({c.dataset for c in judged})
    if not names:
        raise UserError("nothing to judge on: give --test-rated CSV, --test-shards DIR or both")
    if len(set(names)) < len(names):
        raise UserError(f"two test sets have one name ({', '.join(names)}): rename a folder")


VALIDATIONS = 10

CHANGES = (
    *("steps", "batch", "lr", "warmup", "validate_every", "crops", "rated_share", "precision"),
    "seed",
)
"""Options that change the preset."""


def make_plan(args: argparse.Namespace) -> list[Run]:
    """All runs, cheapest variant first. ``ValueError`` for what cannot be trained or judged."""
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
        f"best update; {runs[-1].config.samples} samples of shards",
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
        # A run that was continued did only a part of its updates now.
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
    """Scores of all models on all test sets.

    The teacher is left out on shards that it labelled itself: there it is right by definition.
    """
    rows: list[ClipScore] = []
    for name in [*folders, teacher.name]:
        scorer = load(folders[name], args.device) if name in folders else teacher
        scorer.name = name
        for way in WAYS[args.short] if clips else ():
            rows += score_rated(scorer, clips, way)
        for folder in args.test_shards or ():
            if not labelled_by(folder, scorer):
                rows += score_shards(scorer, folder, args.test_samples)
    return rows


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


# --- judging --------------------------------------------------------------------------------------


def test_sets(
    rows: Sequence[ClipScore], clips: Sequence[RatedClip], models: Sequence[Model]
) -> list[TestSet]:
    """The sets in order of appearance. ``ValueError`` if a model's scores are not all there."""
    tables: dict[tuple[str, str], dict[str, dict[str, ClipScore]]] = {}
    for row in rows:
        table = tables.setdefault((row.set, row.short), {})
        table.setdefault(row.model, {})[row.path_or_key] = row
    return [_test_set(*key, table, clips, models) for key, table in tables.items()]


def _test_set(
    name: str,
    short: str,
    table: Mapping[str, Mapping[str, ClipScore]],
    clips: Sequence[RatedClip],
    models: Sequence[Model],
) -> TestSet:
    first = next(iter(table.values()))
    keys, truth_N = list(first), np.array([row.truth for row in first.values()])
    scores: dict[str, Doubles] = {}
    for model in models:
        own = table.get(model.name)
        if own is None and model.kind == "teacher" and short == SHARDS_SHORT:
            scores[model.name] = truth_N
            continue
        if own is None or own.keys() != first.keys():
            raise UserError(f"scores of {model.name} on {name} are missing: score again")
        if {row.weights_sha256 for row in own.values()} != {model.weights_sha256}:
            raise UserError(f"scores of {model.name} are of other weights: score again")
        scores[model.name] = np.array([own[key].score for key in keys])
    truth: Literal["people", "teacher"] = "teacher" if short == SHARDS_SHORT else "people"
    unit, groups = _groups(name, keys, clips) if truth == "people" else ("clip", keys)
    own_labels = any(model.name not in table for model in models)
    return TestSet(name, truth, short, truth_N, unit, groups, scores, own_labels)


def _groups(name: str, keys: Sequence[str], clips: Sequence[RatedClip]) -> tuple[str, list[str]]:
    by_path = {str(clip.path): clip for clip in clips if clip.dataset == name}
    missing = [key for key in keys if key not in by_path]
    if missing:
        raise UserError(f"{missing[0]}: scored, but not in --test-rated: score again")
    return groups_of([by_path[key] for key in keys])


# --- verdicts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A question of the experiment on one set; ``answer`` is None where there is none."""

    set: str
    short: str
    answer: bool | None
    text: str


def beats(heading: str, gaps: Sequence[Gap]) -> Verdict:
    """Whether the distilled student is above its twin at every size."""
    question = f"distilled beats labelled-only at every size on {heading}"
    name, short = gaps[0].set, gaps[0].short
    for gap in gaps:
        if gap.difference is None:
            return Verdict(
                name, short, None, f"{question}: not defined ({gap.variant}: {gap.reason})"
            )
    least = min(gaps, key=lambda gap: gap.difference or 0.0)
    clear = sum((gap.difference_low or 0.0) > 0 for gap in gaps)
    answer = (least.difference or 0.0) > 0
    shown = ranged(least.difference, least.difference_low, least.difference_high, sign="+")
    text = (
        f"{question}: {_word(answer)}; smallest difference {shown} ({least.variant}); the whole "
        f"interval is above 0 at {clear} of {len(gaps)} sizes"
    )
    return Verdict(name, short, answer, text)


def closes_half(heading: str, gaps: Sequence[Gap], teacher: Model) -> Verdict:
    """Whether half of the gap is closed by a student of a tenth of the teacher's size or less."""
    question = "closes half of the gap at a tenth of the teacher's size"
    name, short = gaps[0].set, gaps[0].short
    if teacher.parameters is None:
        text = f"{question} on {heading}: not defined (how large {teacher.name} is is not known)"
        return Verdict(name, short, None, text)
    limit = SMALL * teacher.parameters
    question += f" (<= {limit / 1e6:.2f} M parameters) on {heading}"
    small = [gap for gap in gaps if gap.parameters <= limit]
    if not small:
        return Verdict(name, short, None, f"{question}: not tried (no variant is that small)")
    defined = [gap for gap in small if gap.share is not None]
    if not defined:
        return Verdict(name, short, None, f"{question}: not defined ({small[0].reason})")
    best = max(defined, key=lambda gap: gap.share or 0.0)
    answer = (best.share or 0.0) >= HALF
    shown = ranged(best.share, best.share_low, best.share_high)
    text = f"{question}: {_word(answer)}; best such variant: {best.variant}, share {shown}"
    return Verdict(name, short, answer, text)


def _word(answer: bool) -> str:
    return "yes" if answer else "no"


def ranged(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """``0.856 [0.790, 0.910]``; a dash where there is no value, no brackets without interval."""
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


# --- figures --------------------------------------------------------------------------------------

Panel = tuple[str, Markup, Markup]
"""Heading, correlations, shares of the gap."""


def panels(tests: Sequence[TestSet], outcome: Outcome) -> list[Panel]:
    """For every set the paper's Figure 3, and the share of the gap closed."""
    sizes = [model.parameters / 1e6 for model in outcome.models if model.parameters]
    x = charts.Axis("parameters (millions)", min(sizes) / 1.35, max(sizes) * 1.35, log=True)
    return [
        (test.heading, _correlations(test, x, outcome), _shares(test, x, outcome)) for test in tests
    ]


def _correlations(test: TestSet, x: charts.Axis, outcome: Outcome) -> Markup:
    rows = [row for row in outcome.judged if _of(test, row) and row.pcc is not None]
    ends = [r.pcc for r in rows if r.pcc is not None]
    with_bars = [row for row in rows if row.kind in TITLES]
    ends += [end for row in with_bars for end in (row.pcc_low, row.pcc_high) if end is not None]
    y = charts.axis("PCC", ends or [0.0, 1.0])
    room = NAMES_ROOM * (y.high - y.low)
    y = charts.Axis(y.label, y.low - room, y.high + room)
    series = [_pcc_line(kind, rows) for kind in kinds_drawn(outcome)]
    level = None
    for row in (row for row in rows if row.kind == "teacher"):
        size = row.parameters / 1e6 if row.parameters else None
        about = f"teacher {row.model}" + (f", {size:.1f} M" if size else "")
        about += ": 1 by definition" if row.by_definition else ""
        level = charts.Level(about, row.pcc or 0.0, size)
    names = [(m.variant or "", (m.parameters or 0) / 1e6) for m in outcome.models if m.variant]
    title = f"PCC over parameters, {test.heading}"
    return charts.estimates(title, x, y, series, level, names=list(dict.fromkeys(names)))


def kinds_drawn(outcome: Outcome) -> list[str]:
    """The lines of Figure 3: distilled, labelled-only, and one a pruned network and method."""
    kinds = dict.fromkeys(model.kind for model in outcome.models)
    return ["distilled", "labelled", *(kind for kind in kinds if kind not in TITLES)]


def _pcc_line(kind: str, rows: Sequence[Judged]) -> charts.Estimates:
    mine = sorted((row for row in rows if row.kind == kind), key=lambda row: row.parameters or 0)
    return charts.Estimates(
        TITLES.get(kind, kind),
        [(row.parameters or 0) / 1e6 for row in mine],
        [row.pcc or 0.0 for row in mine],
        # Many points stand close together on the lines of pruned models: bars would hide them.
        [row.pcc_low if kind in TITLES else None for row in mine],
        [row.pcc_high if kind in TITLES else None for row in mine],
    )


def _shares(test: TestSet, x: charts.Axis, outcome: Outcome) -> Markup:
    gaps = [gap for gap in outcome.gaps if _of(test, gap) and gap.share is not None]
    gaps.sort(key=lambda gap: gap.parameters)
    percent = [100 * (gap.share or 0.0) for gap in gaps]
    low = [None if gap.share_low is None else 100 * gap.share_low for gap in gaps]
    high = [None if gap.share_high is None else 100 * gap.share_high for gap in gaps]
    # Where the gap is narrow the interval is wide: it is cut at the edge.
    ends = [min(max(end, -100.0), 200.0) for end in [*low, *high] if end is not None]
    y = charts.axis("share of the gap closed (%)", [0.0, 100.0, *percent, *ends])
    sizes = [gap.parameters / 1e6 for gap in gaps]
    series = [charts.Estimates("share of the gap", sizes, percent, low, high)]
    teacher = outcome.teacher.parameters
    upright = charts.Upright("1/10 of the teacher", SMALL * teacher / 1e6) if teacher else None
    title = f"share of the gap closed over parameters, {test.heading}"
    return charts.estimates(title, x, y, series, charts.Level("half", 100 * HALF), upright)


def _of(test: TestSet, row: Judged | Gap) -> bool:
    return (row.set, row.short) == (test.name, test.short)


def figure3(found: Sequence[Panel], outcome: Outcome) -> Markup:
    """The panels as one SVG file: correlations, and shares of the gap beneath."""
    rows = []
    for start in range(0, len(found), PANELS_A_ROW):
        part = found[start : start + PANELS_A_ROW]
        rows.append([(heading, upper) for heading, upper, _ in part])
        rows.append(
            [(f"{heading.split(' (')[0]}: gap closed", lower) for heading, _, lower in part]
        )
    title = "PCC over parameters, and share of the gap to the teacher that distillation closes"
    return charts.sheet(title, rows, [TITLES.get(kind, kind) for kind in kinds_drawn(outcome)])


# --- what is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Everything that was found."""

    models: list[Model]
    judged: list[Judged]
    gaps: list[Gap]
    verdicts: list[Verdict]

    @property
    def teacher(self) -> Model:
        """The model that the students are measured by."""
        return next(model for model in self.models if model.kind == "teacher")


def find(tests: Sequence[TestSet], models: Sequence[Model], seed: int) -> Outcome:
    """Judge all sets and answer both questions on each."""
    outcome = Outcome(list(models), [], [], [])
    for test in tests:
        judged, gaps = judge(test, models, seed)
        outcome.judged.extend(judged)
        outcome.gaps.extend(gaps)
        outcome.verdicts.append(beats(test.heading, gaps))
        outcome.verdicts.append(closes_half(test.heading, gaps, outcome.teacher))
    return outcome


def markdown(tests: Sequence[TestSet], outcome: Outcome, about: Mapping[str, Any]) -> str:
    """The gap table, the verdicts and the command, for a README."""
    titles = "judged against|student|parameters|labelled-only PCC|distilled PCC|teacher PCC"
    titles += "|difference|share of the gap"
    lines = [f"| {titles.replace('|', ' | ')} |", "|---|---|" + "---:|" * 6]
    for test in tests:
        rows = {row.model: row for row in outcome.judged if _of(test, row)}
        for gap in (gap for gap in outcome.gaps if _of(test, gap)):
            twins = [rows[f"{gap.variant}-{kind}"] for kind in KINDS]
            cells = [
                f"{test.heading}, {in_groups(test)}",
                gap.variant,
                f"{gap.parameters:,}",
                *(pcc_cell(row) for row in [*twins, rows[outcome.teacher.name]]),
                ranged(gap.difference, gap.difference_low, gap.difference_high, sign="+"),
                share_cell(gap),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    verdicts = [f"- {verdict.text}." for verdict in outcome.verdicts]
    how = f"`{about['command']}`, {about['date']}. In brackets: {about['intervals']}."
    return "\n".join([*lines, "", *verdicts, "", how, ""])


def pcc_cell(row: Judged) -> str:
    """The correlation with its interval."""
    if row.by_definition:
        return "1 by definition"
    return ranged(row.pcc, row.pcc_low, row.pcc_high)


def share_cell(gap: Gap) -> str:
    """The share of the gap with its interval, or why it has none."""
    if gap.share is None:
        return gap.reason or "–"
    why = f" ({gap.reason})" if gap.share_low is None and gap.reason else ""
    return ranged(gap.share, gap.share_low, gap.share_high) + why


def in_groups(test: TestSet) -> str:
    """How many clips, and in how many conditions."""
    clips, groups = len(test.groups), len(set(test.groups))
    return f"{clips} clips" + ("" if test.unit == "clip" else f" in {groups} {test.unit}s")


def page(
    tests: Sequence[TestSet], outcome: Outcome, found: Sequence[Panel], about: Mapping[str, Any]
) -> str:
    """``experiment.html``: one file without a script or an outside address."""
    pages = environment()
    pages.globals.update(
        ranged=ranged, pcc_cell=pcc_cell, share_cell=share_cell, in_groups=in_groups
    )
    sets = [
        {
            "test": test,
            "judged": [row for row in outcome.judged if _of(test, row)],
            "gaps": [gap for gap in outcome.gaps if _of(test, gap)],
            "by_definition": test.by_definition,
        }
        for test in tests
    ]
    template = pages.get_template("experiment.html.j2")
    return template.render(
        sets=sets,
        outcome=outcome,
        panels=found,
        about=about,
        titles=TITLES,
        kinds=kinds_drawn(outcome),
        versions=versions(),
    )


def write_all(
    tests: Sequence[TestSet], outcome: Outcome, about: Mapping[str, Any], out: Path
) -> None:
    """``results.json``, ``.csv`` and ``.md``, ``figure3.svg`` and ``experiment.html``."""
    content = {
        "about": about,
        "models": [asdict(model) for model in outcome.models],
        "sets": [asdict(row) for row in outcome.judged],
        "gaps": [asdict(gap) for gap in outcome.gaps],
        "verdicts": [asdict(verdict) for verdict in outcome.verdicts],
    }
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / "results.csv", csv_text([asdict(row) for row in outcome.judged]))
    write_text(out / "results.md", markdown(tests, outcome, about))
    found = panels(tests, outcome)
    write_text(out / "figure3.svg", figure3(found, outcome))
    write_text(out / "experiment.html", page(tests, outcome, found, about))


def about_run(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """The command, the day, what the runs had in common, and how long everything took."""
    times = args.out / "seconds.json"
    seconds: dict[str, Any] = _read_json(times) if times.is_file() else {}
    common = ("preset", "steps", "batch", "lr", "seed", "precision", "validate_every", "crops")
    settings = {name: getattr(runs[0].config, name, None) for name in common}
    return {
        "command": command_of("experiment", args, add_arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
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


def print_table(tests: Sequence[TestSet], outcome: Outcome) -> None:
    """The results as text."""
    for test in tests:
        print(f"{test.heading}, {in_groups(test)}")
        for row in (row for row in outcome.judged if _of(test, row)):
            rest = f"Spearman {figure(row.spearman)}  RMSE {figure(row.rmse)}"
            print(f"  {row.model:15} {row.parameters or 0:10,}  PCC {pcc_cell(row):22}  {rest}")
        for gap in (gap for gap in outcome.gaps if _of(test, gap)):
            print(f"  {gap.variant:15} share of the gap {share_cell(gap)}")


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train experiment``."""
    add = parser.add_argument
    add("--shards", type=path_here, required=True, help="pseudo-labelled shards to train on")
    add(
        "--validation",
        type=path_here,
        help="shards that choose the best update (default: validation beside --shards)",
    )
    add("--rated", type=path_here, required=True, help="CSV of rated clips to train on")
    add("--rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    add("--rated-validation", type=path_here, help="CSV that chooses the labelled-only best update")
    add(
        *("--rated-hold-out",),
        type=float,
        default=RATED_HOLD_OUT,
        help="without it: share of conditions taken from --rated (default %(default)s)",
    )
    add("--test-rated", type=path_here, help="CSV of rated clips to judge on")
    add("--test-rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    add("--test-shards", nargs="+", type=path_here, help="shards to judge on, by their labels")
    add("--test-samples", type=int, help="of every --test-shards, spread evenly (default: all)")
    add(
        "--pruned",
        nargs="+",
        type=path_here,
        default=[],
        metavar="RUN",
        help="folders of train prune: judged and drawn too",
    )
    _add_training_arguments(parser)


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variants", nargs="+", default=["v1", "v2", "v4", "v6"], help="sizes to train")
    add("--teacher", default="v7", help="what is closed up to: v7, a teacher, a run (default v7)")
    add("--out", type=path_here, required=True, help="folder; continued if it exists")
    add("--short", choices=sorted(WAYS), default="zero", help="how short clips are filled")
    add("--preset", choices=sorted(PRESETS), default="fast")
    for name in ("steps", "batch", "warmup"):
        add(f"--{name}", type=int, help="default: the preset's")
    add("--validate-every", type=int, help="default: the preset's; labelled-only: ten a run")
    for name in ("lr", "rated-share", "crops"):
        add(f"--{name}", type=float, help="default: the preset's")
    add("--precision", choices=("auto", "bf16", "fp32"))
    add("--seed", type=int, default=0, help="of training and of the resamples")
    add("--workers", type=int, default=1, help="decoding processes (0: none)")
    add("--threads", type=int, help="of the training process (default: all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--cache-gb", type=float, default=4.0, help="decoded samples kept in memory")
    add("--report-only", action="store_true", help="train and score nothing: judge scores.csv")


def run(args: argparse.Namespace) -> int:
    """``python -m train experiment``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with run_folder(args.out):
        return _experiment(args)


def _experiment(args: argparse.Namespace) -> int:
    runs, clips = make_plan(args), test_clips(args)
    pruned = pruned_models(args.pruned)
    teacher = load(args.teacher, args.device)  # now, not after hours: it may not be there
    times = args.out / "seconds.json"
    if not args.report_only:
        announce(runs)
        host = Host(workers=args.workers, device=args.device, cache_gb=args.cache_gb)
        train_all(runs, host, times)
        with timed(times, "scoring"):
            folders = {one.name: one.out for one in runs} | {one.name: one.folder for one in pruned}
            rows = score_all(folders, teacher, clips, args)
        write_text(args.out / "scores.csv", csv_text([asdict(row) for row in rows]))
    left = [run.name for run in runs if not is_done(run)]
    if left:
        raise UserError(f"{', '.join(left)}: not trained yet: run without --report-only")
    models = models_of(runs, pruned, teacher)
    tests = test_sets(read_scores(args.out / "scores.csv"), clips, models)
    outcome = find(tests, models, args.seed)
    write_all(tests, outcome, about_run(args, runs), args.out)
    print_table(tests, outcome)
    for verdict in outcome.verdicts:
        print(verdict.text)
    print(args.out / "experiment.html")
    return 0
