"""Scores of speech clips: ``load("small").score(wave, sample_rate)`` and ``python -m train score``.

Longer clips are scored in windows of 7.68 s, at most 1 s apart, spread evenly; the score is
the windows' mean (published code). Shorter clips get zeros at their end (published), or are
repeated (``padding="repeat"``, better for small students).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from data_specs.io.addresses import path_here, redacted
from data_specs.io.audio import UNREADABLE
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.hardware import keep_freed_memory
from data_specs.io.progress import progress_bar
from data_specs.io.text import printable
from data_specs.io.walk import LeftOut, counts, print_left_out
from data_specs.io.waves import Padding
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.models.loading import is_teacher, model_in, path_of, read_model
from train.models.precision import PRECISIONS
from train.models.student import load_v7, v7_weights_path
from train.models.teacher import load_teacher
from train.scoring.base import WINDOWS_A_BATCH, Channels, Scorer
from train.scoring.bundle import ONNX_INT8, fetch, verify_model
from train.scoring.files import choose_files
from train.scoring.onnx_scorer import OnnxScorer
from train.scoring.scorer import StudentScorer, TeacherScorer
from train.scoring.table import LineTable, Settings, Stamp, open_table, rows_of, stamp_of
from train.scoring.windows import Mode

DONE, SOME_FAILED, NONE_SCORED = 0, 1, 2
"""Exit codes of ``python -m train score``."""

FAILURES_NAMED = 20
"""Files that could not be scored and are named at the end; all are in the table."""

INT8 = "int8"
EXPORT = "python -m train export --int8 --calibrate SHARDS --model MODEL --out BUNDLE"

WINDOW_SECONDS = CROP_SAMPLES / SAMPLE_RATE


def load(model: str | Path, device: str = "cpu", precision: str = "fp32") -> Scorer:
    """A scorer of a released student, "v7" (published), a run folder, a model file or an address.

    Files are ``.pt``, ``.safetensors`` and ``.onnx``; an address (``https://``, ``hf://``, what
    fsspec reads) is that of a bundle. Or a teacher: a name of ``teachers.yaml``, ``mean:a+b``, the
    folder of a trained head. Pruned models are called by their folder, too.

    ``precision`` is "fp32" (the published scores to 1e-4), "bf16" (within 0.01, faster where the
    device computes it itself), "fp16" (CUDA), "auto": bf16 where it is fast, or "int8", on a CPU,
    for the folder or address of a bundle that was exported with it. An ``.onnx`` file has its own.
    ``ValueError`` naming what is missing or damaged.
    """
    if precision == INT8:
        return _load_int8(str(model), device)
    if str(model) == "v7":
        return StudentScorer(load_v7(), "v7", sha256_of(v7_weights_path()), device, precision)
    if "://" in str(model):
        # The address may carry credentials, and names go into tables, cards and files of models.
        return _load_path(fetch(str(model)), redacted(str(model)), device, precision)
    return _load_path(path_of(model), str(model), device, precision)


def _load_int8(model: str, device: str) -> Scorer:
    """The int8 file of a bundle."""
    name = redacted(model)
    if device != "cpu":
        raise UserError(f"precision int8 is for CPUs; on {device} take auto")
    if "://" not in model and (model == "v7" or not path_of(model).is_dir()):
        raise UserError(f"precision int8: {name} is no bundle's folder: make one: {EXPORT}")
    path = fetch(model, ONNX_INT8) if "://" in model else path_of(model) / ONNX_INT8
    if not path.is_file():
        raise UserError(f"{path} is missing: int8 is calibrated on real clips: {EXPORT}")
    return _load_path(path, name, device, "fp32")


def _load_path(path: Path, name: str, device: str, precision: str) -> Scorer:
    if is_teacher(path):
        return TeacherScorer(load_teacher(path, device, precision))
    path = model_in(path)
    verify_model(path)
    if path.suffix == ".onnx":
        return OnnxScorer(path)
    student, parameters = read_model(path)
    return StudentScorer(student, name, sha256_of(path), device, precision, parameters)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train score``."""
    add, a_batch = parser.add_argument, WINDOWS_A_BATCH * WINDOW_SECONDS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("paths", nargs="+", help="files, folders, globs, .txt lists, - for a list on stdin")
    models = "small (default), tiny, v7, a run folder, a model file, an address, or a teacher"
    add("--model", default="small", help=models)
    table = ".csv, .jsonl or .parquet; what it holds already is not scored again"
    add("--out", type=path_here, required=True, help=table)
    padding = "behind clips under 7.68 s (default: what the model was trained to hear)"
    add("--padding", choices=get_args(Padding), help=padding)
    fast = "fast: the windows of long clips share their convolutions; close, not equal"
    add("--mode", choices=get_args(Mode), default="exact", help=fast)
    channels = get_args(Channels)
    add("--channels", choices=channels, default="mono", help="mono: the first channel")
    add("--curve", action="store_true", help="a row for every window, too")
    auto = "auto: bf16 where it is fast; int8: of a bundle exported with --int8"
    add("--precision", choices=(*PRECISIONS, INT8), default="fp32", help=auto)
    add("--device", default=device)
    add("--batch-seconds", type=float, default=a_batch, help="audio that is scored at a time")
    add("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train score``; returns the exit code (0 all, 1 some failed, 2 none scored)."""
    keep_freed_memory()
    if not args.batch_seconds > 0:
        raise UserError(f"--batch-seconds {args.batch_seconds}: must be positive")
    chosen = choose_files(args.paths)
    files = list(chosen.files)
    lost = chosen.lost()
    if not files and not lost:
        raise UserError(f"no audio file in {', '.join(map(str, args.paths))}")
    scorer = load(args.model, args.device, args.precision)
    made_by = scorer.weights_sha256, scorer.version, scorer.precision
    curve = "yes" if args.curve else "no"
    settings = Settings(*made_by, args.mode, args.padding or scorer.padding, args.channels, curve)
    table = open_table(args.out)
    try:
        errors = _leave_out(table, scorer, settings, lost)
        stamps = {path: stamp_of(path) for path in files}
        todo = [path for path in files if not table.is_done(path, settings, stamps[path])]
        failed = _score_into(table, scorer, settings, {path: stamps[path] for path in todo}, args)
    finally:
        gone = table.close()
        if gone:
            print(f"warning: {gone}", file=sys.stderr)
    print_left_out("folders", chosen.harmless())
    status = _report(len(files) - len(todo), len(todo) - len(failed), [*failed, *errors], args.out)
    return max(status, SOME_FAILED) if gone else status


def _leave_out(
    table: LineTable, scorer: Scorer, settings: Settings, lost: dict[Path, str]
) -> list[LeftOut]:
    """Put what cannot be scored in the table, too; returns what is wrong with each."""
    for path, reason in lost.items():
        score = replace(scorer.unscored(path), error=f"{path}: {reason}")
        table.append(rows_of(path, [score], settings, stamp_of(path)))
    return [LeftOut(str(path), reason) for path, reason in lost.items()]


def _score_into(
    table: LineTable,
    scorer: Scorer,
    settings: Settings,
    todo: dict[Path, Stamp],
    args: argparse.Namespace,
) -> list[LeftOut]:
    """Score files into a table; returns what went wrong with those that failed.

    A bar shows files and how many times real time is reached.
    """
    errors: list[LeftOut] = []
    scored_seconds = 0.0
    batch = max(1, round(args.batch_seconds / WINDOW_SECONDS))
    scores = scorer.score_files(todo, args.padding, batch, args.channels, args.mode)
    with progress_bar(total=len(todo), unit="file", desc="score") as bar:
        for path, group in itertools.groupby(scores, lambda score: score.path):
            of_file = list(group)
            assert path is not None  # these are scores of files
            table.append(rows_of(path, of_file, settings, todo[path]))
            wrong = [score.error for score in of_file if score.error][:1]
            errors += [LeftOut(str(path), why.removeprefix(f"{path}: ")) for why in wrong]
            scored_seconds += sum(score.seconds or 0.0 for score in of_file)
            bar.update()
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{scored_seconds / elapsed:.1f}x real time")
    return errors


def _report(before: int, scored: int, errors: Sequence[LeftOut], out: Path) -> int:
    """Say how it went; returns the exit code."""
    for error in errors[:FAILURES_NAMED]:
        print(printable(f"not scored: {error.path}: {error.reason}"), file=sys.stderr)
    if len(errors) > FAILURES_NAMED:
        print(f"and {len(errors) - FAILURES_NAMED} more: see {out}", file=sys.stderr)
    kinds = [LeftOut("", error.reason.removeprefix(UNREADABLE)) for error in errors]
    why = f" ({counts(kinds)})" if errors else ""
    print(f"{scored} scored, {before} scored before, {len(errors)} not{why}: {out}")
    if errors and not scored and not before:
        return NONE_SCORED
    return SOME_FAILED if errors else DONE
