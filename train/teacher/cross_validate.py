"""What dataset scales do for a teacher, on few rated clips. ``python -m train cross-validate``.

Whole conditions are held out in turn, fold by fold. On the rest a head is trained without and with
a scale and shift a dataset (by ``train.teacher.fit``, with a part of it held out again to stop at
the best and to fit the universal scale). What the heads say of the clips held out is put together
over the folds, and judged in three ways: ``plain`` (a head without scales), ``own scale`` (with
them, each clip on its own dataset's) and ``universal`` (the same head, all clips on one scale).

Front ends are those of ``teachers.yaml``. Of ``v7-conv`` mind that its network has learned from
people's ratings already, perhaps of these clips: it may flatter all three ways.

The folder holds the features, a file of predictions for every head (a head whose file is there is
not trained again), ``results.json`` and ``results.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.parse import json_field, json_object
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip, read_rated
from data_specs.strict import checked, digest, unknown
from data_specs.teacher import teacher_table
from train.data.hold_out import groups_of, hold_out
from train.data.sources import require_once
from train.files import csv_text, load_checkpoint, require_same, run_folder
from train.metrics import agreement
from train.models.front_end import load_front_end
from train.teacher.calibrate import Affine, Doubles
from train.teacher.feature_cache import ROWS, FrameCache, bad_clips, open_cache
from train.teacher.fit import (
    FEW_CLIPS,
    HeadTrainer,
    Host,
    RatedFrames,
    Rows,
    Settings,
    TeachConfig,
    make_config,
    teach,
)

STREAM_FOLDS = 3
"""The generator's stream of the folds (``train.teacher.fit``, ``train.data.hold_out``: 0 to 2)."""

PLAIN, OWN, UNIVERSAL = WAYS = ("plain", "own scale", "universal")

LEFT_TO_TRAIN = 2
"""Conditions of every dataset that each fold must leave: one to train, one to validate."""

DEFAULTS = Settings(steps=100, lr=2e-3, validate_every=20)
"""For some hundred clips. After 60 steps batch norms still lag: folds are off by up to .8 MOS."""

VALIDATION_SHARE = 0.3
"""A tenth (``train.teacher.fit``) of ten conditions would be one, which says nothing of a scale."""


class Plan(BaseModel):
    """What is trained. ``settings.seed`` draws the folds and is the first of the heads' seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: Settings = DEFAULTS
    folds: Annotated[int, Field(ge=2)] = 5
    seeds: Annotated[int, Field(ge=1)] = 2
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = VALIDATION_SHARE

    def parts(self, front_ends: Iterable[str]) -> list[Part]:
        """All trainings; front ends take turns, so that the time left is told well."""
        first = self.settings.seed
        return [
            Part(front_end, fold, seed, scaled)
            for seed in range(first, first + self.seeds)
            for fold in range(self.folds)
            for front_end in front_ends
            for scaled in (False, True)
        ]

    def identity(self, clips: Sequence[RatedClip]) -> dict[str, Any]:
        """What a folder must have been made with; front ends and seeds may be added to it."""
        rated = [[c.dataset, c.path.name, c.mos, c.condition, c.system] for c in clips]
        return {
            **self.settings.model_dump(exclude={"front_end", "bias_aware"}),
            "folds": self.folds,
            "validation_share": self.validation_share,
            "clips": len(clips),
            "clips_sha256": digest(rated),
        }


@dataclass(frozen=True)
class Part:
    """One training: without or with scales, of one seed, with one fold held out."""

    front_end: str
    fold: int
    seed: int
    scaled: bool

    def file(self, out: Path) -> Path:
        """Where its predictions are kept."""
        ending = "scaled" if self.scaled else "plain"
        return out / self.front_end / f"fold-{self.fold}-seed-{self.seed}-{ending}.json"


@dataclass(frozen=True)
class Result:
    """A dataset judged in one way; ``pcc`` (None where undefined) and ``rmse`` for every seed."""

    front_end: str
    dataset: str
    clips: int
    way: str
    pcc: tuple[float | None, ...]
    rmse: tuple[float | None, ...]

    def row(self) -> dict[str, Any]:
        """A row of ``results.csv``: means and standard deviations over the seeds."""
        pcc, pcc_sd = mean_and_spread(self.pcc)
        rmse, rmse_sd = mean_and_spread(self.rmse)
        figures = {"pcc": pcc, "pcc_sd": pcc_sd, "rmse": rmse, "rmse_sd": rmse_sd}
        names = ("front_end", "dataset", "clips", "way")
        return {name: getattr(self, name) for name in names} | figures | {"seeds": len(self.pcc)}


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); none of what is undefined for any of the values."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def read_clips(rated: Sequence[Path]) -> list[RatedClip]:
    """The clips of all CSV files, by dataset and file name.

    ``ValueError`` for a file that is rated twice: one fold would train on it and another judge it.
    """
    clips = [clip for path in rated for clip in read_rated(path)]
    require_once(clips)
    return sorted(clips, key=lambda clip: (clip.dataset, clip.path.name, str(clip.path)))


def folds_of(clips: Sequence[RatedClip], folds: int, seed: int) -> list[int]:
    """The fold of every clip: whole conditions (else systems, else clips), datasets spread evenly.

    What has one name in several datasets is in one fold: reference conditions are the same in
    many listening tests. Depends on the clips and the seed, not on the clips' order. ``ValueError``
    naming a dataset that has too few conditions.
    """
    keys = _keys(clips)
    groups = {key: number for number, key in enumerate(sorted(set(keys)))}
    datasets = sorted({clip.dataset for clip in clips})
    shares_GD = np.zeros((len(groups), len(datasets)))
    for key, clip in zip(keys, clips, strict=True):
        shares_GD[groups[key], datasets.index(clip.dataset)] += 1
    shares_GD /= shares_GD.sum(axis=0)
    fold_G = _spread_evenly(shares_GD, folds, seed)
    fold_N = [int(fold_G[groups[key]]) for key in keys]
    _require_enough(clips, keys, fold_N, folds)
    return fold_N


def _keys(clips: Sequence[RatedClip]) -> list[tuple[str, str]]:
    """What every clip is held out with: (condition, system or clip; its name)."""
    keys = [("", "")] * len(clips)
    for name in {clip.dataset for clip in clips}:
        rows = [row for row, clip in enumerate(clips) if clip.dataset == name]
        kind, found = groups_of([clips[row] for row in rows])
        for row, key in zip(rows, found, strict=True):
            keys[row] = (kind, key)
    return keys


def _spread_evenly(shares_GD: Doubles, folds: int, seed: int) -> Rows:
    """The fold (G,) of groups that hold these shares of the datasets.

    Large ones first, in random order among equals, each to the fold that has least of its datasets.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, STREAM_FOLDS])))
    sizes_G = shares_GD.sum(axis=1).round(9)  # so that no last bit decides between equals
    order = sorted(draw.permutation(len(shares_GD)), key=lambda group: -sizes_G[group])
    loads_FD = np.zeros((folds, shares_GD.shape[1]))
    fold_G = np.zeros(len(shares_GD), np.int64)
    for group in order:
        of_its_datasets_F = (loads_FD @ shares_GD[group]).round(9)
        of_all_F = loads_FD.sum(axis=1).round(9)
        fold_G[group] = np.lexsort((of_all_F, of_its_datasets_F))[0]
        loads_FD[fold_G[group]] += shares_GD[group]
    return fold_G


def _require_enough(
    clips: Sequence[RatedClip], keys: Sequence[tuple[str, str]], fold_N: Sequence[int], folds: int
) -> None:
    of_dataset: dict[str, set[tuple[tuple[str, str], int]]] = defaultdict(set)
    for clip, key, fold in zip(clips, keys, fold_N, strict=True):
        of_dataset[clip.dataset].add((key, fold))
    for name, pairs in sorted(of_dataset.items()):
        kind = next(iter(pairs))[0][0]
        if len(pairs) < folds:
            raise UserError(
                f"dataset {name!r} has {len(pairs)} {kind}s for {folds} folds: give fewer --folds, "
                "or leave it out"
            )
        left = len(pairs) - max(Counter(fold for _, fold in pairs).values())
        if left < LEFT_TO_TRAIN:
            raise UserError(
                f"dataset {name!r} has {len(pairs)} {kind}s: a fold leaves {left} of them, "
                f"{LEFT_TO_TRAIN} are needed to train and validate: give more --folds, or leave "
                "it out"
            )


def split(
    cache: FrameCache,
    clips: Sequence[RatedClip],
    fold_N: Sequence[int],
    part: Part,
    validation_share: float = VALIDATION_SHARE,
) -> tuple[RatedFrames, Rows]:
    """(what a head trains and validates on, rows to judge it on); no clip without features.

    ``ValueError`` naming the fold that has too few clips left.
    """

    def usable(what: str, rows: Iterable[int], least: int) -> Rows:
        found = np.array([row for row in rows if row not in cache.bad], np.int64)
        if len(found) < least:
            raise UserError(
                f"{part.front_end}, fold {part.fold}: {len(found)} clips to {what} that have "
                f"features, at least {least} needed"
            )
        return found

    rest = [row for row, fold in enumerate(fold_N) if fold != part.fold]
    held = dict(
        zip(rest, hold_out([clips[r] for r in rest], part.seed, validation_share), strict=True)
    )
    train = usable("train on", (row for row in rest if not held[row]), 1)
    validation = usable("validate on", (row for row in rest if held[row]), 2)
    judged = usable("judge on", (row for row, fold in enumerate(fold_N) if fold == part.fold), 1)
    return RatedFrames(cache.about, cache.frames, clips, train, validation), judged


def cross_validate(
    caches: Mapping[str, FrameCache],
    clips: Sequence[RatedClip],
    plan: Plan,
    out: Path,
    host: Host | None = None,
) -> list[Result]:
    """Train all heads whose predictions are not in ``out``, and judge them all.

    ``caches`` has the features of the clips by front end. After Ctrl-C or a kill the same call
    continues, and on a CPU to the same results. ``ValueError`` if ``out``
    holds results of another plan, clips or features.
    """
    host = host or Host()
    fold_N = folds_of(clips, plan.folds, plan.settings.seed)
    claim(out, plan, clips)
    parts = plan.parts(caches)
    there = sum(part.file(out).is_file() for part in parts)
    predicted: dict[Part, list[dict[str, Any]]] = {}
    with progress_bar(
        total=len(parts), initial=there, unit="head", disable=not host.progress
    ) as bar:
        for part in parts:
            bar.set_postfix_str(f"{part.front_end} {part.file(out).stem}")
            cache, is_there = caches[part.front_end], part.file(out).is_file()
            data, judged = split(cache, clips, fold_N, part, plan.validation_share)
            config = _config(part, plan, data)
            predicted[part] = _predicted(part.file(out), config, data, judged, host)
            bar.update(not is_there)
    results = summarise(predicted)
    _write(out, plan, clips, caches, results)
    return results


def claim(out: Path, plan: Plan, clips: Sequence[RatedClip]) -> None:
    """Write ``config.json``; ``ValueError`` naming the field that is not the same in one there."""
    path, now = out / "config.json", plan.identity(clips)
    if path.is_file():
        require_same(out, json_object(path.read_bytes(), path), now)
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=2) + "\n")


def _config(part: Part, plan: Plan, data: RatedFrames) -> TeachConfig:
    changes = {"bias_aware": part.scaled, "seed": part.seed}
    return make_config(plan.settings.model_copy(update=changes), data)


def _predicted(
    path: Path,
    config: TeachConfig,
    data: RatedFrames,
    judged: Rows,
    host: Host,
) -> list[dict[str, Any]]:
    """The predictions in ``path``, which is made by training first.

    Beside ``path`` is the folder of the training, until that is done.
    """
    run = path.with_suffix("")
    if not path.is_file():
        teach(config, data, run, dataclasses.replace(host, progress=False))
        rows = predict(config, data, judged, run, host.device)
        content = {"fit": config.model_dump(), "clips": rows}
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(run, ignore_errors=True)
    content = json_object(path.read_bytes(), path, "delete it and run again")
    require_same(path, json_field(content, "fit", dict, path), config.model_dump())
    found: list[dict[str, Any]] = json_field(content, "clips", list, path)
    return found


def predict(
    config: TeachConfig, data: RatedFrames, judged: Rows, run: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What the best head of a finished training says of these clips, in each way that it has."""
    trainer = HeadTrainer(config, data.training_counts, device)
    trainer.load_weights(load_checkpoint(run / "best.pt"))
    logits_V = trainer.raw_logits(dataclasses.replace(data, validation_rows=judged))
    about = json.loads((run / "head.json").read_text("utf-8"))
    own = {name: trainer.own(name) for name in {data.clips[row].dataset for row in judged}}
    rows = []
    for row, logit in zip(judged, logits_V, strict=True):
        clip = data.clips[row]
        maps = {PLAIN: own[clip.dataset]}  # scale 1, shift 0
        if config.bias_aware:
            universal = Affine(**about["calibration"]["universal"])
            maps = {OWN: own[clip.dataset], UNIVERSAL: universal}
        said = {way: float(affine.mos(logit)) for way, affine in maps.items()}
        known = {"dataset": clip.dataset, "name": clip.path.name, "mos": clip.mos}
        rows.append({**known, "logit": float(logit), **said})
    return rows


def summarise(predicted: Mapping[Part, Sequence[Mapping[str, Any]]]) -> list[Result]:
    """Every dataset in every way, over all folds together; one value a seed."""
    pairs: dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]]
    pairs = defaultdict(lambda: defaultdict(list))
    for part, rows in predicted.items():
        for row in rows:
            for way in (way for way in WAYS if way in row):
                key = (part.front_end, row["dataset"], way)
                pairs[key][part.seed].append((row["mos"], row[way]))
    front_ends = list(dict.fromkeys(part.front_end for part in predicted))
    results = []
    for key in sorted(
        pairs, key=lambda key: (front_ends.index(key[0]), key[1], WAYS.index(key[2]))
    ):
        found = [agreement(*zip(*of_seed, strict=True)) for of_seed in pairs[key].values()]
        front_end, dataset, way = key
        pcc, rmse = tuple(one.pcc for one in found), tuple(one.rmse for one in found)
        results.append(Result(front_end, dataset, found[0].clips, way, pcc, rmse))
    return results


def _write(
    out: Path,
    plan: Plan,
    clips: Sequence[RatedClip],
    caches: Mapping[str, FrameCache],
    results: Sequence[Result],
) -> None:
    """``results.json`` (every seed) and ``results.csv`` (means)."""
    content = {
        "config": plan.identity(clips) | {"seeds": plan.seeds},
        "front_ends": {name: cache.about.weights_sha256 for name, cache in caches.items()},
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(out / "results.csv", csv_text([result.row() for result in results]))


def table(results: Sequence[Result]) -> str:
    """The results as text: means over the seeds, and the standard deviation of several."""
    front = max(len("front end"), *(len(result.front_end) for result in results))
    name = max(len("dataset"), *(len(result.dataset) for result in results))
    way = max(map(len, WAYS))
    lines = [
        f"{'front end':{front}}  {'dataset':{name}} {'clips':>6}  {'way':{way}} {'PCC':>12} "
        f"{'RMSE':>12}"
    ]
    for result in results:
        row = result.row()
        lines.append(
            f"{result.front_end:{front}}  {result.dataset:{name}} {result.clips:6}  "
            f"{result.way:{way}} {_figure(row['pcc'], row['pcc_sd']):>12} "
            f"{_figure(row['rmse'], row['rmse_sd']):>12}"
        )
    return "\n".join(lines)


def _figure(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ±{spread:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train cross-validate``."""
    parser.add_argument(
        "--front-end", action="append", required=True, help="of teachers.yaml; repeatable"
    )
    parser.add_argument(
        "--rated",
        type=path_here,
        action="append",
        required=True,
        help="CSV of rated clips; repeatable",
    )
    parser.add_argument(
        "--out", type=path_here, required=True, help="folder; continued if it exists"
    )
    parser.add_argument(
        "--cache", type=path_here, help="folder of features (default: OUT/features)"
    )
    parser.add_argument("--folds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="heads a fold (default: %(default)s)")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=VALIDATION_SHARE,
        help="of the conditions left by a fold: to find the best head (default: %(default)s)",
    )
    for name in ("steps", "batch", "validate-every", "cap", "dim", "heads", "layers", "seed"):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    for name in ("lr", "weight-decay", "dropout"):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, help="default: %(default)s")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train cross-validate``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = Settings.model_fields.keys() - {"front_end", "bias_aware"}
    settings = checked(Settings, {name: getattr(args, name) for name in chosen}, "options")
    given = {name: getattr(args, name) for name in Plan.model_fields if name != "settings"}
    plan = checked(Plan, given | {"settings": settings}, "options")
    front_ends = list(dict.fromkeys(args.front_end))
    for name in front_ends:
        if name not in teacher_table().front_ends:
            raise UserError(unknown("front end", name, teacher_table().front_ends))
    clips = read_clips(args.rated)
    fold_N = folds_of(clips, plan.folds, plan.settings.seed)
    with run_folder(args.out):
        claim(args.out, plan, clips)
        _warn(clips, fold_N, plan)
        caches = _features(args, front_ends, clips)
        results = cross_validate(caches, clips, plan, args.out, Host(args.device))
    print(_summary(clips, plan))
    print(table(results))
    print(f"done: {args.out / 'results.json'}")
    return 0


def _features(
    args: argparse.Namespace,
    front_ends: Sequence[str],
    clips: Sequence[RatedClip],
) -> dict[str, FrameCache]:
    """The features of every front end, which is dropped when they are there."""
    caches = {}
    for name in front_ends:
        folder = (args.cache or args.out / "features") / name
        cache = open_cache(folder, clips, load_front_end(name, args.device, args.precision))
        if cache.bad:
            print(f"{name}: {len(cache.bad)} clips left out: see {folder / ROWS}", file=sys.stderr)
            print("\n".join(bad_clips(cache, clips)), file=sys.stderr)
        caches[name] = cache
    return caches


def _warn(clips: Sequence[RatedClip], fold_N: Sequence[int], plan: Plan) -> None:
    if len({clip.dataset for clip in clips}) == 1:
        print(
            f"warning: all clips are of dataset {clips[0].dataset!r}: a scale of its own says "
            "little, give a second --rated",
            file=sys.stderr,
        )
    rest = [clip for clip, fold in zip(clips, fold_N, strict=True) if fold != 0]
    validate = sum(hold_out(rest, plan.settings.seed, plan.validation_share))
    if validate < FEW_CLIPS:
        print(
            f"warning: a fold has some {validate} clips to find its best head and universal scale "
            f"on; with fewer than {FEW_CLIPS} these may be far off",
            file=sys.stderr,
        )


def _summary(clips: Sequence[RatedClip], plan: Plan) -> str:
    counts = ", ".join(
        f"{n} {count}" for n, count in sorted(Counter(c.dataset for c in clips).items())
    )
    settings = plan.settings
    return (
        f"{counts}; {plan.folds} folds of whole conditions, {plan.seeds} seeds, "
        f"{settings.steps} steps of {settings.batch}"
    )
