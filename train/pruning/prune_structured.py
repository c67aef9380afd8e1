"""Structured pruning: whole units are taken out. ``python -m train prune-structured``.

Units whose weights are all gone are removed: scores stay the same. ``--keep-macs 0.5`` goes on, for
students: the units that change the score least for their multiply-adds go too
(``train.pruning.structured``), until half of these are left; ``python -m train fit --start OUT``
then fine-tunes what is left. With ``--shards`` they go in a training (``train.pruning.joint``), by
gates (``--by l0``), by rank or by importance; the same command continues it, bit for bit. Size and
speed are measured beside the original's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.options import add_options, options_of
from data_specs.io.progress import progress_bar
from data_specs.io.waves import Padding, Resampler
from data_specs.rated import read_rated, require_heard
from data_specs.sample import CROP_SAMPLES
from data_specs.strict import Strict, checked
from train.data.order import generator
from train.data.shards import list_shards
from train.data.sources import RatedSamples, Samples, open_sources
from train.data.stream import ShardSamples, padded
from train.files import run_folder, write_model
from train.loop.loop import ONE_PROCESS, Host, host_of, train_on
from train.loop.parallel import make_fabric
from train.models.front_end import XlsrFrontEnd
from train.models.head_teacher import HeadTeacher, describe, weights_of
from train.models.loading import find_student, is_teacher
from train.models.pruned import DENSE_FILE, SPARSE_FILE, save_pruned
from train.models.student import Student, count, macs_of
from train.models.teacher import load_teacher
from train.pruning.gates import by_group, for_its_cost, most_likely
from train.pruning.joint import Joint, JointConfig, of_low_rank
from train.pruning.masks import Masks
from train.pruning.structured import (
    choose_units,
    dead_units,
    remove_units,
    removed,
    unit_importance,
)
from train.pruning.units import layout_of
from train.student.fit import export
from train.student.presets import PRESETS, FitConfig, computed_in_bf16, make_config

REPORT_FILE = "structured.json"

START = "start"
"""What importance leaves, before a training: a folder of the run."""

BATCH = 8
"""Clips that go through a network at a time."""

WORTH_A_MASK = 0.05
"""Share of zeros above which a tensor of 32 bits a weight is smaller with a bit for each."""


class Settings(Strict):
    """What a user chooses; folders and the machine are not in it."""

    keep_macs: float | None = Field(
        default=None, gt=0, le=1, description="share of the multiply-adds to keep; students only"
    )
    importance_clips: int = Field(default=64, ge=1, description="clips of --importance-from")
    clips: int = Field(default=16, ge=1, description="clips whose scores are compared")
    repeats: int = Field(default=7, ge=1, description="of each measurement of speed")


# --- clips ----------------------------------------------------------------------------------------


def clips_of(
    where: Path | str | None,
    count: int,
    seed: int = 0,
    padding: Padding = "zero",
    resampler: Resampler = "soft",
) -> Tensor:
    """Up to ``count`` clips, float32 (B, 122880) within -1 to 1, drawn from all of a source.

    A CSV of rated clips, a folder of shards, or None: noise of different loudness over time.
    ``padding`` stands behind short ones.
    """
    draw = generator(seed)
    if where is None:
        noise_BT = draw.standard_normal((count, CROP_SAMPLES), np.float32)
        gates_BS = draw.random((count, CROP_SAMPLES // 7680), np.float32) ** 3
        return torch.from_numpy(0.1 * noise_BT * gates_BS.repeat(7680, axis=1))
    samples = _samples(where, resampler)
    numbers = sorted(draw.permutation(len(samples))[:count].tolist())
    pcm_BT = torch.from_numpy(np.stack([samples.read(number)[0] for number in numbers]))
    return padded(pcm_BT, padding, torch.device("cpu"))


def _samples(where: Path | str, resampler: Resampler) -> Samples:
    if str(where).endswith(".csv"):
        clips = read_rated(where)
        require_heard(clips)
        return RatedSamples(clips, resampler)
    return ShardSamples(list_shards(where))


def scores_of(model: Student | HeadTeacher, waves_BT: Tensor) -> Tensor:
    """MOS (B,) of waves, float64, a few at a time."""
    if isinstance(model, HeadTeacher):
        parts = [torch.from_numpy(model.score(part)[0]) for part in waves_BT.split(BATCH)]
        return torch.cat(parts).double()
    device = next(model.parameters()).device
    with torch.inference_mode():
        found = [model.eval()(part.to(device)).cpu() for part in waves_BT.split(BATCH)]
    return torch.cat(found).double()


# --- what it buys ---------------------------------------------------------------------------------


class Report:
    """What is measured: printed at once, and kept for ``structured.json``."""

    def __init__(self, waves_BT: Tensor, original: Student | HeadTeacher) -> None:
        self.waves_BT, self.original = waves_BT, original
        self.before_B = scores_of(original, waves_BT)
        self.values: dict[str, Any] = {"threads": torch.get_num_threads()}

    def difference(self, what: str, model: Student | HeadTeacher) -> None:
        """How far the scores of clips are from the original's."""
        apart_B = (scores_of(model, self.waves_BT) - self.before_B).abs()
        found = {"max": float(apart_B.max()), "mean": float(apart_B.mean()), "clips": len(apart_B)}
        self.values[f"MOS apart {what}"] = found
        print(
            f"{what}: scores of {found['clips']} clips are {found['max']:.2g} MOS apart at most, "
            f"{found['mean']:.2g} on average",
            flush=True,
        )

    def finish(self, model: Student | HeadTeacher, repeats: int, out: Path) -> None:
        """Sizes and speed of the smaller model, and ``structured.json``."""
        sizes = zip(_sizes(self.original), _sizes(model), strict=True)
        for name, (old, new) in zip(("parameters", "multiply-adds a clip"), sizes, strict=True):
            self.values[name] = {"before": old, "after": new}
            print(f"{name}: {old:,} -> {new:,} ({new / old:.1%})")
        self.values["speed"] = [self._speed(model, clips, repeats) for clips in (1, BATCH)]
        write_text(out / REPORT_FILE, json.dumps(self.values, indent=2) + "\n")

    def _speed(self, model: Student | HeadTeacher, clips: int, repeats: int) -> dict[str, float]:
        """Median seconds of so many clips, both models in turns after one pair that warms up.

        In turns, so that what else the machine does falls on both; the gain is the median of the
        pairs' own ratios.
        """
        waves_BT = clips_of(None, clips)
        works = [partial(scores_of, one, waves_BT) for one in (self.original, model)]
        pairs = [[timeit(work, number=1) for work in works] for _ in range(repeats + 1)][1:]
        old_s, new_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        gain = statistics.median(old / new for old, new in pairs)
        print(
            f"{clips} window(s) at a time: {1e3 * old_s:.1f} ms before, {1e3 * new_s:.1f} ms "
            f"after: {gain:.2f} times as fast (median of {repeats}, "
            f"{torch.get_num_threads()} threads)"
        )
        return {"windows": clips, "before_s": old_s, "after_s": new_s, "gain": gain}


def _sizes(model: Student | HeadTeacher) -> tuple[int, int]:
    """Parameters, and multiply-adds a clip, of a student or a teacher's encoder."""
    network: Any = model
    if isinstance(model, HeadTeacher) and isinstance(model.front_end, XlsrFrontEnd):
        network = model.front_end.encoder
    layout = layout_of(network)
    return sum(p.numel() for p in network.parameters()), round(layout.macs(layout.counts))


# --- students -------------------------------------------------------------------------------------


def _prune_student(args: argparse.Namespace, settings: Settings, device: str) -> None:
    original, sha256 = find_student(args.model)
    report = Report(clips_of(args.importance_from, settings.clips), original.to(device))
    student, units = _cut(original, args, settings, report)
    _write(args.out, student, units, Path(args.model).name, sha256)
    report.finish(find_student(args.out)[0].to(device), settings.repeats, args.out)
    print(f"done: {args.out / DENSE_FILE}")


def _cut(
    original: Student, args: argparse.Namespace, settings: Settings, report: Report
) -> tuple[Student, dict[str, Any]]:
    """A student without its dead and its least important units, and how many these were."""
    device = next(original.parameters()).device
    dead = dead_units(original)
    units = {"dead": removed(dead)}
    student = remove_units(original, dead).to(device)
    report.difference("without its dead units", student)
    if settings.keep_macs is not None:
        chosen = _least(student, settings.keep_macs * macs_of(original.config), args, settings)
        student, units["chosen"] = remove_units(student, chosen).to(device), removed(chosen)
        report.difference("without the chosen ones", student)
    return student, units


def _write(
    folder: Path, student: Student, units: Mapping[str, Any], name: str, sha256: str
) -> None:
    """A smaller student; ``name`` and ``sha256`` are those of the one that it was."""
    parameters, macs = count(student.config)
    about = {
        "student": f"{name}, units pruned",  # files hold no machine's paths
        "pruned_from": {"model": name, "weights_sha256": sha256},
        "units_left": units,
        "config": student.config.model_dump(mode="json"),
        "parameters": parameters,
        "macs_per_clip": macs,
    }
    write_model(folder / DENSE_FILE, student.state_dict(), about)


def _least(
    student: Student, macs: float, args: argparse.Namespace, settings: Settings
) -> dict[str, Tensor]:
    """The least important units, without which so many multiply-adds are left.

    Whole blocks go; before a training single units come back, as many as the budget allows.
    """
    share = macs / macs_of(student.config)
    if share >= 1:
        print(f"without dead units it has less than {settings.keep_macs:.0%}: nothing is chosen")
        return {}
    device = next(student.parameters()).device
    heard = (student.config.padding, student.config.resampler)
    waves_BT = clips_of(args.importance_from or args.shards, settings.importance_clips, 1, *heard)
    bar = progress_bar(torch.split(waves_BT, 1), unit="clip", desc="importance")
    importance = unit_importance(student, (wave_1T.to(device) for wave_1T in bar))
    gone = choose_units(student, importance, share)
    if args.shards:
        layout = layout_of(student)
        left = {name: int((~gone_U).sum()) for name, gone_U in gone.items()}
        kept_N = most_likely(layout, for_its_cost(layout, importance), macs, left)
        gone = {name: ~kept_U for name, kept_U in by_group(layout, kept_N)}
    return gone


def _prune_in_training(args: argparse.Namespace, settings: Settings, host: Host) -> None:
    """Take units out of a student while it learns, or go on with that."""
    if settings.keep_macs is None:
        raise UserError("--shards: how much shall be left? Give --keep-macs .5")
    dense, sha256 = find_student(args.model)
    sources = open_sources(args.shards, args.validation)
    changes = options_of(args, FitConfig) | {"start": sha256}
    name, preset = Path(args.model).name, changes.pop("preset")
    fit = make_config(name, sources, preset, dense.config, **changes)
    own = options_of(args, JointConfig) | fit.model_dump()
    config = checked(JointConfig, own, "options")
    report = Report(clips_of(args.importance_from, settings.clips), dense.to(host.device))
    start = of_low_rank(dense) if config.by == "low-rank" else dense
    if config.by == "importance":
        folder = args.out / START
        if not (args.out / "last.pt").is_file():  # else a run that goes on with what it chose
            folder.mkdir(exist_ok=True)
            _write(folder, *_cut(dense, args, settings, report), name, sha256)
        start, _ = find_student(folder)
    fabric = make_fabric(host.device, bf16=computed_in_bf16(config, host.device))
    train_on(Joint(config, dense, start, fabric), sources, args.out, host)
    export(args.out, config, sources.info)
    smaller = find_student(args.out)[0].to(host.device)
    report.difference(f"by {config.by}", smaller)
    report.finish(smaller, settings.repeats, args.out)
    print(f"done: {args.out / DENSE_FILE}")


# --- teachers -------------------------------------------------------------------------------------


def _prune_teacher(args: argparse.Namespace, settings: Settings, device: str) -> None:
    """Take the dead heads and feed-forward units out of a teacher's XLS-R."""
    teacher = load_teacher(args.model, device, "fp32")
    if not isinstance(teacher, HeadTeacher) or not isinstance(teacher.front_end, XlsrFrontEnd):
        raise UserError(f"teacher {teacher.name!r} has no XLS-R encoder that could be pruned")
    front_end = teacher.front_end
    dead = dead_units(front_end.encoder)
    encoder = remove_units(front_end.encoder, dead)
    smaller = XlsrFrontEnd(teacher.name, encoder, front_end.weights_sha256, device)
    parts = (teacher.head, teacher.weights_sha256, teacher.calibration)
    pruned = HeadTeacher(teacher.name, smaller, *parts)
    about = describe(pruned) | {
        "pruned_from": {"model": Path(args.model).name, "weights_sha256": teacher.weights_sha256},
        "units_left": {"dead": removed(dead)},
    }
    weights = weights_of(pruned)
    save_pruned(args.out, weights, zeros_of(weights), about)
    after = load_teacher(args.out, device, "fp32")
    assert isinstance(after, HeadTeacher)
    report = Report(clips_of(args.importance_from, settings.clips), teacher)
    report.difference("without its dead units", after)
    report.finish(after, settings.repeats, args.out)
    print(f"done: {args.out / SPARSE_FILE}")


def zeros_of(weights: Mapping[str, Tensor]) -> Masks:
    """Masks of the zeros, where they are worth it: what is left may still be sparse."""
    matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim >= 2}
    shares = {name: float((tensor == 0).float().mean()) for name, tensor in matrices.items()}
    return Masks({n: t != 0 for n, t in matrices.items() if shares[n] > WORTH_A_MASK})


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train prune-structured``."""
    add = parser.add_argument
    add("--model", required=True, help="v7, or the folder of a run or pruned model")
    add("--out", type=path_here, required=True, help="folder of the smaller model")
    add(
        "--importance-from", help="shards or a CSV of clips: their scores (no labels) say what goes"
    )
    add_options(parser, Settings)
    add("--shards", help="train on these while units go (folder or address)")
    add("--validation", help="shards to validate on (default: validation beside --shards)")
    add("--preset", choices=sorted(PRESETS), default="fast", help="of the training")
    add_options(parser, JointConfig)
    add_options(parser, Host, ONE_PROCESS)


def run(args: argparse.Namespace) -> int:
    """``python -m train prune-structured``; returns the exit code."""
    host = host_of(args, Host)
    settings = checked(Settings, options_of(args, Settings), "options")
    of_teacher = is_teacher(args.model)
    if of_teacher and settings.keep_macs is not None:
        raise UserError(
            "of a teacher only dead units are removed: --keep-macs is for students; prune it "
            "further with python -m train prune"
        )
    if of_teacher and args.shards:
        raise UserError("of a teacher only dead units are removed: --shards is for students")
    if args.shards is None and args.steps:
        raise UserError("--steps: of a training; give --shards to learn from")
    if args.shards is None and args.by != "importance":
        raise UserError(f"--by {args.by} learns what goes: give --shards to learn from")
    if settings.keep_macs is not None and not (args.importance_from or args.shards):
        raise UserError("--keep-macs needs clips to measure by: --importance-from SHARDS")
    with run_folder(args.out):
        if args.shards:
            _prune_in_training(args, settings, host)
            return 0
        (_prune_teacher if of_teacher else _prune_student)(args, settings, host.device)
    return 0
