"""Scores of speech clips: ``load("v7").score(wave, sample_rate)`` and ``python -m train score``.

Longer clips are scored in windows of 7.68 s, at most 1 s apart, spread evenly; the score is
the windows' mean (published code). Shorter clips get zeros at their end (published), or are
repeated (``short="repeat"``, better for small students).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
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
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from data_specs.teacher import MEAN, teacher_table
from train.files import load_checkpoint
from train.models.head_teacher import HEAD_JSON
from train.models.precision import PRECISIONS
from train.models.student import Student, load_v7, read_student, student_of, v7_weights_path
from train.models.teacher import load_teacher
from train.models.tensors import read_about
from train.pruning import storage
from train.pruning.storage import SPARSE_FILE, is_pruned, load_student, parameters_left
from train.scoring.files import AUDIO_ENDINGS, choose_files, find_files
from train.scoring.int8 import EXPORT, INT8_FILE, read_int8
from train.scoring.result import Score, Window
from train.scoring.scorer import WINDOWS_A_BATCH, Channels, Scorer, TeacherScorer, as_wave
from train.scoring.table import Settings, Stamp, Table, open_table, rows_of, stamp_of
from train.scoring.windows import (
    MAX_HOP_SAMPLES,
    MIN_SAMPLES,
    Mode,
    Short,
    window_count,
    window_starts,
    windows,
)

__all__ = [
    "AUDIO_ENDINGS",
    "MAX_HOP_SAMPLES",
    "MIN_SAMPLES",
    "WINDOWS_A_BATCH",
    "Channels",
    "Mode",
    "Score",
    "Scorer",
    "Short",
    "TeacherScorer",
    "Window",
    "as_wave",
    "find_files",
    "load",
    "window_count",
    "window_starts",
    "windows",
]

DONE, SOME_FAILED, NONE_SCORED = 0, 1, 2
"""Exit codes of ``python -m train score``."""

FAILURES_TOLD = 20
"""Files that could not be scored and are named at the end; all are in the table."""

INT8 = "int8"

WINDOW_SECONDS = CROP_SAMPLES / SAMPLE_RATE


def load(model: str | Path, device: str = "cpu", precision: str = "fp32") -> Scorer:
    """A scorer of "v7" (the published weights), a run folder, a model file, or an address.

    Files are ``.pt``, ``.safetensors`` and ``.onnx``; an address (``https://``, ``hf://``, what
    fsspec reads) is that of a bundle. Or a teacher: a name of ``teachers.yaml``, ``mean:a+b``, the
    folder of a trained head. Models that were pruned or shrunk are called by their folder, too.

    ``precision`` is "fp32" (the published scores to 1e-4), "bf16" (within 0.01, faster where the
    device computes it itself), "fp16" (CUDA), "auto": bf16 where it is fast, or "int8", on a CPU,
    for the folder or address of a bundle that was exported with it. An ``.onnx`` file has its own.
    ``ValueError`` naming what is missing or damaged.
    """
    if precision == INT8:
        return _load_int8(str(model), device)
    if str(model) == "v7":
        return Scorer(load_v7(), "v7", sha256_of(v7_weights_path()), device, precision)
    if "://" in str(model):
        # The address may carry credentials, and names go into tables, cards and files of models.
        return _load_path(_fetched(str(model)), redacted(str(model)), device, precision)
    return _load_path(Path(model), str(model), device, precision)


def _load_int8(model: str, device: str) -> Scorer:
    """The student of a bundle with its int8 convolutions; the hash is that of their file."""
    folder = _fetched(model, int8=True) if "://" in model else Path(model)
    if device != "cpu":
        raise UserError(f"precision int8 is for CPUs; on {device} take auto")
    name = redacted(model)
    if model == "v7" or not folder.is_dir():
        raise UserError(f"precision int8: {name} is no bundle's folder: make one: {EXPORT}")
    scorer = _load_path(folder, name, device, "fp32")
    student = student_in(scorer)
    _hold_to_checksums(folder / INT8_FILE)
    int8 = read_int8(folder, student, sha256_of(_model_in(folder)))
    sha256 = sha256_of(folder / INT8_FILE)
    return Scorer(student, name, sha256, device, "auto", int8, scorer.parameters)


def _fetched(address: str, int8: bool = False) -> Path:
    from train.scoring.bundle import fetch  # only who gives an address needs it

    return fetch(address, (INT8_FILE,) if int8 else ())


def _load_path(path: Path, name: str, device: str, precision: str) -> Scorer:
    if name in teacher_table().teachers or name.startswith(MEAN):
        return TeacherScorer(load_teacher(name, device, precision))
    if (path / HEAD_JSON).is_file() or _is_pruned_teacher(path):
        return TeacherScorer(load_teacher(path, device, precision))
    if path.is_dir():
        path = _model_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model; give v7, a run folder, a model file or a teacher")
    _hold_to_checksums(path)
    if path.suffix == ".onnx":
        from train.scoring.onnx_scorer import (
            OnnxScorer,  # only who gives such a file needs onnxruntime
        )

        return OnnxScorer(path)
    student, parameters = _student_in(path)
    return Scorer(student, name, sha256_of(path), device, precision, parameters=parameters)


def student_in(scorer: Scorer) -> Student:
    """The student that scores, to go on with; ``ValueError`` for a scorer that is none."""
    network = getattr(scorer, "network", None)
    if not isinstance(network, Student):
        raise UserError(f"{scorer.name}: is not a student: give v7, or a run or model of one")
    return network


def _is_pruned_teacher(folder: Path) -> bool:
    return is_pruned(folder) and storage.read_about(folder).get("kind") == "teacher"


def _model_in(folder: Path) -> Path:
    for name in (SPARSE_FILE, "model.safetensors", "best.pt"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: holds no model.safetensors or best.pt: train it first")


def _hold_to_checksums(path: Path) -> None:
    """A bundle's file is what the bundle's checksums say; other files have none beside them."""
    if (path.parent / "checksums.json").is_file():
        from train.scoring.bundle import verify_model  # only who has a bundle needs it

        verify_model(path)


def _student_in(path: Path) -> tuple[Student, int | None]:
    """The student in a model file; of a pruned one also how many parameters are left."""
    if path.name == SPARSE_FILE:
        student, _ = load_student(path.parent)
        return student, parameters_left(path.parent, student)
    if path.suffix == ".safetensors":
        return read_student(path, read_about(path.with_suffix(".json"))), None
    content = load_checkpoint(path)
    weights = content.get("weights")
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds no model; give the run's best.pt or its folder")
    return student_of(path, content.get("student_config"), weights), None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train score``."""
    parser.add_argument(
        "paths", nargs="+", help="files, folders, globs, .txt lists, - for a list on standard input"
    )
    parser.add_argument(
        "--model", default="v7", help="v7, a run folder, a model file, an address, or a teacher"
    )
    parser.add_argument(
        "--out",
        type=path_here,
        required=True,
        help=".csv, .jsonl or .parquet; scored files are skipped",
    )
    parser.add_argument("--short", choices=get_args(Short), default="zero")
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="exact",
        help="fast: the windows of long clips share their convolutions; close, not equal",
    )
    parser.add_argument(
        "--channels", choices=get_args(Channels), default="mono", help="mono: the first channel"
    )
    parser.add_argument("--curve", action="store_true", help="a row for every window, too")
    parser.add_argument(
        "--precision",
        choices=(*PRECISIONS, INT8),
        default="fp32",
        help="auto: bf16 where it is fast; int8: of a bundle exported with --int8",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=WINDOWS_A_BATCH * WINDOW_SECONDS,
        help="audio that is scored at a time",
    )
    parser.add_argument("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train score``; returns the exit code (0 all, 1 some failed, 2 none scored)."""
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if not args.batch_seconds > 0:
        raise UserError(f"--batch-seconds {args.batch_seconds}: must be positive")
    chosen = choose_files(args.paths)
    files = list(chosen.files)
    lost = chosen.lost()
    if not files and not lost:
        raise UserError(f"no audio file in {', '.join(map(str, args.paths))}")
    scorer = load(args.model, args.device, args.precision)
    settings = _settings(scorer, args)
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
    status = _tell(len(files) - len(todo), len(todo) - len(failed), [*failed, *errors], args.out)
    return max(status, SOME_FAILED) if gone else status


def _settings(scorer: Scorer, args: argparse.Namespace) -> Settings:
    return Settings(
        scorer.weights_sha256,
        scorer.version,
        scorer.precision,
        args.mode,
        args.short,
        args.channels,
        "yes" if args.curve else "no",
    )


def _leave_out(
    table: Table, scorer: Scorer, settings: Settings, lost: dict[Path, str]
) -> list[LeftOut]:
    """Put what cannot be scored in the table, too; returns what is wrong with each."""
    for path, reason in lost.items():
        score = replace(scorer.unscored(path), error=f"{path}: {reason}")
        table.append(rows_of(path, [score], settings, stamp_of(path)))
    return [LeftOut(str(path), reason) for path, reason in lost.items()]


def _score_into(
    table: Table,
    scorer: Scorer,
    settings: Settings,
    todo: dict[Path, Stamp],
    args: argparse.Namespace,
) -> list[LeftOut]:
    """Score files into a table; returns what went wrong with those that failed."""
    errors: list[LeftOut] = []
    batch = max(1, round(args.batch_seconds / WINDOW_SECONDS))
    scores = scorer.score_files(todo, args.short, batch, args.channels, args.mode)
    for path, of_file in _with_progress(scores, len(todo)):
        table.append(rows_of(path, of_file, settings, todo[path]))
        wrong = [score.error for score in of_file if score.error][:1]
        errors += [LeftOut(str(path), why.removeprefix(f"{path}: ")) for why in wrong]
    return errors


def _with_progress(scores: Iterator[Score], files: int) -> Iterator[tuple[Path, Sequence[Score]]]:
    """The scores file by file; a bar shows files and how many times real time is reached."""
    heard_seconds = 0.0
    with progress_bar(total=files, unit="file", desc="score") as bar:
        for path, group in itertools.groupby(scores, lambda score: score.path):
            of_file = list(group)
            assert path is not None  # these are scores of files
            yield path, of_file
            heard_seconds += sum(score.seconds or 0.0 for score in of_file)
            bar.update()
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{heard_seconds / elapsed:.1f}x real time")


def _tell(before: int, scored: int, errors: Sequence[LeftOut], out: Path) -> int:
    """Say how it went; returns the exit code."""
    for error in errors[:FAILURES_TOLD]:
        print(printable(f"not scored: {error.path}: {error.reason}"), file=sys.stderr)
    if len(errors) > FAILURES_TOLD:
        print(f"and {len(errors) - FAILURES_TOLD} more: see {out}", file=sys.stderr)
    kinds = [LeftOut("", error.reason.removeprefix(UNREADABLE)) for error in errors]
    why = f" ({counts(kinds)})" if errors else ""
    print(f"{scored} scored, {before} scored before, {len(errors)} not{why}: {out}")
    if errors and not scored and not before:
        return NONE_SCORED
    return SOME_FAILED if errors else DONE
