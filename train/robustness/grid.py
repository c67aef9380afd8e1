"""Models x bits x sparsity x conditions. ``python -m train robustness``.

Every model judges every clip in every cell: with weights of so many bits, so many of them zero, and
in real int8. Results are what that adds to the error of the same model before it, by condition, and
whether it adds more in one condition than in the matched one. What was judged is kept, clip by
clip: the same command goes on where it was stopped, and a changed table costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.options import add_options
from data_specs.io.progress import progress_bar
from data_specs.io.waves import Resampler
from train.audio import Wave
from train.bootstrap import LEVEL, RESAMPLES
from train.command import made_by
from train.evaluation.score_cache import Key, ScoreCache
from train.evaluation.tables import write_tables
from train.export.clips import read_clips
from train.files import run_folder
from train.loop.loop import Host, host_of
from train.robustness.clips import read_judged
from train.robustness.compress import Compressor
from train.robustness.interface import BITS, DENSE, INT8, METHODS, Cell, Clip, Judged
from train.robustness.page import page
from train.robustness.quality import Quality
from train.robustness.results import Judgement, results_md, rows_of, worst
from train.robustness.words import WordsJudged

TASKS: dict[str, type[Judged]] = {"quality": Quality, "words": WordsJudged}
SLICES = ("condition", "dataset")
TIMED = 10
"""Windows that each network is timed on, in turns."""

AT_ONCE = 16
"""Clips that are judged together."""


@dataclass
class Run:
    """What all models of a grid share."""

    clips: list[Clip]
    waves: Mapping[Resampler, list[Wave]]
    """Windows to calibrate on, or none."""
    cells: list[Cell]
    cache: ScoreCache
    bar: tqdm[Any]
    speeds: list[dict[str, Any]] = field(default_factory=list)


def cells_of(bits: Sequence[str], sparsity: Sequence[float], by: Sequence[str]) -> list[Cell]:
    """All cells, the dense one first."""
    zeros = [(share, one) for share in sorted(set(sparsity)) if share for one in by]
    pairs = [(0.0, ""), *zeros] if 0 in sparsity else zeros
    cells = [Cell(one, *pair) for pair in pairs for one in BITS if one in bits]
    return list(dict.fromkeys([DENSE, *cells]))


def judge(model: Judged, run: Run) -> list[Judgement]:
    """One model in all cells, in real int8 too where there are windows to calibrate on."""
    waves = run.waves[model.resampler]
    compressor = Compressor(model, waves)
    made_on = hashlib.sha256(b"".join(wave.tobytes() for wave in waves)).hexdigest()[:12]
    found = []
    for cell in run.cells:
        on = made_on if cell.by == "importance" else ""
        found.append(_judged(model, model, cell, on, run, compressor))
    compressor.apply(DENSE)
    if waves:
        with tempfile.TemporaryDirectory() as folder:
            small = model.int8(waves, Path(folder))
            found.append(_judged(model, small, Cell(INT8), made_on, run, None))
            run.speeds.append(speed(model, small, waves[0]))
    return found


def _judged(
    model: Judged, run_by: Judged, cell: Cell, on: str, run: Run, compressor: Compressor | None
) -> Judgement:
    """The values of one cell, out of the cache where they are known."""
    version, names = f"{run_by.version} {cell.label} {on}", model.columns
    keys: list[Key] = [(model.weights_sha256, version, "", clip.sha256) for clip in run.clips]
    known = [run.cache.get(key, names) for key in keys]
    missing = [number for number, values in enumerate(known) if values is None]
    run.bar.set_postfix_str(f"{model.name}, {cell.label}")
    run.bar.initial += len(keys) - len(missing)
    run.bar.update(len(keys) - len(missing))
    if missing:
        model.prepare(run.clips)
        if compressor:
            compressor.apply(cell)
    for start in range(0, len(missing), AT_ONCE):
        part = missing[start : start + AT_ONCE]
        for number, values in zip(part, run_by.judge([run.clips[n] for n in part]), strict=True):
            run.cache.put(keys[number], values)
            known[number] = values
            run.bar.update()
    columns = {name: np.array([one[name] for one in known if one]) for name in names}
    return Judgement(model.name, cell, columns)


def speed(model: Judged, small: Judged, wave_T: Wave) -> dict[str, Any]:
    """Megabytes, and milliseconds a window of 7.68 s (the median), of both in turns."""
    spent: dict[str, list[float]] = {"fp32": [], "int8": []}
    for number in range(TIMED + 1):
        for name, one in (("fp32", model), ("int8", small)):
            began = time.perf_counter()
            one.hear(wave_T)
            if number:  # the first warms up
                spent[name].append(1000 * (time.perf_counter() - began))
    return {
        "model": model.name,
        "fp32_mb": model.megabytes,
        "int8_mb": small.megabytes,
        **{f"{name}_ms": median(times) for name, times in spent.items()},
    }


def _windows(args: argparse.Namespace, resampler: Resampler) -> list[Wave]:
    if not args.calibrate:
        return []
    return read_clips(args.calibrate, args.calibration_clips, resampler)


def _check(args: argparse.Namespace) -> None:
    """``UserError`` for what is wrong before any work."""
    for share in args.sparsity:
        if not 0 <= share < 100:
            raise UserError(f"--sparsity {share:g}: percent of the weights, from 0 to below 100")
    if args.clips is not None and args.clips < 1:
        raise UserError(f"--clips {args.clips}: at least 1 of each condition")
    if not args.calibrate and "importance" in args.by and any(args.sparsity):
        raise UserError(
            "--by importance needs real clips to find it on: give --calibrate SHARDS, a CSV or a "
            "folder of audio, or --by magnitude"
        )
    if twice := [name for name in args.model if args.model.count(name) > 1]:
        raise UserError(f"{twice[0]!r} is asked for twice: name it once with --model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train robustness``."""
    add = parser.add_argument
    several: Any = {"action": "extend", "nargs": "+"}
    add("--task", choices=sorted(TASKS), default="quality")
    add("--model", required=True, help="v7, a run or a model file; several or repeated", **several)
    add("--data", type=path_here, required=True, help="CSV of the clips to judge")
    slices = "what the conditions are: column condition, or dataset"
    add("--slices", choices=SLICES, default=SLICES[0], help=slices)
    matched = "condition that the others are held against (default: the first)"
    add("--matched", metavar="CONDITION", help=matched)
    add("--clips", type=int, help="most of each condition, spread evenly (default: all)")
    add("--bits", nargs="+", choices=BITS, default=list(BITS), help="a weight (default: all)")
    zero = "percent of the weights that are zero (default: %(default)s)"
    add("--sparsity", nargs="+", type=float, default=[0, 30, 50, 70, 90], help=zero)
    add("--by", nargs="+", choices=METHODS, default=list(METHODS), help="which (default: both)")
    calibrate = "other clips, for importance and int8: shards, a CSV of rated clips, or a folder"
    add("--calibrate", type=path_here, help=calibrate)
    add("--calibration-clips", type=int, default=32)
    add("--out", type=path_here, required=True, help="folder for the results; continued")
    add("--seed", type=int, default=0, help="of the resamples")
    add_options(parser, Host, Host.model_fields.keys() - {"device", "threads"})


def run(args: argparse.Namespace) -> int:
    """``python -m train robustness``; returns the exit code."""
    host = host_of(args, Host)
    _check(args)
    task: Any = TASKS[args.task]
    clips = read_judged(args.data, args.slices, args.clips)
    conditions = list(dict.fromkeys(clip.condition for clip in clips))
    matched = args.matched or conditions[0]
    if matched not in conditions:
        raise UserError(f"--matched {matched}: {args.data} has {', '.join(conditions)}")
    models = [task(name, host.device) for name in args.model]
    waves = {one: _windows(args, one) for one in {model.resampler for model in models}}
    cells = cells_of(args.bits, args.sparsity, args.by)
    total = len(models) * (len(cells) + bool(args.calibrate)) * len(clips)
    with (
        run_folder(args.out),
        ScoreCache(args.out / "judged.jsonl") as cache,
        progress_bar(total=total, unit="clip", desc=args.task) as bar,
    ):
        grid = Run(clips, waves, cells, cache, bar)
        judged = [one for model in models for one in judge(model, grid)]
        rows = rows_of(task, clips, judged, matched, args.seed)
        about = made_by("robustness", args, add_arguments) | {
            "matched": matched,
            "clips": str(len(clips)),
            "intervals": f"bootstrap intervals ({LEVEL:.0%}, {RESAMPLES} resamples)",
        }
        records = [asdict(row) for row in rows]
        content = {"about": about, "rows": records, "speeds": grid.speeds}
        text = results_md(rows, grid.speeds, about)
        write_tables(args.out, "robustness", content, records, text)
        write_text(args.out / "robustness.html", page(rows, grid.speeds, about))
    print(text, worst(rows), args.out / "robustness.html", sep="\n")
    return 0
